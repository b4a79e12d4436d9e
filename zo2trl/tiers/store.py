"""TieredStore: the one owner of a model's parameters, wherever their bytes live.

Does not: know about models, modules, probes or losses; it lends clean bytes and absorbs records.

Invariants:
- What `lease` lends has absorbed every record of the journal, and holds no perturbation.
- A record is durable in the journal before any bytes that have absorbed it are written to a file.
- Signals are held back while bytes and their position change together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from zo2trl.amp.codecs import PLAIN
from zo2trl.errors import MarchError, StoreError
from zo2trl.tiers.homes import Homes
from zo2trl.tiers.interrupts import let_interrupts_in, uninterrupted
from zo2trl.tiers.journal import Journal
from zo2trl.tiers.layout import Layout, Segment, Unit, VisitPoint
from zo2trl.tiers.loans import Loan
from zo2trl.tiers.logbook import Logbook
from zo2trl.tiers.placement import Placement, TierName
from zo2trl.tiers.prefetch import Prefetcher
from zo2trl.tiers.replay import catch_up
from zo2trl.tiers.rhythm import Rhythm
from zo2trl.tiers.summary import summary_of
from zo2trl.tiers.tier import Source, gathered
from zo2trl.zo.records import Record
from zo2trl.zo.rules import Displaced, UpdateRule

__all__ = ["TieredStore"]


class TieredStore:
    """Parameters of one model in three tiers, and the journal of the steps they have to absorb.

    Args:
        homes: filled; closed with the store.
        journal: receives every step; its records are what leases catch up with.
        logbook: kept for those who measure; closed with the store.
        rule: how a record changes weights.
        rhythm: how often units are written; may be replaced between steps.
        device: where leases are lent.
        on_first_step: called once, when the first step is durable.
        on_close: called once when everything else is closed (gives up the folder).
    """

    records: list[Record]
    """What leases catch up with: the journal's own list, or the part of it that leads to a past one went back to."""

    def __init__(
        self,
        homes: Homes,
        *,
        journal: Journal,
        logbook: Logbook,
        rule: UpdateRule,
        rhythm: Rhythm,
        device: torch.device,
        on_first_step: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.homes, self.journal, self.logbook, self.rule, self.device = homes, journal, logbook, rule, device
        self.records = journal.records
        self.rhythm = rhythm
        self._on_first_step: Callable[[], None] | None = on_first_step
        self._on_close = on_close
        self._eager, self.is_open = False, True
        self._prefetcher: Prefetcher | None = None
        homes.will_write_back = self._may_be_due
        self._start_prefetching()

    @property
    def layout(self) -> Layout:
        """What the units are."""
        return self.homes.layout

    @property
    def placement(self) -> Placement:
        """Where they live."""
        return self.homes.placement

    @property
    def traffic(self) -> Counter[str]:
        """Bytes since the store was opened: h2d, d2h, disk_read, disk_written."""
        return self.homes.traffic

    def tier_of(self, unit: Unit) -> TierName:
        """Name of the tier a unit lives in."""
        return self.homes.tier_of(unit)

    def view(self, unit: Unit) -> tuple[torch.Tensor, int]:
        """See `Homes.view`."""
        return self.homes.view(unit)

    def tensors(self, unit: Unit, *, unless_version: int | None = None) -> tuple[list[torch.Tensor], int] | None:
        """See `Homes.tensors`."""
        return self.homes.tensors(unit, unless_version=unless_version)

    def describe(self) -> list[tuple[str, TierName, int]]:
        """(unit, tier, bytes) for people."""
        return [(unit.name, self.tier_of(unit), unit.n_bytes) for unit in self.layout.units]

    def summary(self) -> str:
        """One line on where the weights live."""
        return summary_of(self.layout, self.placement)

    # -- leases

    @contextmanager
    def lend(self, point: VisitPoint) -> Iterator[list[Loan]]:
        """The segments of a point, on the device inside the block; each is brought up to date when it is used."""
        loans: list[Loan] = []
        try:
            self._borrow(point, loans)
            yield loans
        finally:
            self._give_back(loans)

    @contextmanager
    def lease(self, point: VisitPoint) -> Iterator[list[torch.Tensor]]:
        """The clean weights of a point's segments: flat uint8 on the device, valid inside the block."""
        with self.lend(point) as loans:
            yield [loan.clean() for loan in loans]

    @uninterrupted
    def _borrow(self, point: VisitPoint, loans: list[Loan]) -> None:
        self._refuse_if_spoiled()
        for segment in point.segments:
            loans.append(self._resident(segment) if self.homes.is_resident(segment) else self._fetched(segment))

    @uninterrupted
    def _give_back(self, loans: Sequence[Loan]) -> None:
        for loan in loans:
            if loan.fetch is not None:
                assert self._prefetcher is not None
                self._prefetcher.give_back(loan.fetch, after=loan.write)

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
        self._prefetcher.expect([s for point in points for s in point.segments if not self.homes.is_resident(s)])

    # -- steps

    @uninterrupted
    def append(self, record: Record) -> None:
        """Make a step durable in the journal; every unit absorbs it at its next visit, rest at once."""
        self._refuse_if_read_only("train")
        self._forget_later_records()
        self.journal.append(record)
        if self._on_first_step is not None:
            tell, self._on_first_step = self._on_first_step, None
            tell()
        self._absorb_rest()
        position = len(self.records)
        every, units = self.rhythm.snapshot, self.layout.units
        for unit in units:
            is_its_turn = self.rhythm.is_turn(unit.index, of=len(units), every=every, position=position)
            if is_its_turn and unit.is_trained and self.tier_of(unit) != "disk":
                self.homes.snapshot(unit)

    @uninterrupted
    def end_march(self) -> None:
        """Raise what went wrong in finished write-backs; the others run on into the next march."""
        if self.layout.leaf_blocks:
            self.homes.settle()
        self.homes.end_march()

    @uninterrupted
    def settle(self) -> None:
        """Wait for every write, and forget unit versions that did not get all their leaves in one march."""
        self.homes.settle()

    def flush(self) -> None:
        """Bring every home up to date: saved weights and views are never a step behind."""
        with self.writing_back():
            for segment in filter(self._is_behind, self.layout.segments):
                let_interrupts_in()
                with self.lease(_alone(segment)):
                    pass
        self.settle()
        self.homes_changed()

    def is_behind(self, unit: Unit) -> bool:
        """True while steps are in the journal that a unit's bytes at home have not absorbed."""
        return any(self._is_behind(segment) for segment in self.layout.segments if segment.unit is unit)

    def _is_behind(self, segment: Segment) -> bool:
        return segment.is_trainable and self.homes.position(segment) < len(self.records)

    # -- weights that no step led to

    @uninterrupted
    def homes_changed(self) -> None:
        """Weights at home were changed from outside, or may soon be: forget what was fetched ahead."""
        assert self._prefetcher is not None
        self._prefetcher.drop()
        self.homes.doubt_views()

    @uninterrupted
    def adopt_changes(self, units: Sequence[Unit]) -> None:
        """Somebody wrote into these units' views: keep what they wrote, durably, as a new beginning.

        Steps before it do not lead there, so the journal alone is not enough any more to rebuild the weights.
        """
        self._refuse_if_read_only("change weights")
        self._begin_anew((unit, self.homes.view(unit)[0]) for unit in units)

    @uninterrupted
    def replace(self, source: Source) -> None:
        """Overwrite every unit's weights, durably: a new beginning, as in `adopt_changes`."""
        self._refuse_if_read_only("replace weights")
        self._begin_anew((unit, gathered(unit, source)) for unit in self.layout.units)

    @uninterrupted
    def go_back(self, position: int, *, base: Source) -> None:
        """Show the weights after `position` records. The later ones stay in the journal until another step is made.

        `base` gives the weights at position 0 of units that the store keeps no early enough version of.
        """
        self._refuse_if_read_only("go back")
        assert 0 <= position <= len(self.records)
        self.homes.settle()
        try:
            self._go_back(position, base=base)
        except BaseException as error:
            self.homes.spoiled = f"weights of an earlier step were being rebuilt ({error})"
            raise
        self.homes_changed()

    def _go_back(self, position: int, *, base: Source) -> None:
        self.records = self.records[:position]
        for unit in self.layout.units:
            segments = [s for s in self.layout.segments if s.unit is unit and s.is_trainable]
            if max(map(self.homes.position, segments), default=0) > position:
                weights, start = self.homes.earlier(unit, position, base=base)
                weights = weights.to(self.device)
                for segment in segments:
                    part = weights[segment.byte_start : segment.byte_start + segment.n_bytes]
                    catch_up(part, segment, self.records, position=start, rule=self.rule)
                self.homes.set_back(unit, weights.cpu(), position=position)

    def _begin_anew(self, contents: Iterable[tuple[Unit, torch.Tensor]]) -> None:
        self.homes.settle()
        self._forget_later_records()
        self.homes.begin_anew(contents, position=len(self.records))
        self.homes_changed()

    def _forget_later_records(self) -> None:
        """The run goes on from where it went back to: that is its history now."""
        if self.records is self.journal.records:
            return
        position = len(self.records)
        self.logbook.rewind(position)
        self.journal.rewind(position)
        self.homes.files.forget_after(position)
        self.records = self.journal.records

    @uninterrupted
    def regranulate(self, layout: Layout, placement: Placement) -> None:
        """The same units, visited at other points or living elsewhere."""
        self.flush()
        assert self._prefetcher is not None
        self._prefetcher.close()
        try:
            self.homes.cut_anew(layout, placement)
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
            everything.callback(self.homes.close)
            if self._prefetcher is not None:
                self._prefetcher.close()

    # -- how a segment gets its bytes

    def _start_prefetching(self) -> None:
        streamed = [s for p in self.layout.points for s in p.segments if not self.homes.is_resident(s)]
        self.homes.make_staging(PLAIN.wire_bytes(self.placement.largest_segment_bytes))
        self._prefetcher = Prefetcher(
            streamed, self.homes.load, ring_bytes=PLAIN.wire_bytes(self.placement.ring_bytes), device=self.device,
            on_disk=lambda segment: self.tier_of(segment.unit) == "disk", upcoming=self.homes.read_ahead,
        )  # fmt: skip
        self._absorb_rest()

    def _absorb_rest(self) -> None:
        for segment in self.layout.rest.segments:
            self._resident(segment).clean()

    def _resident(self, segment: Segment) -> Loan:
        position = self.homes.position(segment)
        return Loan(
            segment=segment, weights=self.homes.weights(segment), position=position,
            is_kept=self._is_to_be_kept(segment, position), bring=self._bring,
        )  # fmt: skip

    def _fetched(self, segment: Segment) -> Loan:
        assert self._prefetcher is not None
        fetch, arrival = self._prefetcher.take(segment)
        is_kept = self._is_to_be_kept(segment, arrival.position)
        if is_kept and not arrival.is_checked:  # it was fetched before it was known that it would be written
            self._prefetcher.give_back(fetch)
            self._prefetcher.drop()
            fetch, arrival = self._prefetcher.take(segment)
        try:
            if arrival.was_written_to:
                self._keep_written(segment.unit, position=arrival.position)
            self.homes.trust_view(segment)
        except BaseException:
            self._prefetcher.give_back(fetch)
            raise
        return Loan(
            segment=segment, weights=PLAIN.decode(fetch.wire), position=arrival.position, is_kept=is_kept,
            bring=self._bring, fetch=fetch,
        )  # fmt: skip

    def _is_to_be_kept(self, segment: Segment, position: int) -> bool:
        return segment.is_trainable and position < len(self.records) and self._is_due(segment.unit)

    @uninterrupted
    def _bring(self, loan: Loan, probes: Sequence[Displaced], keep: bool) -> None:
        segment, records = loan.segment, self.records
        is_resident = loan.fetch is None
        try:
            has_absorbed = catch_up(
                loan.weights, segment, records, position=loan.position, rule=self.rule, probes=probes, keep=keep
            )
            if has_absorbed and is_resident:
                self.homes.absorbed(segment, len(records))
        except BaseException as error:
            if is_resident:
                self.homes.spoiled = f"unit {segment.unit.name} was being brought up to date ({error})"
            raise
        if has_absorbed:
            loan.position = len(records)
            if loan.is_kept and not is_resident:
                loan.write = self.homes.write_back(segment, loan.weights, position=len(records))

    def _keep_written(self, unit: Unit, *, position: int) -> None:
        self._refuse_if_read_only("change weights")
        if unit.is_trained and position < len(self.records):
            raise MarchError(
                f"The weights of {unit.name} were changed in place while steps were pending that they had not "
                "absorbed: the steps would be added to the new values. Call `trainer.engine.flush()` before changing "
                "weights between steps."
            )
        self._forget_later_records()
        self.homes.keep_written(unit, position=len(self.records))

    def _is_due(self, unit: Unit, *, in_steps: int = 0) -> bool:
        tier = self.tier_of(unit)
        if self.homes.read_only and tier == "disk":
            return False
        (turn, of), every = self.placement.turns[unit.index], self.rhythm.store_every(tier)
        return self._eager or self.rhythm.is_turn(turn, of=of, every=every, position=len(self.records) + in_steps)

    def _may_be_due(self, segment: Segment) -> bool:
        """Asked when a segment is fetched, which may be a step before it is used."""
        return segment.is_trainable and (self._is_due(segment.unit) or self._is_due(segment.unit, in_steps=1))

    def _refuse_if_spoiled(self) -> None:
        if self.homes.spoiled is not None:
            raise StoreError(
                f"An error struck in {self.journal.path.parent} while {self.homes.spoiled}, so what memory holds is "
                "not known. What is on disk is sound: make a new trainer and pass `resume_from_checkpoint=True`."
            )

    def _refuse_if_read_only(self, what: str) -> None:
        self._refuse_if_spoiled()
        if self.homes.read_only:
            raise StoreError(f"{self.journal.path.parent} is open for reading only: cannot {what}.")


def _alone(segment: Segment) -> VisitPoint:
    return VisitPoint(index=-1, module_name="", block_name="", segments=(segment,))
