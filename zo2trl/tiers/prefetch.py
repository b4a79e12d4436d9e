"""Prefetcher: copies segments from their homes into a ring of device slots, ahead of the march.

Does not: apply steps, write anything back, or know why a segment is wanted.

The order is cyclic and known, but only a hint: a taker that asks for something else gets it, at the price of what was
fetched in vain. Fetching runs on across the end of a step into the next one.

Invariant: a slot is owned by exactly one fetch from the moment its load is submitted until it is given back. A slot is
reused only after the job that may still touch it (its load, or a write-back reading it) has ended; a job's failure is
kept in its future and raised to whoever waits for it, so nobody waits for ever.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zo2trl.tiers.layout import Segment
from zo2trl.tiers.waiting import wait_for

__all__ = ["Arrival", "Fetch", "Load", "Prefetcher", "Slot"]


class Arrival(NamedTuple):
    """What a load says of the bytes it brought."""

    position: int
    """Records of the journal that they have absorbed."""
    was_written_to: bool = False
    """Somebody wrote into the segment's view at home, and this is what they wrote."""


Load = Callable[[Segment, "Slot"], Arrival]
"""Fills a slot with a segment's bytes."""


@dataclass(eq=False)
class Slot:
    """Device memory for one segment. The events are None on a CPU-only machine, where program order is enough."""

    buffer: torch.Tensor
    copied: torch.Event | None = None  # recorded by the load after its copy was enqueued
    released: torch.Event | None = None  # recorded when the last kernel that reads the slot was enqueued
    busy: Future | None = None  # the job that must end before the slot is filled again


@dataclass(eq=False)
class Fetch:
    """A segment on its way into a slot, or there."""

    segment: Segment
    slot: Slot
    job: Future[Arrival]

    @property
    def wire(self) -> torch.Tensor:
        """The bytes that arrived."""
        return self.slot.buffer[: self.segment.n_bytes]


class Prefetcher:
    """Hands out segments in slots; keeps every free slot loading what comes next."""

    _order: list[Segment]
    _cursor: int  # position in the order of the next segment to fetch
    _ahead: deque[Fetch]  # fetched or loading, in order, not yet taken
    _taken: list[Fetch]
    _free: deque[Slot]
    _pool: ThreadPoolExecutor

    def __init__(
        self, order: Sequence[Segment], load: Load, *, n_slots: int, slot_bytes: int, device: torch.device
    ) -> None:
        self._order = list(order)
        self._cursor = 0
        self._ahead = deque()
        self._taken = []
        self._load = load
        self._device = device
        self._free = deque(Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(n_slots))
        self._pool = ThreadPoolExecutor(max(n_slots - 1, 1), thread_name_prefix="zo2trl-fetch")

    def expect(self, order: Sequence[Segment]) -> None:
        """Replace the hint: the segments of one whole march, in order of need."""
        if [s.index for s in order] != [s.index for s in self._order]:
            self._order = list(order)
            self.drop()
            self._cursor = 0

    def take(self, segment: Segment) -> tuple[Fetch, Arrival]:
        """The segment's bytes in a slot, and what the load says of them; waits for it."""
        if not any(fetch.segment is segment for fetch in self._ahead):
            self.drop()
            self._cursor = self._next_position_of(segment)
            self._start()
        while self._ahead[0].segment is not segment:
            self._discard(self._ahead.popleft())
        fetch = self._ahead.popleft()
        self._taken.append(fetch)
        self._refill()
        try:
            arrival = wait_for(fetch.job, what=f"unit {segment.unit.name}")
        except BaseException:
            self.give_back(fetch)
            raise
        if fetch.slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(fetch.slot.copied)
        return fetch, arrival

    def give_back(self, fetch: Fetch, *, after: Future | None = None) -> None:
        """End a taker's use of a slot; it is filled again once `after` (a write-back reading it) has ended."""
        if self._device.type == "cuda":
            fetch.slot.released = torch.cuda.current_stream(self._device).record_event()
        fetch.slot.busy = after
        self._taken.remove(fetch)
        self._free.append(fetch.slot)
        self._refill()

    def drop(self) -> None:
        """Forget everything fetched ahead, because the order or the bytes at home have changed."""
        while self._ahead:
            self._discard(self._ahead.popleft())

    def close(self) -> None:
        """Stop the threads and free the slots."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._free.clear()

    def _discard(self, fetch: Fetch) -> None:
        fetch.slot.busy = fetch.job
        self._free.append(fetch.slot)

    def _refill(self) -> None:
        while self._free and self._order:
            held = {fetch.segment.index for fetch in (*self._ahead, *self._taken)}
            # The bytes at home of a segment under the model's hands may be about to change: it comes round later.
            if self._order[self._cursor].index in held:
                return
            self._start()

    def _start(self) -> None:
        segment, slot = self._order[self._cursor], self._free.popleft()
        self._cursor = (self._cursor + 1) % len(self._order)
        self._ahead.append(Fetch(segment, slot, self._pool.submit(self._run, segment, slot, slot.busy)))

    def _run(self, segment: Segment, slot: Slot, busy: Future | None) -> Arrival:
        if busy is not None and not busy.cancelled():
            busy.exception()  # only its end matters here; its failure is raised where its result is awaited
        return self._load(segment, slot)

    def _next_position_of(self, segment: Segment) -> int:
        for step in range(len(self._order)):
            position = (self._cursor + step) % len(self._order)
            if self._order[position] is segment:
                return position
        self._order.append(segment)
        return len(self._order) - 1
