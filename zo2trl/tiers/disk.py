"""Disk tier: the newest version of a unit's file is its home, read with pread and mapped for those who look at it.

Never written through a map: a full disk under a writable map kills the process, under pwrite it is an error. And never
read through one by the engine: a drive that fails, or a file that somebody cuts, is an error too, not a SIGBUS.

Invariants:
- A published version is never written to again (unit_files.py).
- A tensor is compared with its checksum at its first read after the version was opened, and then at least once in
  `CHECK_EVERY` reads, at a phase of its own, so that no step has to compare much more than another. Who is going to
  write back what was read asks for everything to be compared: damage never gets a checksum that fits.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial

import numpy as np
import torch

from zo2trl.tiers.checksums import TensorSums
from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.tiers.journal import UnitRecord
from zo2trl.tiers.layout import Segment, TensorSpec, Unit
from zo2trl.tiers.spans import spanned
from zo2trl.tiers.tier import Source, host_bytes
from zo2trl.tiers.unit_files import Draft, UnitFiles, check_crc

__all__ = ["CHECK_EVERY", "DiskHome", "DiskReading", "DiskTier"]

CHECK_EVERY = 16


class DiskHome:
    """One published version. It stays readable while anybody holds this object, also when its name is gone."""

    _ages: dict[int, int]  # tensor id -> reads since it was last compared; not there: it never was

    def __init__(self, files: UnitFiles, unit: Unit, record: UnitRecord, *, fs: FS = LOCAL) -> None:
        self.record, self.unit = record, unit
        self._fs = fs
        self._path = files.path(unit, record)
        self._fds = [files.open(unit, record)]
        self.close = weakref.finalize(self, _close, fs, self._fds)
        """For when nobody reads any more; else the last user closes it by letting go."""
        self._direct = files.open_direct(self._fds[0])
        if self._direct is not None:
            self._fds.append(self._direct)
        self._crcs = files.read_table(unit, record, self._fds[0])
        self._ages = {}
        self._lock = threading.Lock()

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
            beside_view: bring what somebody wrote into the view, where that differs from the file. (All is compared
                then, and read through the page cache as the view is: else damage to one of two copies of the file
                would pass for what somebody wrote.)
        """
        beside_view = beside_view and "map" in self.__dict__
        with self._lock:
            chosen = [spec for spec in tensors if check_all or beside_view or self._is_turn(spec)]
            for spec in tensors:
                if spec.tensor_id in self._ages:
                    self._ages[spec.tensor_id] += 1
        return DiskReading(self, tensors, chosen, position=position, shown=self.map if beside_view else None)

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

    @spanned("disk read", lambda home, *_, **__: home.unit.name)
    def read_at(self, into: memoryview, offset: int, *, directly: bool) -> None:
        """Bytes of the file; `directly`: past the page cache where that is possible."""
        direct = self._direct if directly else None
        self._fs.read_at(self._fds[0], into, offset, path=self._path, direct=direct)

    def compare(self, found: dict[int, int]) -> None:
        """Tensor id -> CRC32 of what was read. Raises `StoreCorrupt` if one is not what it should be."""
        for number, spec in enumerate(self.unit.tensors):
            if spec.tensor_id in found:
                crc = found[spec.tensor_id]
                check_crc(self._path, self.unit, spec, found=crc, expected=self._crcs[spec.tensor_id])
                with self._lock:
                    phase = 0 if spec.tensor_id in self._ages else (number + self.unit.index) % CHECK_EVERY
                    self._ages[spec.tensor_id] = phase

    @cached_property
    def map(self) -> np.ndarray:
        """The unit's bytes, copy-on-write."""
        # By its descriptor: a newer version may have taken this one's name away.
        return self._fs.map_open(self._fds[0])[: self.unit.n_bytes]


class DiskReading:
    """Consecutive tensors on their way from a version."""

    def __init__(
        self,
        home: DiskHome,
        tensors: Sequence[TensorSpec],
        chosen: Sequence[TensorSpec],
        *,
        position: int,
        shown: np.ndarray | None,
    ) -> None:
        self.position = position
        self.is_checked = len(chosen) == len(tensors)
        """Every byte is compared, once `finish` returns."""
        self.was_written_to = False
        """Somebody changed the view of these tensors, and this is what they wrote: a copy-on-write map keeps that in
        this process, where reading the file does not see it."""
        self._home, self._start, self._shown = home, tensors[0].byte_offset, shown
        self._sums = TensorSums(chosen)

    def fill(self, into: torch.Tensor, start: int) -> None:
        """Read `into` (uint8, host memory) full from byte `start` of the first tensor. From any thread, in any order.

        Raises:
            ShortRead, StoreError: the file was cut meanwhile, or cannot be read.
        """
        data, offset = into.numpy().data, self._start + start
        self._home.read_at(data, offset, directly=self._shown is None)
        self._sums.add(data, offset)
        if self._shown is not None:
            shown, stored = self._shown[offset : offset + len(data)], np.frombuffer(data, np.uint8)
            if not np.array_equal(shown, stored):
                stored[:] = shown
                self.was_written_to = True

    def finish(self) -> None:
        """All was read. Raises `StoreCorrupt` if what was to be compared is not what it should be."""
        self._home.compare(self._sums.crcs())


class DiskTier:
    """Homes of units in versioned files.

    `keep_base`: first versions with trainable tensors are kept for good, because nothing else holds these weights.
    """

    name = "disk"

    _homes: dict[int, DiskHome]
    _drafts: dict[int, Draft]

    def __init__(self, files: UnitFiles, *, keep_base: bool = False, fs: FS = LOCAL) -> None:
        self._files, self._fs, self._keep_base = files, fs, keep_base
        self._homes = {}
        self._drafts = {}

    def adopt(self, unit: Unit, source: Source) -> None:
        """Write the unit's first version, one tensor at a time."""
        draft = self._files.draft(unit, lambda spec: host_bytes(source(spec)), position=0)
        self.move_in(unit, self._files.publish(draft, is_origin=self._keep_base and unit.is_trained))

    def restore(self, unit: Unit, record: UnitRecord) -> None:
        """Open a version that is there, after checking every byte of it."""
        self._files.check(unit, record)
        self.move_in(unit, record)

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Write into the draft of `version`; True when every trainable tensor of the unit is in it."""
        return self.write_pieces(segment, [(0, host_bytes(data))], version=version)

    def write_pieces(self, segment: Segment, pieces: Iterable[tuple[int, memoryview]], *, version: int) -> bool:
        """The same, from pieces of the segment in order: (byte offset, bytes that are valid until the next one)."""
        draft = self._draft(segment.unit, version)
        in_unit = ((segment.byte_start + start, data) for start, data in pieces)
        self._files.write_pieces(draft, segment.tensors, in_unit)
        return not any(spec.trainable for spec in draft.lacks())

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Complete the draft with frozen tensors that no write covered, and make it durable."""
        draft, home = self._drafts[unit.index], self._homes[unit.index]
        try:
            for spec in draft.lacks():
                data = memoryview(bytearray(spec.n_padded_bytes))
                home.read([spec], data)
                self._files.write(draft, [spec], data)
            record = self._files.publish(draft)
        except BaseException:
            self.abandon(unit)
            raise
        del self._drafts[unit.index]
        # Readers that still hold the old home keep its bytes: an unlinked file lives until its last user goes.
        return partial(self.move_in, unit, record)

    def abandon(self, unit: Unit) -> None:
        """Unlink an incomplete draft."""
        draft = self._drafts.pop(unit.index, None)
        if draft is not None:
            self._files.discard(draft)

    def move_in(self, unit: Unit, record: UnitRecord) -> None:
        """Make a published version the home."""
        self._homes[unit.index] = DiskHome(self._files, unit, record, fs=self._fs)

    def home(self, unit: Unit) -> DiskHome:
        """The published version."""
        return self._homes[unit.index]

    def view(self, unit: Unit) -> torch.Tensor:
        """The published version's copy-on-write map."""
        return torch.from_numpy(self._homes[unit.index].map)

    def drop(self, unit: Unit) -> None:
        """Forget a home; its file stays, and is closed by whoever reads it last."""
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
