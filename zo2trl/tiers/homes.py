"""Homes: where every unit's bytes live, which records they have absorbed, and the files that would bring them back.

Does not: lend bytes, replay records, or decide when something is written.

Units in the disk tier are durable by themselves: their home is the newest version. Units in memory get one whenever
the store asks for a snapshot, so that a restart replays a bounded number of steps.

Invariants:
- The bytes at home and the position they have absorbed change together, under one lock, after the bytes are complete.
- Files are written by one thread, so that a unit's versions appear in order.
- Wholly frozen units are never written, unless somebody changed them from outside.
"""

import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress

import torch

from zo2trl.errors import StoreCorrupt, StoreError, StoreForeign
from zo2trl.tiers.cpu import HostTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.gpu import DeviceTier
from zo2trl.tiers.journal import UnitRecord
from zo2trl.tiers.layout import Layout, Segment, TensorSpec, Unit
from zo2trl.tiers.placement import Placement, TierName
from zo2trl.tiers.prefetch import Arrival, Slot
from zo2trl.tiers.replay import Ledger
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.three import Tiers
from zo2trl.tiers.tier import Source, Tier, carve, host_bytes
from zo2trl.tiers.unit_files import Draft, UnitFiles, padded_crc
from zo2trl.tiers.waiting import wait_for_all

__all__ = ["Homes"]

logger = logging.getLogger(__name__)


class Homes:
    """The bytes of one model at rest.

    Args:
        layout, placement: what the units are and where they live.
        tiers: empty tiers; closed with this object.
        files: versions on disk.
        device: where slots are.
        read_only: nothing is ever written to a file.
    """

    traffic: Counter[str]  # bytes so far: h2d, d2h, disk_read, disk_written

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
        self.traffic = Counter()
        self._tiers, self._device = tiers, device
        self._ledger = Ledger()
        self.spoiled: str | None = None  # what was being done when an error left bytes that no position describes
        self._views: Counter[int] = Counter()  # unit -> how often its home moved to other memory
        self._writes: dict[int, Future] = {}  # segment -> its newest write-back
        self._snapshots: list[Future] = []  # and write-backs that a newer one of the same segment has followed
        self._doubtful: set[int] = set()  # segments on disk whose views users may have written to
        self._lock = threading.Lock()  # traffic, views and ledger are changed by worker threads, too
        self._staging = Staging(0, device=device)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="zo2trl-write")

    # -- moving in

    def found(self, source: Source, *, keep_base: bool) -> dict[int, int]:
        """Take over every unit's weights, one tensor at a time; returns tensor id -> CRC32 of its padded bytes.

        With `keep_base`, units with trainable tensors that live in memory are written to files as well.
        """
        crcs: dict[int, int] = {}

        def noted(spec: TensorSpec) -> torch.Tensor:
            value = source(spec)
            crcs[spec.tensor_id] = padded_crc(spec, host_bytes(value))
            return value

        for unit in self.layout.units:
            self._tier(unit).adopt(unit, noted)
            if keep_base and unit.is_trained and self.tier_of(unit) != "disk":
                self._save(unit, self.view(unit)[0], position=0, is_origin=True)
        return crcs

    def restore(self, source: Source, *, base_crcs: Mapping[int, int], has_base: bool) -> None:
        """Bring every unit back from its newest version; units without one are taken from `source`, and compared.

        Without `has_base`, units with trainable tensors have been in files from the first step on.

        Raises:
            StoreCorrupt: a version is damaged.
            StoreForeign: `source` gives other weights than those the store was founded on.
        """

        def compared(spec: TensorSpec) -> torch.Tensor:
            value = source(spec)
            found = padded_crc(spec, host_bytes(value))
            if found != base_crcs[spec.tensor_id]:
                raise StoreForeign(
                    f"{spec.name} is not what it was when {self.files.folder.parent} was founded (CRC {found:08x}, "
                    f"then {base_crcs[spec.tensor_id]:08x}), and the run continues from those weights. Load the same "
                    "model as then, or start anew with another `store_dir`."
                )
            return value

        for unit in self.layout.units:
            tier, record = self._tier(unit), self.files.newest(unit)
            if record is None:
                self._refuse_lost_base(unit, has_base=has_base)
                tier.adopt(unit, compared)
                continue
            if isinstance(tier, DiskTier):
                tier.restore(unit, record)
            else:
                assert isinstance(tier, (DeviceTier, HostTier))
                tier.fill(unit, self.files.read_checked(unit, record))
            self._ledger.place(self._segments([unit]), record.position)

    def _refuse_lost_base(self, unit: Unit, *, has_base: bool) -> None:
        if unit.is_trained and not has_base:
            raise StoreCorrupt(
                f"The journal in {self.files.folder.parent} names no version of unit {unit.name}, whose first weights "
                "are nowhere else: it was cut or replaced. Restore the journal from a copy."
            )

    # -- looking

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self.placement.tier_of[unit.index]

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """A unit's bytes at home (flat uint8) and a number that changes whenever that memory is another one."""
        with self._lock:
            return self._tier(unit).view(unit), self._views[unit.index]

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

    def cut_anew(self, layout: Layout, placement: Placement) -> None:
        """The same units in other segments. Every unit must be at one position."""
        for unit in self.layout.units:
            position = self._position_of(unit)
            assert position is not None, "a unit is cut anew when all of it is at one position"
            self._ledger.place(self._segments([unit]), position)
        self.layout, self.placement = layout, placement

    def make_staging(self, slot_bytes: int) -> None:
        """Host buffers for segments that come from or go to disk."""
        self._staging.close()
        self._staging = Staging(slot_bytes if self.placement.units_in("disk") else 0, device=self._device)

    def load(self, segment: Segment, slot: Slot) -> Arrival:
        """Home -> slot, in a fetch thread."""
        write = self._writes.get(segment.index)
        if write is not None:
            # A host unit is about to change in place. If the write fails, the march's end says so: the home and its
            # position are still what they were.
            wait([write])
        on_disk = self.tier_of(segment.unit) == "disk"
        with self._lock:  # one snapshot: a new version may be published while we copy the old one
            position = self._ledger.position(segment)
            disk_home = self._tiers.disk.home(segment.unit) if on_disk else None
        target = slot.buffer[: segment.n_bytes]
        if disk_home is None:
            self._staging.upload(self._tiers.cpu.weights(segment), target, slot)
            self._count(h2d=segment.n_bytes)
            return Arrival(position)
        is_doubtful, written_to = segment.index in self._doubtful, False

        def read(into: memoryview) -> None:
            nonlocal written_to
            disk_home.read(segment.tensors, into)
            written_to = is_doubtful and disk_home.was_written_to(segment.tensors, into)

        self._staging.read_and_upload(read, target, slot)
        self._count(disk_read=segment.n_bytes, h2d=segment.n_bytes if self._device.type != "cpu" else 0)
        return Arrival(position, written_to)

    def trust_view(self, segment: Segment) -> None:
        """What a load brought was taken: the segment's view needs no second look."""
        self._doubtful.discard(segment.index)

    def doubt_views(self) -> None:
        """Users are next: what they write into the views of units on disk is looked for at the next load."""
        self._doubtful = {segment.index for segment in self.layout.segments if self.tier_of(segment.unit) == "disk"}

    def keep_written(self, unit: Unit, *, position: int) -> None:
        """`begin_anew` with what is in a unit's view, beside write-backs of other units."""
        self._writer.submit(self.begin_anew, [(unit, self.view(unit)[0])], position=position).result()

    def write_back(self, segment: Segment, weights: torch.Tensor, *, position: int) -> Future:
        """Slot -> home, later, in the writer thread; `weights` must stay until the future is done."""
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        write = self._writer.submit(self._write, segment, weights, position=position, ready=ready)
        before = self._writes.get(segment.index)
        self._writes[segment.index] = write
        if before is not None:
            self._snapshots.append(before)
        return write

    def snapshot(self, unit: Unit) -> None:
        """Write a unit that lives in memory to a new version, later, unless it has that version already."""
        if self.tier_of(unit) == "cpu":  # changed by the writer thread only, so it is read there
            self._snapshots.append(self._writer.submit(self._save_host_unit, unit))
            return
        position = self._position_of(unit)
        if position is not None and self._is_news(unit, position):
            copied = self.view(unit)[0].to("cpu", copy=True)
            self._snapshots.append(self._writer.submit(self._save, unit, copied, position=position))

    def begin_anew(self, contents: Iterable[tuple[Unit, torch.Tensor]], *, position: int) -> None:
        """Give units bytes (flat uint8, their own views included) that no record leads to: all of them, or none."""
        drafts: list[Draft] = []
        try:
            for unit, data in contents:
                self._tier(unit).abandon(unit)
                drafts.append(self._draft(unit, data, position=position))
            records = self.files.publish_together(drafts)
            for record in records:
                self._fill(self.layout.units[record.unit], record)
            self._move_in(records)
        except BaseException as error:
            self.spoiled = f"weights from outside were being taken over ({error})"
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
            self._move_in([self.files.publish(self._draft(unit, data, position=position))])

    def _fill(self, unit: Unit, record: UnitRecord) -> None:
        """A version -> a home in memory, in place."""
        if self.tier_of(unit) != "disk":
            home = self.view(unit)[0]
            for start, piece in self.files.read_checked(unit, record):
                home[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))

    def _move_in(self, records: Sequence[UnitRecord]) -> None:
        for record in records:
            unit = self.layout.units[record.unit]
            with self._lock:
                if self.tier_of(unit) == "disk":
                    self._tiers.disk.move_in(unit, record)
                    self._views[unit.index] += 1
                self._ledger.place(self._segments([unit]), record.position)
            self._count(disk_written=unit.n_bytes)

    def earlier(self, unit: Unit, position: int, *, base: Source) -> tuple[torch.Tensor, int]:
        """A unit's bytes at or before a position, in main memory, and where they are: a version, or the base."""
        data = torch.zeros(unit.n_bytes, dtype=torch.uint8)
        record = self.files.start_for(unit, position)
        if record is None:
            for spec in unit.tensors:
                carve(data, spec).copy_(base(spec))
            return data, 0
        for start, piece in self.files.read_checked(unit, record):
            data[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))
        return data, record.position

    # -- waiting

    def end_march(self) -> None:
        """Raise what went wrong in finished jobs; the others run on into the next march."""
        done = [index for index, write in self._writes.items() if write.done()]
        snapshots = [job for job in self._snapshots if job.done()]
        self._snapshots = [job for job in self._snapshots if job not in snapshots]
        _raise_first([*(self._writes.pop(index) for index in done), *snapshots])

    def settle(self) -> None:
        """Wait for every job, and forget unit versions that did not get all their leaves in one march."""
        writes, snapshots = dict(self._writes), self._snapshots
        names = sorted({s.unit.name for s in self.layout.segments if s.index in writes}) or ["snapshots"]
        wait_for_all([*writes.values(), *snapshots], what=f"writes of {', '.join(names)}")
        # Only now: a fetch thread that still loads one of these segments must find the write it has to wait for.
        for index in writes:
            del self._writes[index]
        self._snapshots = []
        for index in self._ledger.forget_drafts():
            self._tier(self.layout.units[index]).abandon(self.layout.units[index])
        _raise_first([*writes.values(), *snapshots])

    def close(self) -> None:
        """Let running jobs end, drop those that wait (the journal leads there again), release everything."""
        with ExitStack() as everything:
            everything.callback(self._staging.close)
            everything.callback(self._tiers.close)
            self._writer.shutdown(wait=True, cancel_futures=True)
            jobs, self._writes, self._snapshots = [*self._writes.values(), *self._snapshots], {}, []
            for job in jobs:
                if not job.cancelled() and (error := job.exception()) is not None:
                    logger.warning("A unit was not written, and an older version of it is kept: %s", str(error))

    # -- in the writer thread

    def _write(self, segment: Segment, weights: torch.Tensor, *, position: int, ready: torch.Event | None) -> None:
        tier = self._tier(segment.unit)
        with self._staging.downloaded(weights, ready) as data:
            complete = tier.write(segment, data, version=position)
        on_disk = self.tier_of(segment.unit) == "disk"
        move_in = tier.publish(segment.unit) if complete else None
        with self._lock:
            self._ledger.draft(segment, position)
            if move_in is not None:
                move_in()
                self._ledger.publish(segment.unit)
                self._views[segment.unit.index] += on_disk
        self._count(
            disk_written=segment.n_bytes if on_disk else 0,
            d2h=segment.n_bytes if self._device.type != "cpu" or not on_disk else 0,
        )

    def _save_host_unit(self, unit: Unit) -> None:
        position = self._position_of(unit)
        if position is not None and self._is_news(unit, position):
            self._save(unit, self.view(unit)[0], position=position)

    def _save(self, unit: Unit, data: torch.Tensor, *, position: int, is_origin: bool = False) -> None:
        """A unit that lives in memory -> a new version."""
        self.files.publish(self._draft(unit, data, position=position), is_origin=is_origin)
        self._count(disk_written=unit.n_bytes)

    def _draft(self, unit: Unit, data: torch.Tensor, *, position: int) -> Draft:
        draft = self.files.create(unit, position=position)
        try:
            for spec in unit.tensors:
                self.files.write(draft, [spec], host_bytes(carve(data, spec)))
        except BaseException:
            self.files.discard(draft)
            raise
        return draft

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

    def _count(self, **n_bytes: int) -> None:
        with self._lock:
            self.traffic.update(n_bytes)


def _raise_first(jobs: Iterable[Future]) -> None:
    for job in jobs:
        job.result()
