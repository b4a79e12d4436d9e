"""Read-ahead: segments on disk whose turn comes, read into staging memory before there is a slot for them.

With units in host memory between those on disk, a slot is free for the next disk segment only a moment before it is
wanted, and until then the drive would idle.

Does not: know the order of a march (the prefetcher tells) or where bytes go (staging.py).
Invariant: a segment is begun in the order of need, and all of it before the next one.
"""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Generic

import torch

from zo2trl.tiers.layout import Segment
from zo2trl.tiers.ring import Slot
from zo2trl.tiers.staging import Begun, R, Staging

__all__ = ["ReadAhead"]


class ReadAhead(Generic[R]):
    """What was begun and not loaded yet. `open` starts to read a segment from its home, in a reader's thread."""

    _begun: dict[int, Begun[R]]  # segment -> reading

    def __init__(self, staging: Staging, open: Callable[[Segment], R]) -> None:
        self._staging, self._open = staging, open
        self._begun = {}
        self._lock = threading.Lock()  # a fetch thread takes what the march's thread has begun

    def announce(self, upcoming: Iterable[Segment]) -> None:
        """These come next, in this order: read as much of them as there is memory for. If none do, forget all."""
        is_over = True
        with self._lock:
            for segment in upcoming:
                is_over = False
                begun = self._begun.setdefault(segment.index, self._new(segment))
                if not self._staging.read_ahead(begun):
                    break
            if is_over:
                while self._begun:
                    self._staging.abandon(self._begun.popitem()[1])

    def load(self, segment: Segment, target: torch.Tensor, slot: Slot) -> R:
        """Disk -> slot; see `Staging.read_and_upload`."""
        with self._lock:
            begun = self._begun.pop(segment.index, None) or self._new(segment)
        self._staging.read_and_upload(begun, target, slot)
        return begun.reading

    def _new(self, segment: Segment) -> Begun[R]:
        return Begun(partial(self._open, segment), n_bytes=segment.n_bytes)
