"""Byte budgets -> which unit in which tier, how long the ring is, how often units are written back.

Does not: look at a machine (the caller passes free bytes in), move anything, or change its mind during a run.
Invariant: pure functions of their arguments. A placement that is returned fits its budgets; one that cannot fit is
refused with both byte counts and the smallest budget that works.

Access is cyclic (every unit once a step), so a cache that evicts would miss every time: residency is static, and
resident units are spread evenly between streamed ones, so that the link never idles for long.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

from zo2trl.errors import BudgetError, ConfigError
from zo2trl.tiers.layout import Layout, Unit, VisitPoint

__all__ = [
    "Budgets",
    "Placement",
    "TierName",
    "format_bytes",
    "parse_size",
    "place",
    "place_again",
    "smallest_device_budget",
    "snapshot_interval",
]

TierName = Literal["gpu", "cpu", "disk"]
Size = int | Literal["min"]

RING_SLOTS = 3  # one under the model's hands, one ready, one filling; two is the least that works
MIN_RING_SLOTS = 2

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B|([KMGT]?))\s*", re.IGNORECASE)


def parse_size(value: object, *, argument: str) -> int | Literal["auto", "min"]:
    """Bytes of "8GB" (8e9), "8GiB" (8 x 2^30), "512MB", or a plain count; "auto" and "min" are passed through.

    Raises:
        ConfigError: anything else, or a negative count; names the argument.
    """
    if isinstance(value, str):
        if value.lower() in ("auto", "min"):
            return "auto" if value.lower() == "auto" else "min"
        match = _SIZE.fullmatch(value)
        if match:
            prefix = (match[2] or match[4] or "").upper()
            scale = _UNITS[prefix] if not match[3] else 1024 ** " KMGT".index(prefix or " ")
            return int(float(match[1]) * scale)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value % 1 == 0:
        return int(value)
    raise ConfigError(
        f'`{argument}` is {value!r}, which is not a size. Write bytes (8000000000), "8GB" (8e9 bytes), "8GiB" '
        '(8 x 2^30 bytes), "auto", or "min".'
    )


def format_bytes(n_bytes: float) -> str:
    """A short decimal size for people: 1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Ceilings in bytes. `device` "min" asks for the least that works; `cpu` counts home copies, not the ring."""

    device: Size
    cpu: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A decision that fits its budgets."""

    tier_of: dict[int, TierName]  # unit index -> tier
    n_slots: int  # ring slots; 0 when nothing is streamed
    slot_bytes: int  # the largest streamed segment
    scratch_bytes: int  # the largest perturbed copy
    device_bytes: int  # what all of it takes on the device
    cpu_bytes: int  # home copies in host memory

    def units_in(self, tier: TierName) -> list[int]:
        """Indices of the units that live in a tier."""
        return [index for index, name in self.tier_of.items() if name == tier]


def place(layout: Layout, budgets: Budgets) -> Placement:
    """Decide where every unit lives.

    Raises:
        BudgetError: the device budget holds neither everything nor a ring of two slots.
    """
    everything = _Need(layout, streamed=frozenset(), n_slots=0)
    if budgets.device != "min" and everything.total <= budgets.device:
        return _placement(layout, everything, budgets)
    streamable = _streamable(layout)
    least = min(
        everything, _Need(layout, streamed=frozenset(streamable), n_slots=MIN_RING_SLOTS), key=attrgetter("total")
    )
    if budgets.device == "min":
        return _placement(layout, least, budgets)
    if least.total > budgets.device:
        raise _cannot_fit(layout, least, budgets.device)
    return _placement(layout, _widest(layout, streamable, budgets.device) or least, budgets)


def place_again(layout: Layout, homes: Placement, budgets: Budgets) -> Placement:
    """Ring and scratch for another granularity of the same units, which stay where they are.

    Raises:
        BudgetError: the ring this granularity needs does not fit beside the units that are resident already.
    """
    streamed = frozenset(index for index, tier in homes.tier_of.items() if tier != "gpu")
    needs = [_Need(layout, streamed=streamed, n_slots=n_slots) for n_slots in (RING_SLOTS, MIN_RING_SLOTS)]
    fitting = needs[-1:] if budgets.device == "min" else [need for need in needs if need.total <= budgets.device]
    if not fitting:
        assert budgets.device != "min"
        raise _cannot_fit(layout, needs[-1], budgets.device)
    need = fitting[0]
    return replace(
        homes, n_slots=need.n_slots, slot_bytes=need.slot_bytes, scratch_bytes=need.scratch_bytes,
        device_bytes=need.total,
    )  # fmt: skip


def smallest_device_budget(layout: Layout) -> int:
    """Bytes of device memory below which `place` refuses this layout."""
    return place(layout, Budgets(device="min", cpu=0)).device_bytes


def _streamable(layout: Layout) -> list[int]:
    return [unit.index for unit in layout.units if not unit.is_resident]


def spread(count: int, total: int) -> list[int]:
    """`count` positions out of `total`, as evenly spaced as whole numbers allow (Bresenham's rule)."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def _widest(layout: Layout, streamable: Sequence[int], device_bytes: int) -> "_Need | None":
    """The most resident units that fit, with a full ring if there is room for one."""
    for n_resident in range(len(streamable) - 1, -1, -1):
        resident = {streamable[i] for i in spread(n_resident, len(streamable))}
        need = _Need(layout, streamed=frozenset(streamable) - resident, n_slots=RING_SLOTS)
        if need.total <= device_bytes:
            return need
    return None


class _Need:
    """Device bytes of one way to run a step: resident homes, ring and scratch."""

    def __init__(self, layout: Layout, *, streamed: frozenset[int], n_slots: int) -> None:
        self.streamed = streamed
        self.n_slots = min(n_slots, sum(s.unit.index in streamed for s in layout.segments))
        self.slot_bytes = max((s.n_bytes for s in layout.segments if s.unit.index in streamed), default=0)
        self.scratch_bytes = max((scratch_bytes(point) for point in layout.points), default=0)
        self.resident_bytes = sum(unit.n_bytes for unit in layout.units if unit.index not in streamed)

    @property
    def total(self) -> int:
        return self.resident_bytes + self.scratch_bytes + self.n_slots * self.slot_bytes


def scratch_bytes(point: VisitPoint) -> int:
    """Bytes of one perturbed copy of everything trainable that a visit binds."""
    return sum(segment.n_bytes for segment in point.segments if segment.is_trainable)


def _placement(layout: Layout, need: _Need, budgets: Budgets) -> Placement:
    streamed = [unit for unit in layout.units if unit.index in need.streamed]
    in_cpu = _fill_cpu(streamed, budgets.cpu)
    tiers: dict[int, TierName] = {
        unit.index: "gpu" if unit.index not in need.streamed else "cpu" if unit.index in in_cpu else "disk"
        for unit in layout.units
    }
    return Placement(
        tier_of=tiers, n_slots=need.n_slots, slot_bytes=need.slot_bytes, scratch_bytes=need.scratch_bytes,
        device_bytes=need.total, cpu_bytes=sum(unit.n_bytes for unit in streamed if unit.index in in_cpu),
    )  # fmt: skip


def _fill_cpu(streamed: Sequence[Unit], cpu_bytes: int) -> set[int]:
    for count in range(len(streamed), 0, -1):
        chosen = [streamed[i] for i in spread(count, len(streamed))]
        if sum(unit.n_bytes for unit in chosen) <= cpu_bytes:
            return {unit.index for unit in chosen}
    return set()


def _cannot_fit(layout: Layout, least: _Need, device_bytes: int) -> BudgetError:
    rest_bytes = sum(unit.n_bytes for unit in layout.units if unit.is_resident)
    largest = max((unit for unit in layout.units if not unit.is_resident), key=lambda u: u.n_bytes, default=None)
    block = f"the largest block ({largest.name}) is {largest.n_bytes:,} bytes and " if largest else _NO_BLOCKS
    ring = f", {least.n_slots} ring slots of {least.slot_bytes:,} bytes" if least.n_slots else ""
    finer = "" if layout.leaf_blocks or not largest else ', and `granularity="leaf"` may need less'
    return BudgetError(
        f"`device_memory` is {device_bytes:,} bytes, which cannot hold one step: {block}everything outside the blocks "
        f"is {rest_bytes:,} bytes. A step needs {least.resident_bytes:,} bytes of resident weights{ring} and "
        f"{least.scratch_bytes:,} bytes of scratch. The smallest `device_memory` that works is {least.total:,} bytes "
        f'({format_bytes(least.total)}); "min" asks for exactly that{finer}.'
    )


_NO_BLOCKS = (
    "no stack of transformer blocks was found in this model (blocks are `GradientCheckpointingLayer`s or classes that "
    "`_no_split_modules` names), so all of it must be on the device at once; "
)


def write_back_interval(*, tier: TierName, device_type: str, itemsize: int) -> int:
    """Steps between write-backs of a unit: the K that minimises writing plus replaying.

    Writing costs t_write / K per step and element, replaying pending steps (K - 1) / 2 x t_replay, so the minimum is
    at sqrt(2 t_write / t_replay). Rates are of one H200 machine for "cuda" (disk 0.94 GB/s, 37 G updates/s with
    today's unfused kernels; writes to host memory ride on the idle direction of the link and cost a quarter of its
    50 GB/s) and of one CPU core for "cpu" (memory 5 GB/s, disk 0.94 GB/s, 0.1 G updates/s).
    """
    write_bytes_s, updates_s = _WRITE_RATES[device_type == "cuda", tier]
    interval = round((2 * (itemsize / write_bytes_s) * updates_s) ** 0.5)
    return min(max(interval, 1), MAX_WRITE_BACK_INTERVAL)


def snapshot_interval(n_elements: int, *, device_type: str, max_replay_s: float) -> int:
    """Steps between snapshots of a unit in memory: replaying this many on all trainable elements takes that long."""
    _, updates_s = _WRITE_RATES[device_type == "cuda", "cpu"]
    return max(int(min(max_replay_s * updates_s / max(n_elements, 1), MAX_SNAPSHOT_INTERVAL)), 1)


MAX_WRITE_BACK_INTERVAL = 32
MAX_SNAPSHOT_INTERVAL = 1 << 40
_WRITE_RATES: dict[tuple[bool, TierName], tuple[float, float]] = {
    (True, "cpu"): (200e9, 37e9),
    (True, "disk"): (0.94e9, 37e9),
    (False, "cpu"): (5e9, 0.1e9),
    (False, "disk"): (0.94e9, 0.1e9),
}
