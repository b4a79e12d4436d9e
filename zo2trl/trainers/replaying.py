"""Going through journaled steps again in the trainer's own loop, without forward passes.

The data pipeline, the scheduler and the callbacks run for real; losses and projected gradients come from the journal,
evaluations from the logbook. Weights are not touched: the store has absorbed these steps already.

Invariant: a replayed step is compared with what the trainer would have done; another learning rate is refused.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.tiers.journal import MarkKind
from zo2trl.zo.estimators import Estimate
from zo2trl.zo.records import Record, StepRecord

__all__ = ["Replay", "ResumePoint", "estimate_of", "locate"]


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where the trainer's loop starts again.

    Attributes:
        folder: the checkpoint, or None: the beginning of the training.
        store_id, fingerprint: which journal the checkpoint belongs to, and which history up to its position.
        position: records of the journal that lie before it.
        step_offset: journal step - global step.
    """

    folder: Path | None = None
    store_id: str = ""
    fingerprint: str = ""
    position: int = 0
    step_offset: int = 0


def locate(point: ResumePoint, engine: Engine) -> ResumePoint:
    """The point with its place in the engine's journal.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or the run does not begin where the loop would.
    """
    journal, store = engine.store.journal, engine.store
    if point.folder is not None:
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
    started = [mark for mark in journal.marks if mark.kind == MarkKind.STARTED]
    if started:
        return ResumePoint(position=started[-1].position, step_offset=started[-1].step)
    if store.records:
        raise CheckpointError(
            f"The run in {journal.path.parent} began in the middle of a training, so its loop needs a checkpoint of "
            "that training to start from. Pass one as `resume_from_checkpoint`."
        )
    return ResumePoint()


def estimate_of(record: Record) -> Estimate:
    """What a replayed step's probes said: the mean slope and losses, as they were before clipping."""
    slope = math.nan
    if isinstance(record, StepRecord):
        slope = math.copysign(record.grad_norm, math.fsum(record.projected_grads))
    return Estimate(projected_grads=(slope,), loss_plus=record.loss_plus, loss_minus=record.loss_minus)


class Replay:
    """The steps between a resume point and the journal's end, and how far the loop has come."""

    def __init__(self, engine: Engine, start: ResumePoint) -> None:
        self._store = engine.store
        self._end = len(engine.store.records)
        self.position = start.position

    @property
    def is_over(self) -> bool:
        """True when the next step is a new one."""
        return self.position >= self._end

    @property
    def n_left(self) -> int:
        """Steps still to come."""
        return self._end - self.position

    @property
    def record(self) -> Record:
        """The step to go through next."""
        return self._store.records[self.position]

    def advance(self, *, learning_rate: float) -> None:
        """The loop has made the step.

        Raises:
            ConfigError: it would have made it at another learning rate.
        """
        record = self.record
        if isinstance(record, StepRecord) and record.learning_rate != learning_rate:
            raise ConfigError(
                f"Step {record.step} was made at learning rate {record.learning_rate!r}, and would now be made at "
                f"{learning_rate!r}: `learning_rate`, the schedule, `max_steps` or `warmup_steps` have changed. "
                "Resume with the arguments of the run, or export the weights of a checkpoint (`zo2trl export`) and "
                "start a new run from them."
            )
        self.position += 1

    def measured(self) -> Any:
        """What the forwards of the step to go through next measured besides losses, or None."""
        return self._store.logbook.get("step", self.position + 1)

    def evaluation(self, name: str) -> dict[str, float] | None:
        """Metrics of an evaluation made after the step gone through last, or None if there was none."""
        return self._store.logbook.get("evaluation", self.position, name=name)

    def was_marked(self, kind: MarkKind) -> bool:
        """Whether something was closed after the step gone through last."""
        return any(mark.kind == kind and mark.position == self.position for mark in self._store.journal.marks)
