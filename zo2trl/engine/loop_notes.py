"""Notes of a training loop in the journal and the logbook, from which the loop can go through its steps again.

A loop notes where a training starts, with which settings and random state, what its forwards measured beside losses,
and its evaluations. Random states, settings and measurements are JSON that this module neither reads nor checks.

Does not: make steps, or go through them again (retrace.py).

Invariant: a note is keyed by the number of records before it. Values of a step are written before its record, because
opening a store drops notes that have no record.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from zo2trl.engine.step import Engine
from zo2trl.errors import ConfigError
from zo2trl.journal.journal import MarkKind, MarkRecord

__all__ = [
    "can_start_over", "compare_settings", "note_evaluation", "note_measured", "note_start", "random_state_at",
    "started_marks",
]  # fmt: skip

logger = logging.getLogger(__name__)


def note_start(engine: Engine, step_offset: int, *, randomness: Any, settings: Mapping[str, Any]) -> None:
    """Note that the next step is the first of a training, so that its loop can start again here.

    Args:
        step_offset: number of that step in the journal, minus its number in the loop.
        randomness: state of the random generators before the loop's first batch (JSON).
        settings: what the steps are made of beside weights, seeds and learning rates (JSON).
    """
    book, position = engine.store.logbook, len(engine.store.records)
    book.put("settings", position, dict(settings))
    book.put("started", position, randomness, sync=True)
    engine.store.journal.append_mark(MarkKind.STARTED, step=step_offset)


def note_measured(engine: Engine, measured: Any) -> None:
    """Note what the forwards of the pending step measured beside losses (JSON); call it before the commit."""
    store = engine.store
    store.logbook.put("step", len(store.records) + 1, measured)


def note_evaluation(engine: Engine, name: str, metrics: Mapping[str, float], *, step: int) -> None:
    """Note the metrics of an evaluation after the loop's step `step`."""
    store = engine.store
    store.logbook.put("evaluation", len(store.records), dict(metrics), name=name, sync=True)
    store.journal.append_mark(MarkKind.EVALUATED, step=step)


def started_marks(engine: Engine) -> list[MarkRecord]:
    """Return the marks at which trainings of the run began, oldest first."""
    return [mark for mark in engine.store.journal.marks if mark.kind == MarkKind.STARTED]


def can_start_over(engine: Engine) -> bool:
    """Return whether a loop can go through all steps of its training without a checkpoint."""
    return bool(started_marks(engine))


def random_state_at(engine: Engine, position: int) -> Any:
    """Return the random state that `note_start` noted at a position of the journal, or None."""
    return engine.store.logbook.get("started", position)


def compare_settings(engine: Engine, settings: Mapping[str, Any], *, may_change: Collection[str] = ()) -> None:
    """Compare settings with those that the training began with.

    Args:
        may_change: names of settings that every record holds. A change of them is logged as a warning.

    Raises:
        ConfigError: another setting has changed, so that the loop would go on at another place in the data.
    """
    started = started_marks(engine)
    before = engine.store.logbook.get("settings", started[-1].position) if started else None
    for name, value in (before or {}).items():
        if name not in settings or settings[name] == value:
            continue
        changed = f"`{name}` was {value!r} when this training began and is {settings[name]!r} now"
        if name not in may_change:
            raise ConfigError(
                f"{changed}: the loop would go on at another place in the data. Resume with the arguments of the "
                "run, or export the weights of a checkpoint (`zo2trl export`) and start a new run from them."
            )
        logger.warning("%s: it holds for the steps that are made from here on.", changed)
