"""Host tier: units in one exact-size arena of main memory, pinned when the execution device is a GPU.

torch rounds every pinned tensor up to a power of two, which would waste up to half of the memory; one arena registered
with CUDA costs exactly what the placement promised.
Invariant: a unit keeps its place in the arena for the life of the tier.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zo2trl.errors import StoreError
from zo2trl.tiers.layout import Segment, Unit
from zo2trl.tiers.tier import Pieces, Source, tensor_view

__all__ = ["HostTier", "pin", "unpin"]


def pin(buffer: torch.Tensor) -> None:
    """Register host memory with CUDA, so that copies run asynchronously and at line rate."""
    code = _cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(code) != 0:
        raise StoreError(
            f"CUDA could not pin {buffer.numel():,} bytes of host memory (error {int(code)}). Lower `cpu_memory`, or "
            "raise the limit on locked memory (`ulimit -l`)."
        )


def unpin(buffer: torch.Tensor) -> None:
    """Undo `pin`."""
    _cudart().cudaHostUnregister(buffer.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()


class HostTier:
    """Homes of units in main memory."""

    name = "cpu"

    _arena: torch.Tensor | None
    _starts: dict[int, int]

    def __init__(self, units: Sequence[Unit], *, pinned: bool) -> None:
        self._starts = {}
        total = 0
        for unit in units:
            self._starts[unit.index] = total
            total += unit.n_bytes
        self._arena = torch.zeros(total, dtype=torch.uint8)
        self._pinned = pinned and total > 0
        if self._pinned:
            pin(self._arena)

    def adopt(self, unit: Unit, source: Source) -> None:
        """Fill the unit's place in the arena."""
        home = self.view(unit)
        for spec in unit.tensors:
            tensor_view(home, spec).copy_(source(spec))

    def fill(self, unit: Unit, pieces: Pieces) -> None:
        """Fill the unit's place with the bytes of a unit file."""
        home = self.view(unit)
        for start, piece in pieces:
            home[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))

    def weights(self, segment: Segment) -> torch.Tensor:
        """The segment's bytes in place, ready for an asynchronous copy when pinned."""
        return self.view(segment.unit)[segment.byte_start : segment.byte_start + segment.n_bytes]

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Copy into the arena, from host or device memory."""
        self.weights(segment).copy_(data)
        return True

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Written in place: nothing is left to do."""
        return _nothing

    def abandon(self, unit: Unit) -> None:
        """Nothing is ever half written here."""

    def view(self, unit: Unit) -> torch.Tensor:
        """The unit's place in the arena."""
        assert self._arena is not None, "the tier is closed"
        start = self._starts[unit.index]
        return self._arena[start : start + unit.n_bytes]

    def close(self) -> None:
        """Unpin and drop the arena."""
        if self._arena is not None and self._pinned:
            unpin(self._arena)
        self._arena = None


def _nothing() -> None:
    pass
