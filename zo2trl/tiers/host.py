"""Host tier: units live in main memory, each in a buffer of exactly its size, pinned if the device is a GPU.

torch rounds every pinned tensor up to a power of two, which would waste up to half of the memory; buffers registered
with CUDA cost exactly what the placement promised.
Invariant: a unit's buffer keeps its address as long as the unit lives here.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from zo2trl.errors import StoreError
from zo2trl.layout.layout import Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.tiers.readers import aligned_bytes
from zo2trl.tiers.tier import Source, put_tensor, tensor_views

__all__ = ["HostTier", "pin", "unpin"]

N_TOUCHING = 16  # threads that make the kernel find pages for a buffer: registering it takes half the time after that
TOUCHED_BYTES = 64 << 20  # at a time


def pin(buffer: torch.Tensor) -> None:
    """Register host memory with CUDA, so that copies run asynchronously and at line rate."""
    code = _cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(code) != 0:
        raise StoreError(
            f"CUDA could not pin {buffer.numel():,} bytes of host memory (error {int(code)}). Lower `cpu_memory`, or "
            "raise the limit on locked memory (`ulimit -l`)."
        )


def unpin(buffer: torch.Tensor) -> None:
    """Undo `pin`. No copy may use the memory any more."""
    _cudart().cudaHostUnregister(buffer.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()


def _pinned_bytes(n_bytes: int) -> torch.Tensor:
    buffer = aligned_bytes(n_bytes)
    if n_bytes:
        with ThreadPoolExecutor(N_TOUCHING) as threads:
            list(threads.map(torch.Tensor.zero_, buffer.split(TOUCHED_BYTES)))
        pin(buffer)
    return buffer


class HostTier:
    """Homes in main memory. Those of `units` are reserved at once, so that too small a machine is found out before
    anything is moved."""

    name: TierName = "cpu"

    _buffers: dict[int, torch.Tensor]

    def __init__(self, units: Sequence[Unit] = (), *, pinned: bool) -> None:
        self._buffers = {}
        self._pinned = pinned
        try:
            for unit in units:
                self.reserve(unit)
        except BaseException:
            self.close()
            raise

    def add(self, unit: Unit, source: Source) -> None:
        """Reserve, if that was not done yet, and fill."""
        home = self.reserve(unit)
        for spec in unit.tensors:
            put_tensor(home, spec, source(spec))

    def weights(self, segment: Segment) -> torch.Tensor:
        """The segment's bytes in place, ready for an asynchronous copy when pinned."""
        return self.view(segment.unit)[segment.stored_start : segment.stored_start + segment.stored_bytes]

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Overwrite in place, from host or device memory."""
        self.weights(segment).copy_(data)
        return True

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Written in place: nothing is left to do."""
        return _nothing

    def abandon(self, unit: Unit) -> None:
        """Nothing is ever half written here."""

    def view(self, unit: Unit) -> torch.Tensor:
        """The buffer itself."""
        return self._buffers[unit.index]

    def tensors(self, unit: Unit) -> list[torch.Tensor]:
        """Views of the buffer."""
        return tensor_views(self.view(unit), unit)

    def drop(self, unit: Unit) -> None:
        """Unpin the unit's buffer, which no copy may use any more, and free it as soon as no view of it is left."""
        buffer = self._buffers.pop(unit.index, None)
        if buffer is not None and self._pinned and buffer.numel():
            unpin(buffer)

    def close(self) -> None:
        """Unpin and drop all buffers."""
        buffers, self._buffers = self._buffers, {}
        for buffer in buffers.values():
            if self._pinned and buffer.numel():
                unpin(buffer)

    def reserve(self, unit: Unit) -> torch.Tensor:
        """Allocate and pin, if that was not done yet."""
        if unit.index not in self._buffers:
            new = (
                _pinned_bytes(unit.stored_bytes) if self._pinned else torch.zeros(unit.stored_bytes, dtype=torch.uint8)
            )
            self._buffers[unit.index] = new
        return self._buffers[unit.index]


def _nothing() -> None:
    pass
