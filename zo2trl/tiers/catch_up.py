"""Bringing a segment from the journal position it has absorbed to the journal's end.

Does not: decide when, or move bytes between tiers.
Invariant: replaying records one call at a time or all in one call gives the same bits (`UpdateRule.replay` rounds
after every step), so how lazily a unit catches up never shows in the weights.
"""

from collections.abc import Sequence

import torch

from zo2trl.layout.layout import Segment, Unit
from zo2trl.zo.records import Record
from zo2trl.zo.rules import UpdateRule
from zo2trl.zo.tiles import Perturbed

__all__ = ["Ledger", "catch_up", "catch_up_unit"]


class Ledger:
    """Which journal position each segment's bytes at home have absorbed."""

    _from: dict[int, int]  # unit -> position of all its segments, unless they are in:
    _absorbed: dict[int, int]  # segment -> position
    _drafted: dict[int, dict[int, int]]  # unit -> segment -> position, written but not yet the unit's home

    def __init__(self) -> None:
        self._from = {}
        self._absorbed = {}
        self._drafted = {}

    def position(self, segment: Segment) -> int:
        """Records absorbed by the bytes at home."""
        return self._absorbed.get(segment.index, self._from.get(segment.unit.index, 0))

    def place(self, segments: Sequence[Segment], position: int) -> None:
        """The bytes at home of whole units, given as all their segments, are those of one position."""
        for segment in segments:
            self._from[segment.unit.index] = position
            self._absorbed.pop(segment.index, None)

    def absorb(self, segment: Segment, position: int) -> None:
        """The bytes at home were changed in place."""
        self._absorbed[segment.index] = position

    def draft(self, segment: Segment, position: int) -> None:
        """Newer bytes were written beside the home."""
        self._drafted.setdefault(segment.unit.index, {})[segment.index] = position

    def publish(self, unit: Unit) -> None:
        """What was written of this unit is its home now."""
        self._absorbed.update(self._drafted.pop(unit.index, {}))

    def forget_drafts(self) -> list[int]:
        """Drop everything that never became a home; returns the units concerned."""
        units = list(self._drafted)
        self._drafted.clear()
        return units


def catch_up(
    weights: torch.Tensor,
    segment: Segment,
    records: Sequence[Record],
    *,
    position: int,
    rule: UpdateRule,
    probes: Sequence[Perturbed] = (),
    keep: bool = True,
) -> bool:
    """Replay `records[position:]` on a segment's bytes (uint8, on the device). True if they have absorbed them now.

    `probes` and `keep`: see `UpdateRule.visit`, which makes them in the same pass.
    """
    if not segment.is_trainable:
        return False
    pending = records[position:]
    return rule.visit(weights, segment.spans, pending, probes=probes, keep=keep) and bool(pending)


def catch_up_unit(
    weights: torch.Tensor, segments: Sequence[Segment], records: Sequence[Record], *, position: int, rule: UpdateRule
) -> None:
    """Replay `records[position:]` on all of a trained unit's bytes, given with its trainable segments."""
    for segment in segments:
        part = weights[segment.stored_start : segment.stored_start + segment.stored_bytes]
        catch_up(part, segment, records, position=position, rule=rule)
