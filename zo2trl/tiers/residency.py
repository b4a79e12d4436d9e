"""Residency: the homes of one model's units in three tiers, from the first weights on.

Does not: lend bytes, replay records, or decide when something is written. Segments move in transfers.py, versions are
written in snapshots.py, and locations.py holds the state that all of them share.

Invariants:
- Files are written by one thread, so that a unit's versions appear in order.
- Wholly frozen units are never written, unless they were changed from outside.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial

import torch

from zo2trl.layout.layout import Layout, Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.tiers.first_weights import comparing, noting, refuse_lost_base
from zo2trl.tiers.locations import Locations
from zo2trl.tiers.snapshots import Snapshots
from zo2trl.tiers.tier import Source, Tiers, carve_plain, copy_pieces
from zo2trl.tiers.transfers import Transfers
from zo2trl.tiers.unit_files import UnitFiles
from zo2trl.tiers.uploader import Uploader
from zo2trl.tiers.writer import Writer, raise_first

__all__ = ["Residency"]


class Residency:
    """All bytes of one model.

    Args:
        layout, placement: what the units are and where they live.
        tiers: empty tiers; closed with this object.
        files: versions on disk.
        device: where slots are.
        read_only: nothing is ever written to a file.
        uploader: copies into slots; None: a direct one.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        tiers: Tiers,
        files: UnitFiles,
        device: torch.device,
        read_only: bool = False,
        uploader: Uploader | None = None,
    ) -> None:
        self.files, self.read_only, self._device = files, read_only, device
        self._tiers, self._writer = tiers, Writer()
        self.locations = Locations(layout, placement, tiers)
        self.snapshots = Snapshots(self.locations, files, self._writer)
        self.transfers = Transfers(self.locations, self._writer, device=device, uploader=uploader)

    @property
    def layout(self) -> Layout:
        """What the units are."""
        return self.locations.layout

    @property
    def placement(self) -> Placement:
        """Where they live."""
        return self.locations.placement

    # -- first weights

    def populate(self, source: Source, *, keep_base: bool, kept_frozen: Collection[int] = ()) -> dict[int, int]:
        """Take over every unit's weights, one tensor at a time; returns tensor id -> CRC32 of its padded bytes.

        With `keep_base`, units with trainable tensors (and `kept_frozen`) that live in memory are written to files.
        """
        crcs: dict[int, int] = {}
        noted = noting(source, crcs)
        for unit in self.layout.units:
            self.locations.tier(unit).add(unit, noted)
            needs_file = (keep_base and unit.is_trained) or unit.index in kept_frozen
            if needs_file and self.locations.tier_of(unit) != "disk":
                self.snapshots.save(unit, self.locations.view(unit)[0], position=0, is_base=True)
        return crcs

    def restore(self, source: Source, *, base_crcs: Mapping[int, int], has_base: bool) -> None:
        """Bring every unit back from its newest version; units without one are taken from `source`, and compared.

        Without `has_base`, units with trainable tensors have been in files from the first step on.

        Raises:
            StoreCorrupt: a version is damaged.
            StoreForeign: `source` gives other weights than those the store began with.
        """
        compared = comparing(source, base_crcs, folder := self.files.folder.parent)
        for unit in self.layout.units:
            record, name = self.files.newest(unit), self.locations.tier_of(unit)
            if record is None:
                if not has_base:
                    refuse_lost_base(unit, folder)
                self._tiers[name].add(unit, compared)
                continue
            if name == "disk":
                self._tiers.disk.restore(unit, record)
            else:
                copy_pieces(self.files.read_checked(unit, record), self._tiers.in_memory(name).reserve(unit))
            self.locations.ledger.place(self.locations.segments_of([unit]), record.position)

    # -- units that stay on the device

    def is_resident(self, segment: Segment) -> bool:
        """True if the segment's home is on the device: leasing it moves nothing."""
        return self.locations.tier_of(segment.unit) == "gpu"

    def weights(self, segment: Segment) -> torch.Tensor:
        """A resident segment's bytes in place."""
        return self._tiers.gpu.weights(segment)

    def absorbed(self, segment: Segment, position: int) -> None:
        """Note that a resident segment was brought to `position` in place."""
        with self.locations.lock:
            self.locations.ledger.absorb(segment, position)

    # -- other places for units

    def relayout(self, layout: Layout, placement: Placement) -> None:
        """Cut the same units into other segments, and move them where the placement says so; see `move`."""
        locations = self.locations
        for unit in self.layout.units:
            locations.ledger.place(locations.segments_of([unit]), locations.one_position_of(unit))
        # What leaves the device makes room for what comes.
        for unit in sorted(self.layout.units, key=lambda unit: placement.tier_of[unit.index] == "gpu"):
            self.move(unit, placement.tier_of[unit.index])
        locations.layout, locations.placement = layout, placement
        self.transfers.invalidate_views()

    def move(self, unit: Unit, to: TierName) -> None:
        """Give a unit a home in another tier. If that fails (`StoreError`, out of memory), it keeps the one it has.

        All of it must be at one position, nothing of it lent, fetched ahead or being written; parameters that show its
        bytes keep the old memory alive until they are bound home again.
        """
        position, source = self.locations.one_position_of(unit), self.locations.tier_of(unit)
        old, new = self._tiers[source], self._tiers[to]
        if new is old:
            return
        try:
            if to == "disk":
                self._move_to_disk(unit, position)
            elif source == "disk":
                copy_pieces(self._tiers.disk.home(unit).pieces(), self._tiers.in_memory(to).reserve(unit))
            else:
                self._tiers.in_memory(to).reserve(unit).copy_(old.view(unit))
        except BaseException:
            new.drop(unit)
            raise
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a copy that is not awaited any more may still read the old home
        self.locations.move(unit, to)
        old.drop(unit)

    def _move_to_disk(self, unit: Unit, position: int) -> None:
        view, _ = self.locations.view(unit)
        may_be_in_files = unit.is_plain and self.files.newest(unit) is None
        if not may_be_in_files or not self._tiers.disk.find(unit, partial(carve_plain, view)):
            self._tiers.disk.open_version(unit, self.snapshots.version_of(unit, position))

    # -- waiting

    def end_traversal(self) -> None:
        """Raise what went wrong in finished jobs; the others run on into the next traversal."""
        raise_first(self._writer.take_ended())

    def settle(self) -> None:
        """Wait for every job, and forget unit versions that did not get all their leaves in one traversal."""
        jobs, locations = self._writer.take_all(), self.locations
        for index in locations.ledger.forget_drafts():
            locations.tier(locations.layout.units[index]).abandon(locations.layout.units[index])
        raise_first(jobs)

    def close(self) -> None:
        """Let running jobs end, drop those that wait (the journal leads there again), release everything."""
        with ExitStack() as everything:
            everything.callback(self._tiers.close)
            everything.callback(self.transfers.close)  # first: it waits for the copies out of pinned homes
            self._writer.close()
