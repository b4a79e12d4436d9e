"""Layout file: writes and reads `layout.json`, the units of a store and checksums of the weights its run began with.

Does not: need the model or its weights, or compare anything with a journal.
Invariant: what is read back has the digest and the spans of what was written, whatever its granularity was, so a
replay on whole units gives the same bits as the run. Every field of the file is checked before it is used, and reading
takes memory in proportion to the file, whatever sizes it claims.

::

    {"format": 2, "units": [{"name": ..., "kind": ..., "tensors": [{"name": ..., "id": number in `named_parameters()`,
     "shape": [...], "dtype": "bfloat16", "stored": "plain", "offset": decoded bytes, "trainable": ..., "decays": ...,
     "crc": CRC32 of the padded stored bytes}]}]}
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import torch

from zo2trl.amp.codecs import PLAIN, is_known
from zo2trl.errors import StoreCorrupt
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.strict_json import Fields, read_json, write_json
from zo2trl.layout.layout import Kind, Layout, Segment, TensorSpec, Unit, VisitPoint, spans_of
from zo2trl.zo.tiles import TILE

__all__ = ["StoredLayout", "base_digest", "read_layout", "whole_segment", "write_layout"]

LAYOUT_FORMAT = 2
MAX_BYTES = 256 * 2**20
"""About 200 bytes a tensor; the largest published models have a few hundred thousand."""
MAX_NUMEL = 2**44
"""Tiles of a tensor are numbered in 32 bits."""

_KINDS: tuple[str, ...] = get_args(Kind)
_DTYPES = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_CURE = "Restore the file from a copy."


@dataclass(frozen=True)
class StoredLayout:
    """The content of a `layout.json`."""

    units: tuple[Unit, ...]
    base_crcs: dict[int, int]
    """Tensor id -> CRC32 of the tensor's padded stored bytes before the first step."""

    @property
    def digest(self) -> str:
        """`Layout.digest` of the layout that was written."""
        return Layout(units=self.units, points=(), stack_ends=frozenset(), leaf_blocks=frozenset()).digest()

    @cached_property
    def layout(self) -> Layout:
        """Each unit as one segment, visited at a point of its own."""
        points = tuple(_point(unit) for unit in self.units)
        return Layout(units=self.units, points=points, stack_ends=frozenset(), leaf_blocks=frozenset())


def whole_segment(unit: Unit) -> Segment:
    """A unit as one segment; its index is the unit's."""
    return Segment(
        index=unit.index, unit=unit, byte_start=0, n_bytes=unit.n_bytes, tensors=unit.tensors,
        spans=tuple(spans_of(unit.tensors, 0)),
    )  # fmt: skip


def write_layout(path: Path, layout: Layout, base_crcs: Mapping[int, int], *, fs: FS = LOCAL) -> None:
    """Write the file, durably and at once. `base_crcs` has every tensor's."""
    units = [
        {
            "name": unit.name,
            "kind": unit.kind,
            "tensors": [
                {
                    "name": spec.name,
                    "id": spec.tensor_id,
                    "shape": list(spec.shape),
                    "dtype": str(spec.dtype).removeprefix("torch."),
                    "stored": spec.stored,
                    "offset": spec.byte_offset,
                    "trainable": spec.trainable,
                    "decays": spec.decays,
                    "crc": base_crcs[spec.tensor_id],
                }
                for spec in unit.tensors
            ],
        }
        for unit in layout.units
    ]
    write_json(path, {"format": LAYOUT_FORMAT, "units": units}, fs=fs)


def read_layout(path: Path, *, fs: FS = LOCAL) -> StoredLayout:
    """Read the file back.

    Raises:
        StoreCorrupt: a field is missing or cannot be; names it. Nothing was changed.
    """
    root = Fields(read_json(path, max_bytes=MAX_BYTES, fs=fs), str(path))
    if (version := root.integer("format")) != LAYOUT_FORMAT:
        raise StoreCorrupt(
            f"{path} has format {version}; this zo2trl reads format {LAYOUT_FORMAT}. Use the zo2trl that wrote it."
        )
    crcs: dict[int, int] = {}
    units = tuple(
        _read_unit(Fields(value, f"{path}, units[{index}]"), index, crcs)
        for index, value in enumerate(root.list("units"))
    )
    names = [tensor.name for unit in units for tensor in unit.tensors]
    _refuse_double(path, "unit", (unit.name for unit in units))
    _refuse_double(path, "tensor", names)
    if not units or sorted(crcs) != list(range(len(names))):
        raise StoreCorrupt(f"{path}: the `id`s of {len(names)} tensors are not 0 to {len(names) - 1}. {_CURE}")
    return StoredLayout(units, crcs)


def base_digest(layout: Layout | StoredLayout, base_crcs: Mapping[int, int]) -> str:
    """SHA-256 over names and checksums of all tensors, by id: identifies the weights a run began with."""
    named = {spec.tensor_id: spec.name for unit in layout.units for spec in unit.tensors}
    rows = [[named[tensor_id], base_crcs[tensor_id]] for tensor_id in sorted(named)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _point(unit: Unit) -> VisitPoint:
    segment = whole_segment(unit)
    return VisitPoint(index=unit.index, module_name=unit.name, block_name=unit.name, segments=(segment,))


def _read_unit(fields: Fields, index: int, crcs: dict[int, int]) -> Unit:
    kind = fields.text("kind")
    if kind not in _KINDS:
        raise fields.refuse("kind", f"{kind!r} is none of {', '.join(_KINDS)}")
    tensors: list[TensorSpec] = []
    offset = stored_offset = 0
    for number, value in enumerate(fields.list("tensors")):
        of_tensor = Fields(value, f"{fields.where}.tensors[{number}]")
        tensors.append(_read_tensor(of_tensor, offset=offset, stored_offset=stored_offset))
        crcs[tensors[-1].tensor_id] = of_tensor.integer("crc", least=0, most=2**32 - 1)
        offset += tensors[-1].n_padded_bytes
        stored_offset += tensors[-1].stored_padded_bytes
    if not tensors:
        raise fields.refuse("tensors", "there are none")
    return Unit(index=index, name=fields.text("name"), kind=cast(Kind, kind), tensors=tuple(tensors))


def _read_tensor(fields: Fields, *, offset: int, stored_offset: int) -> TensorSpec:
    shape = tuple(_size(fields, value) for value in fields.list("shape"))
    numel = 1
    for size in shape:
        numel *= size
        if numel > MAX_NUMEL:
            raise fields.refuse("shape", f"more than 2^44 elements cannot be numbered, got {list(shape)[:8]}")
    dtype = _DTYPES.get(fields.text("dtype"))
    if dtype is None:
        raise fields.refuse("dtype", f"{fields.text('dtype')[:40]!r} is no dtype of torch {torch.__version__}")
    if (found := fields.integer("offset", least=0)) != offset:
        raise fields.refuse("offset", f"tensors follow each other in whole tiles of {TILE}: {offset}, not {found}")
    trainable = fields.flag("trainable")
    if trainable and not dtype.is_floating_point:
        raise fields.refuse("trainable", f"a tensor of {dtype} cannot be trained")
    if not is_known(stored := fields.text("stored")):
        raise fields.refuse("stored", f"{stored[:40]!r} is no form of weights that this zo2trl can read")
    if trainable and stored != PLAIN.identity:
        raise fields.refuse("stored", f"a tensor that is trained is stored as it is, not as {stored}")
    return TensorSpec(
        name=fields.text("name"), tensor_id=fields.integer("id", least=0, most=2**32 - 1), shape=shape, dtype=dtype,
        byte_offset=offset, trainable=trainable, decays=fields.flag("decays"),
        stored_offset=stored_offset, stored=stored,
    )  # fmt: skip


def _size(fields: Fields, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMEL:
        raise fields.refuse("shape", f"a size must be a number from 0 to 2^44, got {str(value)[:40]}")
    return value


def _refuse_double(path: Path, what: str, names: Iterable[str]) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise StoreCorrupt(f"{path}: two {what}s are called {doubled[0]!r}. {_CURE}")
