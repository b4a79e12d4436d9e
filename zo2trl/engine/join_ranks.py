"""Joining: the stores of a training's processes, one each, opened as one run.

Does not: open a store, or compare weights while steps are made (audit.py).

Processes may be killed at any moment, so one journal can hold a step that another does not: a step is made only when
all have sent their losses, so it is one step at most, or as many as a power cut took (`sync_every`). The step is known
to the last bit where it is in a journal. So ranks that miss it copy it; no rank goes back.
Invariant: afterwards all ranks have the same records.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from zo2trl.journal.journal import MarkKind
from zo2trl.parallel.ranks import Ranks
from zo2trl.tiers.store import TieredStore
from zo2trl.zo.records import Record, SkipRecord, StepRecord

__all__ = ["agree_on_run", "join_stores"]

logger = logging.getLogger(__name__)


def agree_on_run(ranks: Ranks, *, header: Mapping[str, Any], choices: Mapping[str, Any], store_id: str) -> str:
    """Compare what a run is made of before it is opened; returns rank 0's name for it, if it is a new one.

    Raises:
        ConfigError: a choice differs between ranks.
        RankLost, RanksDiverged: see `Ranks.exchange`.
    """
    facts = {name: header[name] for name in ("layout", "method", "codec", "decays", "seed")}
    ranks.agree_on("The run that all processes make", {**facts, **choices, "number of processes": ranks.size})
    return ranks.all_gather("name of the run", store_id)[0]


def join_stores(ranks: Ranks, store: TieredStore) -> None:
    """Check that all ranks opened stores of the same run, and copy steps that this one misses.

    Raises:
        ConfigError: they are not; or their histories differ; names what.
        RankLost, RanksDiverged: see `Ranks.exchange`.
    """
    if ranks.size == 1:
        return
    journal, records = store.journal, store.journal.records
    ranks.agree_on(
        "The stores of the processes",
        {
            "first weights": journal.header["base"], "name of the run": journal.header["store"],
            "steps before which weights were changed": _changes(store),
        },
    )  # fmt: skip
    lengths = [int(row[0]) for row in ranks.gather("steps in the journals", [len(records)])]
    shortest, longest = min(lengths), max(lengths)
    ranks.agree_on(
        "The journals of the processes", {f"name of the first {shortest} steps": journal.fingerprint(shortest)}
    )
    if shortest == longest:
        return
    gives = ranks.rank == lengths.index(longest)
    mine = [_encode(store, position) for position in range(shortest, longest)] if gives else []
    given = ranks.all_gather("steps that some journals miss", mine)[lengths.index(longest)]
    missing = given[len(records) - shortest :]
    for step in missing:
        if step["measured"] is not None:
            store.logbook.put("step", len(records) + 1, step["measured"])
        store.append(_decode(step))
    if missing:
        logger.warning(
            "%s: %d steps are copied from rank %d, which had made them when this process stopped.",
            journal.path, len(missing), lengths.index(longest),
        )  # fmt: skip


def _changes(store: TieredStore) -> list[int]:
    return [mark.position for mark in store.journal.marks if mark.kind == MarkKind.CHANGED]


def _encode(store: TieredStore, position: int) -> dict[str, Any]:
    record = store.journal.records[position]
    values = record._asdict() if isinstance(record, StepRecord) else asdict(record)
    return {"values": values, "measured": store.logbook.get("step", position + 1)}


def _decode(step: Mapping[str, Any]) -> Record:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in step["values"].items()
    }
    return StepRecord(**values) if "coefficients" in values else SkipRecord(**values)
