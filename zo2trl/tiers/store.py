"""TieredStore: the one owner of a model's parameters, wherever their bytes live.

Does not: know about models, modules, probes or losses; it lends clean bytes and absorbs records.

Invariants:
- What `lease` lends has absorbed every record of the journal, and holds no perturbation.
- A record is durable in the journal before any bytes that have absorbed it are written to a file.
- Signals are held back while bytes and their position change together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from zo2trl.amp.codecs import PLAIN
from zo2trl.errors import MarchError, StoreError
from zo2trl.tiers.homes import Homes
from zo2trl.tiers.interrupts import let_interrupts_in, uninterrupted
from zo2trl.tiers.journal import Journal
from zo2trl.tiers.layout import Layout, Segment, Unit, VisitPoint
from zo2trl.tiers.logbook import Logbook
from zo2trl.tiers.placement import Placement, TierName, format_bytes
from zo2trl.tiers.prefetch import Fetch, Prefetcher
from zo2trl.tiers.replay import catch_up
from zo2trl.tiers.tier import Source, tensor_view
from zo2trl.zo.records import Record
from zo2trl.zo.rules import UpdateRule

__all__ = ["Rhythm", "TieredStore"]


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """Steps between two writes of one unit. Units take turns, so that every step writes about equally much."""

    write_back: Mapping[TierName, int]
    """Of a streamed unit to its home, for the tiers "cpu" and "disk"."""
    snapshot: int
    """Of a unit in memory to a file."""

    def is_turn(self, unit: Unit, *, every: int, position: int) -> bool:
        """Whether a unit is due after the record that leads to `position`."""
        return (position + unit.index) % every == 0


class TieredStore:
    """Parameters of one model in three tiers, and the journal of the steps they have to absorb.

    Args:
        homes: filled; closed with the store.
        journal: receives every step; its records are what leases catch up with.
        logbook: kept for those who measure; closed with the store.
        rule: how a record changes weights.
        rhythm: how often units are written.
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
        self._rhythm = rhythm
        self._on_first_step: Callable[[], None] | None = on_first_step
        self._on_close = on_close
        self._eager = False
        self.is_open = True
        self._prefetcher: Prefetcher | None = None
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
        self._refuse_if_spoiled()
        return [
            self._resident(segment) if self.homes.is_resident(segment) else self._fetch(segment, fetches)
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
        for unit in self.layout.units:
            is_its_turn = self._rhythm.is_turn(unit, every=self._rhythm.snapshot, position=position)
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
        self._begin_anew((unit, _gathered(unit, source)) for unit in self.layout.units)

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
        """The same units, visited at other points."""
        self.flush()
        assert self._prefetcher is not None
        self._prefetcher.close()
        self.homes.cut_anew(layout, placement)
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
        slot_bytes = PLAIN.wire_bytes(self.placement.slot_bytes)
        self.homes.make_staging(slot_bytes)
        self._prefetcher = Prefetcher(
            streamed, self.homes.load, n_slots=self.placement.n_slots, device=self.device, slot_bytes=slot_bytes
        )
        self._absorb_rest()

    def _absorb_rest(self) -> None:
        for segment in self.layout.rest.segments:
            self._resident(segment)

    def _resident(self, segment: Segment) -> torch.Tensor:
        weights, records = self.homes.weights(segment), self.records
        try:
            if catch_up(weights, segment, records, position=self.homes.position(segment), rule=self.rule):
                self.homes.absorbed(segment, len(records))
        except BaseException as error:
            self.homes.spoiled = f"unit {segment.unit.name} was being brought up to date ({error})"
            raise
        return weights

    def _fetch(self, segment: Segment, fetches: list[tuple[Fetch, Future | None]]) -> torch.Tensor:
        assert self._prefetcher is not None
        fetch, (position, was_written_to) = self._prefetcher.take(segment)
        fetches.append((fetch, None))
        if was_written_to:
            self._keep_written(segment.unit, position=position)
        self.homes.trust_view(segment)
        weights = PLAIN.decode(fetch.wire)
        records = self.records
        behind = catch_up(weights, segment, records, position=position, rule=self.rule)
        if behind and self._is_due(segment.unit):
            fetches[-1] = (fetch, self.homes.write_back(segment, weights, position=len(records)))
        return weights

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

    def _is_due(self, unit: Unit) -> bool:
        tier = self.tier_of(unit)
        if self.homes.read_only and tier == "disk":
            return False
        every = self._rhythm.write_back[tier]
        return self._eager or self._rhythm.is_turn(unit, every=every, position=len(self.records))

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


def _gathered(unit: Unit, source: Source) -> torch.Tensor:
    data = torch.zeros(unit.n_bytes, dtype=torch.uint8)
    for spec in unit.tensors:
        tensor_view(data, spec).copy_(source(spec))
    return data


def _alone(segment: Segment) -> VisitPoint:
    return VisitPoint(index=-1, module_name="", block_name="", segments=(segment,))
