"""TieredStore: the one owner of a model's parameters, wherever their bytes live.

Does not: know about models, modules, probes or losses; it lends clean bytes and absorbs records.

Invariants:
- What `lease` lends has absorbed every record of the journal, and holds no perturbation.
- Frozen segments are never written, in any tier.
- The bytes at home and the position they have absorbed change together, in one thread, after the bytes are complete;
  Ctrl-C is held back meanwhile.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from zo2trl.amp.codecs import PLAIN
from zo2trl.tiers.gpu import DeviceTier
from zo2trl.tiers.interrupts import uninterrupted
from zo2trl.tiers.journal import Journal
from zo2trl.tiers.layout import Layout, Segment, Unit, VisitPoint
from zo2trl.tiers.placement import Placement, TierName, format_bytes
from zo2trl.tiers.prefetch import Fetch, Prefetcher, Slot
from zo2trl.tiers.replay import Ledger, catch_up
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.tier import Source, Tier, tensor_view
from zo2trl.zo.records import Record
from zo2trl.zo.rules import UpdateRule

__all__ = ["TieredStore"]


class TieredStore:
    """Parameters of one model in three tiers, and the journal of the steps they have to absorb.

    Args:
        layout, placement: what the units are and where they live.
        journal: receives every step; its records are what leases catch up with.
        rule: how a record changes weights.
        tiers: a home for each tier name; the store closes them.
        write_back_every: steps between write-backs of a unit, for the tiers "cpu" and "disk".
        device: where leases are lent.
        restart_journal: keeps the closed journal under another name and opens an empty one in its place.
        on_close: called once when everything else is closed (gives up the folder).
    """

    traffic: Counter[str]  # bytes since the store was opened: h2d, d2h, disk_read, disk_written

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        journal: Journal,
        rule: UpdateRule,
        tiers: Mapping[TierName, Tier],
        write_back_every: Mapping[TierName, int],
        device: torch.device,
        restart_journal: Callable[[], Journal],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._restart_journal = restart_journal
        self._on_close = on_close
        self.layout, self.placement, self.journal, self.rule, self.device = layout, placement, journal, rule, device
        self.traffic = Counter()
        self._tiers = tiers
        self._every = write_back_every
        self._ledger = Ledger()
        self._versions: Counter[int] = Counter()  # unit -> how often its home moved
        self._writes: dict[int, Future] = {}  # segment -> its newest write-back
        self._lock = threading.Lock()  # traffic, versions and ledger are also changed by the worker threads
        self._eager = False
        self._staging = Staging(0, device=device)
        self.is_open = True
        self._prefetcher: Prefetcher | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="zo2trl-write")

    # -- homes

    def adopt(self, source: Source) -> None:
        """Take over every unit's weights, one tensor at a time."""
        for unit in self.layout.units:
            self._tier(unit).adopt(unit, source)
        self._start_prefetching()

    @uninterrupted
    def replace(self, source: Source) -> None:
        """Overwrite every unit's weights, and start a new journal: the steps so far do not lead to these weights."""
        self.flush()
        version = len(self.journal.records)
        for unit in self.layout.units:
            staged = torch.zeros(unit.n_bytes, dtype=torch.uint8)
            for spec in unit.tensors:
                tensor_view(staged, spec).copy_(source(spec))
            for segment in (s for s in self.layout.segments if s.unit is unit):
                data = staged[segment.byte_start : segment.byte_start + segment.n_bytes]
                self._tier(unit).write(segment, data, version=version)
            self._tier(unit).publish(unit)
            self._versions[unit.index] += self.tier_of(unit) == "disk"
        self.journal.close()
        self.journal = self._restart_journal()
        self._ledger = Ledger()
        self.homes_changed()

    @uninterrupted
    def regranulate(self, layout: Layout, placement: Placement) -> None:
        """The same units, visited at other points; only before the first record."""
        assert not self.journal.records, "segments are numbered per layout: nothing may have been absorbed yet"
        if self._prefetcher is not None:
            self._prefetcher.close()
        self.layout, self.placement = layout, placement
        self._start_prefetching()

    def _start_prefetching(self) -> None:
        streamed = [s for p in self.layout.points for s in p.segments if not self._is_resident(s)]
        slot_bytes = PLAIN.wire_bytes(self.placement.slot_bytes)
        self._staging.close()
        self._staging = Staging(slot_bytes if self.placement.units_in("disk") else 0, device=self.device)
        self._prefetcher = Prefetcher(
            streamed, self._load, n_slots=self.placement.n_slots, device=self.device, slot_bytes=slot_bytes
        )

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self.placement.tier_of[unit.index]

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """A unit's bytes at home (flat uint8) and a number that changes whenever that memory is another one."""
        with self._lock:
            return self._tier(unit).view(unit), self._versions[unit.index]

    def describe(self) -> list[tuple[str, TierName, int]]:
        """(unit, tier, bytes) for people."""
        return [(unit.name, self.tier_of(unit), unit.n_bytes) for unit in self.layout.units]

    def summary(self) -> str:
        """One line on where the weights live."""
        parts = []
        for tier in ("gpu", "cpu", "disk"):
            units = [self.layout.units[index] for index in self.placement.units_in(tier)]
            if units:
                parts.append(f"{tier}: {len(units)} units, {format_bytes(sum(unit.n_bytes for unit in units))}")
        ring = f"{self.placement.n_slots} slots of {format_bytes(self.placement.slot_bytes)}"
        visits = "leaf by leaf" if self.layout.leaf_blocks else "block by block"
        return f"{'; '.join(parts)}; ring: {ring}; {format_bytes(self.placement.device_bytes)} on the device, {visits}"

    # -- leases

    @contextmanager
    def lease(self, point: VisitPoint) -> Iterator[list[torch.Tensor]]:
        """Lend the clean weights of a point's segments: flat uint8 on the device, valid inside the block."""
        fetches: list[tuple[Fetch, Future | None]] = []
        try:
            yield self._borrow(point, fetches)
        finally:
            self._give_back(fetches)

    @uninterrupted
    def _borrow(self, point: VisitPoint, fetches: list[tuple[Fetch, Future | None]]) -> list[torch.Tensor]:
        return [
            self._resident(segment) if self._is_resident(segment) else self._fetch(segment, fetches)
            for segment in point.segments
        ]

    @uninterrupted
    def _give_back(self, fetches: Sequence[tuple[Fetch, Future | None]]) -> None:
        for fetch, write in fetches:
            assert self._prefetcher is not None
            self._prefetcher.give_back(fetch, after=write)

    @contextmanager
    def writing_back(self) -> Iterator[None]:
        """Inside, every unit that is behind is written back at its visit: nothing has to catch up with it again."""
        before, self._eager = self._eager, True
        try:
            yield
        finally:
            self._eager = before

    @uninterrupted
    def expect(self, points: Sequence[VisitPoint]) -> None:
        """The visits one march is expected to make, in order."""
        assert self._prefetcher is not None
        self._prefetcher.expect([s for point in points for s in point.segments if not self._is_resident(s)])

    @uninterrupted
    def append(self, record: Record) -> None:
        """Make a step durable in the journal; every unit absorbs it at its next visit, rest at once."""
        self.journal.append(record)
        for segment in self.layout.rest.segments:
            self._resident(segment)

    @uninterrupted
    def end_march(self) -> None:
        """Raise what went wrong in finished write-backs; the others run on into the next march."""
        if self.layout.leaf_blocks:
            self.settle()
        done = [index for index, write in self._writes.items() if write.done()]
        _raise_first([self._writes.pop(index) for index in done])

    @uninterrupted
    def settle(self) -> None:
        """Wait for every write-back, and forget unit versions that did not get all their leaves in one march."""
        writes = dict(self._writes)
        wait(writes.values())
        # Only now: a fetch thread that still loads one of these segments must find the write it has to wait for.
        for index in writes:
            del self._writes[index]
        for index in self._ledger.forget_drafts():
            unit = self.layout.units[index]
            self._tier(unit).abandon(unit)
        _raise_first(writes.values())

    def flush(self) -> None:
        """Bring every home up to date: saved weights and views are never a step behind."""
        with self.writing_back():
            for segment in filter(self._is_behind, self.layout.segments):
                alone = VisitPoint(index=-1, module_name="", block_name="", segments=(segment,))
                with self.lease(alone):
                    pass
        self.settle()
        self.homes_changed()

    def is_behind(self, unit: Unit) -> bool:
        """True while steps are in the journal that a unit's bytes at home have not absorbed."""
        return any(self._is_behind(segment) for segment in self.layout.segments if segment.unit is unit)

    def _is_behind(self, segment: Segment) -> bool:
        return segment.is_trainable and self._ledger.position(segment) < len(self.journal.records)

    @uninterrupted
    def homes_changed(self) -> None:
        """Weights at home were changed from outside, or may soon be: forget what was fetched ahead."""
        assert self._prefetcher is not None
        self._prefetcher.drop()

    @uninterrupted
    def close(self) -> None:
        """Stop the threads, close the journal and the tiers; idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._writer.shutdown(wait=True)
        self.journal.close()
        for tier in self._tiers.values():
            tier.close()
        self._staging.close()
        self._on_close()

    # -- how a segment gets its bytes

    def _tier(self, unit: Unit) -> Tier:
        return self._tiers[self.tier_of(unit)]

    def _is_resident(self, segment: Segment) -> bool:
        return self.tier_of(segment.unit) == "gpu"

    def _resident(self, segment: Segment) -> torch.Tensor:
        tier = self._tiers["gpu"]
        assert isinstance(tier, DeviceTier)
        weights = tier.weights(segment)
        records = self.journal.records
        catch_up(weights, segment, records, position=self._ledger.position(segment), rule=self.rule)
        self._ledger.absorb(segment, len(records))
        return weights

    def _fetch(self, segment: Segment, fetches: list[tuple[Fetch, Future | None]]) -> torch.Tensor:
        assert self._prefetcher is not None
        fetch, position = self._prefetcher.take(segment)
        fetches.append((fetch, None))
        weights = PLAIN.decode(fetch.wire)
        records = self.journal.records
        behind = catch_up(weights, segment, records, position=position, rule=self.rule)
        if behind and self._is_due(segment.unit):
            fetches[-1] = (fetch, self._write_back(segment, weights))
        return weights

    def _is_due(self, unit: Unit) -> bool:
        # Staggered by unit, so that a step writes 1/K of the units instead of every K-th step writing all.
        return self._eager or (len(self.journal.records) + unit.index) % self._every[self.tier_of(unit)] == 0

    def _load(self, segment: Segment, slot: Slot) -> int:
        """Runs in a fetch thread: home -> slot; returns the position the copied bytes have absorbed."""
        write = self._writes.get(segment.index)
        if write is not None:
            # A host unit is about to change in place. If the write fails, the march's end says so: the home and its
            # position are still what they were.
            wait([write])
        with self._lock:  # one snapshot: a new version may be published while we copy the old one
            position = self._ledger.position(segment)
            home = self._tier(segment.unit).view(segment.unit)
        source = home[segment.byte_start : segment.byte_start + segment.n_bytes]
        target = slot.buffer[: segment.n_bytes]
        if self.tier_of(segment.unit) == "cpu":
            self._staging.upload(source, target, slot)
            self._count(h2d=segment.n_bytes)
        else:
            self._staging.read_and_upload(source, target, slot)
            self._count(disk_read=segment.n_bytes, h2d=segment.n_bytes if self.device.type != "cpu" else 0)
        return position

    def _write_back(self, segment: Segment, weights: torch.Tensor) -> Future:
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        write = self._writer.submit(self._write, segment, weights, position=len(self.journal.records), ready=ready)
        self._writes[segment.index] = write
        return write

    def _write(self, segment: Segment, weights: torch.Tensor, *, position: int, ready: torch.Event | None) -> None:
        """Runs in the writer thread: slot -> home. One thread, so that a unit's segments are written in order."""
        tier = self._tier(segment.unit)
        with self._staging.downloaded(weights, ready) as data:
            complete = tier.write(segment, data, version=position)
        on_disk = self.tier_of(segment.unit) == "disk"
        with self._lock:
            self._ledger.draft(segment, position)
            if complete:
                tier.publish(segment.unit)
                self._ledger.publish(segment)
                self._versions[segment.unit.index] += on_disk
        self._count(
            disk_written=segment.n_bytes if on_disk else 0,
            d2h=segment.n_bytes if self.device.type != "cpu" or not on_disk else 0,
        )

    def _count(self, **n_bytes: int) -> None:
        with self._lock:
            self.traffic.update(n_bytes)


def _raise_first(writes: Iterable[Future]) -> None:
    for write in writes:
        write.result()
