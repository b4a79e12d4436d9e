"""What every tier can do. One contract test (tests/tiers/test_tier_contract.py) runs against all of them.

Does not: decide who lives where (placement.py) or when something moves (prefetch.py, store.py).
Invariant: what `view` returned stays one whole version of every segment: a disk unit's old map outlives the publishing
of a new version, and a host unit's segments change only inside `write`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from zo2trl.layout.layout import Segment, TensorSpec, Unit

__all__ = ["Pieces", "Source", "Tier", "carve", "copy_pieces", "gathered", "host_bytes", "tensor_view", "tensor_views"]

Source = Callable[[TensorSpec], torch.Tensor]
"""Gives a tensor's values, in the spec's shape and dtype, on any device, while a unit is adopted."""

Pieces = Iterator[tuple[int, memoryview]]
"""A unit's bytes in order: (byte offset, bytes that are valid until the next piece)."""


class Tier(Protocol):
    """Residency of units. Buffers are flat uint8 tensors; `Segment.byte_start` counts from the start of the unit."""

    name: str

    def adopt(self, unit: Unit, source: Source) -> None:
        """Make a home for a unit and fill it, tensor by tensor; padding is zero."""
        ...

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Copy new bytes of a segment to its home, or beside it; blocks. True when `publish` may be called."""
        ...

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Make what was written of a complete version durable; returns the quick part that makes it the home."""
        ...

    def abandon(self, unit: Unit) -> None:
        """Forget segments written of a version that never became the home."""
        ...

    def view(self, unit: Unit) -> torch.Tensor:
        """The whole unit as a flat uint8 tensor of the bytes at home; writing into a disk unit's view stays private,
        and is lost if its bytes had to be gathered from several files."""
        ...

    def tensors(self, unit: Unit) -> list[torch.Tensor]:
        """The unit's tensors at home, each with a storage of its own; writing is as for `view`."""
        ...

    def drop(self, unit: Unit) -> None:
        """Let go of a unit's home, if it has one: it lives elsewhere from now on. Files stay."""
        ...

    def close(self) -> None:
        """Release memory, maps and files; idempotent."""
        ...


def carve(buffer: torch.Tensor, spec: TensorSpec, *, byte_start: int = 0) -> torch.Tensor:
    """One parameter inside a buffer that starts at `byte_start` of its unit, sharing the buffer's storage."""
    start = spec.byte_offset - byte_start
    return buffer[start : start + spec.n_bytes].view(spec.dtype).view(spec.shape)


def tensor_view(buffer: torch.Tensor, spec: TensorSpec, *, byte_start: int = 0) -> torch.Tensor:
    """One parameter inside a unit's or a segment's buffer, as a tensor with a storage of its own.

    Savers recognise tied weights by their storage: views of one buffer would all look tied, so each view goes
    through DLPack, which wraps the same memory in a new storage.
    """
    return torch.from_dlpack(carve(buffer, spec, byte_start=byte_start))


def tensor_views(buffer: torch.Tensor, unit: Unit) -> list[torch.Tensor]:
    """`tensor_view` of all tensors of a unit in its buffer."""
    return [tensor_view(buffer, spec) for spec in unit.tensors]


def copy_pieces(pieces: Pieces, buffer: torch.Tensor) -> None:
    """Copy a unit's bytes into its flat uint8 buffer, on any device."""
    for start, piece in pieces:
        buffer[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))


def gathered(unit: Unit, source: Source) -> torch.Tensor:
    """A unit's bytes in main memory, flat uint8; padding is zero."""
    data = torch.zeros(unit.n_bytes, dtype=torch.uint8)
    for spec in unit.tensors:
        carve(data, spec).copy_(source(spec))
    return data


def host_bytes(data: torch.Tensor) -> memoryview:
    """A tensor's elements as bytes in main memory; a copy only if they are elsewhere or not contiguous."""
    return data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
