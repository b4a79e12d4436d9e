"""An interrupted and resumed training equals an uninterrupted one: every weight, record, log entry and counter.

Crashes here are exceptions (tests/support/crashes.py); tests/crash kills processes.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.crashes import (
    Crash,
    Crashed,
    Outcome,
    abandoning,
    drop_dead,
    in_peace,
    resumed,
    run_until_crash,
    straight,
)
from tests.support.runs import closing, differing
from tests.support.trainings import PLAIN, TRAININGS, UNSAVED, Training, held_out
from zo2trl.journal.journal import Journal, MarkKind

END, BEGIN = "step_end", "step_begin"

MARKED = replace(
    PLAIN.having(eval_strategy="steps", eval_steps=2, save_steps=3), extra=lambda: {"eval_dataset": held_out()}
)  # fmt: skip
UNSAVED_LOGS = UNSAVED.having(logging_steps=4)

CRASHES = {
    # before the first step; before any checkpoint; in an accumulation; behind an evaluation and before its checkpoint
    "epochs": [Crash(BEGIN, 0), Crash(END, 2), Crash("substep_end", 4), Crash("evaluate", 6), Crash(END, 7)],
    "plateau": [Crash(END, 2), Crash("evaluate", 5), Crash(END, 7)],
    "bf16": [Crash(END, 2), Crash("pre_optimizer_step", 4), Crash(END, 7)],
    "lora": [Crash(END, 4), Crash("save", 6)],
    "frozen": [Crash(END, 2), Crash(END, 5)],
    "seq2seq": [Crash(END, 2), Crash(END, 5)],
    "skips": [Crash(END, 4), Crash(END, 8)],
    "masking": [Crash(END, 2), Crash(END, 5), Crash("epoch_begin", 6), Crash(END, 8)],
    "workers": [Crash(END, 2), Crash(END, 5)],
    "by length": [Crash(END, 5), Crash(END, 9)],
    "stream": [Crash(END, 2), Crash(END, 5), Crash(END, 7)],
    "best": [Crash(END, 3), Crash("evaluate", 6), Crash("save", 8), Crash("train_end", 12)],
    "patience": [Crash(END, 1), Crash(END, 3), Crash("evaluate", 4)],
    "sft": [Crash("substep_end", 2), Crash(END, 5), Crash(END, 8)],
    "packed": [Crash(END, 2), Crash(END, 5)],
}


# What differs most: full weights, evaluations, order of data, schedules that look at metrics, TRL's own trainer.
IN_CI = ("masking", "stream", "best", "patience", "sft")


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.nightly) for name in TRAININGS]
)
def test_crashes_leave_no_trace(name: str, tmp_path: Path) -> None:
    training = TRAININGS[name]
    wanted = in_peace(training)
    found = resumed(training, tmp_path / "crashed", CRASHES[name], lives=training.places(tmp_path / "crashed"))
    assert wanted.difference(found) == ""


def test_the_trainings_are_what_they_are_meant_to_be() -> None:
    """Without these properties of the trainings, equal runs would prove less than they seem to."""
    assert in_peace(TRAININGS["patience"]).state["step"] == 6, "early stopping did not stop"
    assert any("SkipRecord" in record for record in in_peace(TRAININGS["skips"]).records)
    assert in_peace(TRAININGS["best"]).state["best step"] not in (None, 2, 12), "the best is the first or the last"
    rates = [re.search("learning_rate=([^,]*)", record)[1] for record in in_peace(TRAININGS["plateau"]).records]
    assert 1 < len(set(rates)) < len(rates), "the rate was never or always lowered"


@pytest.mark.nightly
@pytest.mark.parametrize("event", [BEGIN, "pre_optimizer_step", END])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_crash_at_any_step_leaves_no_trace(name: str, event: str, tmp_path: Path) -> None:
    training = TRAININGS[name]
    wanted = in_peace(training)
    places = training.places(tmp_path / "planned")
    for step in range(event == END, wanted.state["step"] + (event == END)):
        lives = places[step % 4 :] + places[: step % 4]
        found = resumed(training, tmp_path / f"{step}", [Crash(event, step)], lives=lives)
        assert wanted.difference(found) == "", f"crash at {event} {step}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRAININGS)
def test_a_crash_in_every_step_leaves_no_trace(name: str, tmp_path: Path) -> None:
    training = TRAININGS[name]
    wanted = in_peace(training)
    crashes = [Crash(END, step) for step in range(1, wanted.state["step"] + 1)]
    found = resumed(training, tmp_path / "crashed", crashes, lives=training.places(tmp_path / "crashed"))
    assert wanted.difference(found) == ""


# -- without a checkpoint, and from a chosen one


def test_without_any_checkpoint_a_run_is_resumed_from_its_journal(tmp_path: Path) -> None:
    training = TRAININGS["epochs"].having(save_strategy="no")
    wanted = in_peace(TRAININGS["epochs"])
    crashes = [Crash("train_begin", 0), Crash(BEGIN, 0), Crash(END, 1), Crash("evaluate", 4), Crash("substep_end", 5)]
    found = resumed(training, tmp_path / "crashed", crashes)
    assert wanted.difference(found) == ""
    assert not list((tmp_path / "crashed").glob("checkpoint-*"))


def test_an_older_checkpoint_leads_to_the_same_end(tmp_path: Path) -> None:
    wanted = in_peace(PLAIN)
    run_until_crash(PLAIN(tmp_path / "run"), Crash(END, 5))
    with closing(PLAIN(tmp_path / "run")) as trainer:
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert wanted.difference(Outcome.of(trainer)) == ""


@pytest.mark.parametrize(
    ("training", "n_steps"),
    [(PLAIN, 5), (PLAIN, 6), (UNSAVED, 5)], ids=["within an epoch", "at its end", "unsaved"],
)  # fmt: skip
def test_a_finished_run_has_nothing_left_to_do(training: Training, n_steps: int, tmp_path: Path) -> None:
    training = training.having(max_steps=n_steps)
    with closing(training(tmp_path)) as trainer:
        trainer.train()
        wanted = Outcome.of(trainer)
        trainer.train(resume_from_checkpoint=True)  # the same trainer
        assert wanted.difference(Outcome.of(trainer)) == ""
    with closing(training(tmp_path)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert wanted.difference(Outcome.of(trainer)) == ""


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    wanted = straight(PLAIN.having(max_steps=9), tmp_path / "straight")
    straight(PLAIN, tmp_path / "run")
    with closing(PLAIN.having(max_steps=9)(tmp_path / "run")) as trainer:
        trainer.train(resume_from_checkpoint=True)
        found = Outcome.of(trainer)
    assert wanted.records == found.records
    assert differing(dict(wanted.weights), dict(found.weights)) == []


def test_the_best_weights_can_be_shown_again_and_trained_on(tmp_path: Path) -> None:
    training = TRAININGS["best"]
    with closing(training(tmp_path)) as trainer:
        trainer.train()
        wanted = Outcome.of(trainer)
        assert wanted.state["best step"] < 12
        trainer.train(resume_from_checkpoint=True)
        assert wanted.difference(Outcome.of(trainer)) == ""


# -- moments between two writes


@pytest.mark.parametrize(("kind", "later"), [(MarkKind.STARTED, 2), (MarkKind.EVALUATED, 3), (MarkKind.SAVED, 5)])
def test_a_crash_before_a_mark_leaves_no_trace(
    kind: MarkKind, later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = in_peace(MARKED)
    trainer = MARKED(tmp_path)
    real = Journal.append_mark

    def append_mark(journal: Journal, mark: MarkKind, *, step: int) -> None:
        if mark == kind:
            drop_dead(trainer)
            raise Crashed
        real(journal, mark, step=step)

    monkeypatch.setattr(Journal, "append_mark", append_mark)
    with abandoning(trainer), pytest.raises(Crashed):
        trainer.train()
    monkeypatch.undo()
    run_until_crash(MARKED(tmp_path), Crash(END, later), resume_from_checkpoint=True)
    with closing(MARKED(tmp_path)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert wanted.difference(Outcome.of(trainer)) == ""


# -- several trainings of one trainer


class Interrupting(TrainerCallback):
    """This callback sends one Ctrl-C."""

    is_done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == 2 and not self.is_done:
            self.is_done = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["unsaved", "sft"])
def test_after_ctrl_c_the_same_trainer_goes_on(name: str, tmp_path: Path) -> None:
    training = UNSAVED_LOGS if name == "unsaved" else TRAININGS["sft"]
    with closing(training(tmp_path)) as trainer:
        trainer.add_callback(Interrupting())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train(resume_from_checkpoint=True)
        assert in_peace(training).difference(Outcome.of(trainer)) == ""


@pytest.mark.parametrize("training", [PLAIN, UNSAVED], ids=["saved", "unsaved"])
def test_a_second_training_is_resumed_and_not_the_first(training: Training, tmp_path: Path) -> None:
    with closing(training(tmp_path / "straight")) as trainer:
        trainer.train()
        trainer.args.max_steps = 5
        trainer.train()
        wanted = Outcome.of(trainer)
    trainer = training(tmp_path / "run")
    trainer.train()
    trainer.args.max_steps = 5
    run_until_crash(trainer, Crash(END, 1))
    run_until_crash(training.having(max_steps=5)(tmp_path / "run"), Crash(END, 3), resume_from_checkpoint=True)
    with closing(training.having(max_steps=5)(tmp_path / "run")) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert wanted.difference(Outcome.of(trainer)) == ""


def test_a_new_run_is_resumed_beside_the_checkpoints_of_an_earlier_one(tmp_path: Path) -> None:
    other = PLAIN.having(seed=7)
    wanted = straight(other, tmp_path / "straight")
    run_until_crash(PLAIN(tmp_path / "run"), Crash(END, 5))
    for step in (1, 3):  # before and behind the first checkpoint of its own
        run_until_crash(other(tmp_path / "run"), Crash(END, step), resume_from_checkpoint=step > 1)
    with closing(other(tmp_path / "run")) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert wanted.difference(Outcome.of(trainer)) == ""
