"""Prefetcher: copies segments from their homes into a ring of device memory, ahead of the traversal.

Does not: apply steps, write anything back, or depend on why a segment is needed.

The order is cyclic and known, but only a hint: a caller that takes another segment gets it, at the price of what was
fetched in vain. Fetching runs on across the end of a step into the next one.

Loads from host memory only enqueue a copy: one thread does that, in order. Loads from disk take their time, so they
have threads of their own, and no upload waits behind a read.

Invariant: a byte of the ring is owned by exactly one fetch from the moment its load is submitted until it is given
back. It is used again only after the jobs that may still touch it (a load, or a write-back reading it) have ended; a
job's failure is kept in its future and raised where the result is awaited, so no thread waits for ever.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zo2trl.errors import TraversalError
from zo2trl.files.tracing import traced
from zo2trl.files.waiting import wait_for
from zo2trl.layout.layout import Segment
from zo2trl.tiers.ring import Region, Ring, Slot, plan_regions

__all__ = ["Arrival", "Fetch", "Load", "Prefetcher", "Slot"]

N_DISK_FETCHES = (
    2  # segments read from disk at once: the drive reads the next one while the last one is copied to the device
)


class Arrival(NamedTuple):
    """What is known of the bytes that a load brought."""

    position: int
    """Records of the journal that they have absorbed."""
    was_written_to: bool = False
    """The segment's view at home was changed, and the bytes are those of the view."""
    is_checked: bool = True
    """Every byte was compared with its checksum on this very read: only then may it be written back."""


Load = Callable[[Segment, Slot], Arrival]
"""Fills a slot with a segment's bytes, in a fetch thread. On a GPU all copies into slots are enqueued on one stream,
after the slot's `released` events, so that a copy that was not awaited ends before that of the slot's next tenant."""


@dataclass(eq=False)
class Fetch:
    """A segment that is being loaded into a slot, or is there."""

    segment: Segment
    slot: Slot
    job: Future[Arrival]

    @property
    def stored(self) -> torch.Tensor:
        """The bytes that arrived, in their stored form."""
        return self.slot.buffer


class Prefetcher:
    """Hands out segments in slots; keeps the whole ring loading what comes next.

    Args:
        order: the segments of one whole traversal, in order of need; see `expect`.
        load: see `Load`.
        ring_bytes: device memory to use.
        device: where that is.
        on_disk: whether loading a segment means reading a file.
        upcoming: receives the segments on disk that come next, in order, whenever others were begun or dropped; until
            the ring has room for them, they may be read into host memory.
    """

    _order: list[Segment]
    _cursor: int  # position in the order of the next segment to fetch
    _regions: dict[int, Region]  # segment -> where it lies in the ring
    _disk_positions: list[int]  # in the order
    _ahead: deque[Fetch]  # fetched or loading, in order, not yet taken
    _taken: list[Fetch]

    def __init__(
        self,
        order: Sequence[Segment],
        load: Load,
        *,
        ring_bytes: int,
        device: torch.device,
        on_disk: Callable[[Segment], bool] = lambda segment: False,
        upcoming: Callable[[Iterable[Segment]], None] = lambda segments: None,
    ) -> None:
        self._load, self._device, self._on_disk, self._upcoming = load, device, on_disk, upcoming
        self._ring = Ring(ring_bytes, device=device)
        self._ahead = deque()
        self._taken = []
        self._follow(order)
        self._cursor = 0
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="zo2trl-fetch")
        self._readers = ThreadPoolExecutor(N_DISK_FETCHES, thread_name_prefix="zo2trl-fetch-disk")

    def expect(self, order: Sequence[Segment]) -> None:
        """Replace the hint: the segments of one whole traversal, in order of need."""
        if [s.index for s in order] != [s.index for s in self._order]:
            self.drop()
            self._follow(order)
            self._cursor = 0
            self._refill()

    def take(self, segment: Segment) -> tuple[Fetch, Arrival]:
        """Wait for a segment's bytes in a slot, and what is known of them.

        Raises:
            TraversalError: what is lent already leaves no room for it.
        """
        if not any(fetch.segment is segment for fetch in self._ahead):
            self.drop()
            self._cursor = self._next_position_of(segment)
            self._start(self._beside_what_is_lent(segment))
        while self._ahead[0].segment is not segment:
            self._discard(self._ahead.popleft())
        fetch = self._ahead.popleft()
        self._taken.append(fetch)
        self._refill()
        try:
            arrival = wait_for(fetch.job, what=f"unit {segment.unit.name}")
        except BaseException:
            self._taken.remove(fetch)
            self._discard(fetch)
            self._refill()
            raise
        if fetch.slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(fetch.slot.copied)
        return fetch, arrival

    def give_back(self, fetch: Fetch, *, after: Future | None = None) -> None:
        """End the use of a slot; it is filled again once `after` (a write-back reading it) has ended."""
        on_gpu = self._device.type == "cuda"
        released = [torch.cuda.current_stream(self._device).record_event()] if on_gpu else []
        self._taken.remove(fetch)
        self._ring.leave(fetch.slot, released=released, busy=[] if after is None else [after])
        self._refill()

    def drop(self) -> None:
        """Forget everything fetched ahead, because the order or the bytes at home have changed."""
        while self._ahead:
            self._discard(self._ahead.popleft())
        self._upcoming(())

    def close(self) -> None:
        """Stop the threads and free the ring; idempotent."""
        self._upcoming(())
        self._uploader.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies that were not taken may still write there
        self._ahead.clear()
        self._ring.close()

    # -- fetching

    def _follow(self, order: Sequence[Segment]) -> None:
        self._regions = plan_regions(order, self._ring.n_bytes)
        self._order = list(order)
        self._disk_positions = [position for position, segment in enumerate(order) if self._on_disk(segment)]

    def _refill(self) -> None:
        while self._order and self._may_start(self._order[self._cursor]):
            self._start(self._regions[self._order[self._cursor].index])
        if self._disk_positions:
            self._upcoming(self._not_begun())

    def _not_begun(self) -> Iterator[Segment]:
        """Segments on disk that are neither fetched nor lent, in the order of need."""
        held = {fetch.segment.index for fetch in (*self._ahead, *self._taken)}
        first = bisect_left(self._disk_positions, self._cursor)
        for position in (*self._disk_positions[first:], *self._disk_positions[:first]):
            if self._order[position].index not in held:
                yield self._order[position]

    def _may_start(self, segment: Segment) -> bool:
        """Whether its region is free, and the segment itself is neither fetched nor lent.

        The home of a segment that the model computes on may be about to change: it is fetched later.
        """
        region = self._regions[segment.index]
        return not any(
            fetch.segment.index == segment.index or fetch.slot.region.overlaps(region)
            for fetch in (*self._ahead, *self._taken)
        )

    def _start(self, region: Region) -> None:
        segment = self._order[self._cursor]
        self._cursor = (self._cursor + 1) % len(self._order)
        slot = self._ring.slot(region)
        pool = self._readers if self._on_disk(segment) else self._uploader
        self._ahead.append(Fetch(segment, slot, pool.submit(self._run, segment, slot)))

    def _run(self, segment: Segment, slot: Slot) -> Arrival:
        for job in slot.busy:
            with suppress(CancelledError):  # only its end matters; its failure is raised where its result is awaited
                job.exception()
        return self._fill(segment, slot)

    @traced("fetch", lambda prefetcher, segment, slot: segment.unit.name)
    def _fill(self, segment: Segment, slot: Slot) -> Arrival:
        return self._load(segment, slot)

    def _discard(self, fetch: Fetch) -> None:
        slot = fetch.slot
        left = [] if fetch.job.cancel() else [fetch.job]
        # It may not have waited for the jobs that used its region before: the next fetch does.
        self._ring.leave(slot, released=slot.released, busy=[*slot.busy, *left])

    def _beside_what_is_lent(self, segment: Segment) -> Region:
        """The segment's own region, or, out of order, wherever there is room while nothing is ahead."""
        lent = [fetch.slot.region for fetch in self._taken]
        n_bytes = segment.stored_bytes
        for start in (self._regions[segment.index].start, 0, *(region.stop for region in lent)):
            region = Region(start, start + n_bytes)
            if region.stop <= self._ring.n_bytes and not any(other.overlaps(region) for other in lent):
                return region
        raise TraversalError(
            f"Unit {segment.unit.name} is visited while other weights are lent that leave no room for it: its "
            f"{n_bytes:,} bytes do not fit beside {sum(stop - start for start, stop in lent):,} bytes in a ring of "
            f"{self._ring.n_bytes:,}. Raise `device_memory`."
        )

    def _next_position_of(self, segment: Segment) -> int:
        for step in range(len(self._order)):
            position = (self._cursor + step) % len(self._order)
            if self._order[position] is segment:
                return position
        self._follow([*self._order, segment])
        return len(self._order) - 1
