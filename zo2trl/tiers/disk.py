"""Disk tier: the newest version of a unit's file is its home, read with pread and mapped for those who look at it.

Never written through a map: a full disk under a writable map kills the process, under pwrite it is an error. And never
read through one by the engine: a drive that fails, or a file that somebody cuts, is an error too, not a SIGBUS.
Invariant: a published version is never written to again (unit_files.py).
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial

import numpy as np
import torch

from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.tiers.journal import UnitRecord
from zo2trl.tiers.layout import Segment, TensorSpec, Unit
from zo2trl.tiers.tier import Source, host_bytes
from zo2trl.tiers.unit_files import Draft, UnitFiles, check_tensor

__all__ = ["DiskHome", "DiskTier"]


class DiskHome:
    """One published version. It stays readable while anybody holds this object, also when its name is gone."""

    def __init__(self, files: UnitFiles, unit: Unit, record: UnitRecord, *, fs: FS = LOCAL) -> None:
        self.record = record
        self._unit, self._fs = unit, fs
        self._path = files.path(unit, record)
        self._fd = files.open(unit, record)
        self.close = weakref.finalize(self, fs.close, self._fd)
        """For when nobody reads any more; else the last user closes it by letting go."""
        self._crcs = files.read_table(unit, record, self._fd)

    def read(self, tensors: Sequence[TensorSpec], into: memoryview) -> None:
        """Fill a buffer with consecutive tensors and their padding.

        Every byte is checked every time: a step absorbed by damaged weights would be written back as sound ones.

        Raises:
            ShortRead, StoreCorrupt: the file was cut or changed meanwhile.
        """
        start = tensors[0].byte_offset
        self._fs.read_at(self._fd, into, start, path=self._path)
        for spec in tensors:
            data = into[spec.byte_offset - start : spec.byte_offset - start + spec.n_padded_bytes]
            check_tensor(self._path, self._unit, spec, data=data, expected=self._crcs[spec.tensor_id])

    def was_written_to(self, tensors: Sequence[TensorSpec], data: memoryview) -> bool:
        """Whether somebody changed the view of consecutive tensors, whose bytes in the file are `data`; if so, `data`
        gets what they wrote.

        Writes into the copy-on-write map stay in this process, and reading the file does not see them.
        """
        if "map" not in self.__dict__:
            return False
        start = tensors[0].byte_offset
        shown = torch.from_numpy(self.map[start : start + len(data)])
        stored = torch.frombuffer(data, dtype=torch.uint8)
        if torch.equal(shown, stored):
            return False
        stored.copy_(shown)
        return True

    @cached_property
    def map(self) -> np.ndarray:
        """The unit's bytes, copy-on-write."""
        # By its descriptor: a newer version may have taken this one's name away.
        return self._fs.map_open(self._fd)[: self._unit.n_bytes]


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
        draft = self._files.create(unit, position=0)
        try:
            for spec in unit.tensors:
                self._files.write(draft, [spec], host_bytes(source(spec)))
        except BaseException:
            self._files.discard(draft)
            raise
        self.move_in(unit, self._files.publish(draft, is_origin=self._keep_base and unit.is_trained))

    def restore(self, unit: Unit, record: UnitRecord) -> None:
        """Open a version that is there, after checking every byte of it."""
        self._files.check(unit, record)
        self.move_in(unit, record)

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Write into the draft of `version`; True when every trainable tensor of the unit is in it."""
        draft = self._draft(segment.unit, version)
        self._files.write(draft, segment.tensors, host_bytes(data))
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
