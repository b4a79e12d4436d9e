"""Ring: the device memory that segments pass through, the region of each of them, and the last use of every byte.

Does not: fetch, or track what is ahead and what is lent (prefetch.py).
Invariants:
- Where a segment lies is a pure function of the order and of the ring's size, so it has one address in every step.
- A region is filled again only after the last uses of all of its bytes: the host waits for their jobs, the device for
  their kernels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import NamedTuple, TypeVar

import torch

from zo2trl.errors import BudgetError
from zo2trl.layout.layout import ALIGNMENT_BYTES, Segment
from zo2trl.tiers.readers import aligned_bytes

__all__ = ["Region", "Ring", "Slot", "makespan", "plan_regions", "plan_ring"]

MAX_TRIED = 6  # places to turn at, and as many for the last lap: planning takes milliseconds
SAMPLE = 256  # segments of a traversal that is played through

T = TypeVar("T")


class Region(NamedTuple):
    """Bytes `start` to `stop` of the ring."""

    start: int
    stop: int

    def overlaps(self, other: "Region") -> bool:
        """Whether any byte is in both."""
        return self.start < other.stop and other.start < self.stop

    def without(self, other: "Region") -> Iterator["Region"]:
        """What is left when the other's bytes are taken away."""
        for start, stop in ((self.start, min(self.stop, other.start)), (max(self.start, other.stop), self.stop)):
            if start < stop:
                yield Region(start, stop)


def plan_regions(order: Sequence[Segment], n_bytes: int) -> dict[int, Region]:
    """Where every segment of an order (which may name some of them repeatedly) lies in a ring: index -> region.

    Raises:
        BudgetError: a segment is larger than the ring.
    """
    segments = list({segment.index: segment for segment in order}.values())
    largest = max(segments, key=lambda segment: segment.stored_bytes, default=None)
    if largest is not None and largest.stored_bytes > n_bytes:
        raise BudgetError(
            f"A visit of unit {largest.unit.name} needs {largest.stored_bytes:,} bytes of device memory at once, and "
            f"the ring that streamed weights pass through has {n_bytes:,}. Raise `device_memory`, or set "
            '`granularity="leaf"`.'
        )
    starts = plan_ring([segment.stored_bytes for segment in segments], n_bytes)
    return {s.index: Region(start, start + s.stored_bytes) for s, start in zip(segments, starts, strict=True)}


def plan_ring(sizes: Sequence[int], n_bytes: int) -> list[int]:
    """Where segments of these sizes, which come round in this order for ever, start in a ring of `n_bytes` bytes.

    One behind the other; where the next one does not fit, from 0 again. Two things are tried out by simulating a
    traversal (`makespan`), for both can leave the link idle:
    - where to turn back to 0. Later is not always better: the hole behind the turn is lost, and what comes first after
      it may lie where its predecessor still is (OPT-13B on an H200: 459 ms a step with 3 times the largest leaf, 477
      with 2 times, and 485 with 2.5 times);
    - where the last lap lies, for the next round begins at 0 whatever is there.
    """
    aligned = tuple(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes)
    return list(_plan(aligned, n_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES))


@lru_cache(maxsize=16)
def _plan(sizes: tuple[int, ...], n_bytes: int) -> tuple[int, ...]:
    if not sizes:
        return ()
    # Across the seam of two rounds, and as often round as it takes; of a long order this much will do: blocks repeat.
    traversal = [i % len(sizes) for i in range(-SAMPLE // 2, SAMPLE // 2)]
    laid_out = (_laid_out(sizes, lap) for lap in (n_bytes, *_shorter_laps(sizes, n_bytes)))
    plans = (plan for starts in laid_out for plan in _with_last_lap_moved(sizes, starts, n_bytes))
    return min(plans, key=lambda starts: makespan([sizes[i] for i in traversal], [starts[i] for i in traversal]))


def _laid_out(sizes: Sequence[int], lap: int) -> tuple[int, ...]:
    starts: list[int] = []
    stop = 0
    for size in sizes:
        start = stop if stop + size <= lap else 0
        starts.append(start)
        stop = start + size
    return tuple(starts)


def _shorter_laps(sizes: Sequence[int], n_bytes: int) -> list[int]:
    """Other places to turn back at: ends of the first lap's segments, as far as a hole could ever reach."""
    largest = max(sizes)
    ends = takewhile(lambda stop: stop < n_bytes, accumulate(sizes))
    return _thinned(stop for stop in ends if stop >= max(largest, n_bytes - largest))[::-1]


def _with_last_lap_moved(sizes: Sequence[int], starts: tuple[int, ...], n_bytes: int) -> Iterator[tuple[int, ...]]:
    """The plan, and others whose last lap lies higher up: behind segments of the lap before, or at the ring's end."""
    yield starts
    turns = [0, *(i for i in range(1, len(sizes)) if starts[i] < starts[i - 1] + sizes[i - 1])]
    if len(turns) > 1:
        before, last = turns[-2:]
        room = n_bytes - (starts[-1] + sizes[-1])
        borders = sorted({starts[i] + sizes[i] for i in range(before, last)})
        for shift in (*_thinned(border for border in borders if border < room), room):
            yield starts[:last] + tuple(start + shift for start in starts[last:])


def _thinned(values: Iterable[int]) -> list[int]:
    values = list(values)
    return values[:: -(-len(values) // MAX_TRIED) or 1]


def makespan(sizes: Sequence[int], starts: Sequence[int]) -> int:
    """How long a traversal over these segments takes, in bytes copied, if computing on one takes as long as its copy.

    Copies run one after the other, each as soon as its region is free. Balanced like that, every wait
    shows.
    """
    copied = used = 0
    live: deque[tuple[Region, int]] = deque()  # the oldest first, with the time at which its use ends
    for size, start in zip(sizes, starts, strict=True):
        region = Region(start, start + size)
        while any(other.overlaps(region) for other, _ in live):
            copied = max(copied, live.popleft()[1])
        copied += size
        used = max(used, copied) + size
        live.append((region, used))
    return used


@dataclass(eq=False)
class Slot:
    """A region of the ring, lent for one segment. There are no events on a CPU: program order is enough."""

    region: Region
    buffer: torch.Tensor
    """The region's memory, flat uint8."""
    released: tuple[torch.Event, ...] = ()
    """The copy into the slot must wait for all of them: the last kernels that read what was there before."""
    busy: tuple[Future, ...] = ()
    """The copy may be enqueued when all of them have ended: jobs that still touch what was there before."""
    copied: torch.Event | None = None
    """Recorded by the load when its copy is enqueued."""


class _Use(NamedTuple):
    region: Region
    released: tuple[torch.Event, ...]
    busy: tuple[Future, ...]


class Ring:
    """The memory, and the last use of every byte of it."""

    _uses: list[_Use]  # their regions do not overlap

    def __init__(self, n_bytes: int, *, device: torch.device) -> None:
        self.n_bytes = n_bytes
        if device.type == "cpu":
            self._memory = aligned_bytes(n_bytes)
            self._uses = []
        else:
            self._memory = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            # The allocator gives out what kernels of this stream may still be using; copies come on another one.
            freed = torch.cuda.current_stream(device).record_event()
            self._uses = [_Use(Region(0, n_bytes), (freed,), ())]

    def slot(self, region: Region) -> Slot:
        """Lend a region that is free."""
        before = [use for use in self._uses if use.region.overlaps(region)]
        return Slot(
            region, self._memory[region.start : region.stop],
            released=_once(event for use in before for event in use.released),
            busy=_once(job for use in before for job in use.busy if not job.done()),
        )  # fmt: skip

    def leave(self, slot: Slot, *, released: Sequence[torch.Event], busy: Sequence[Future]) -> None:
        """Take a region back, whose next user has to wait for these."""
        region = slot.region
        kept = [use._replace(region=part) for use in self._uses for part in use.region.without(region)]
        self._uses = [*kept, _Use(region, tuple(released), tuple(busy))]

    def close(self) -> None:
        """Free the memory, as soon as no view of it is left."""
        self._memory = self._memory[:0].clone()
        self._uses = []


def _once(things: Iterable[T]) -> tuple[T, ...]:
    return tuple({id(thing): thing for thing in things}.values())
