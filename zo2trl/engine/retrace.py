"""Retracing: a loop goes through journaled steps again, without forward passes, to the place where it was stopped.

The loop's data, schedule and callbacks run for real; losses and coefficients come from the journal, evaluations
and other measurements from the logbook. Weights are not touched, because the store has applied these steps already
(bringing weights forward over records is called replay, see tiers/catch_up.py).

::

    start = locate(StartPoint(), engine)
    retrace = Retrace(engine, start)
    for step, batch in enumerate(batches):
        if not retrace.is_over:
            estimate = retrace.estimate
            retrace.advance(learning_rate=rate(step))
        else:
            estimate = engine.step([lambda: loss_of(batch)], step=start.step_offset + step)
            engine.commit(learning_rate=rate(step), weight_decay=0.0)

Does not: know a checkpoint's files, a trainer or a scheduler.

Invariant: a retraced step is compared with what the loop would do now; another learning rate is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from zo2trl.engine.loop_notes import started_marks
from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.journal.journal import MarkKind
from zo2trl.zo.estimators import Estimate
from zo2trl.zo.records import Record, StepRecord

__all__ = [
    "Retrace", "StartPoint", "estimate_of", "locate", "note_origin", "refuse_changed_weights", "refuse_other_rates",
    "refuse_other_training",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """The place in a journal where a loop starts again.

    Attributes:
        folder: the checkpoint that holds the loop's state there, or None: the beginning of the training.
        store_id, fingerprint: which journal the checkpoint belongs to, and which history up to its position.
        position: number of records that lie before it.
        step_offset: number of a step in the journal, minus its number in the loop.
    """

    folder: Path | None = None
    store_id: str = ""
    fingerprint: str = ""
    position: int = 0
    step_offset: int = 0


AnyPoint = TypeVar("AnyPoint", bound=StartPoint)


def locate(point: AnyPoint, engine: Engine) -> AnyPoint:
    """Return the point with its place in the engine's journal.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or the run does not begin where the loop would.
    """
    journal, store = engine.store.journal, engine.store
    if point.folder is not None:
        origin = store.logbook.get("continues", 0)
        if origin == [point.store_id, point.fingerprint, point.position]:
            return replace(point, position=0)  # its weights are what this run began with
        if point.store_id != journal.header["store"]:
            raise CheckpointError(
                f"{point.folder} belongs to run {point.store_id[:8]}, and {journal.path.parent} holds run "
                f"{str(journal.header['store'])[:8]}. Set `store_dir` to the store of that run, or resume from one of "
                "this run's checkpoints."
            )
        n_records = len(store.records)
        if point.position > n_records or journal.fingerprint(point.position) != point.fingerprint:
            raise CheckpointError(
                f"{point.folder} was saved after {point.position} steps that the journal {journal.path} does not hold "
                f"(it has {n_records}, of another history): training went on from earlier weights since. Resume from "
                "a checkpoint saved after that."
            )
        return point
    if started := started_marks(engine):
        return replace(point, position=started[-1].position, step_offset=started[-1].step)
    if store.records:
        raise CheckpointError(
            f"The run in {journal.path.parent} began in the middle of a training, so its loop needs a checkpoint of "
            "that training to start from. Pass one as `resume_from_checkpoint`."
        )
    return replace(point, position=0, step_offset=0)


def note_origin(point: StartPoint, engine: Engine) -> None:
    """Note that a run begins on the weights of a checkpoint, so that its loop can start there again."""
    value = [point.store_id, point.fingerprint, point.position]
    engine.store.logbook.put("continues", 0, value, sync=True)


def refuse_other_training(point: StartPoint, engine: Engine) -> None:
    """Raise `CheckpointError` if a located checkpoint lies before the beginning of the last training."""
    started = started_marks(engine)
    if started and (point.position < started[-1].position or point.step_offset != started[-1].step):
        raise CheckpointError(f"{point.folder} belongs to an earlier call of `train`; a later one has begun since.")


def refuse_other_rates(point: StartPoint, engine: Engine, *, rate_at: Callable[[int], float]) -> None:
    """Compare a schedule with the learning rates of the steps before a point, which are not retraced.

    Args:
        rate_at: the learning rate of a step, by the step's number in the loop.

    Raises:
        ConfigError: a step was made at another rate than the schedule gives now.
    """
    for record in engine.store.records[: point.position]:
        step = record.step - point.step_offset
        if step >= 0 and isinstance(record, StepRecord):
            _refuse_other_rate(record, rate_at(step))


def _refuse_other_rate(record: StepRecord, learning_rate: float) -> None:
    if record.learning_rate != learning_rate:
        raise ConfigError(
            f"Step {record.step} was made at learning rate {record.learning_rate!r}, and would now be made at "
            f"{learning_rate!r}: `learning_rate`, the schedule, `max_steps` or `warmup_steps` have changed. Resume "
            "with the arguments of the run, or export the weights of a checkpoint (`zo2trl export`) and start a new "
            "run from them."
        )


def refuse_changed_weights(engine: Engine, *, step: int, advice: str) -> None:
    """Raise `ConfigError` if parameters were written into while steps are retraced, whose changes they hold already.

    Args:
        step: number of the step in the loop.
        advice: ends the message with what the loop's user can do.
    """
    if engine.binding.collect_changes():
        engine.shutdown(flush=False)
        raise ConfigError(
            f"Weights were changed around step {step}, which is gone through again: they hold what was changed there "
            f"already. {advice}"
        )


def estimate_of(record: Record) -> Estimate:
    """Return the mean slope and losses of a journaled step, as they were before clipping."""
    slope = math.nan
    if isinstance(record, StepRecord):
        slope = math.copysign(record.grad_norm, math.fsum(record.coefficients))
    return Estimate(coefficients=(slope,), losses=record.losses)


class Retrace:
    """The steps between a start point and the journal's end, and how far the loop has come.

    Args:
        engine: continues the run whose steps are retraced.
        start: where the loop starts; from `locate`.
    """

    def __init__(self, engine: Engine, start: StartPoint) -> None:
        self._store = engine.store
        self._end = len(engine.store.records)
        self.position = start.position

    @property
    def is_over(self) -> bool:
        """True when the next step is a new one."""
        return self.position >= self._end

    @property
    def n_left(self) -> int:
        """Number of steps still to be retraced."""
        return self._end - self.position

    @property
    def record(self) -> Record:
        """The record of the next step."""
        return self._store.records[self.position]

    @property
    def estimate(self) -> Estimate:
        """The estimate of the next step; see `estimate_of`."""
        return estimate_of(self.record)

    def advance(self, *, learning_rate: float) -> None:
        """Go past the next step.

        Raises:
            ConfigError: the loop would make it at another learning rate now.
        """
        if isinstance(record := self.record, StepRecord):
            _refuse_other_rate(record, learning_rate)
        self.position += 1

    def measured(self) -> Any:
        """Return what the forwards of the next step measured beside losses, or None."""
        return self._store.logbook.get("step", self.position + 1)

    def evaluation(self, name: str) -> dict[str, float] | None:
        """Return the metrics of an evaluation made after the last retraced step, or None if there was none."""
        return self._store.logbook.get("evaluation", self.position, name=name)

    @property
    def had_evaluation(self) -> bool:
        """Whether an evaluation was made after the last retraced step."""
        return self._store.logbook.has("evaluation", self.position)

    @property
    def ends_changed(self) -> bool:
        """Whether weights were changed from outside after the last step, which must not be done again."""
        marks = self._store.journal.marks
        return any(mark.kind == MarkKind.CHANGED and mark.position == self._end for mark in marks)

    def was_marked(self, kind: MarkKind) -> bool:
        """Return whether the journal has a mark of this kind after the last retraced step."""
        return any(mark.kind == kind and mark.position == self.position for mark in self._store.journal.marks)
