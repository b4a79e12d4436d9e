"""A resumed training does not silently continue with other choices, with other weights, or from another run."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.support.crashes import Crash, Outcome, abandoning, in_peace, resumed, run_until_crash, straight
from tests.support.models import tiny_batch, tiny_model
from tests.support.runs import STREAMED_FROM_DISK, closing, differing, prompts, weights_of
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import PLAIN, TRAININGS, UNSAVED, Training, held_out, lora, small_model, unmasked
from zo2trl.errors import CheckpointError, ConfigError, StoreForeign, ZO2TRLError

LAST = Crash("step_end", 5)  # one step behind checkpoint-4


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Training], Path]:
    """Make folders of trainings that crashed at step 5, each once; do not train in them."""
    made: dict[int, Path] = {}

    def folder_of(training: Training) -> Path:
        if id(training) not in made:
            made[id(training)] = tmp_path_factory.mktemp("cut")
            run_until_crash(training(made[id(training)] / "run"), LAST)
        return made[id(training)] / "run"

    return folder_of


def refusal(training: Training, folder: Path, error: type[Exception], **named: Any) -> str:
    """Return the message with which a training refuses to resume in a folder."""
    with closing(training(folder)) as trainer, pytest.raises(error) as refused:
        trainer.train(**{"resume_from_checkpoint": True, **named})
    return str(refused.value)


def finished(training: Training, folder: Path) -> Outcome:
    with closing(training(folder)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        return Outcome.of(trainer)


# -- other choices

CHANGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "learning_rate": ({"learning_rate": 2e-3}, ConfigError, "learning_rate"),
    "schedule": ({"lr_scheduler_type": "cosine"}, ConfigError, "schedule"),
    "warmup": ({"warmup_steps": 3}, ConfigError, "warmup_steps"),
    "max_steps": ({"max_steps": 12}, ConfigError, "max_steps"),  # the schedule is linear
    "seed": ({"seed": 7}, StoreForeign, "seed"),
    "rounding": ({"rounding": "stochastic"}, StoreForeign, "stochastic"),
    "direction": ({"direction": "gaussian"}, StoreForeign, "gaussian"),
}
LINEAR = {True: PLAIN.having(lr_scheduler_type="linear", max_steps=8)}
LINEAR[False] = LINEAR[True].having(save_strategy="no")


@pytest.mark.parametrize("saves", [True, False], ids=["saved", "unsaved"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_other_choices(
    name: str, saves: bool, cut_short: Callable[[Training], Path], tmp_path: Path
) -> None:
    options, error, word = CHANGES[name]
    folder = Path(shutil.copytree(cut_short(LINEAR[saves]), tmp_path / "run"))
    assert word in refusal(LINEAR[saves].having(**options), folder, error)
    if name in ("schedule", "seed"):  # refused late and early: with its own choices it resumes
        assert in_peace(LINEAR[saves]).difference(finished(LINEAR[saves], folder)) == ""


@pytest.mark.parametrize("max_steps", [3, 4])
@pytest.mark.parametrize("training", [PLAIN, UNSAVED], ids=["saved", "unsaved"])
def test_a_run_does_not_end_before_its_journal_does(training: Training, max_steps: int, tmp_path: Path) -> None:
    run_until_crash(training(tmp_path), LAST)
    message = refusal(training.having(max_steps=max_steps), tmp_path, ConfigError)
    assert "max_steps" in message
    assert len(finished(training, tmp_path).records) == 6


def test_what_may_change_from_life_to_life(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The journal records these choices at every step; a warning reports each change."""
    run_until_crash(PLAIN(tmp_path), LAST)
    changed = PLAIN.having(max_steps=8, zo_eps=1e-2, weight_decay=0.1, num_directions=2)
    with closing(changed(tmp_path)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        records = trainer.engine.store.journal.records
        before = weights_of(trainer.model)
    assert all(f"`{name}` was" in caplog.text for name in ("zo_eps", "weight_decay", "num_directions"))
    assert [(r.zo_eps, r.weight_decay, len(r.coefficients)) for r in records] == [(1e-3, 0.0, 1)] * 5 + [
        (1e-2, 0.1, 2)
    ] * 3
    with closing(changed(tmp_path)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert differing(before, weights_of(trainer.model)) == []


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_what_finds_another_place_in_the_data_is_refused_by_name(name: str, tmp_path: Path) -> None:
    run_until_crash(PLAIN(tmp_path), LAST)
    with (
        closing(PLAIN.having(**{name: 3})(tmp_path)) as trainer,
        pytest.raises(ConfigError, match=rf"`{name}` was \d when this training began and is 3 now"),
    ):
        trainer.train(resume_from_checkpoint=True)


# -- other weights


def half_frozen() -> nn.Module:
    model = small_model()
    model.get_input_embeddings().requires_grad_(False)
    return model


OTHER_MODELS: dict[str, tuple[Training, Training, type[Exception], str]] = {
    "other trainable weights": (PLAIN, PLAIN.of(half_frozen), StoreForeign, "trainable"),
    "other dtype": (PLAIN, PLAIN.of(partial(small_model, dtype=torch.bfloat16)), StoreForeign, "model"),
    "other model": (PLAIN, PLAIN.of(partial(tiny_model, "gpt2")), StoreForeign, "model"),
    "other base under adapters": (
        TRAININGS["lora"], TRAININGS["lora"].of(partial(lora, base_seed=1)), StoreForeign, "embed_tokens.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_run_does_not_go_on_with_another_model(
    name: str, cut_short: Callable[[Training], Path], tmp_path: Path
) -> None:
    training, other, error, word = OTHER_MODELS[name]
    folder = Path(shutil.copytree(cut_short(training), tmp_path / "run"))
    message = refusal(other, folder, error)
    assert word in message
    assert str(folder / "store") in message
    assert len(finished(training, folder).records) > 5  # nothing was harmed


@pytest.mark.parametrize("name", ["lora", "plain"])
def test_trained_weights_come_from_the_store_and_not_from_the_model_handed_over(name: str, tmp_path: Path) -> None:
    """Most scripts draw adapters and new heads at random, and differently each time."""
    training, other = {
        "lora": (TRAININGS["lora"], partial(lora, adapter_seed=1)), "plain": (PLAIN, partial(small_model, seed=1)),
    }[name]  # fmt: skip
    wanted = in_peace(training)
    run_until_crash(training(tmp_path / "run"), LAST)
    assert wanted.difference(finished(training.of(other), tmp_path / "run")) == ""


def test_a_run_of_a_checkpoint_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    def save(seed: int) -> str:
        small_model(seed=seed).save_pretrained(tmp_path / "start")
        tiny_tokenizer().save_pretrained(tmp_path / "start")
        return str(tmp_path / "start")

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **STREAMED_FROM_DISK}
    training = Training(options, model=partial(save, 0), rows=partial(prompts, 11), is_sft=True)
    wanted = in_peace(training)
    run_until_crash(training(tmp_path / "run"), LAST)
    message = refusal(training.of(partial(save, 1)), tmp_path / "run", StoreForeign)
    assert re.search(r"\w+\.weight", message)  # which one
    assert wanted.difference(finished(training, tmp_path / "run")) == ""


# -- another run, or none


def test_a_checkpoint_of_another_run_is_refused(cut_short: Callable[[Training], Path], tmp_path: Path) -> None:
    run_until_crash(PLAIN(tmp_path / "other"), LAST)
    folder = cut_short(PLAIN)
    message = refusal(PLAIN, tmp_path / "other", CheckpointError, resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert str(folder / "checkpoint-4") in message
    assert "store_dir" in message


@pytest.mark.parametrize("wanted", [True, "checkpoint-3"])
def test_where_there_is_nothing_to_resume_nothing_is_begun(wanted: bool | str, tmp_path: Path) -> None:
    refusal(PLAIN, tmp_path, ZO2TRLError, resume_from_checkpoint=wanted)
    assert not (tmp_path / "store").exists()


# -- looking before resuming

LOOKED_AT = replace(PLAIN, extra=lambda: {"eval_dataset": held_out()})

LOOKS: dict[str, Callable[[Any, Path], Any]] = {
    "evaluate": lambda trainer, folder: trainer.evaluate(),
    "save": lambda trainer, folder: trainer.save_model(str(folder / "looked")),
    "forward": lambda trainer, folder: trainer.model(**tiny_batch("opt")),
}


@pytest.mark.parametrize(
    ("look", "is_same"),
    [("evaluate", True), ("evaluate", False), ("save", False), ("forward", True)],
)  # fmt: skip
def test_a_look_before_resuming_loses_nothing(look: str, is_same: bool, tmp_path: Path) -> None:
    wanted = in_peace(LOOKED_AT)
    run_until_crash(LOOKED_AT(tmp_path / "run"), LAST)
    trainer = LOOKED_AT(tmp_path / "run")
    with abandoning(trainer), torch.no_grad():
        LOOKS[look](trainer, tmp_path)
        if is_same:
            trainer.train(resume_from_checkpoint=True)
            assert wanted.difference(Outcome.of(trainer)) == ""
    if not is_same:
        assert wanted.difference(finished(LOOKED_AT, tmp_path / "run")) == ""


# -- weights that no step led to


class Changing(TrainerCallback):
    """This callback changes weights after the third step, as a script does that prunes, merges or resets weights."""

    def __init__(self, how: str, *, is_guarded: bool) -> None:
        self.how, self.is_guarded = how, is_guarded
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **named: Any) -> None:
        if state.global_step != 3 or (self.is_guarded and self.trainer.is_replaying):
            return
        if self.how == "load":
            model.load_state_dict({key: value * 1.25 for key, value in model.state_dict().items()})
            return
        self.trainer.engine.flush()
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
            model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.5)


def changing(folder: Path, *, how: str, is_guarded: bool = True, **options: Any) -> Any:
    trainer = UNSAVED.having(max_steps=7)(folder, **options)
    callback = Changing(how, is_guarded=is_guarded)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return trainer


@pytest.mark.parametrize("place", [{}, STREAMED_FROM_DISK], ids=["auto", "disk"])
@pytest.mark.parametrize("how", ["load", "in place"])
def test_weights_changed_by_hand_survive_a_crash(how: str, place: dict, tmp_path: Path) -> None:
    make = partial(changing, how=how, **place)
    wanted = straight(make, tmp_path / "straight")
    crashes = [Crash("step_end", 3), Crash("pre_optimizer_step", 3), Crash("step_end", 5)]
    assert wanted.difference(resumed(make, tmp_path / "run", crashes)) == ""


@pytest.mark.parametrize("how", ["load", "in place"])
def test_a_callback_that_would_change_weights_twice_is_refused(how: str, tmp_path: Path) -> None:
    run_until_crash(changing(tmp_path, how=how, is_guarded=False), LAST)
    unguarded = changing(tmp_path, how=how, is_guarded=False)
    with closing(unguarded) as trainer, pytest.raises(ZO2TRLError, match="is_replaying"):
        trainer.train(resume_from_checkpoint=True)
    with closing(changing(tmp_path, how=how)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        found = Outcome.of(trainer)
    assert straight(partial(changing, how=how), tmp_path / "straight").difference(found) == ""


def test_masks_are_drawn_alike_whatever_was_drawn_before(tmp_path: Path) -> None:
    training = TRAININGS["masking"].having(save_strategy="no", eval_strategy="no", max_steps=6)
    wanted = in_peace(training)
    for folder, draw in (("drawn", torch.rand), ("seeded", torch.manual_seed)):
        run_until_crash(training(tmp_path / folder), Crash("step_end", 4))
        with closing(training(tmp_path / folder)) as trainer:
            draw(99)
            trainer.train(resume_from_checkpoint=True)
            assert wanted.difference(Outcome.of(trainer)) == "", folder
    assert len(unmasked()) % 4  # an epoch ends within an accumulation
