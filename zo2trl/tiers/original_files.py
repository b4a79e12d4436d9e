"""Original files: lets frozen units live in the checkpoint they were loaded from, without a copy of a byte.

transformers maps safetensors files instead of reading them. So the kernel's table of maps shows where
a parameter's bytes lie in a file, whatever a loader, PEFT or the user has done to names since.

Does not: write, or trust the maps: each byte is read from the file and compared before a unit lives there.
Invariant: a unit lives in files only if all of its tensors do, in the dtype and the order of elements they are used
in. Where that is not so (a tensor was cast, fused, or never came from a file), the store keeps a copy.

Tensors in such files begin anywhere, so reads go through the page cache.
"""

import logging
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from zo2trl.errors import StoreCorrupt, StoreError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.tracing import traced
from zo2trl.layout.layout import TensorSpec, Unit
from zo2trl.tiers.disk import DiskHome
from zo2trl.tiers.readers import READ_PIECE_BYTES
from zo2trl.tiers.tier import Source, host_bytes
from zo2trl.tiers.unit_files import padded_crc

__all__ = ["OriginalFiles", "OriginalHome"]

logger = logging.getLogger(__name__)

MAPS = Path("/proc/self/maps")
_LENGTH_BYTES = 8  # of a safetensors header's length, which the header follows


class OriginalFile:
    """A file that the store does not own, open for reading."""

    def __init__(self, path: Path, *, fs: FS) -> None:
        self.path, self._fs = path, fs
        self._fd = fs.open(path)
        self.close = weakref.finalize(self, fs.close, self._fd)

    def read_at(self, into: memoryview, offset: int) -> None:
        """Bytes of the file."""
        self._fs.read_at(self._fd, into, offset, path=self.path)

    @cached_property
    def map(self) -> np.ndarray:
        """All of it, copy-on-write."""
        return self._fs.map_open(self._fd)

    def is_safetensors(self) -> bool:
        """Whether it begins as such a file does. Others (a store's own versions, say) may vanish when they like."""
        start = bytearray(_LENGTH_BYTES + 1)
        if (size := self._fs.size(self._fd)) < len(start):
            return False
        self.read_at(memoryview(start), 0)
        return start[_LENGTH_BYTES:] == b"{" and int.from_bytes(start[:_LENGTH_BYTES], "little") < size


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's elements begin."""

    file: OriginalFile
    offset: int


class _Mapping(NamedTuple):
    start: int  # address
    stop: int
    offset: int  # byte of the file at `start`
    path: str


class OriginalFiles:
    """Finds homes for units whose parameters are maps of files; on systems without /proc it finds none."""

    _places: dict[int, list[_Place]]  # unit -> where its tensors most likely are

    def __init__(self, *, fs: FS = LOCAL) -> None:
        self._fs = fs
        self._known: list[_Mapping] = []
        self._files: dict[str, OriginalFile] = {}
        self._places = {}

    def note(self, unit: Unit, source: Source) -> bool:
        """Note where a frozen unit's tensors are mapped from, while they are; False if one of them is not. Nothing is
        read."""
        if unit.is_trained or not unit.is_plain:
            return False
        places: list[_Place] = []
        for spec in unit.tensors:
            place = self._place(spec, source(spec))
            if place is None:
                return False
            places.append(place)
        self._places[unit.index] = places
        return True

    def home(self, unit: Unit, source: Source) -> "OriginalHome | None":
        """A home in files that hold every tensor of the unit as `source` gives it, to the last byte; else None."""
        crcs: dict[int, int] = {}
        places = self._places.get(unit.index)
        if places is None:
            return None
        for spec, place in zip(unit.tensors, places, strict=True):
            data = host_bytes(source(spec))
            if not _is_there(place, data):
                return None
            crcs[spec.tensor_id] = padded_crc(spec, data)
        return OriginalHome(unit, crcs, places)

    def close(self) -> None:
        """Close the files; no home in them can be read from then on."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._places.clear()

    def _place(self, spec: TensorSpec, value: torch.Tensor) -> _Place | None:
        if value.device.type != "cpu" or not value.is_contiguous() or value.dtype != spec.dtype:
            return None
        mapping = self._mapping(value.data_ptr(), spec.n_bytes)
        if mapping is None or (file := self._file(mapping.path)) is None:
            return None
        offset = mapping.offset + value.data_ptr() - mapping.start
        return _Place(file, offset) if offset % spec.dtype.itemsize == 0 else None

    def _mapping(self, address: int, n_bytes: int) -> _Mapping | None:
        for is_fresh in (False, True):  # what is known may be out of date; what it leads to is compared in any case
            if is_fresh:
                self._known = sorted(_mappings())
            found = bisect_right(self._known, address, key=lambda mapping: mapping.start) - 1
            if found >= 0 and address + n_bytes <= self._known[found].stop:
                return self._known[found]
        return None

    def _file(self, path: str) -> OriginalFile | None:
        file = self._files.get(path)
        if file is None:
            try:
                file = OriginalFile(Path(path), fs=self._fs)
                if not file.is_safetensors():
                    return None
            except StoreError as error:
                logger.info("%s is not used as a home of weights: %s", path, error)
                return None
            self._files[path] = file
        return file


class OriginalHome(DiskHome):
    """The home of a frozen unit in the files it was loaded from."""

    def __init__(self, unit: Unit, crcs: dict[int, int], places: list[_Place]) -> None:
        super().__init__(unit, crcs)
        self._places = dict(zip(unit.tensors, places, strict=True))
        self._is_shown = False

    def close(self) -> None:
        """Nothing: `OriginalFiles` closes the files."""

    @traced("disk read", lambda home, *_, **__: home.unit.name)
    def read_at(self, into: memoryview, offset: int, *, directly: bool) -> None:
        """See `DiskHome.read_at`."""
        for place, inside, at in self._extents(offset, len(into)):
            if place is None:
                into[inside] = bytes(inside.stop - inside.start)
            else:
                place.file.read_at(into[inside], place.offset + at)

    @property
    def is_shown(self) -> bool:
        """See `DiskHome.is_shown`."""
        return self._is_shown

    def shown(self, offset: int, n_bytes: int) -> np.ndarray:
        """See `DiskHome.shown`; a copy, gathered from the files."""
        gathered = np.zeros(n_bytes, np.uint8)
        for place, inside, at in self._extents(offset, n_bytes):
            if place is not None:
                first = place.offset + at
                gathered[inside] = place.file.map[first : first + inside.stop - inside.start]
        return gathered

    def tensors(self) -> list[torch.Tensor]:
        """See `DiskHome.tensors`."""
        self._is_shown = True
        views: list[torch.Tensor] = []
        for spec, place in self._places.items():
            data = torch.from_numpy(place.file.map[place.offset : place.offset + spec.n_bytes])
            views.append(torch.from_dlpack(data.view(spec.dtype).view(spec.shape)))
        return views

    def refuse(self, spec: TensorSpec, *, found: int, expected: int) -> None:
        """See `DiskHome.refuse`."""
        place = self._places[spec]
        raise StoreCorrupt(
            f"{place.file.path} at offset {place.offset}: {spec.name} has CRC {found:08x}, expected {expected:08x}. "
            "The frozen base is read from this file, and it was changed since the run began. Restore it from where it "
            "came from, then resume: the store holds everything that was trained."
        )

    def _extents(self, offset: int, n_bytes: int) -> Iterator[tuple[_Place | None, slice, int]]:
        """The parts of a range of the unit: where they are (None: padding), where they go, and at which byte of the
        tensor they begin."""
        end = offset + n_bytes
        for spec, place in self._places.items():
            elements = spec.byte_offset + spec.n_bytes
            for where, first, stop in (
                (place, spec.byte_offset, elements),
                (None, elements, spec.byte_offset + spec.n_padded_bytes),
            ):
                first_here, stop_here = max(first, offset), min(stop, end)
                if first_here < stop_here:
                    yield where, slice(first_here - offset, stop_here - offset), first_here - spec.byte_offset


def _is_there(place: _Place, wanted: memoryview) -> bool:
    """Whether a file has what memory has: the map or the file may have been written to."""
    data = np.frombuffer(wanted, np.uint8)
    buffer = np.empty(min(READ_PIECE_BYTES, len(data)), np.uint8)
    for start in range(0, len(data), READ_PIECE_BYTES):
        piece = buffer[: min(READ_PIECE_BYTES, len(data) - start)]
        place.file.read_at(piece.data, place.offset + start)
        if not np.array_equal(piece, data[start : start + len(piece)]):
            return False
    return True


def _mappings() -> Iterator[_Mapping]:
    """All files that are mapped into this process."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].endswith(" (deleted)"):
            start, stop = (int(number, 16) for number in fields[0].split("-"))
            yield _Mapping(start, stop, int(fields[2], 16), fields[5])
