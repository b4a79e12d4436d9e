"""Same bits, any tier: where weights live, how they are visited and when they are written changes no result.

Every run is compared with MeZO's algorithm on an ordinary model in memory, so that all of them agree with each other
and with the truth.
"""

import warnings
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, default_data_collator

from tests.support.covering import every_value
from tests.support.models import NAMES, tiny_model, tiny_rows
from tests.support.plain import PlainStep, PlainZO
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    budgets_for_all_tiers,
    closing,
    differing,
    step_logs,
    tiers_of,
    weights_of,
    zo_trainer,
)
from zo2trl import ZOTrainer

N_STEPS, LEARNING_RATE, SEED = 3, 1e-3, 42
Weights = dict[str, torch.Tensor]

PLACES: dict[str, dict[str, Any]] = {
    "on-device": EVERYTHING_ON_DEVICE,
    "cpu-block": {**STREAMED_FROM_CPU, "granularity": "block"},
    "cpu-leaf": {**STREAMED_FROM_CPU, "granularity": "leaf"},
    "disk-block": {**STREAMED_FROM_DISK, "granularity": "block"},
    "disk-leaf": {**STREAMED_FROM_DISK, "granularity": "leaf"},
    "mixed-block": {"granularity": "block"},
    "mixed-leaf": {"granularity": "leaf"},
}


def fixed_batches(name: str) -> list[dict[str, torch.Tensor]]:
    rows = tiny_rows(name, 2 * N_STEPS)
    return [default_data_collator(rows[2 * i : 2 * i + 2]) for i in range(N_STEPS)]


class InOrder:
    """A collator that gives out the same batches in the same order, whatever the sampler says."""

    def __init__(self, name: str) -> None:
        self._batches, self._calls = fixed_batches(name), 0

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        self._calls += 1
        return dict(self._batches[max(self._calls - 2, 0) % N_STEPS])  # the first call only looks for labels


def make(name: str, folder: Path, **options: Any) -> ZOTrainer:
    options = {"max_steps": N_STEPS, "learning_rate": LEARNING_RATE, "seed": SEED, **options}
    rows = tiny_rows(name, 2 * N_STEPS)
    extra = {"data_collator": InOrder(name), "eval_dataset": tiny_rows(name, 8, seed=1)}
    return zo_trainer(folder, tiny_model(name), rows, extra=extra, **options)


def options_of(name: str, place: str, folder: Path) -> dict[str, Any]:
    if place.startswith("mixed"):
        return budgets_for_all_tiers(partial(make, name, folder), PLACES[place]["granularity"])
    return PLACES[place]


@cache
def plain_run(name: str) -> tuple[list[PlainStep], Weights]:
    """Two plain perturbed forwards a step, in memory."""
    model = tiny_model(name)
    algorithm = PlainZO(model, seed=SEED)
    steps = [
        algorithm.step([lambda b=batch: model(**b).loss], step=i, learning_rate=LEARNING_RATE)
        for i, batch in enumerate(fixed_batches(name))
    ]
    return steps, weights_of(model)


@pytest.mark.parametrize(("name", "place"), every_value(NAMES, PLACES))
def test_losses_and_weights_equal_plain_perturbed_forwards(name: str, place: str, tmp_path: Path) -> None:
    steps, weights = plain_run(name)
    with closing(make(name, tmp_path, **options_of(name, place, tmp_path))) as trainer:
        trainer.train()
        logs, found, tiers = step_logs(trainer), weights_of(trainer.model), tiers_of(trainer)
        visits = trainer.engine.store.layout.leaf_blocks
    assert [log["zo/loss_plus"] for log in logs] == [step.loss_plus for step in steps]
    assert [log["zo/loss_minus"] for log in logs] == [step.loss_minus for step in steps]
    assert [log["zo/projected_grad"] for log in logs] == [step.projected_grad for step in steps]
    assert differing(found, weights) == []
    # The comparison means nothing if the blocks were not where the test says they were.
    wanted = {"on": {"gpu"}, "cpu": {"cpu"}, "disk": {"disk"}, "mixed": {"gpu", "cpu", "disk"}}
    assert tiers == wanted[place.split("-")[0]]
    assert bool(visits) == place.endswith("leaf")


@pytest.mark.parametrize(("name", "every"), every_value(["opt", "llama-tied", "mixtral", "t5"], [1, 2, 100]))
def test_the_write_back_interval_changes_nothing(name: str, every: int, tmp_path: Path) -> None:
    steps, weights = plain_run(name)
    with closing(make(name, tmp_path, **PLACES["disk-leaf"], write_back_every=every)) as trainer:
        trainer.train()
        assert [log["zo/loss_plus"] for log in step_logs(trainer)] == [step.loss_plus for step in steps]
        assert differing(weights_of(trainer.model), weights) == []


SETTINGS: dict[str, dict[str, Any]] = {
    "gaussian": {"direction": "gaussian"},
    "mezo": {"direction": "mezo"},
    "directions-decay-schedule": {"num_directions": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "bf16-stochastic": {},
    "bf16-nearest": {"rounding": "nearest", "learning_rate": 0.1},
    "fp16": {},
    "mostly-frozen": {},
}


@cache
def run_with(name: str, place: str, setting: str) -> tuple[list[float], Weights]:
    """Losses and final weights of a run with other than the plain algorithm's settings."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    model = tiny_model(name, dtype=dtypes.get(setting.split("-")[0], torch.float32))
    if setting == "mostly-frozen":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("bias") or "norm" in parameter_name.lower())
    with TemporaryDirectory() as folder:

        def make_trainer(**options: Any) -> ZOTrainer:
            return zo_trainer(Path(folder) / "run", model, tiny_rows(name, 12), **SETTINGS[setting], **options)

        budgets = PLACES[place]
        if place.startswith("mixed"):
            budgets = budgets_for_all_tiers(make_trainer, budgets["granularity"])
        with closing(make_trainer(**budgets)) as trainer:
            trainer.train()
            return [log["zo/loss_minus"] for log in step_logs(trainer)], weights_of(trainer.model)


AT_NIGHT = pytest.param("llama-tied", marks=pytest.mark.nightly)


@pytest.mark.parametrize("name", ["opt", "t5", AT_NIGHT])
@pytest.mark.parametrize(("setting", "place"), every_value(SETTINGS, ["disk-leaf", "mixed-block"]))
def test_other_settings_give_the_same_bits_in_every_place(name: str, setting: str, place: str) -> None:
    losses, weights = run_with(name, "on-device", setting)
    found_losses, found = run_with(name, place, setting)
    assert found_losses == losses
    assert differing(found, weights) == []
    original = tiny_model(name).to(next(iter(weights.values())).dtype)
    assert differing(weights_of(original), weights) != []


@pytest.mark.parametrize(("name", "place"), every_value(NAMES, ["on-device", "disk-leaf", "mixed-block"]))
def test_evaluation_gives_the_same_bits_batched_and_one_by_one(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(make(name, tmp_path, **options_of(name, place, tmp_path))) as trainer:
        trainer.train()
        trainer.data_collator = default_data_collator
        together, predicted = trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset)
        monkeypatch.setattr("zo2trl.trainers.evaluation.MAX_BATCHES_PER_TRAVERSAL", 1)
        one_by_one, alone = trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset)
        model = trainer.model
        trainer.engine.shutdown()
        plain = plain_evaluation(model, trainer.eval_dataset)
    assert together == one_by_one == plain
    assert torch.equal(first(predicted.predictions), first(alone.predictions))


def first(predictions: Any) -> torch.Tensor:
    return torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)


def plain_evaluation(model: nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """The mean over rows of each batch's mean loss, as the Trainer reports it; the model is in memory again."""
    batches = [default_data_collator(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    with torch.no_grad():
        losses = [model.eval()(**batch).loss.repeat(2) for batch in batches]
    return np.mean(torch.cat(losses).numpy()).item()


@pytest.mark.parametrize(("name", "place"), every_value(NAMES, ["disk-leaf", "mixed-block"]))
def test_a_saved_model_reloads_with_plain_transformers_to_the_same_bits(name: str, place: str, tmp_path: Path) -> None:
    with closing(make(name, tmp_path / "run", **options_of(name, place, tmp_path / "run"))) as trainer:
        trainer.train()
        trainer.data_collator = default_data_collator
        before = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(tmp_path / "saved"))
        rows, model_class = trainer.eval_dataset, type(trainer.model)
    reloaded = quietly(model_class.from_pretrained, str(tmp_path / "saved"))
    assert differing(weights_of(reloaded), plain_run(name)[1]) == []
    assert plain_evaluation(reloaded, rows) == before


@pytest.mark.parametrize(
    "name", [*NAMES[::2], *(pytest.param(name, marks=pytest.mark.nightly) for name in NAMES[1::2])]
)
def test_training_goes_on_from_a_saved_model_as_from_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "start")
    by_path = str(tmp_path / "start")
    rows, extra = tiny_rows(name, 2 * N_STEPS), {"data_collator": InOrder(name)}
    options = {**PLACES["disk-leaf"], "max_steps": N_STEPS, "learning_rate": LEARNING_RATE, "seed": SEED}
    with closing(zo_trainer(tmp_path / "run", by_path, rows, extra=extra, **options)) as trainer:
        assert type(trainer.model) is type(model)
        trainer.train()
        assert [log["zo/loss_plus"] for log in step_logs(trainer)] == [s.loss_plus for s in plain_run(name)[0]]
        assert differing(weights_of(trainer.model), plain_run(name)[1]) == []


@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral", "roberta-mlm", "t5"])
def test_the_checkpoint_that_was_trained_on_is_never_changed(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "start")
    bytes_before = {path.name: path.read_bytes() for path in (tmp_path / "start").iterdir()}
    rows = tiny_rows(name, 4)
    with closing(zo_trainer(tmp_path / "run", str(tmp_path / "start"), rows, learning_rate=1.0)) as trainer:
        trainer.train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "start").iterdir()} == bytes_before


def quietly(call: Any, *args: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args).eval()
