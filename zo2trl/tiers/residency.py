"""Residency: where every unit's bytes live, which records they have absorbed, and the files that restore them.

Does not: lend bytes, replay records, or decide when something is written.

Units in the disk tier are durable by themselves: their home is the newest version. Units in memory get one whenever
the store asks for a snapshot, so that a restart replays a bounded number of steps.

Invariants:
- The bytes at home and the position they have absorbed change together, under one lock, after the bytes are complete.
- Files are written by one thread, so that a unit's versions appear in order.
- Wholly frozen units are never written, unless somebody changed them from outside.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch

from zo2trl.errors import StoreError
from zo2trl.files.tracing import traced
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import Layout, Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.tiers.catch_up import Ledger
from zo2trl.tiers.first_weights import comparing, noting, refuse_lost_base
from zo2trl.tiers.prefetch import Arrival, Slot
from zo2trl.tiers.read_ahead import ReadAhead
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.tier import Reading, Source, Tier, Tiers, carve_plain, copy_pieces, gathered, host_bytes, stored_part
from zo2trl.tiers.unit_files import Draft, UnitFiles
from zo2trl.tiers.writer import Release, Writer, raise_first

__all__ = ["Residency"]


class Residency:
    """The bytes of one model at rest.

    Args:
        layout, placement: what the units are and where they live.
        tiers: empty tiers; closed with this object.
        files: versions on disk.
        device: where slots are.
        read_only: nothing is ever written to a file.
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
    ) -> None:
        self.layout, self.placement, self.files, self.read_only = layout, placement, files, read_only
        self.traffic: Counter[str] = Counter()  # bytes so far: h2d, d2h, disk_read, disk_written
        self._tiers, self._device, self._ledger = tiers, device, Ledger()
        self.inconsistent_reason: str | None = None  # what an error interrupted: no position describes the bytes
        self._views: Counter[int] = Counter()  # unit -> how often its home moved to other memory
        self._writes = Writer()
        self._invalidated: set[int] = set()  # segments on disk whose views users may have written to
        self.will_write_back: Callable[[Segment], bool] = lambda segment: True  # then a load compares every byte
        self._lock = threading.Lock()  # traffic, views and ledger are changed by worker threads, too
        self._staging = Staging(0, device=device)
        self._ahead = ReadAhead(self._staging, self._open)

    # -- moving in

    def populate(self, source: Source, *, keep_base: bool, kept_frozen: Collection[int] = ()) -> dict[int, int]:
        """Take over every unit's weights, one tensor at a time; returns tensor id -> CRC32 of its padded bytes.

        With `keep_base`, units with trainable tensors (and `kept_frozen`) that live in memory are written to files.
        """
        crcs: dict[int, int] = {}
        noted = noting(source, crcs)
        for unit in self.layout.units:
            self._tier(unit).add(unit, noted)
            needs_file = (keep_base and unit.is_trained) or unit.index in kept_frozen
            if needs_file and self.tier_of(unit) != "disk":
                self._save(unit, self.view(unit)[0], position=0, is_base=True)
        return crcs

    def restore(self, source: Source, *, base_crcs: Mapping[int, int], has_base: bool) -> None:
        """Bring every unit back from its newest version; units without one are taken from `source`, and compared.

        Without `has_base`, units with trainable tensors have been in files from the first step on.

        Raises:
            StoreCorrupt: a version is damaged.
            StoreForeign: `source` gives other weights than those the store was founded on.
        """
        compared = comparing(source, base_crcs, folder := self.files.folder.parent)
        for unit in self.layout.units:
            tier, record = self._tier(unit), self.files.newest(unit)
            if record is None:
                if not has_base:
                    refuse_lost_base(unit, folder)
                tier.add(unit, compared)
                continue
            if (name := self.tier_of(unit)) == "disk":
                self._tiers.disk.restore(unit, record)
            else:
                copy_pieces(self.files.read_checked(unit, record), self._tiers.in_memory(name).reserve(unit))
            self._ledger.place(self._segments([unit]), record.position)

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self.placement.tier_of[unit.index]

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """A unit's bytes at home (flat uint8) and a number that changes whenever that memory is another one."""
        with self._lock:
            return self._tier(unit).view(unit), self._views[unit.index]

    def tensors(self, unit: Unit, *, unless_version: int | None = None) -> tuple[list[torch.Tensor], int] | None:
        """A unit's tensors at home, and the number that `view` gives; None if that is `unless_version`."""
        with self._lock:
            now = self._views[unit.index]
            return None if now == unless_version else (self._tier(unit).tensors(unit), now)

    def position(self, segment: Segment) -> int:
        """Records that a segment's bytes at home have absorbed."""
        with self._lock:
            return self._ledger.position(segment)

    def is_resident(self, segment: Segment) -> bool:
        """True if the segment's home is on the device: leasing it moves nothing."""
        return self.tier_of(segment.unit) == "gpu"

    def weights(self, segment: Segment) -> torch.Tensor:
        """A resident segment's bytes in place."""
        return self._tiers.gpu.weights(segment)

    def absorbed(self, segment: Segment, position: int) -> None:
        """A resident segment was brought to `position` in place."""
        with self._lock:
            self._ledger.absorb(segment, position)

    # -- moving

    def relayout(self, layout: Layout, placement: Placement) -> None:
        """The same units in other segments, and in other tiers where the placement says so; see `move`."""
        for unit in self.layout.units:
            self._ledger.place(self._segments([unit]), self._one_position_of(unit))
        # What leaves the device makes room for what comes.
        for unit in sorted(self.layout.units, key=lambda unit: placement.tier_of[unit.index] == "gpu"):
            self.move(unit, placement.tier_of[unit.index])
        self.layout, self.placement = layout, placement
        self.invalidate_views()

    def move(self, unit: Unit, to: TierName) -> None:
        """Give a unit a home in another tier. If that fails (`StoreError`, out of memory), it keeps the one it has.

        All of it must be at one position, nothing of it lent, fetched ahead or being written; parameters that show its
        bytes keep the old memory alive until they are put to rest anew.
        """
        position, source = self._one_position_of(unit), self.tier_of(unit)
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
            torch.cuda.synchronize(self._device)  # a copy that nobody waits for any more may still read the old home
        with self._lock:
            self.placement = replace(self.placement, tier_of={**self.placement.tier_of, unit.index: to})
            self._views[unit.index] += 1
        old.drop(unit)

    def _move_to_disk(self, unit: Unit, position: int) -> None:
        if self.files.newest(unit) or not self._tiers.disk.find(unit, partial(carve_plain, self.view(unit)[0])):
            self._tiers.disk.open_version(unit, self._filed(unit, position))

    def make_staging(self, n_bytes: int) -> None:
        """Host memory for segments that come from or go to disk."""
        self._staging.close()
        on_disk = [self.layout.units[index].stored_bytes for index in self.placement.units_in("disk")]
        is_uneven = self.placement.units_in("cpu") or self.layout.leaf_blocks  # if not, the ring is enough
        ahead_bytes = max(on_disk, default=0) if is_uneven else 0
        self._staging = Staging(n_bytes if on_disk else 0, device=self._device, ahead_bytes=ahead_bytes)
        self._ahead = ReadAhead(self._staging, self._open)

    def read_ahead(self, upcoming: Iterable[Segment]) -> None:
        """See `ReadAhead.announce`."""
        self._ahead.announce(upcoming)

    def load(self, segment: Segment, slot: Slot) -> Arrival:
        """Home -> slot, in a fetch thread."""
        target = slot.buffer[: segment.stored_bytes]
        if self.tier_of(segment.unit) == "disk":
            reading = self._ahead.load(segment, target, slot)
            self._count(disk_read=segment.stored_bytes, h2d=segment.stored_bytes if self._device.type != "cpu" else 0)
            return Arrival(reading.position, reading.was_written_to, reading.is_checked)
        self._wait_for_write(segment)
        position = self.position(segment)
        self._staging.upload(self._tiers.cpu.weights(segment), target, slot)
        self._count(h2d=segment.stored_bytes)
        return Arrival(position)

    def _open(self, segment: Segment) -> Reading:
        self._wait_for_write(segment)
        with self._lock:  # one snapshot: a new version may be published while we copy the old one
            position, home = self._ledger.position(segment), self._tiers.disk.home(segment.unit)
        check_all, beside_view = self.will_write_back(segment), segment.index in self._invalidated
        return home.reading(segment.tensors, position=position, check_all=check_all, beside_view=beside_view)

    def _wait_for_write(self, segment: Segment) -> None:
        if (write := self._writes.get(segment.index)) is not None:
            # A host unit is about to change in place. A failure is raised by the traversal's end.
            wait([write])

    def validate_view(self, segment: Segment) -> None:
        """What a load brought was taken: the segment's view needs no second look."""
        self._invalidated.discard(segment.index)

    def invalidate_views(self) -> None:
        """Users are next: what they write into the views of units on disk is looked for at the next load."""
        self._invalidated = {segment.index for segment in self.layout.segments if self.tier_of(segment.unit) == "disk"}

    def keep_written(self, unit: Unit, *, position: int) -> None:
        """`begin_anew` with what is in a unit's view, beside write-backs of other units."""
        self._writes.now(self.begin_anew, [(unit, self.view(unit)[0])], position=position)

    def write_back(self, segment: Segment, weights: torch.Tensor, *, position: int) -> Future:
        """Slot -> home, later, in the writer thread; `weights` must stay until the future is done."""
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        work = partial(self._write, segment, weights, position=position, ready=ready)
        return self._writes.write_back(segment, work)

    def snapshot(self, unit: Unit) -> None:
        """Write a unit that lives in memory to a new version, later, unless it has that version already."""
        if self.tier_of(unit) == "cpu":  # changed by the writer thread only, so it is read there
            self._writes.later(self._save_host_unit, unit)
            return
        position = self._position_of(unit)
        if position is not None and self._is_news(unit, position):
            copied = self.view(unit)[0].to("cpu", copy=True)
            self._writes.later(self._save, unit, copied, position=position)

    def begin_anew(self, contents: Iterable[tuple[Unit, torch.Tensor]], *, position: int) -> None:
        """Give units bytes (flat uint8, their own views included) that no record leads to: all of them, or none."""
        drafts: list[Draft] = []
        try:
            for unit, data in contents:
                self._tier(unit).abandon(unit)
                drafts.append(self._draft(unit, data, position=position))
            records = self.files.publish_together(drafts)
            for record in records:
                if self.tier_of(unit := self.layout.units[record.unit]) != "disk":
                    copy_pieces(self.files.read_checked(unit, record), self.view(unit)[0])
            self._open_versions(records)
        except BaseException as error:
            self.inconsistent_reason = f"weights from outside were being taken over ({error})"
            for draft in drafts:
                with suppress(StoreError):
                    self.files.discard(draft)
            raise

    def set_back(self, unit: Unit, data: torch.Tensor, *, position: int) -> None:
        """Give one unit the bytes that an earlier part of the journal leads to."""
        self._tier(unit).abandon(unit)
        newest = self.files.newest(unit)
        on_disk = self.tier_of(unit) == "disk"
        if not on_disk:
            self.view(unit)[0].copy_(data)
            with self._lock:
                self._ledger.place(self._segments([unit]), position)
        if on_disk or (newest is not None and newest.position > position):
            self._open_versions([self.files.publish(self._draft(unit, data, position=position))])

    def _open_versions(self, records: Sequence[UnitRecord]) -> None:
        for record in records:
            unit = self.layout.units[record.unit]
            with self._lock:
                if self.tier_of(unit) == "disk":
                    self._tiers.disk.open_version(unit, record)
                    self._views[unit.index] += 1
                self._ledger.place(self._segments([unit]), record.position)
            self._count(disk_written=unit.stored_bytes)

    def earlier(self, unit: Unit, position: int, *, base: Source) -> tuple[torch.Tensor, int]:
        """A unit's bytes at or before a position, in main memory, and where they are: a version, or the base."""
        record = self.files.start_for(unit, position)
        if record is None:
            return gathered(unit, base), 0
        data = torch.zeros(unit.stored_bytes, dtype=torch.uint8)
        copy_pieces(self.files.read_checked(unit, record), data)
        return data, record.position

    # -- waiting

    def end_traversal(self) -> None:
        """Raise what went wrong in finished jobs; the others run on into the next traversal."""
        raise_first(self._writes.take_ended())

    def settle(self) -> None:
        """Wait for every job, and forget unit versions that did not get all their leaves in one traversal."""
        jobs = self._writes.take_all()
        for index in self._ledger.forget_drafts():
            self._tier(self.layout.units[index]).abandon(self.layout.units[index])
        raise_first(jobs)

    def close(self) -> None:
        """Let running jobs end, drop those that wait (the journal leads there again), release everything."""
        with ExitStack() as everything:
            everything.callback(self._tiers.close)
            everything.callback(self._staging.close)  # first: it waits for the copies out of pinned homes
            self._writes.close()

    # -- in the writer thread

    @traced("write back", lambda residency, segment, *_, **__: segment.unit.name)
    def _write(
        self, segment: Segment, weights: torch.Tensor, release: Release, *, position: int, ready: torch.Event | None
    ) -> None:
        tier, on_disk = self._tier(segment.unit), self.tier_of(segment.unit) == "disk"
        if on_disk:
            pieces = self._staging.download(weights, ready)
            complete = self._tiers.disk.write_pieces(segment, pieces, version=position)
        else:
            with self._staging.downloaded(weights, ready) as data:
                complete = tier.write(segment, data, version=position)
        release()  # the slot is free while the file is being synced
        make_home = tier.publish(segment.unit) if complete else None
        with self._lock:
            self._ledger.draft(segment, position)
            if make_home is not None:
                make_home()
                self._ledger.publish(segment.unit)
                self._views[segment.unit.index] += on_disk
        self._count(
            disk_written=segment.stored_bytes if on_disk else 0,
            d2h=segment.stored_bytes if self._device.type != "cpu" or not on_disk else 0,
        )

    def _save_host_unit(self, unit: Unit) -> None:
        position = self._position_of(unit)
        if position is not None and self._is_news(unit, position):
            self._save(unit, self.view(unit)[0], position=position)

    def _save(self, unit: Unit, data: torch.Tensor, *, position: int, is_base: bool = False) -> None:
        """A unit that lives in memory -> a new version."""
        self.files.publish(self._draft(unit, data, position=position), is_base=is_base)
        self._count(disk_written=unit.stored_bytes)

    def _filed(self, unit: Unit, position: int) -> UnitRecord:
        """A version that holds what a unit in memory holds: the newest, or one that is written now."""
        newest = self.files.newest(unit)
        if newest is not None and (newest.position == position or not unit.is_trained):
            return newest
        self._count(disk_written=unit.stored_bytes)
        return self.files.publish(self._draft(unit, self.view(unit)[0], position=position))

    def _draft(self, unit: Unit, data: torch.Tensor, *, position: int) -> Draft:
        return self.files.draft(unit, lambda spec: host_bytes(stored_part(data, spec)), position=position)

    def _is_news(self, unit: Unit, position: int) -> bool:
        newest = self.files.newest(unit)
        return position > (newest.position if newest else 0)

    # -- small print

    def _tier(self, unit: Unit) -> Tier:
        return self._tiers[self.tier_of(unit)]

    def _segments(self, units: Collection[Unit]) -> list[Segment]:
        wanted = {unit.index for unit in units}
        return [segment for segment in self.layout.segments if segment.unit.index in wanted]

    def _position_of(self, unit: Unit) -> int | None:
        """The one position of all of a unit's trainable segments; None if they differ."""
        with self._lock:
            found = {self._ledger.position(s) for s in self._segments([unit]) if s.is_trainable}
        return found.pop() if len(found) == 1 else None if found else 0

    def _one_position_of(self, unit: Unit) -> int:
        position = self._position_of(unit)
        assert position is not None, "all of a unit is at one position when it is cut anew or moved"
        return position

    def _count(self, **n_bytes: int) -> None:
        with self._lock:
            self.traffic.update(n_bytes)
