"""Trainings that are cut short and resumed, and what has to be equal in the end.

Does not: kill a process (tests/crash does). A crash here is an exception out of a callback, after which nothing more
reaches the store: pending steps are not absorbed, nothing is flushed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from tests.support.runs import differing, weights_of

Make = Callable[..., Any]  # (folder, **options) -> a trainer with its store in that folder
_NOT_COMPARED = re.compile(r"zo/bytes_.*|.*runtime|.*per_second|train_loss")


class Crashed(Exception):
    """Crashed is the exception that stands for a crash."""


class Crash(NamedTuple):
    """When: at an event of the trainer's loop, in the step after so many finished ones."""

    event: str
    """Name of a callback's method without `on_`: step_begin, substep_end, pre_optimizer_step, step_end, save ..."""
    step: int


class Crashing(TrainerCallback):
    """It raises once, and is added last so that other callbacks have had the event."""

    def __init__(self, trainer: Any, crash: Crash) -> None:
        self._trainer, self._crash = trainer, crash
        setattr(self, f"on_{crash.event}", self._strike)

    def _strike(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step == self._crash.step and not self._trainer.is_replaying:
            drop_dead(self._trainer)
            raise Crashed


def drop_dead(trainer: Any) -> None:
    """Stop all writes of this trainer, except those that its threads have begun."""
    if trainer._engine is not None:
        trainer._engine.flush = lambda: None


@contextlib.contextmanager
def abandoning(trainer: Any) -> Iterator[Any]:
    """Release the trainer's store at the end as a dead process does, without flushing it."""
    try:
        yield trainer
    finally:
        if trainer._engine is not None:
            trainer._engine.shutdown(flush=False)


def run_until_crash(trainer: Any, crash: Crash, **named: Any) -> None:
    """Train; the crash must come."""
    trainer.add_callback(Crashing(trainer, crash))
    with abandoning(trainer), contextlib.suppress(Crashed):
        trainer.train(**named)
        raise AssertionError(f"the training ended before {crash}")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind, as far as it may not depend on crashes."""

    weights: Mapping[str, torch.Tensor]
    logs: list[str]
    records: list[str]
    state: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> "Outcome":
        """Of a trainer whose training has ended."""
        state = trainer.state
        return cls(
            weights=weights_of(trainer.model),
            logs=[comparable(entry) for entry in state.log_history],
            records=[repr(record) for record in trainer.engine.store.journal.records],
            state={
                "step": state.global_step, "epoch": state.epoch, "flos": state.total_flos,
                "tokens": state.num_input_tokens_seen, "best": state.best_metric, "best step": state.best_global_step,
            },
        )  # fmt: skip

    def difference(self, other: "Outcome") -> str:
        """In words; nothing if there is none."""
        for name in ("records", "logs", "state"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                if isinstance(ours, dict):
                    return f"{name}: {ours} / {theirs}"
                rows = [f"{i}: {a}\n   {b}" for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
                return f"{name}: {len(ours)} / {len(theirs)} entries\n" + "\n".join(rows[:4])
        return ", ".join(differing(dict(self.weights), dict(other.weights)))


def comparable(entry: Mapping[str, Any]) -> str:
    """A log entry without what depends on the clock or on where bytes were."""
    kept = {key: value for key, value in entry.items() if not _NOT_COMPARED.fullmatch(key)}
    return repr(sorted(kept.items()))


def straight(make: Make, folder: Path) -> Outcome:
    """Train without a crash."""
    trainer = make(folder)
    try:
        trainer.train()
        return Outcome.of(trainer)
    finally:
        trainer.close()


@cache
def in_peace(make: Make) -> Outcome:
    """`straight`, once for each training."""
    with TemporaryDirectory() as folder:
        return straight(make, Path(folder))


def resumed(make: Make, folder: Path, crashes: Sequence[Crash], *, lives: Sequence[Mapping[str, Any]] = ()) -> Outcome:
    """The same run with crashes; one life after the other has the next of `lives` as options, over and over."""
    options = cycle(lives or [{}])
    for life, crash in enumerate(crashes):
        run_until_crash(make(folder, **next(options)), crash, resume_from_checkpoint=life > 0)
    trainer = make(folder, **next(options))
    try:
        trainer.train(resume_from_checkpoint=True)
        return Outcome.of(trainer)
    finally:
        trainer.close()
