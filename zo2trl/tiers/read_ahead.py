"""Read-ahead: reads the next segments on disk into staging memory before there is a slot for them.

With units in host memory between those on disk, a slot is free for the next disk segment only a moment before it is
wanted, and until then the drive would idle.

Does not: choose the order (the prefetcher announces it) or the memory (staging.py).
Invariant: a segment is begun in the order of need, and all of it before the next one.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic

import torch

from zo2trl.layout.layout import Segment
from zo2trl.tiers.ring import Slot
from zo2trl.tiers.staging import Begun, R, Staging

__all__ = ["ReadAhead"]


class ReadAhead(Generic[R]):
    """Readings that were begun and are not loaded yet. `open` starts to read a segment from its home."""

    _begun: dict[int, Begun[R]]  # segment -> reading
    _upcoming: list[Segment]  # the next ones in the order of need, as many as could ever be begun

    def __init__(self, staging: Staging, open: Callable[[Segment], R]) -> None:
        self._staging, self._open = staging, open
        self._begun = {}
        self._upcoming = []
        # A fetch thread takes what the traversal's thread has begun. Giving up a reading makes room, in that thread.
        self._lock = threading.RLock()
        staging.on_room = self._go_on

    def announce(self, upcoming: Iterable[Segment]) -> None:
        """Read as much of the next segments, in this order, as there is memory for. If none come, forget all."""
        with self._lock:
            self._upcoming = list(_filling(self._staging.ahead_bytes, upcoming))
            if self._upcoming:
                self._go_on()
                return
            while self._begun:
                self._staging.abandon(self._begun.popitem()[1])

    def load(self, segment: Segment, target: torch.Tensor, slot: Slot) -> R:
        """Disk -> slot; see `Staging.read_and_upload`."""
        with self._lock:
            self._upcoming = [other for other in self._upcoming if other.index != segment.index]
            begun = self._begun.pop(segment.index, None) or self._new(segment)
        self._staging.read_and_upload(begun, target, slot)
        return begun.reading

    def _go_on(self) -> None:
        """Read on; also while a load gives its memory back piece by piece, so that the drive need not wait."""
        with self._lock:
            for segment in self._upcoming:
                begun = self._begun.setdefault(segment.index, self._new(segment))
                if not self._staging.read_ahead(begun):
                    break

    def _new(self, segment: Segment) -> Begun[R]:
        return Begun(partial(self._open, segment), n_bytes=segment.stored_bytes)


def _filling(n_bytes: int, segments: Iterable[Segment]) -> Iterator[Segment]:
    """The first ones: so many bytes, and one more that may be begun."""
    for segment in segments:
        yield segment
        n_bytes -= segment.stored_bytes
        if n_bytes < 0:
            return
