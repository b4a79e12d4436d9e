"""Placement: which unit is in which tier, how large the ring is, and how many perturbed copies there are.

Does not: look at a machine (the caller passes byte budgets in), move anything, or change a decision during a run.
Invariant: pure functions of their arguments. A placement that is returned fits its budgets; one that cannot fit is
refused with both byte counts and the smallest budget that works.

Access is cyclic (every unit once a step), so a cache that evicts would miss every time: residency is static, and
resident units are spread evenly between streamed ones, so that the link never idles for long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from zo2trl.errors import BudgetError
from zo2trl.files.sizes import format_bytes
from zo2trl.layout.layout import ALIGNMENT_BYTES, Layout, Unit, VisitPoint
from zo2trl.planning.budgets import TIERS, Budgets, Size, TierName
from zo2trl.planning.cost_model import CostModel
from zo2trl.planning.workload import loads_of

__all__ = [
    "Placement",
    "place",
    "place_again",
    "smallest_device_budget",
    "summarise",
]

RING_SEGMENTS = 3  # of the largest size: one that the model uses, one ready, one filling
MIN_RING_SEGMENTS = 2  # with fewer nothing could be fetched ahead


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where units live, and what else takes device memory, within the budgets."""

    tier_of: dict[int, TierName]  # unit index -> tier
    ring_bytes: int  # device memory that streamed segments pass through; 0 when nothing is streamed
    largest_segment_bytes: int  # of the streamed ones
    scratch_bytes: int  # the largest perturbed copy
    decode_bytes: int = 0  # for segments that are not stored plain: those of the largest visit, decoded
    scratch_copies: int  # 2: both probes of a direction are made in one pass over the weights
    device_bytes: int  # what all of it takes on the device
    cpu_bytes: int  # home copies in host memory

    def units_in(self, tier: TierName) -> list[int]:
        """Indices of the units that live in a tier."""
        return [index for index, name in self.tier_of.items() if name == tier]

    @cached_property
    def turns(self) -> dict[int, tuple[int, int]]:
        """Each unit's number among those of its tier, and how many these are.

        A unit's index is no such number, because every other block may be in one tier.
        """
        units = {tier: self.units_in(tier) for tier in TIERS}
        return {index: (turn, len(units[tier])) for tier in TIERS for turn, index in enumerate(units[tier])}


def place(layout: Layout, budgets: Budgets, cost_model: CostModel | None = None) -> Placement:
    """Decide where every unit lives.

    As many units as fit are resident, beside a ring of three of the largest streamed segments. What is left then
    holds a second scratch copy, and after that a longer ring. With a cost model the second scratch copy comes before
    the last resident units if the step takes less time then, which it does where computing bounds it.

    Raises:
        BudgetError: the device budget holds neither everything nor a ring of two segments.
    """
    room = budgets.for_weights
    everything = _Need(layout, streamed=frozenset())
    if room != "min" and everything.least_bytes <= room:
        return _placement(layout, everything, budgets)
    streamable = _streamable(layout)
    least = min(everything, _Need(layout, streamed=frozenset(streamable)), key=attrgetter("least_bytes"))
    if room == "min":
        return _placement(layout, least, budgets)
    if least.least_bytes > room:
        raise _cannot_fit(layout, least, budgets)
    found = [_widest(layout, streamable, room, scratch_copies=copies) for copies in ((1, 2) if cost_model else (1,))]
    placements = [_placement(layout, need, budgets) for need in found if need is not None]
    if not placements:
        return _placement(layout, least, budgets)
    return min(placements, key=lambda placement: _step_s(layout, placement, cost_model) if cost_model else 0.0)


def place_again(layout: Layout, current: Placement, budgets: Budgets) -> Placement:
    """Size ring and scratch for another granularity or another reserve, with every unit where it lives now.

    Raises:
        BudgetError: what is needed does not fit beside the units that are resident already.
    """
    need = _Need(layout, streamed=frozenset(index for index, tier in current.tier_of.items() if tier != "gpu"))
    room = budgets.for_weights
    if room != "min" and need.least_bytes > room:
        raise _cannot_fit(layout, need, budgets)
    return need.placed(current.tier_of, room=room)


def summarise(layout: Layout, placement: Placement) -> str:
    """One line: units and bytes of each tier, the ring, the device memory in all, and how blocks are visited."""
    parts: list[str] = []
    for tier in ("gpu", "cpu", "disk"):
        units = [layout.units[index] for index in placement.units_in(tier)]
        if units:
            parts.append(f"{tier}: {len(units)} units, {format_bytes(sum(unit.stored_bytes for unit in units))}")
    ring = format_bytes(placement.ring_bytes)
    visits = "leaf by leaf" if layout.leaf_blocks else "block by block"
    return f"{'; '.join(parts)}; ring: {ring}; {format_bytes(placement.device_bytes)} on the device, {visits}"


def smallest_device_budget(layout: Layout, *, reserve: int = 0) -> int:
    """The smallest device budget that `place` accepts for this layout, in bytes."""
    return place(layout, Budgets(device="min", cpu=0)).device_bytes + reserve


def _streamable(layout: Layout) -> list[int]:
    return [unit.index for unit in layout.units if not unit.is_resident]


def spread(count: int, total: int) -> list[int]:
    """`count` positions out of `total`, as evenly spaced as whole numbers allow (Bresenham's rule)."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def _widest(layout: Layout, streamable: Sequence[int], room: int, *, scratch_copies: int) -> "_Need | None":
    """Keep as many units resident as fit beside a full ring and so many perturbed copies; None if that never fits."""
    for n_resident in range(len(streamable) - 1, -1, -1):
        resident = {streamable[i] for i in spread(n_resident, len(streamable))}
        need = _Need(layout, streamed=frozenset(streamable) - resident)
        if need.bytes_with(need.ring_bytes(RING_SEGMENTS), scratch_copies=scratch_copies) <= room:
            return need
    return None


def _step_s(layout: Layout, placement: Placement, cost_model: CostModel) -> float:
    loads, makes_pairs = loads_of(layout, placement.tier_of), placement.scratch_copies > 1
    every = cost_model.write_back_intervals(loads, makes_pairs=makes_pairs)
    return cost_model.step_time(loads, every=every, makes_pairs=makes_pairs).step_s


class _Need:
    """Device bytes of a step, given which units are streamed: resident units, ring and scratch."""

    def __init__(self, layout: Layout, *, streamed: frozenset[int]) -> None:
        self.layout, self.streamed = layout, streamed
        passing = [segment.stored_bytes for segment in layout.segments if segment.unit.index in streamed]
        self.largest_bytes = max(passing, default=0)
        self.streamed_bytes = sum(passing)
        self.scratch_bytes = max((scratch_bytes(point) for point in layout.points), default=0)
        self.decode_bytes = max((decode_bytes(point) for point in layout.points), default=0)
        self.resident_bytes = sum(unit.stored_bytes for unit in layout.units if unit.index not in streamed)

    def ring_bytes(self, n_segments: int) -> int:
        """Bytes of a ring of so many of the largest segments; never more than all streamed segments have."""
        return min(n_segments * self.largest_bytes, self.streamed_bytes)

    def bytes_with(self, ring_bytes: int, *, scratch_copies: int = 1) -> int:
        """Device bytes in all with a ring of so many bytes."""
        return self.resident_bytes + self.decode_bytes + scratch_copies * self.scratch_bytes + ring_bytes

    @property
    def least_bytes(self) -> int:
        """The fewest device bytes that a step works with."""
        return self.bytes_with(self.ring_bytes(MIN_RING_SEGMENTS))

    def share(self, room: Size) -> tuple[int, int]:
        """Ring bytes and scratch copies for `room` bytes, which are at least `least_bytes`."""
        ring_bytes = self.ring_bytes(MIN_RING_SEGMENTS)
        if room == "min":
            return ring_bytes, 1
        spare = room - self.least_bytes
        # A ring may have any size between the two: `plan_ring` uses all of it.
        ring_bytes += min(self.ring_bytes(RING_SEGMENTS) - ring_bytes, spare // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
        spare = room - self.bytes_with(ring_bytes)
        copies = 2 if 0 < self.scratch_bytes <= spare else 1
        spare -= (copies - 1) * self.scratch_bytes
        more = spare // self.largest_bytes * self.largest_bytes if self.largest_bytes else 0
        return min(ring_bytes + more, self.streamed_bytes), copies

    def placed(self, tier_of: Mapping[int, TierName], *, room: Size) -> Placement:
        """The placement with the units in these tiers."""
        ring_bytes, copies = self.share(room)
        return Placement(
            tier_of=dict(tier_of), ring_bytes=ring_bytes, largest_segment_bytes=self.largest_bytes,
            scratch_bytes=self.scratch_bytes, scratch_copies=copies, decode_bytes=self.decode_bytes,
            device_bytes=self.bytes_with(ring_bytes, scratch_copies=copies),
            cpu_bytes=sum(unit.stored_bytes for unit in self.layout.units if tier_of[unit.index] == "cpu"),
        )  # fmt: skip


def scratch_bytes(point: VisitPoint) -> int:
    """Bytes of one perturbed copy of everything trainable that a visit binds."""
    return sum(segment.n_bytes for segment in point.segments if segment.is_trainable)


def decode_bytes(point: VisitPoint) -> int:
    """Bytes that a visit's weights take when decoded, but for those that are used as they are stored."""
    return sum(segment.n_bytes for segment in point.segments if not segment.is_plain)


def _placement(layout: Layout, need: _Need, budgets: Budgets) -> Placement:
    in_cpu = _fill_cpu([unit for unit in layout.units if unit.index in need.streamed], budgets.cpu)
    tiers: dict[int, TierName] = {
        unit.index: "gpu" if unit.index not in need.streamed else "cpu" if unit.index in in_cpu else "disk"
        for unit in layout.units
    }
    return need.placed(tiers, room=budgets.for_weights)


def _fill_cpu(streamed: Sequence[Unit], cpu_bytes: int) -> set[int]:
    for count in range(len(streamed), 0, -1):
        chosen = [streamed[i] for i in spread(count, len(streamed))]
        if sum(unit.stored_bytes for unit in chosen) <= cpu_bytes:
            return {unit.index for unit in chosen}
    return set()


def _cannot_fit(layout: Layout, least: _Need, budgets: Budgets) -> BudgetError:
    assert budgets.device != "min"
    root_bytes = sum(unit.stored_bytes for unit in layout.units if unit.is_resident)
    largest = max((unit for unit in layout.units if not unit.is_resident), key=lambda u: u.stored_bytes, default=None)
    block = f"the largest block ({largest.name}) is {largest.stored_bytes:,} bytes and " if largest else _NO_BLOCKS
    ring_bytes = least.ring_bytes(MIN_RING_SEGMENTS)
    ring = f", a ring of {ring_bytes:,} bytes that streamed ones pass through" if ring_bytes else ""
    decoding = f" {least.decode_bytes:,} bytes of it are for decoding low-bit weights." if least.decode_bytes else ""
    kept = f" {budgets.reserve:,} bytes of it are kept free for activations." if budgets.reserve else ""
    fewer = _FEWER if least.least_bytes <= budgets.device else ""
    finer = "" if layout.leaf_blocks or not largest else ', and `granularity="leaf"` may need less'
    smallest = least.least_bytes + budgets.reserve
    return BudgetError(
        f"`device_memory` is {budgets.device:,} bytes, which cannot hold one step: {block}everything outside the "
        f"blocks is {root_bytes:,} bytes. A step needs {least.resident_bytes:,} bytes of resident weights{ring} and "
        f"{least.scratch_bytes:,} bytes of scratch.{decoding}{kept}{fewer} The smallest `device_memory` that works is "
        f'{smallest:,} bytes ({format_bytes(smallest)}); "min" asks for as little as it can{finer}.'
    )


_FEWER = (
    " Without them the step would fit: lower `per_device_train_batch_size` or `max_length`, so that activations need "
    "less."
)
_NO_BLOCKS = (
    "no stack of transformer blocks was found in this model (blocks are `GradientCheckpointingLayer`s or classes that "
    "`_no_split_modules` names), so all of it must be on the device at once; "
)
