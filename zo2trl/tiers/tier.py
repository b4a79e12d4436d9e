"""Contracts of the tiers: what the device, main memory and the disk can do with units, and what only some of them can.

One contract test (tests/tiers/test_tier_contract.py) runs against every tier.

Does not: decide where a unit lives (planning/placement.py) or when something moves (prefetch.py, store.py).
Invariant: what `view` returned stays one whole version of every segment: a disk unit's old map outlives the publishing
of a new version, and a host unit's segments change only inside `write`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch

from zo2trl.amp.codecs import codec_of
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import Segment, TensorSpec, Unit
from zo2trl.planning.budgets import TierName

__all__ = [
    "MemoryTier",
    "Pieces",
    "Reading",
    "Source",
    "Tier",
    "Tiers",
    "UnitHome",
    "VersionedTier",
    "carve",
    "carve_plain",
    "copy_pieces",
    "encoded",
    "gathered",
    "host_bytes",
    "put_tensor",
    "stored_part",
    "tensor_view",
    "tensor_views",
]

Source = Callable[[TensorSpec], torch.Tensor]
"""Gives a tensor's values, in the spec's shape and dtype, on any device, while a unit is added to a tier. Of a tensor
that is not stored plain it may give the stored bytes instead, flat uint8; see `encoded`."""

Pieces = Iterator[tuple[int, memoryview]]
"""A unit's bytes in order: (byte offset, bytes that are valid until the next piece)."""


class Tier(Protocol):
    """Homes of units. Buffers are flat uint8 tensors of stored bytes; `Segment.stored_start` counts from the start of
    the unit."""

    @property
    def name(self) -> TierName:
        """What a placement calls this tier."""
        ...

    def add(self, unit: Unit, source: Source) -> None:
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


class MemoryTier(Tier, Protocol):
    """A tier whose homes are buffers that keep their addresses, so that bytes can be copied in and out directly."""

    def reserve(self, unit: Unit) -> torch.Tensor:
        """The buffer of a unit's home, which is made if there is none; the caller fills all of it."""
        ...

    def weights(self, segment: Segment) -> torch.Tensor:
        """A segment's bytes in place."""
        ...


class Reading(Protocol):
    """One segment on its way from disk."""

    @property
    def position(self) -> int:
        """Records of the journal that its bytes have absorbed."""
        ...

    @property
    def is_checked(self) -> bool:
        """Every byte was compared with its checksum, once `finish` has returned."""
        ...

    @property
    def was_written_to(self) -> bool:
        """The view of these tensors was changed, and the bytes are those of the view."""
        ...

    def fill(self, into: torch.Tensor, start: int) -> None:
        """Read `into` (uint8, host memory) full from byte `start` of the segment; from several threads at once."""
        ...

    def finish(self) -> None:
        """Check what was read, after all of it was: raises `StoreCorrupt` if it is not what it should be."""
        ...


class UnitHome(Protocol):
    """Where a unit of a versioned tier is read from; it stays readable after a newer version took its place."""

    def reading(
        self, tensors: Sequence[TensorSpec], *, position: int = 0, check_all: bool = True, beside_view: bool = False
    ) -> Reading:
        """Begin to read consecutive tensors and their padding; see `DiskHome.reading`."""
        ...

    def pieces(self) -> Pieces:
        """All of the unit, tensor by tensor, each compared with its checksum."""
        ...


class VersionedTier(Tier, Protocol):
    """A tier whose homes are immutable versions: a write makes a new one, and a published one can be opened again."""

    def write_pieces(self, segment: Segment, pieces: Iterable[tuple[int, memoryview]], *, version: int) -> bool:
        """`write`, from pieces of the segment in order: (byte offset, bytes that are valid until the next one)."""
        ...

    def find(self, unit: Unit, source: Source) -> bool:
        """Use files that hold what `source` gives as the unit's home; False if there are none."""
        ...

    def restore(self, unit: Unit, record: UnitRecord) -> None:
        """Open a version that is there, after checking every byte of it."""
        ...

    def open_version(self, unit: Unit, record: UnitRecord) -> None:
        """Make a published version the unit's home."""
        ...

    def home(self, unit: Unit) -> UnitHome:
        """Where the unit is read from."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """The three tiers of one store."""

    gpu: MemoryTier
    cpu: MemoryTier
    disk: VersionedTier

    def __getitem__(self, name: TierName) -> Tier:
        return self.disk if name == "disk" else self.in_memory(name)

    def in_memory(self, name: TierName) -> MemoryTier:
        """The tier of this name, which is not the disk."""
        assert name != "disk"
        return self.gpu if name == "gpu" else self.cpu

    def close(self) -> None:
        """Release memory, maps and files."""
        with ExitStack() as everything:
            for tier in (self.gpu, self.cpu, self.disk):
                everything.callback(tier.close)


def carve(buffer: torch.Tensor, spec: TensorSpec, *, byte_start: int = 0) -> torch.Tensor:
    """One parameter inside decoded bytes that start at `byte_start` of its unit, sharing the buffer's storage."""
    start = spec.byte_offset - byte_start
    return buffer[start : start + spec.n_bytes].view(spec.dtype).view(spec.shape)


def stored_part(buffer: torch.Tensor, spec: TensorSpec, *, stored_start: int = 0) -> torch.Tensor:
    """One parameter's stored bytes, without padding, inside those that start at `stored_start` of its unit."""
    start = spec.stored_offset - stored_start
    return buffer[start : start + spec.stored_bytes]


def encoded(spec: TensorSpec, value: torch.Tensor) -> torch.Tensor:
    """What a home holds of a tensor that a source gave: the elements, or the bytes of its stored form.

    Bytes that are in the stored form already pass through, so that a lossy form is made once, where weights come in.
    """
    if spec.is_plain or (value.dtype == torch.uint8 and value.shape == (spec.stored_bytes,)):
        return value
    return codec_of(spec.stored).encode(value)


def put_tensor(home: torch.Tensor, spec: TensorSpec, value: torch.Tensor) -> None:
    """Copy a tensor that a source gave into its unit's buffer, in its stored form."""
    into = carve_plain(home, spec) if spec.is_plain else stored_part(home, spec)
    into.copy_(encoded(spec, value))


def carve_plain(home: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The elements of a plain tensor inside its unit's buffer, sharing its storage."""
    return stored_part(home, spec).view(spec.dtype).view(spec.shape)


def tensor_view(home: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """One parameter inside its unit's buffer, as a tensor with a storage of its own.

    Savers recognise tied weights by their storage: views of one buffer would all look tied, so each view goes
    through DLPack, which wraps the same memory in a new storage. What is not stored plain is decoded into new memory.
    """
    if spec.is_plain:
        return torch.from_dlpack(carve_plain(home, spec))
    into = torch.empty(spec.shape, dtype=spec.dtype, device=home.device)
    codec_of(spec.stored).decode(stored_part(home, spec), into)
    return into


def tensor_views(buffer: torch.Tensor, unit: Unit) -> list[torch.Tensor]:
    """`tensor_view` of all tensors of a unit in its buffer."""
    return [tensor_view(buffer, spec) for spec in unit.tensors]


def copy_pieces(pieces: Pieces, buffer: torch.Tensor) -> None:
    """Copy a unit's bytes into its flat uint8 buffer, on any device."""
    for start, piece in pieces:
        buffer[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))


def gathered(unit: Unit, source: Source) -> torch.Tensor:
    """A unit's bytes in main memory, flat uint8; padding is zero."""
    data = torch.zeros(unit.stored_bytes, dtype=torch.uint8)
    for spec in unit.tensors:
        put_tensor(data, spec, source(spec))
    return data


def host_bytes(data: torch.Tensor) -> memoryview:
    """A tensor's elements as bytes in main memory; a copy only if they are elsewhere or not contiguous."""
    return data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
