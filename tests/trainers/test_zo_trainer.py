"""ZOTrainer handles schedules, decay, clipping, callbacks and several runs as a Trainer does, without gradients."""

import gc
import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, default_data_collator, get_scheduler

from tests.support.models import tiny_batch, tiny_model, tiny_rows
from tests.support.plain import PlainZO
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_DISK,
    closing,
    differing,
    step_logs,
    weights_of,
    zo_trainer,
)
from zo2trl import ZOConfig, ZOTrainer
from zo2trl.trainers import stepping
from zo2trl.zo.noise import make_direction
from zo2trl.zo.tiles import TILE, TileMap

PLACES = pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK], ids=["device", "disk"])


def one_batch(name: str = "opt") -> dict[str, Any]:
    """Make rows, collator and model inputs of a run whose every batch is the same."""
    return {"rows": tiny_rows(name, 2), "extra": {"data_collator": lambda _: tiny_batch(name)}}


# -- learning rate, decay, clipping


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_learning_rate_schedules_reach_the_journal(schedule: str, warmup_steps: int, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup_steps, "max_steps": 6, "learning_rate": 1e-2}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 12), **options)) as trainer:
        trainer.train()
        rates = [record.learning_rate for record in trainer.engine.store.journal.records]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup_steps, num_training_steps=6)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-12, abs=0.0)


@PLACES
def test_the_schedule_and_the_decay_move_the_weights_as_sgd_would(place: dict, tmp_path: Path) -> None:
    options = {"weight_decay": 0.1, "lr_scheduler_type": "linear", "learning_rate": 1e-2, "max_steps": 4, **place}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), **options)) as trainer:
        decaying = Trainer.get_decay_parameter_names(trainer, trainer.model)
        trainer.train()
        found = weights_of(trainer.model)
    model, batch = tiny_model("opt"), tiny_batch("opt")
    algorithm = PlainZO(model)
    for step, rate in enumerate([1e-2, 0.75e-2, 0.5e-2, 0.25e-2]):
        algorithm.step([lambda: model(**batch).loss], step=step, learning_rate=rate, decay=(0.1, decaying))
    assert differing(found, weights_of(model)) == []
    assert any("embed_tokens" in name for name in decaying)
    assert not any("norm" in name or name.endswith("bias") for name in decaying)


def test_without_a_learning_rate_no_bit_of_the_weights_changes(tmp_path: Path) -> None:
    with closing(
        zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 4), learning_rate=0.0, **STREAMED_FROM_DISK)
    ) as trainer:
        trainer.train()
        assert differing(weights_of(trainer.model), weights_of(tiny_model("opt"))) == []


def test_max_grad_norm_clips_the_projected_gradient(tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), max_grad_norm=0.125)) as trainer:
        trainer.train()
        logs, records = step_logs(trainer), trainer.engine.store.journal.records
    assert all(abs(log["zo/projected_grad"]) > 0.125 for log in logs)  # the logs show what was measured
    assert [abs(record.coefficients[0]) for record in records] == pytest.approx([0.125] * len(records))
    assert [np.sign(r.coefficients[0]) for r in records] == [np.sign(log["zo/projected_grad"]) for log in logs]


def test_by_default_nothing_is_clipped(tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch())) as trainer:
        trainer.train()
        records = trainer.engine.store.journal.records
        assert [r.coefficients[0] for r in records] == [log["zo/projected_grad"] for log in step_logs(trainer)]


@PLACES
def test_several_directions_are_averaged(place: dict, tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), num_directions=3, **place)) as trainer:
        trainer.train()
        records, logs = trainer.engine.store.journal.records, step_logs(trainer)
    assert [len(record.coefficients) for record in records] == [3] * len(records)
    assert len(set(records[0].coefficients)) == 3
    means = [sum(record.coefficients) / 3 for record in records]
    assert [log["zo/projected_grad"] for log in logs] == pytest.approx(means, rel=1e-12)


# -- the loop around the steps


class Witness(TrainerCallback):
    """This callback records events, and global random states before and after each step."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.states: dict[str, list[tuple]] = {"before": [], "after": []}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("train")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("step")
        self.states["before"].append(_random_states())

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("substep")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.states["after"].append(_random_states())
        self.events.append("step end")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("end")


def _random_states() -> tuple:
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()


@pytest.mark.parametrize("direction", ["rademacher", "gaussian", "mezo"])
def test_a_step_leaves_the_global_random_state_alone(direction: str, tmp_path: Path) -> None:
    witness = Witness()
    extra = {"callbacks": [witness]}
    options = {"direction": direction, "device_memory": "min", "cpu_memory": "0"}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 8), extra=extra, **options)) as trainer:
        trainer.train()
    assert witness.states["before"] == witness.states["after"]


def test_callbacks_see_every_step_and_substep(tmp_path: Path) -> None:
    witness = Witness()
    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    rows, extra = tiny_rows("opt", 8), {"callbacks": [witness]}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), rows, extra=extra, **options)) as trainer:
        output = trainer.train()
    assert witness.events == ["train", *["step", "substep", "step end"] * 2, "end"]
    assert output.global_step == 2


def test_a_callback_can_stop_the_run(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    extra = {"callbacks": [Stop()]}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 40), extra=extra, max_steps=20)) as trainer:
        assert trainer.train().global_step == 2
        assert [record.step for record in trainer.engine.store.journal.records] == [0, 1]


def test_epochs_end_where_the_data_ends(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 10), **options)) as trainer:
        output = trainer.train()  # 5 batches an epoch: steps of 2, 2 and 1 micro-batches
    assert output.global_step == 6
    assert trainer.state.epoch == 2.0


def test_nothing_is_reported_when_told_so(tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 4), report_to="none")) as trainer:
        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert not [name for name in names if name.endswith(("TensorBoardCallback", "WandbCallback", "MLflowCallback"))]


def test_arguments_are_accepted_by_position_as_a_trainer_takes_them(tmp_path: Path) -> None:
    assert list(inspect.signature(Trainer.__init__).parameters)[1:6] == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset",
    ]  # fmt: skip
    config = ZOConfig(output_dir=str(tmp_path), report_to="none", max_steps=1, use_cpu=True)
    rows = tiny_rows("opt", 4)
    with closing(ZOTrainer(tiny_model("opt"), config, default_data_collator, rows, rows)) as trainer:
        assert trainer.train().global_step == 1
        assert "eval_loss" in trainer.evaluate()


def test_a_model_can_be_made_by_model_init(tmp_path: Path) -> None:
    extra = {"model_init": lambda: tiny_model("opt")}
    with closing(zo_trainer(tmp_path, None, tiny_rows("opt", 6), extra=extra)) as trainer:
        trainer.train()
        made, again = step_logs(trainer), zo_trainer(tmp_path / "2", tiny_model("opt"), tiny_rows("opt", 6))
    with closing(again):
        again.train()
        assert [log["zo/loss_plus"] for log in made] == [log["zo/loss_plus"] for log in step_logs(again)]


@pytest.mark.parametrize(
    "options", [{"dataloader_num_workers": 2}, {"auto_find_batch_size": True}, {"use_cache": True}]
)
def test_how_batches_arrive_changes_nothing(options: dict, tmp_path: Path) -> None:
    runs = []
    for i, chosen in enumerate(({}, options)):
        rows, place = tiny_rows("opt", 8), {**STREAMED_FROM_DISK, **chosen}
        with closing(zo_trainer(tmp_path / str(i), tiny_model("opt"), rows, **place)) as trainer:
            trainer.train()
            runs.append([log["zo/projected_grad"] for log in step_logs(trainer)])
    assert runs[0] == runs[1]


class Parabola(torch.nn.Module):
    """This loss is |w - target|^2 / 2 on any module, so the slope along z is z . (w - target) at any eps."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 300))

    def forward(self, target: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.w.double() - target[0]).square().sum() / 2}


@pytest.mark.parametrize("zo_eps", [1e-3, 0.5])
def test_on_a_parabola_the_projected_gradient_is_the_exact_slope(zo_eps: float, tmp_path: Path) -> None:
    rows = [{"target": torch.zeros(300), "labels": torch.zeros(())}] * 8
    with closing(zo_trainer(tmp_path, Parabola(), rows, zo_eps=zo_eps)) as trainer:
        trainer.train()
        records = list(trainer.engine.store.journal.records)
        final = trainer.model.w.detach().clone()
    w = Parabola().w.detach()
    for record in records:
        z = torch.empty(TILE)
        make_direction("rademacher").fill(z, record.seed, TileMap.for_tensors([(0, 300)]))
        slope = (z[:300].double() @ w.double()).item()
        assert record.coefficients[0] == pytest.approx(slope, abs=1e-3)
        w = w - z[:300] * record.coefficients[0] * 1e-3
    assert torch.equal(w, final)


# -- several runs


@PLACES
def test_training_twice_goes_on_with_new_directions(place: dict, tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), **place)) as trainer:
        trainer.train()
        trainer.train()
        records, found = list(trainer.engine.store.journal.records), weights_of(trainer.model)
    assert [record.step for record in records] == list(range(6))
    assert len({record.seed for record in records}) == 6
    model, batch = tiny_model("opt"), tiny_batch("opt")
    algorithm = PlainZO(model)
    for step in range(6):
        algorithm.step([lambda: model(**batch).loss], step=step, learning_rate=1e-3)
    assert differing(found, weights_of(model)) == []


@PLACES
def test_a_notebook_cell_can_be_run_again(place: dict, tmp_path: Path) -> None:
    losses, trainer = [], None
    for _ in range(3):  # no trainer is closed; the old one exists while the new one is made
        trainer = zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 6), **place)
        trainer.train()
        losses.append([log["zo/loss_plus"] for log in step_logs(trainer)])
    assert losses[0] == losses[1] == losses[2]
    assert trainer is not None
    trainer.close()


def test_a_model_goes_from_one_trainer_to_the_next(tmp_path: Path) -> None:
    model = tiny_model("opt")
    for run in range(2):
        with closing(zo_trainer(tmp_path / str(run), model, **one_batch(), seed=run, **STREAMED_FROM_DISK)) as trainer:
            trainer.train()
    plain, batch = tiny_model("opt"), tiny_batch("opt")
    for run in range(2):
        algorithm = PlainZO(plain, seed=run)
        for step in range(3):
            algorithm.step([lambda: plain(**batch).loss], step=step, learning_rate=1e-3)
    assert differing(weights_of(model), weights_of(plain)) == []


def test_a_model_outlives_its_trainer(tmp_path: Path) -> None:
    model = tiny_model("opt")
    trainer = zo_trainer(tmp_path, model, **one_batch(), **STREAMED_FROM_DISK)
    trainer.train()
    trained = trainer.evaluate(tiny_rows("opt", 2))["eval_loss"]
    del trainer
    gc.collect()
    with torch.no_grad():
        assert model.eval()(**tiny_batch("opt")).loss.item() == pytest.approx(trained, abs=1e-6)
    assert not any("forward" in module.__dict__ for module in model.modules())  # and no hook is left on it


# -- what is trained


@PLACES
def test_a_frozen_base_stays_as_it_was(place: dict, tmp_path: Path) -> None:
    model = tiny_model("opt")
    before = weights_of(model)
    trainable = [name for name, _ in model.named_parameters() if "fc1.bias" in name or "final_layer_norm" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    with closing(zo_trainer(tmp_path, model, **one_batch(), **place)) as trainer:
        trainer.train()
        found, logs = weights_of(trainer.model), step_logs(trainer)
    assert sorted(differing(found, before)) == sorted(trainable)
    assert all(log["zo/bytes_disk_written"] == 0 for log in logs)
    plain, batch = tiny_model("opt"), tiny_batch("opt")
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trainable)
    algorithm = PlainZO(plain)
    for step in range(3):
        algorithm.step([lambda: plain(**batch).loss], step=step, learning_rate=1e-3)
    assert differing(found, weights_of(plain)) == []


@pytest.mark.parametrize("name", ["opt", "llama-tied", "t5", "roberta-mlm"])
def test_tied_weights_stay_one_parameter(name: str, tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model(name), tiny_rows(name, 6), **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
        model = trainer.model
        head = model.get_output_embeddings().weight
        assert head is model.get_input_embeddings().weight
        assert not torch.equal(head, tiny_model(name).get_output_embeddings().weight)


def test_on_a_cpu_every_pass_gives_back_the_pages_that_it_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else freed memory stays in the process: 480 MB in twenty steps of a 170 M-parameter model."""
    given_back: list[int] = []
    monkeypatch.setattr(stepping, "return_free_pages", lambda: given_back.append(trainer.state.global_step))
    with closing(zo_trainer(tmp_path, tiny_model("opt"), **one_batch(), max_steps=2, num_directions=2)) as trainer:
        trainer.train()
    assert given_back == [0] * 4 + [1] * 4
