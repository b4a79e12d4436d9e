"""DPO, reward models and generated objectives on a real GPU: where weights live shows in no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.preferences import dpo_trainer, lora, pairs, reward_trainer
from tests.support.runs import closing, differing, prompts, sft_trainer, step_logs, weights_of
from tests.support.tokenizer import words
from tests.support.trainings import small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLACES: dict[str, dict[str, Any]] = {
    "auto": {},
    "from host memory": {"device_memory": "min", "cpu_memory": "4GB"},
    "from disk": {"device_memory": "min", "cpu_memory": "0"},
}


def answered() -> Any:
    return prompts(8).add_column("answers", [" ".join(words())] * 8)


@pytest.mark.parametrize("kind", ["dpo", "dpo with adapters", "dpo with a reference", "reward", "generated"])
def test_every_place_gives_the_same_run(kind: str, tmp_path: Path) -> None:
    found = []
    for name, place in PLACES.items():
        options: dict[str, Any] = {"use_cpu": False, "bf16": False, "max_steps": 4, **place}
        extra: dict[str, Any] = {"eval_dataset": pairs(4, start=20)}
        if kind == "generated":
            options |= {"objective": "squad_f1", "objective_max_new_tokens": 4, "zo_eps": 0.05}
            trainer = sft_trainer(tmp_path / name, small_model(), answered(), **options)
        elif kind == "reward":
            trainer = reward_trainer(tmp_path / name, extra=extra, **options)
        else:
            extra |= {"peft_config": lora()} if "adapters" in kind else {}
            extra |= {"ref_model": small_model(seed=3)} if "reference" in kind else {}
            trainer = dpo_trainer(tmp_path / name, extra=extra, **options)
        with closing(trainer):
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"] if kind != "generated" else 0.0
            logs = [(log["zo/loss_plus"], log["zo/loss_minus"]) for log in step_logs(trainer)]
            found.append((logs, evaluated, weights_of(trainer.model)))
    assert found[0][:2] == found[1][:2] == found[2][:2]
    assert differing(found[0][2], found[1][2]) == differing(found[0][2], found[2][2]) == []
