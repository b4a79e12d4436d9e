"""The trainers on a real GPU: any budget gives the same run, evaluation included, and goes on after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import closing, differing, prompts, sft_trainer, step_logs, weights_of, zo_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ON_GPU: dict[str, Any] = {"use_cpu": False, "bf16": False}
PLACES: dict[str, dict[str, Any]] = {
    "auto": {},
    "from host memory": {"device_memory": "min", "cpu_memory": "4GB"},
    "from disk": {"device_memory": "min", "cpu_memory": "0"},
    "a tight budget": {"device_memory": "64MB", "cpu_memory": "4GB"},
}


@pytest.mark.parametrize("place", list(PLACES)[1:])
def test_any_budget_gives_the_losses_and_weights_of_all_memory(place: str, tmp_path: Path) -> None:
    found = []
    for name in ("auto", place):
        options = {**ON_GPU, **PLACES[name], "max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}
        rows, extra = tiny_rows("llama", 12), {"eval_dataset": tiny_rows("llama", 6, seed=1)}
        with closing(zo_trainer(tmp_path / name, tiny_model("llama"), rows, extra=extra, **options)) as trainer:
            trainer.train()
            losses = [(log["loss"], log["step"]) for log in step_logs(trainer)]
            evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
            found.append((losses, evaluations, weights_of(trainer.model)))
    (losses, evaluations, weights), (other_losses, other_evaluations, other_weights) = found
    assert losses == other_losses and evaluations == other_evaluations and len(evaluations) > 1
    assert differing(weights, other_weights) == []


def test_sft_stays_below_its_budget_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {**ON_GPU, "device_memory": "64MB", "cpu_memory": "4GB", "max_steps": 6}
    with closing(sft_trainer(tmp_path / "straight", tiny_model("opt"), prompts(16), **options)) as trainer:
        trainer.train()
        assert torch.cuda.max_memory_allocated() <= 64e6
        wanted = weights_of(trainer.model)
    with closing(sft_trainer(tmp_path / "stopped", tiny_model("opt"), prompts(16), **options)) as trainer:
        trainer.args.max_steps = 3
        trainer.train()
    with closing(sft_trainer(tmp_path / "stopped", tiny_model("opt"), prompts(16), **options)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert differing(wanted, weights_of(trainer.model)) == []
