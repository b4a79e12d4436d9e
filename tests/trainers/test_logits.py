"""Whole logits are computed only for code that reads them; losses do not change."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import EvalPrediction, TrainerCallback

from tests.support.covering import every_value
from tests.support.logits import LogitRows
from tests.support.models import VOCABULARY, tiny_model, tiny_rows
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    prompts,
    sft_trainer,
    step_logs,
    zo_trainer,
)
from zo2trl import ZOConfig, ZOTrainer
from zo2trl.engine import deferred
from zo2trl.trainers import evaluation, mixin

CHUNK, LENGTH = 4, 12
PLACES_BY_NAME = {"device": EVERYTHING_ON_DEVICE, "cpu": STREAMED_FROM_CPU, "disk": STREAMED_FROM_DISK}
PLACES = pytest.mark.parametrize("place", PLACES_BY_NAME.values(), ids=list(PLACES_BY_NAME))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "CHUNK_ROWS", CHUNK)


@pytest.fixture
def whole_logits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes trainers compute losses from whole logits, as upstream's trainers do."""

    def switch() -> None:
        for module in (mixin, evaluation):
            monkeypatch.setattr(module, "deferring_logits", lambda wanted=True: nullcontext())

    return switch


def trained(folder: Path, name: str, *, extra: dict | None = None, **options: Any) -> tuple[list[dict], int]:
    """Return (logs of the steps, most rows of logits at once)."""
    held_out = {"eval_dataset": tiny_rows(name, 4, seed=1)} | (extra or {})
    with closing(zo_trainer(folder, tiny_model(name), tiny_rows(name, 8), extra=held_out, **options)) as trainer:
        with LogitRows(trainer.model) as seen:
            trainer.train()
        return trainer.state.log_history, seen.n_rows


@pytest.mark.parametrize(("name", "place"), every_value(["opt", "llama", "gemma2", "t5"], PLACES_BY_NAME))
def test_training_never_makes_whole_logits_and_loses_nothing_by_it(
    name: str, place: str, whole_logits: Any, tmp_path: Path
) -> None:
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= PLACES_BY_NAME[place]
    logs, n_rows = trained(tmp_path / "chunked", name, **options)
    whole_logits()
    expected, n_whole = trained(tmp_path / "whole", name, **options)
    assert n_rows == CHUNK < n_whole
    for key in ("zo/loss_plus", "zo/loss_minus", "eval_loss"):
        found = [entry[key] for entry in logs if key in entry]
        assert found == pytest.approx([entry[key] for entry in expected if key in entry], rel=1e-6)
        assert len(found) == 2


def test_metrics_are_computed_from_real_logits(whole_logits: Any, tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        assert isinstance(logits, np.ndarray)
        seen.append(logits)
        return {}

    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    logs, n_rows = trained(tmp_path / "chunked", "llama", extra={"compute_metrics": metrics}, **options)
    whole_logits()
    expected, _ = trained(tmp_path / "whole", "llama", extra={"compute_metrics": metrics}, **options)
    assert seen[0].shape == (4, LENGTH, VOCABULARY) and np.array_equal(*seen)
    assert logs[1]["eval_loss"] == expected[1]["eval_loss"], "whole logits are made once, and the loss from them"
    assert n_rows >= 2 * LENGTH


def test_predictions_are_real_logits(tmp_path: Path) -> None:
    rows, model = tiny_rows("opt", 4), tiny_model("opt")
    with torch.no_grad():
        expected = torch.cat([model(row["input_ids"][None]).logits for row in rows])
    with closing(zo_trainer(tmp_path, model, rows)) as trainer:
        np.testing.assert_allclose(trainer.predict(rows).predictions, expected.numpy(), rtol=1e-5, atol=1e-6)


class Keeper(ZOTrainer):
    """This trainer keeps what the model returned, for use after the step."""

    kept: Any = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
        loss, self.kept = super().compute_loss(model, inputs, return_outputs=True, **given)
        return (loss, self.kept) if return_outputs else loss


def test_a_callback_that_looks_at_kept_outputs_finds_the_logits_of_their_probe(tmp_path: Path) -> None:
    found: list[float] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            logits, labels = trainer.kept.logits, rows[0]["labels"]
            found.append(functional.cross_entropy(logits[0, :-1].float(), labels[1:]).item())

    rows = tiny_rows("opt", 1)
    config = ZOConfig(
        output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=2, logging_steps=1,
        per_device_train_batch_size=1, learning_rate=1e-3, save_strategy="no", **STREAMED_FROM_DISK,
    )  # fmt: skip
    with closing(Keeper(tiny_model("opt"), config, train_dataset=rows, callbacks=[Look()])) as trainer:
        trainer.train()
        assert found == pytest.approx([log["zo/loss_minus"] for log in step_logs(trainer)], rel=1e-6)


@pytest.mark.parametrize("option", ["label smoothing", "a loss of one's own"])
def test_losses_that_need_whole_logits_get_them(option: str, whole_logits: Any, tmp_path: Path) -> None:
    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return functional.cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())

    options = {"label_smoothing_factor": 0.1} if option == "label smoothing" else {}
    extra = {} if options else {"compute_loss_func": own}
    logs, n_rows = trained(tmp_path / "chunked", "opt", extra=extra, **options)
    whole_logits()
    assert logs[0]["loss"] == trained(tmp_path / "whole", "opt", extra=extra, **options)[0][0]["loss"]
    assert n_rows > CHUNK


def test_under_autocast_losses_are_those_of_whole_logits(whole_logits: Any, tmp_path: Path) -> None:
    options = {"bf16": True, "max_steps": 2, **STREAMED_FROM_CPU}
    logs, _ = trained(tmp_path / "chunked", "llama", **options)
    whole_logits()
    expected, _ = trained(tmp_path / "whole", "llama", **options)
    assert [log["zo/loss_plus"] for log in logs[:2]] == pytest.approx([log["zo/loss_plus"] for log in expected[:2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trls_own_head_is_left_to_its_work(dtype: torch.dtype, tmp_path: Path) -> None:
    """SFTTrainer reads the head's weights and never calls it; its per-token losses are fp32 all the same."""
    calls: list[Any] = []
    model = tiny_model("llama", dtype=dtype)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    losses: list[torch.Tensor] = []
    with closing(sft_trainer(tmp_path, model, max_steps=2)) as trainer:
        compute = trainer.compute_loss

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(compute(*args, **kwargs))
            return losses[-1]

        trainer.compute_loss = watched
        trainer.train()
    assert not calls and losses and all(loss.dtype == torch.float32 for loss in losses)


def test_sft_metrics_are_computed_from_real_logits(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append(np.asarray(prediction.predictions).shape)
        return {}

    extra = {"eval_dataset": prompts(4), "compute_metrics": metrics}
    with closing(sft_trainer(tmp_path, tiny_model("llama"), extra=extra)) as trainer:
        trainer.evaluate()
    assert shapes[0][0] == 4 and shapes[0][-1] == VOCABULARY


def test_a_closed_trainer_leaves_no_hook(tmp_path: Path) -> None:
    model = tiny_model("opt")
    with closing(zo_trainer(tmp_path, model, tiny_rows("opt", 4), max_steps=1)) as trainer:
        trainer.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
