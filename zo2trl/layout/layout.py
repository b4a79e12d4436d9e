"""Units, segments and visit points: which bytes belong together, and where in a forward they are needed.

Does not: look at a model (model_layout.py), place units in tiers (planning/placement.py), or move or read weights.
Every size exists twice: `n_bytes`, `byte_start` and `byte_offset` count decoded bytes, which models compute on and
spans lie in; `stored_bytes`, `stored_start` and `stored_offset` count those that tiers, links and files hold. They are
equal where all tensors are plain, as in every trained unit.

Invariant: pure data. Every tensor of a unit starts on a noise tile, and numbers of tensors do not depend on how units
are cut, so neither noise nor files depend on granularity.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from zo2trl.amp.codecs import PLAIN, codec_of
from zo2trl.errors import UnsupportedError
from zo2trl.zo.tiles import TILE, Span, TileMap

__all__ = [
    "Layout",
    "Segment",
    "TensorSpec",
    "Unit",
    "VisitPoint",
    "spans_of",
    "trained_part",
]

ALIGNMENT_BYTES = 4096  # of segments in device memory: kernels and reads past the page cache need aligned starts

Kind = Literal["root", "shared", "block", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One parameter inside its unit's buffer. `tensor_id` numbers `named_parameters()` and keys the noise.

    Raises:
        UnsupportedError: it is trained, and its stored form is not plain.
    """

    name: str
    tensor_id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    byte_offset: int
    trainable: bool
    decays: bool
    stored_offset: int
    stored: str = PLAIN.identity
    """Identity of the codec (amp/codecs.py) that turns the stored bytes into elements of `dtype`."""

    def __post_init__(self) -> None:
        if self.trainable and not self.is_plain:
            raise UnsupportedError(
                f"{self.name} is trained, and would be stored as {self.stored}: rounding to that form at every write "
                "would be larger than the steps. Freeze it and train an adapter, or store it as it is."
            )

    @property
    def is_plain(self) -> bool:
        """Whether the stored bytes are the elements themselves."""
        return self.stored == PLAIN.identity

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored form, without padding."""
        return self.n_bytes if self.is_plain else codec_of(self.stored).stored_bytes(self.shape, self.dtype)

    @property
    def stored_padded_bytes(self) -> int:
        """Stored bytes up to the next tensor: whole tiles, or whole pages of a form that has no tiles."""
        if self.is_plain:
            return self.n_padded_bytes
        return -(-self.stored_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return int(torch.Size(self.shape).numel())

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return self.numel * self.dtype.itemsize

    @property
    def n_padded_bytes(self) -> int:
        """Bytes up to the next tensor: a whole number of tiles."""
        return -(-self.numel // TILE) * TILE * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The tensors of one block (or of everything outside the blocks), all trained or all frozen: they have one home in
    one tier."""

    index: int
    name: str
    kind: Kind
    tensors: tuple[TensorSpec, ...]

    @property
    def n_bytes(self) -> int:
        """Length of the unit's contiguous buffer when it is decoded."""
        return sum(tensor.n_padded_bytes for tensor in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Length of the unit's contiguous buffer in every tier."""
        return sum(tensor.stored_padded_bytes for tensor in self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether it is used as it is stored."""
        return all(tensor.is_plain for tensor in self.tensors)

    @property
    def is_resident(self) -> bool:
        """True for units that always live on the execution device."""
        return self.kind != "block"

    @property
    def is_trained(self) -> bool:
        """True if any of its tensors moves."""
        return any(tensor.trainable for tensor in self.tensors)


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """A byte range of a unit that is visited at once: the whole unit, or one leaf of it."""

    index: int
    unit: Unit
    byte_start: int
    n_bytes: int
    tensors: tuple[TensorSpec, ...]
    spans: tuple[Span, ...] = field(repr=False)
    stored_start: int = field(init=False)
    stored_bytes: int = field(init=False)
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        first, last = self.tensors[0], self.tensors[-1]
        stored_stop = last.stored_offset + last.stored_padded_bytes
        object.__setattr__(self, "stored_start", first.stored_offset)
        object.__setattr__(self, "stored_bytes", stored_stop - first.stored_offset)
        object.__setattr__(self, "is_plain", all(tensor.is_plain for tensor in self.tensors))

    @property
    def is_trainable(self) -> bool:
        """Whether it is perturbed, updated and written; False if all of it is frozen."""
        return bool(self.spans)


@dataclass(frozen=True, eq=False, kw_only=True)
class VisitPoint:
    """A module whose forward must not start before its segments are bound. The first point of a layout is "root"."""

    index: int
    module_name: str
    block_name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """All units and the points where a forward needs them, in the order a forward is expected to."""

    units: tuple[Unit, ...]
    points: tuple[VisitPoint, ...]
    stack_ends: frozenset[str]  # names of blocks after which the pass is outside the stacks again
    leaf_blocks: frozenset[str]  # blocks that are visited leaf by leaf

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights, decoded."""
        return sum(unit.n_bytes for unit in self.units)

    @property
    def stored_forms(self) -> str:
        """Identities of all stored forms, joined with "+": what a journal's header calls its codec."""
        return "+".join(sorted({tensor.stored for unit in self.units for tensor in unit.tensors}))

    @property
    def root(self) -> VisitPoint:
        """The point bound whenever a pass runs outside the stacks."""
        return self.points[0]

    @property
    def segments(self) -> list[Segment]:
        """Every segment once, in index order."""
        seen = {segment.index: segment for point in self.points for segment in point.segments}
        return [seen[index] for index in sorted(seen)]

    def trainable_tensors(self) -> list[TensorSpec]:
        """Trainable tensors in `named_parameters()` order: the order of MeZO's stream."""
        tensors = [tensor for unit in self.units for tensor in unit.tensors if tensor.trainable]
        return sorted(tensors, key=lambda tensor: tensor.tensor_id)

    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes, trainability, offsets, and stored forms other than plain.

        Granularity and budgets leave it alone, and so does weight decay, which is the update's business.
        """
        rows = [
            [unit.name, [[t.name, t.tensor_id, t.shape, str(t.dtype), t.byte_offset, t.trainable]
                         + ([] if t.is_plain else [t.stored]) for t in unit.tensors]]
            for unit in self.units
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def trained_part(name: str) -> str:
    """Name of the unit with the trained tensors of a block or root whose frozen tensors are in unit `name`."""
    return f"{name} (trainable)"


def spans_of(tensors: Sequence[TensorSpec], byte_start: int) -> Iterator[Span]:
    """Group consecutive trainable tensors that share dtype and decay, in a buffer that starts at `byte_start`."""
    run: list[TensorSpec] = []
    for tensor in [*tensors, None]:
        kind = (tensor.dtype, tensor.decays) if tensor is not None and tensor.trainable else None
        if run and kind != (run[0].dtype, run[0].decays):
            yield _span(run, byte_start)
            run = []
        if kind is not None and tensor is not None:
            run.append(tensor)


def _span(run: Sequence[TensorSpec], byte_start: int) -> Span:
    tiles = TileMap.for_tensors([(tensor.tensor_id, tensor.numel) for tensor in run])
    return Span(dtype=run[0].dtype, byte_start=run[0].byte_offset - byte_start, tiles=tiles, decays=run[0].decays)
