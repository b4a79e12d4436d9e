"""Locations: which tier holds each unit, and which records of the journal its bytes have absorbed.

Does not: move bytes (transfers.py), or write versions (snapshots.py).
Invariant: bytes at home and the position they have absorbed change together, under `lock`, after the bytes are
complete.
"""

import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import torch

from zo2trl.layout.layout import Layout, Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.tiers.ledger import Ledger
from zo2trl.tiers.tier import Tier, Tiers

__all__ = ["Locations"]


class Locations:
    """The state of all homes, which the writer, fetch threads and the traversal's thread share.

    Args:
        layout, placement: what the units are and where they live.
        tiers: homes by tier.
    """

    def __init__(self, layout: Layout, placement: Placement, tiers: Tiers) -> None:
        self.layout, self.placement, self.tiers = layout, placement, tiers
        self.ledger = Ledger()
        self.lock = threading.Lock()  # of ledger, traffic and view numbers, and of a change of home
        self.traffic: Counter[str] = Counter()  # bytes so far: h2d, d2h, disk_read, disk_written
        self.inconsistent_reason: str | None = None  # what an error interrupted: no position describes the bytes
        self._view_numbers: Counter[int] = Counter()  # unit -> how often its home moved to other memory

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self.placement.tier_of[unit.index]

    def tier(self, unit: Unit) -> Tier:
        """The tier a unit lives in."""
        return self.tiers[self.tier_of(unit)]

    def is_on_disk(self, segment: Segment) -> bool:
        """Whether loading a segment means reading a file."""
        return self.tier_of(segment.unit) == "disk"

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """A unit's bytes at home (flat uint8) and a number that changes whenever that memory is another one."""
        with self.lock:
            return self.tier(unit).view(unit), self._view_numbers[unit.index]

    def tensors(self, unit: Unit, *, unless_version: int | None = None) -> tuple[list[torch.Tensor], int] | None:
        """A unit's tensors at home, and the number that `view` gives; None if that is `unless_version`."""
        with self.lock:
            now = self._view_numbers[unit.index]
            return None if now == unless_version else (self.tier(unit).tensors(unit), now)

    def has_new_view(self, unit: Unit) -> None:
        """Note that a unit's home is in other memory now. The caller holds `lock`."""
        self._view_numbers[unit.index] += 1

    def move(self, unit: Unit, to: TierName) -> None:
        """Note that a unit's home is in another tier now."""
        with self.lock:
            self.placement = replace(self.placement, tier_of={**self.placement.tier_of, unit.index: to})
            self.has_new_view(unit)

    def segments_of(self, units: Collection[Unit]) -> list[Segment]:
        """All segments of some units."""
        wanted = {unit.index for unit in units}
        return [segment for segment in self.layout.segments if segment.unit.index in wanted]

    def position(self, segment: Segment) -> int:
        """Records that a segment's bytes at home have absorbed."""
        with self.lock:
            return self.ledger.position(segment)

    def position_of(self, unit: Unit) -> int | None:
        """The one position of all of a unit's trainable segments; None if they differ."""
        with self.lock:
            found = {self.ledger.position(s) for s in self.segments_of([unit]) if s.is_trainable}
        return found.pop() if len(found) == 1 else None if found else 0

    def one_position_of(self, unit: Unit) -> int:
        """The position of a unit whose segments are all at one."""
        position = self.position_of(unit)
        assert position is not None, "all of a unit is at one position when it is cut anew or moved"
        return position

    def count(self, **n_bytes: int) -> None:
        """Add to the traffic."""
        with self.lock:
            self.traffic.update(n_bytes)
