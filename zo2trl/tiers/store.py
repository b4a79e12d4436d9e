"""TieredStore: the one owner of a model's parameters, wherever their bytes live.

Does not: see models, modules or losses, or choose probes; it lends clean bytes and absorbs records.

Invariants:
- What `lease` lends has absorbed every record of the journal, and holds no perturbation.
- A record is durable in the journal before any bytes that have absorbed it are written to a file.
- Signals are held back while bytes and their position change together.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from zo2trl.errors import StoreError, TraversalError
from zo2trl.files.interrupts import let_interrupts_in, uninterrupted
from zo2trl.journal.journal import Journal
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout import Layout, Segment, Unit, VisitPoint
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement, summarise
from zo2trl.planning.write_schedule import WriteSchedule
from zo2trl.tiers.catch_up import catch_up
from zo2trl.tiers.decoding import DecodeBuffer
from zo2trl.tiers.history import History
from zo2trl.tiers.leases import Lease
from zo2trl.tiers.prefetch import Prefetcher
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.tier import Source, gathered
from zo2trl.zo.method import Method
from zo2trl.zo.records import Record
from zo2trl.zo.tiles import Perturbed

__all__ = ["TieredStore"]


class TieredStore:
    """Parameters of one model in three tiers, and the journal of the steps they have to absorb.

    Args:
        residency: has all units in their tiers; closed with the store.
        journal, logbook: receive every step; closed with the store.
        method: how a record changes weights.
        write_schedule: how often units are written; may be replaced between steps.
        device: where leased weights are.
        on_first_step: called once, when the first step is durable.
        on_close: called once when everything else is closed (releases the folder).
    """

    def __init__(
        self,
        residency: Residency,
        *,
        journal: Journal,
        logbook: Logbook,
        method: Method,
        write_schedule: WriteSchedule,
        device: torch.device,
        on_first_step: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.residency, self.journal, self.logbook, self.device = residency, journal, logbook, device
        self.method = method
        self._locations = residency.locations
        self.history = History(residency, journal=journal, logbook=logbook, method=method, device=device)
        self.write_schedule = write_schedule
        self._on_first_step = on_first_step
        self._on_close = on_close
        self._eager, self.is_open = False, True
        self._prefetcher: Prefetcher | None = None
        residency.transfers.will_write_back = self._may_be_due
        self._start_prefetching()

    @property
    def records(self) -> list[Record]:
        """What leases catch up with; see `History.records`."""
        return self.history.records

    @property
    def layout(self) -> Layout:
        """What the units are."""
        return self.residency.layout

    @property
    def placement(self) -> Placement:
        """Where they live."""
        return self.residency.placement

    @property
    def traffic(self) -> Counter[str]:
        """Bytes since the store was opened: h2d, d2h, disk_read, disk_written."""
        return self._locations.traffic

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self._locations.tier_of(unit)

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """See `Locations.view`."""
        return self._locations.view(unit)

    def tensors(self, unit: Unit, *, unless_version: int | None = None) -> tuple[list[torch.Tensor], int] | None:
        """See `Locations.tensors`."""
        return self._locations.tensors(unit, unless_version=unless_version)

    def describe(self) -> list[tuple[str, TierName, int]]:
        """(unit, tier, bytes) for people."""
        return [(unit.name, self.tier_of(unit), unit.stored_bytes) for unit in self.layout.units]

    def summary(self) -> str:
        """One line on where the weights live."""
        return summarise(self.layout, self.placement)

    @contextmanager
    def lease(self, point: VisitPoint) -> Iterator[list[Lease]]:
        """The segments of a point, on the device inside the block; each is brought up to date when it is used."""
        leases: list[Lease] = []
        try:
            self._borrow(point, leases)
            yield leases
        finally:
            self._give_back(leases)

    @contextmanager
    def lease_clean(self, point: VisitPoint) -> Iterator[list[torch.Tensor]]:
        """The clean weights of a point's segments: flat uint8 on the device, valid inside the block."""
        with self.lease(point) as leases:
            yield [lease.clean() for lease in leases]

    @uninterrupted
    def _borrow(self, point: VisitPoint, leases: list[Lease]) -> None:
        self._refuse_if_inconsistent()
        for segment in point.segments:
            leases.append(self._resident(segment) if self.residency.is_resident(segment) else self._fetched(segment))

    @uninterrupted
    def _give_back(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self._decode_buffer.give_back(lease.segment)
            if lease.fetch is not None:
                assert self._prefetcher is not None
                self._prefetcher.give_back(lease.fetch, after=lease.write)

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
        """The visits one traversal is expected to make, in order."""
        assert self._prefetcher is not None
        self._prefetcher.expect([s for point in points for s in point.segments if not self.residency.is_resident(s)])

    # -- steps

    @uninterrupted
    def append(self, record: Record) -> None:
        """Make a step durable in the journal; every unit absorbs it at its next visit, the root at once."""
        self._refuse_if_read_only("train")
        self.history.forget_later()
        self.journal.append(record)
        on_first_step, self._on_first_step = self._on_first_step, lambda: None
        on_first_step()
        self._absorb_root()
        position = len(self.records)
        every, units = self.write_schedule.snapshot, self.layout.units
        for unit in units:
            is_its_turn = self.write_schedule.is_turn(unit.index, of=len(units), every=every, position=position)
            if is_its_turn and unit.is_trained and self.tier_of(unit) != "disk":
                self.residency.snapshots.request(unit)

    @uninterrupted
    def end_traversal(self) -> None:
        """Raise what went wrong in finished write-backs; the others run on into the next traversal."""
        if self.layout.leaf_blocks:
            self.residency.settle()
        self.residency.end_traversal()

    @uninterrupted
    def settle(self) -> None:
        """Wait for every write, and forget unit versions that did not get all their leaves in one traversal."""
        self.residency.settle()

    def flush(self) -> None:
        """Bring every home up to date: saved weights and views are never a step behind."""
        with self.writing_back():
            for segment in filter(self._is_behind, self.layout.segments):
                let_interrupts_in()
                with self.lease_clean(_alone(segment)):
                    pass
        self.settle()
        self.weights_changed()

    def is_behind(self, unit: Unit) -> bool:
        """True while steps are in the journal that a unit's bytes at home have not absorbed."""
        return any(self._is_behind(segment) for segment in self.layout.segments if segment.unit is unit)

    def _is_behind(self, segment: Segment) -> bool:
        return segment.is_trainable and self._locations.position(segment) < len(self.records)

    # -- weights that no step led to

    @uninterrupted
    def weights_changed(self) -> None:
        """Forget what was fetched ahead, because weights at home were changed from outside, or may be soon."""
        assert self._prefetcher is not None
        self._prefetcher.drop()
        self.residency.transfers.invalidate_views()

    @uninterrupted
    def commit_changes(self, units: Sequence[Unit]) -> None:
        """Keep what was written into these units' views, durably, as new base versions.

        Steps before them do not lead there, so the journal alone is not enough any more to rebuild the weights.
        """
        self._refuse_if_read_only("change weights")
        self.history.replace((unit, self._locations.view(unit)[0]) for unit in units)
        self.weights_changed()

    @uninterrupted
    def replace(self, source: Source) -> None:
        """Overwrite every unit's weights, durably, with new base versions, as in `commit_changes`."""
        self._refuse_if_read_only("replace weights")
        self.history.replace((unit, gathered(unit, source)) for unit in self.layout.units)
        self.weights_changed()

    @uninterrupted
    def go_back(self, position: int, *, base: Source) -> None:
        """Show the weights after `position` records. The later ones stay in the journal until another step is made.

        `base` gives the weights at position 0 of units that the store keeps no early enough version of.
        """
        self._refuse_if_read_only("go back")
        self.history.go_back(position, base=base)
        self.weights_changed()

    @uninterrupted
    def relayout(self, layout: Layout, placement: Placement) -> None:
        """The same units, visited at other points or living elsewhere."""
        self.flush()
        assert self._prefetcher is not None
        self._prefetcher.close()
        try:
            self.residency.relayout(layout, placement)
        finally:
            self._start_prefetching()

    # -- closing

    @uninterrupted
    def close(self) -> None:
        """Stop the threads, close the journal and the tiers; idempotent."""
        if not self.is_open:
            return
        self.is_open = False
        with ExitStack() as everything:
            everything.callback(self._on_close)
            everything.callback(self.journal.close)
            everything.callback(self.logbook.close)
            everything.callback(self.residency.close)
            if self._prefetcher is not None:
                self._prefetcher.close()

    # -- how a segment gets its bytes

    def _start_prefetching(self) -> None:
        streamed = [s for p in self.layout.points for s in p.segments if not self.residency.is_resident(s)]
        self.residency.transfers.make_staging(self.placement.largest_segment_bytes)
        self._prefetcher = Prefetcher(
            streamed, self.residency.transfers.load, ring_bytes=self.placement.ring_bytes, device=self.device,
            on_disk=self._locations.is_on_disk, upcoming=self.residency.transfers.read_ahead,
        )  # fmt: skip
        self._decode_buffer = DecodeBuffer(self.placement.decode_bytes, device=self.device)
        self._absorb_root()

    def _absorb_root(self) -> None:
        for segment in (segment for segment in self.layout.root.segments if segment.is_trainable):
            self._resident(segment).clean()

    def _resident(self, segment: Segment) -> Lease:
        position = self._locations.position(segment)
        weights = self._decode_buffer.decoded(segment, self.residency.weights(segment))
        return Lease(
            segment=segment, weights=weights, position=position,
            writes_back=self._writes_back(segment, position), materialize=self._materialize,
        )  # fmt: skip

    def _fetched(self, segment: Segment) -> Lease:
        assert self._prefetcher is not None
        fetch, arrival = self._prefetcher.take(segment)
        writes_back = self._writes_back(segment, arrival.position)
        if writes_back and not arrival.is_checked:  # it was fetched before it was known that it would be written
            self._prefetcher.give_back(fetch)
            self._prefetcher.drop()
            fetch, arrival = self._prefetcher.take(segment)
        try:
            if arrival.was_written_to:
                self._keep_written(segment.unit, position=arrival.position)
            self.residency.transfers.validate_view(segment)
            weights = self._decode_buffer.decoded(segment, fetch.stored)
        except BaseException:
            self._prefetcher.give_back(fetch)
            raise
        return Lease(
            segment=segment, weights=weights, position=arrival.position, writes_back=writes_back,
            materialize=self._materialize, fetch=fetch,
        )  # fmt: skip

    def _writes_back(self, segment: Segment, position: int) -> bool:
        return segment.is_trainable and position < len(self.records) and self._is_due(segment.unit)

    @uninterrupted
    def _materialize(self, lease: Lease, probes: Sequence[Perturbed], keep: bool) -> None:
        segment, records = lease.segment, self.records
        is_resident = lease.fetch is None
        try:
            has_absorbed = catch_up(
                lease.weights, segment, records, position=lease.position, method=self.method, probes=probes, keep=keep
            )
            if has_absorbed and is_resident:
                self.residency.absorbed(segment, len(records))
        except BaseException as error:
            if is_resident:
                self._locations.inconsistent_reason = (
                    f"unit {segment.unit.name} was being brought up to date ({error})"
                )
            raise
        if has_absorbed:
            lease.position = len(records)
            if lease.writes_back and not is_resident:
                lease.write = self.residency.transfers.write_back(segment, lease.weights, position=len(records))

    def _keep_written(self, unit: Unit, *, position: int) -> None:
        self._refuse_if_read_only("change weights")
        if unit.is_trained and position < len(self.records):
            raise TraversalError(
                f"The weights of {unit.name} were changed in place while steps were pending that they had not "
                "absorbed: the steps would be added to the new values. Call `trainer.engine.flush()` before changing "
                "weights between steps."
            )
        self.history.forget_later()
        self.residency.snapshots.replace_by_view(unit, position=len(self.records))

    def _is_due(self, unit: Unit, *, in_steps: int = 0) -> bool:
        tier = self.tier_of(unit)
        if self.residency.read_only and tier == "disk":
            return False
        (turn, of), every = self.placement.turns[unit.index], self.write_schedule.store_every(tier)
        return self._eager or self.write_schedule.is_turn(
            turn, of=of, every=every, position=len(self.records) + in_steps
        )

    def _may_be_due(self, segment: Segment) -> bool:
        """Whether a unit may be written back at the visit that a fetch is for, in this step or the next."""
        return segment.is_trainable and (self._is_due(segment.unit) or self._is_due(segment.unit, in_steps=1))

    def _refuse_if_inconsistent(self) -> None:
        if (reason := self._locations.inconsistent_reason) is not None:
            raise StoreError(
                f"An error struck in {self.journal.path.parent} while {reason}, so what memory holds is not known. "
                "What is on disk is sound: make a new trainer and pass `resume_from_checkpoint=True`."
            )

    def _refuse_if_read_only(self, what: str) -> None:
        self._refuse_if_inconsistent()
        if self.residency.read_only:
            raise StoreError(f"{self.journal.path.parent} is open for reading only: cannot {what}.")


def _alone(segment: Segment) -> VisitPoint:
    return VisitPoint(index=-1, module_name="", block_name="", segments=(segment,))
