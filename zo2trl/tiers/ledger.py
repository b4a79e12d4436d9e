"""Ledger: which journal position each segment's bytes at home have absorbed.

Does not: lock (locations.py does), or move bytes.
"""

from collections.abc import Sequence

from zo2trl.layout.layout import Segment, Unit

__all__ = ["Ledger"]


class Ledger:
    """Positions of segments, and of newer bytes that were written beside their homes."""

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
