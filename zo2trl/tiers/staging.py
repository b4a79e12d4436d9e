"""Staging: the last hop between host memory and device slots, in both directions.

On a CPU-only machine a slot is host memory: reads land in it directly and nothing is staged. With a GPU, copies run on
streams of their own and are ordered by events only.

Invariant: a staging buffer is reused only after the copy that reads it has finished.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from zo2trl.tiers.cpu import pin, unpin
from zo2trl.tiers.prefetch import Slot

__all__ = ["Staging"]

N_READS = 2  # reads from disk at once: each reading thread also checks what it has read


class Staging:
    """Copies between host and device. `n_bytes` is the largest segment that comes from or goes to disk (0: none)."""

    def __init__(self, n_bytes: int, *, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []  # the first serves one write at a time, the others one read each
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        if device.type == "cuda":
            self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._buffers = [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(1 + N_READS)] if n_bytes else []
            for buffer in self._buffers:
                pin(buffer)
            for buffer in self._buffers[1:]:
                self._free.put(buffer)

    def upload(self, source: torch.Tensor, target: torch.Tensor, slot: Slot) -> None:
        """Host -> slot. `source` must stay unchanged until the slot's `copied` event."""
        if self._device.type != "cuda":
            target.copy_(source)
            return
        with torch.cuda.stream(self._up):
            if slot.released is not None:
                self._up.wait_event(slot.released)
            target.copy_(source, non_blocking=True)
            slot.copied = self._up.record_event()

    def read_and_upload(self, read: Callable[[memoryview], None], target: torch.Tensor, slot: Slot) -> None:
        """File -> slot, through a pinned buffer where the slot is on a GPU; `read` fills a buffer."""
        if self._device.type != "cuda":
            read(target.numpy().data)
            return
        buffer = self._free.get()
        try:
            staged = buffer[: target.numel()]
            read(staged.numpy().data)
            self.upload(staged, target, slot)
            assert slot.copied is not None
            slot.copied.synchronize()
        finally:
            self._free.put(buffer)

    @contextmanager
    def downloaded(self, weights: torch.Tensor, ready: torch.Event | None) -> Iterator[torch.Tensor]:
        """Slot -> host memory, valid inside the block; `ready` marks the last kernel that wrote the slot."""
        if self._device.type != "cuda":
            yield weights
            return
        assert ready is not None
        with torch.cuda.stream(self._down):
            self._down.wait_event(ready)
            staged = self._buffers[0][: weights.numel()] if self._buffers else torch.empty(0, dtype=torch.uint8)
            if staged.numel() == weights.numel():
                staged.copy_(weights, non_blocking=True)
                self._down.record_event().synchronize()
            else:
                staged = weights  # no unit lives on disk: the host tier copies straight into its pinned arena
            yield staged
            self._down.synchronize()

    def close(self) -> None:
        """Unpin the buffers; idempotent."""
        for buffer in self._buffers:
            unpin(buffer)
        self._buffers = []
