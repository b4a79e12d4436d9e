"""Going through journaled steps again in the trainer's own loop, without forward passes.

The data pipeline, the scheduler and the callbacks run for real; losses and projected gradients come from the journal,
evaluations from the logbook. Weights are not touched: the store has absorbed these steps already.

Invariant: a replayed step is compared with what the trainer would have done; another learning rate is refused.
"""

import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import has_length

from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.journal.journal import MarkKind, MarkRecord
from zo2trl.zo.estimators import Estimate
from zo2trl.zo.records import Record, StepRecord

__all__ = [
    "Replay", "ResumePoint", "can_start_over", "compare_settings", "estimate_of", "locate", "note_origin",
    "note_start", "refuse_changed_weights", "refuse_other_rates", "refuse_other_training", "settings_of",
]  # fmt: skip


_NOTED_BY_STEPS = ("zo_eps", "num_directions", "weight_decay", "max_grad_norm", "objective")
_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "max_length", "packing",
    "parallelism",
    *_NOTED_BY_STEPS,
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where the trainer's loop starts again.

    Attributes:
        folder: the checkpoint, or None: the beginning of the training.
        store_id, fingerprint: which journal the checkpoint belongs to, and which history up to its position.
        position: records of the journal that lie before it.
        step_offset: journal step - global step.
        counters: what the checkpoint says of the trainer's own.
        rng: state of the random generators, of processes other than the one that wrote the checkpoint.
    """

    folder: Path | None = None
    store_id: str = ""
    fingerprint: str = ""
    position: int = 0
    step_offset: int = 0
    counters: dict[str, Any] = field(default_factory=dict)
    rng: Any = None


def locate(point: ResumePoint, engine: Engine) -> ResumePoint:
    """The point with its place in the engine's journal.

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
    if started := _started(engine):
        return ResumePoint(position=started[-1].position, step_offset=started[-1].step)
    if store.records:
        raise CheckpointError(
            f"The run in {journal.path.parent} began in the middle of a training, so its loop needs a checkpoint of "
            "that training to start from. Pass one as `resume_from_checkpoint`."
        )
    return ResumePoint()


def can_start_over(engine: Engine) -> bool:
    """Whether the trainer's loop can go through all steps of its training, without a checkpoint."""
    return bool(_started(engine))


def _started(engine: Engine) -> list[MarkRecord]:
    """The beginnings of trainings in the run, oldest first."""
    return [mark for mark in engine.store.journal.marks if mark.kind == MarkKind.STARTED]


def settings_of(trainer: Any) -> dict[str, Any]:
    """What a trainer's steps are made of beside weights, seeds and learning rates."""
    args, dataset = trainer.args, trainer.train_dataset
    settings = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    if args.auto_find_batch_size:  # the batches that are made may be smaller than those that were asked for
        settings["per_device_train_batch_size"] = trainer._train_batch_size
    settings |= {"objective": None if trainer.objective is None else trainer.objective.name}
    settings |= {"number of processes": trainer.ranks.size}
    return settings | {"train_dataset rows": len(dataset) if has_length(dataset) else None}


def note_start(engine: Engine, step_offset: int, *, randomness: Any, settings: dict[str, Any]) -> None:
    """The first step of a training is next: its loop could start again here, without a checkpoint."""
    book, position = engine.store.logbook, len(engine.store.records)
    book.put("settings", position, settings)
    book.put("started", position, randomness, sync=True)
    engine.store.journal.append_mark(MarkKind.STARTED, step=step_offset)


def compare_settings(engine: Engine, settings: dict[str, Any]) -> None:
    """Compare settings with those the training began with; what every step notes may change, and is warned about.

    Raises:
        ConfigError: a setting has changed that finds another place in the data.
    """
    started = _started(engine)
    before = engine.store.logbook.get("settings", started[-1].position) if started else None
    for name, value in (before or {}).items():
        if name not in settings or settings[name] == value:
            continue
        changed = f"`{name}` was {value!r} when this training began and is {settings[name]!r} now"
        if name not in _NOTED_BY_STEPS:
            raise ConfigError(
                f"{changed}: the loop would go on at another place in the data. Resume with the arguments of the "
                "run, or export the weights of a checkpoint (`zo2trl export`) and start a new run from them."
            )
        logger.warning("%s: it holds for the steps that are made from here on.", changed)


def note_origin(point: ResumePoint, engine: Engine) -> None:
    """A run begins on a checkpoint's weights: its loop may start there again."""
    value = [point.store_id, point.fingerprint, point.position]
    engine.store.logbook.put("continues", 0, value, sync=True)


def refuse_other_training(point: ResumePoint, engine: Engine) -> None:
    """Raise `CheckpointError` if a located checkpoint lies before the last call of `train` began."""
    started = _started(engine)
    if started and (point.position < started[-1].position or point.step_offset != started[-1].step):
        raise CheckpointError(f"{point.folder} belongs to an earlier call of `train`; a later one has begun since.")


def refuse_other_rates(point: ResumePoint, engine: Engine, *, scheduler: Any) -> None:
    """Compare the schedule with the learning rates of the journaled steps before a checkpoint, which nobody repeats.

    Raises:
        ConfigError: a step was made at another rate than the schedule gives now.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    rate, shape = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    for record in engine.store.records[: point.position]:
        step = record.step - point.step_offset
        if step >= 0 and isinstance(record, StepRecord):
            _refuse_other_rate(record, float(rate * shape(step)))


def _refuse_other_rate(record: StepRecord, learning_rate: float) -> None:
    if record.learning_rate != learning_rate:
        raise ConfigError(
            f"Step {record.step} was made at learning rate {record.learning_rate!r}, and would now be made at "
            f"{learning_rate!r}: `learning_rate`, the schedule, `max_steps` or `warmup_steps` have changed. Resume "
            "with the arguments of the run, or export the weights of a checkpoint (`zo2trl export`) and start a new "
            "run from them."
        )


def refuse_changed_weights(engine: Engine, *, global_step: int) -> None:
    """Raise `ConfigError` if somebody wrote into parameters while steps are gone through that did so before."""
    if engine.binding.collect_changes():
        engine.shutdown(flush=False)
        raise ConfigError(
            f"A callback changed weights around step {global_step}, which is gone through again: they were changed "
            "already. Let it ask `trainer.is_replaying` first."
        )


def estimate_of(record: Record) -> Estimate:
    """What a replayed step's probes said: the mean slope and losses, as they were before clipping."""
    slope = math.nan
    if isinstance(record, StepRecord):
        slope = math.copysign(record.grad_norm, math.fsum(record.coefficients))
    return Estimate(coefficients=(slope,), losses=record.losses)


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
        if isinstance(record := self.record, StepRecord):
            _refuse_other_rate(record, learning_rate)
        self.position += 1

    def measured(self) -> Any:
        """What the forwards of the step to go through next measured besides losses, or None."""
        return self._store.logbook.get("step", self.position + 1)

    def evaluation(self, name: str) -> dict[str, float] | None:
        """Metrics of an evaluation made after the step gone through last, or None if there was none."""
        return self._store.logbook.get("evaluation", self.position, name=name)

    @property
    def had_evaluation(self) -> bool:
        """Whether there was one after the step gone through last."""
        return self._store.logbook.has("evaluation", self.position)

    @property
    def ends_changed(self) -> bool:
        """Whether weights were changed from outside after the last step: what did that must not do it again."""
        marks = self._store.journal.marks
        return any(mark.kind == MarkKind.CHANGED and mark.position == self._end for mark in marks)

    def was_marked(self, kind: MarkKind) -> bool:
        """Whether something was closed after the step gone through last."""
        return any(mark.kind == kind and mark.position == self.position for mark in self._store.journal.marks)
