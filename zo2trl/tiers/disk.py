"""Disk tier: units live in files, which the engine reads with pread and users see through maps.

A unit's home is the newest version of its file; that of a frozen one may be in other files (original_files.py).

Never written through a map: a full disk under a writable map kills the process, under pwrite it is an error. And never
read through one by the engine: a drive that fails, or a file that is cut, is an error too, not a SIGBUS.

Invariants:
- A published version is never written to again (unit_files.py).
- A tensor is compared with its checksum at its first read after the version was opened, and then at least once in
  `CHECK_EVERY` reads, at a phase of its own, so that no step has to compare much more than another. Before bytes
  that were read are written back, all of them are compared: damage never gets a checksum that fits.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch

from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.tracing import traced
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import Segment, TensorSpec, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.tiers.checksums import TensorSums
from zo2trl.tiers.tier import Pieces, Source, encoded, host_bytes, tensor_views
from zo2trl.tiers.unit_files import Draft, UnitFiles, check_crc

__all__ = ["CHECK_EVERY", "DiskHome", "DiskReading", "DiskTier", "Originals", "VersionHome"]

CHECK_EVERY = 16


class DiskHome:
    """A unit's bytes in files that are not written to any more. They stay readable while this object is referenced.

    Args:
        unit: what is there.
        crcs: tensor id -> CRC32 of its padded bytes.
    """

    unit: Unit
    close: Callable[[], Any]
    """Close the files at once; otherwise they are closed when the last reference to this object goes."""

    _ages: dict[int, int]  # tensor id -> reads since it was last compared; not there: it never was

    def __init__(self, unit: Unit, crcs: Mapping[int, int]) -> None:
        self.unit, self._crcs = unit, crcs
        self._ages = {}
        self._lock = threading.Lock()

    # -- what depends on the kind of home

    def read_at(self, into: memoryview, offset: int, *, directly: bool) -> None:
        """Read bytes of the unit; `directly`: past the page cache where that is possible."""
        raise NotImplementedError

    @property
    def is_shown(self) -> bool:
        """Whether views of it exist. Users may have written into them, which only this process can see."""
        raise NotImplementedError

    def shown(self, offset: int, n_bytes: int) -> np.ndarray:
        """Bytes of the unit as its views have them."""
        raise NotImplementedError

    def tensors(self) -> list[torch.Tensor]:
        """The unit's tensors, copy-on-write, each with a storage of its own."""
        raise NotImplementedError

    def refuse(self, spec: TensorSpec, *, found: int, expected: int) -> None:
        """Raise `StoreCorrupt`: a tensor has another CRC32 than it should have."""
        raise NotImplementedError

    # -- reading

    def reading(
        self,
        tensors: Sequence[TensorSpec],
        *,
        position: int = 0,
        check_all: bool = True,
        beside_view: bool = False,
    ) -> "DiskReading":
        """Begin to read consecutive tensors and their padding.

        Args:
            position: records of the journal that they have absorbed.
            check_all: compare all of them with their checksums; else those whose turn it is.
            beside_view: give the bytes of the view where they differ from the file. (All is compared
                then, and read through the page cache as the view is: else damage to one of two copies of the file
                would pass for a change of the view.)
        """
        beside_view = beside_view and self.is_shown
        with self._lock:
            chosen = [spec for spec in tensors if check_all or beside_view or self._is_turn(spec)]
            for spec in tensors:
                if spec.tensor_id in self._ages:
                    self._ages[spec.tensor_id] += 1
        return DiskReading(self, tensors, chosen, position=position, beside_view=beside_view)

    def _is_turn(self, spec: TensorSpec) -> bool:
        return self._ages.get(spec.tensor_id, CHECK_EVERY) + 1 >= CHECK_EVERY

    def read(self, tensors: Sequence[TensorSpec], into: memoryview) -> None:
        """Fill a buffer with consecutive tensors and their padding, all of them compared with their checksums.

        Raises:
            ShortRead, StoreCorrupt: the file was cut or changed meanwhile.
        """
        reading = self.reading(tensors)
        reading.fill(torch.frombuffer(into, dtype=torch.uint8), 0)
        reading.finish()

    def pieces(self) -> Pieces:
        """All of the unit, tensor by tensor; see `read`."""
        for spec in self.unit.tensors:
            if spec.numel:
                data = memoryview(bytearray(spec.stored_padded_bytes))
                self.read([spec], data)
                yield spec.stored_offset, data

    def compare(self, found: dict[int, int]) -> None:
        """Compare CRC32s of what was read (by tensor id) with the expected ones; `StoreCorrupt` if one differs."""
        for number, spec in enumerate(self.unit.tensors):
            if spec.tensor_id in found:
                crc, expected = found[spec.tensor_id], self._crcs[spec.tensor_id]
                if crc != expected:
                    self.refuse(spec, found=crc, expected=expected)
                with self._lock:
                    phase = 0 if spec.tensor_id in self._ages else (number + self.unit.index) % CHECK_EVERY
                    self._ages[spec.tensor_id] = phase


class VersionHome(DiskHome):
    """One published version of a unit. It stays readable also when its name is gone."""

    def __init__(self, files: UnitFiles, unit: Unit, record: UnitRecord, *, fs: FS = LOCAL) -> None:
        self._fs = fs
        self._path = files.path(unit, record)
        self._fds = [files.open(unit, record)]
        self.close = weakref.finalize(self, _close, fs, self._fds)
        self._direct = files.open_direct(self._fds[0])
        if self._direct is not None:
            self._fds.append(self._direct)
        super().__init__(unit, files.read_table(unit, record, self._fds[0]))

    @traced("disk read", lambda home, *_, **__: home.unit.name)
    def read_at(self, into: memoryview, offset: int, *, directly: bool) -> None:
        """See `DiskHome.read_at`."""
        direct = self._direct if directly else None
        self._fs.read_at(self._fds[0], into, offset, path=self._path, direct=direct)

    @property
    def is_shown(self) -> bool:
        """See `DiskHome.is_shown`."""
        return "map" in self.__dict__

    def shown(self, offset: int, n_bytes: int) -> np.ndarray:
        """See `DiskHome.shown`."""
        return self.map[offset : offset + n_bytes]

    def tensors(self) -> list[torch.Tensor]:
        """See `DiskHome.tensors`."""
        return tensor_views(torch.from_numpy(self.map), self.unit)

    def refuse(self, spec: TensorSpec, *, found: int, expected: int) -> None:
        """See `DiskHome.refuse`."""
        check_crc(self._path, self.unit, spec, found=found, expected=expected)

    @cached_property
    def map(self) -> np.ndarray:
        """The unit's bytes, copy-on-write."""
        # By its descriptor: a newer version may have taken this one's name away.
        return self._fs.map_open(self._fds[0])[: self.unit.stored_bytes]


class DiskReading:
    """Reads consecutive tensors of one home, in pieces, and sums up those that are compared."""

    def __init__(
        self,
        home: DiskHome,
        tensors: Sequence[TensorSpec],
        chosen: Sequence[TensorSpec],
        *,
        position: int,
        beside_view: bool,
    ) -> None:
        self.position = position
        self.is_checked = len(chosen) == len(tensors)
        """Every byte is compared, once `finish` returns."""
        self.was_written_to = False
        """The view of these tensors was changed, and the bytes are those of the view: a copy-on-write map keeps them
        in this process, and reading the file does not show them."""
        self._home, self._start, self._beside_view = home, tensors[0].stored_offset, beside_view
        self._sums = TensorSums(chosen)

    def fill(self, into: torch.Tensor, start: int) -> None:
        """Read `into` (uint8, host memory) full from byte `start` of the first tensor. From any thread, in any order.

        Raises:
            ShortRead, StoreError: the file was cut meanwhile, or cannot be read.
        """
        data, offset = into.numpy().data, self._start + start
        self._home.read_at(data, offset, directly=not self._beside_view)
        self._sums.add(data, offset)
        if self._beside_view:
            shown, stored = self._home.shown(offset, len(data)), np.frombuffer(data, np.uint8)
            if not np.array_equal(shown, stored):
                stored[:] = shown
                self.was_written_to = True

    def finish(self) -> None:
        """Compare checksums, when all was read. Raises `StoreCorrupt` if one differs."""
        self._home.compare(self._sums.crcs())


class Originals(Protocol):
    """Finds homes in files that the store does not own; see original_files.py."""

    def home(self, unit: Unit, source: Source) -> DiskHome | None:
        """A home that holds what `source` gives, byte for byte, if there is one."""
        ...

    def close(self) -> None:
        """Close the files; no home in them is used any more."""
        ...


class DiskTier:
    """Homes of units in files.

    Args:
        files: versions of units.
        keep_base: first versions with trainable tensors are kept for good, because nothing else holds these weights.
        originals: finds homes of frozen units in files that are there already; closed with the tier.
    """

    name: TierName = "disk"

    _homes: dict[int, DiskHome]
    _drafts: dict[int, Draft]

    def __init__(
        self,
        files: UnitFiles,
        *,
        keep_base: bool = False,
        originals: Originals | None = None,
        fs: FS = LOCAL,
    ) -> None:
        self._files, self._fs, self._keep_base, self._originals = files, fs, keep_base, originals
        self._homes = {}
        self._drafts = {}

    def add(self, unit: Unit, source: Source) -> None:
        """Find the unit in files that are there, or write its first version, one tensor at a time."""
        if self.find(unit, source):
            return
        draft = self._files.draft(unit, lambda spec: host_bytes(encoded(spec, source(spec))), position=0)
        self.open_version(unit, self._files.publish(draft, is_base=self._keep_base and unit.is_trained))

    def find(self, unit: Unit, source: Source) -> bool:
        """Make files that are there already the home of a unit; False if there are none."""
        home = None if unit.is_trained or self._originals is None else self._originals.home(unit, source)
        if home is not None:
            self._homes[unit.index] = home
        return home is not None

    def restore(self, unit: Unit, record: UnitRecord) -> None:
        """Open a version that is there, after checking every byte of it."""
        self._files.check(unit, record)
        self.open_version(unit, record)

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Write into the draft of `version`; True when all of the unit is in it."""
        return self.write_pieces(segment, [(0, host_bytes(data))], version=version)

    def write_pieces(self, segment: Segment, pieces: Iterable[tuple[int, memoryview]], *, version: int) -> bool:
        """The same, from pieces of the segment in order: (byte offset, bytes that are valid until the next one)."""
        draft = self._draft(segment.unit, version)
        in_unit = ((segment.stored_start + start, data) for start, data in pieces)
        self._files.write_pieces(draft, segment.tensors, in_unit)
        return not draft.lacks()

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Make the draft durable."""
        try:
            record = self._files.publish(self._drafts[unit.index])
        except BaseException:
            self.abandon(unit)
            raise
        del self._drafts[unit.index]
        # Readers that still hold the old home keep its bytes: an unlinked file lives until its last user goes.
        return partial(self.open_version, unit, record)

    def abandon(self, unit: Unit) -> None:
        """Unlink an incomplete draft."""
        draft = self._drafts.pop(unit.index, None)
        if draft is not None:
            self._files.discard(draft)

    def open_version(self, unit: Unit, record: UnitRecord) -> None:
        """Make a published version the home."""
        self._homes[unit.index] = VersionHome(self._files, unit, record, fs=self._fs)

    def home(self, unit: Unit) -> DiskHome:
        """Where the unit is read from."""
        return self._homes[unit.index]

    def view(self, unit: Unit) -> torch.Tensor:
        """All of the unit's bytes as its views have them: a map of its version, or a copy from other files."""
        return torch.from_numpy(self._homes[unit.index].shown(0, unit.stored_bytes))

    def tensors(self, unit: Unit) -> list[torch.Tensor]:
        """See `DiskHome.tensors`."""
        return self._homes[unit.index].tensors()

    def drop(self, unit: Unit) -> None:
        """Forget a home. Its file stays, and is closed after the last read."""
        self._homes.pop(unit.index, None)

    def close(self) -> None:
        """Drop maps and unfinished drafts; published files stay."""
        drafts, self._drafts = self._drafts, {}
        homes, self._homes = self._homes, {}
        with ExitStack() as everything:
            for home in homes.values():
                everything.callback(home.close)
            for draft in drafts.values():
                everything.callback(self._files.discard, draft)
            if self._originals is not None:
                everything.callback(self._originals.close)

    def _draft(self, unit: Unit, version: int) -> Draft:
        draft = self._drafts.get(unit.index)
        if draft is not None and draft.position != version:
            self.abandon(unit)
            draft = None
        if draft is None:
            draft = self._drafts[unit.index] = self._files.create(unit, position=version)
        return draft


def _close(fs: FS, fds: Sequence[int]) -> None:
    with ExitStack() as everything:
        for fd in fds:
            everything.callback(fs.close, fd)
