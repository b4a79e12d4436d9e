"""Disk tier: one plain file per unit version, mapped for reading, written with pwrite.

Never written through a map: a full disk under a writable map kills the process, under pwrite it is an error.
Invariant: a published version is never written to again. New bytes go to a new file, the draft; once it is complete,
`publish` makes it the home and unlinks the old one.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.tiers.layout import Segment, Unit
from zo2trl.tiers.tier import Source

__all__ = ["DiskTier"]


@dataclass
class _Home:
    path: Path
    map: np.ndarray


@dataclass
class _Draft:
    path: Path
    file: int
    version: int
    written: set[int] = field(default_factory=set)


class DiskTier:
    """Homes of units in files `<folder>/<unit>@<version>`."""

    name = "disk"

    _homes: dict[int, _Home]
    _drafts: dict[int, _Draft]

    def __init__(self, folder: Path, *, fs: FS = LOCAL) -> None:
        self._folder = folder
        self._fs = fs
        self._homes = {}
        self._drafts = {}
        fs.make_dir(folder)

    def adopt(self, unit: Unit, source: Source) -> None:
        """Write the unit's first version, one tensor at a time."""
        path = self._path(unit, 0)
        file = self._fs.create(path, unit.n_bytes)
        try:
            for spec in unit.tensors:
                self._fs.write_at(file, _host_bytes(source(spec)), spec.byte_offset)
        finally:
            self._fs.close(file)
        self._homes[unit.index] = _Home(path, self._fs.map(path))

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Write into the draft of `version`; True when every trainable tensor of the unit is in it."""
        draft = self._draft(segment.unit, version)
        self._fs.write_at(draft.file, _host_bytes(data), segment.byte_start)
        draft.written |= {tensor.tensor_id for tensor in segment.tensors}
        return all(t.tensor_id in draft.written for t in segment.unit.tensors if t.trainable)

    def publish(self, unit: Unit) -> None:
        """Complete the draft with frozen tensors that no write covered, and make it the home."""
        draft, home = self._drafts.pop(unit.index), self._homes[unit.index]
        for spec in unit.tensors:
            if spec.tensor_id not in draft.written:
                stop = spec.byte_offset + spec.n_padded_bytes
                self._fs.write_at(draft.file, home.map[spec.byte_offset : stop].data, spec.byte_offset)
        self._fs.close(draft.file)
        self._homes[unit.index] = _Home(draft.path, self._fs.map(draft.path))
        # Readers that still hold the old map keep its pages: an unlinked file lives until its last map goes.
        self._fs.unlink(home.path)

    def abandon(self, unit: Unit) -> None:
        """Unlink an incomplete draft."""
        draft = self._drafts.pop(unit.index, None)
        if draft is not None:
            self._fs.close(draft.file)
            self._fs.unlink(draft.path)

    def view(self, unit: Unit) -> torch.Tensor:
        """The published version's copy-on-write map."""
        return torch.from_numpy(self._homes[unit.index].map)

    def close(self) -> None:
        """Drop maps and unfinished drafts; published files stay."""
        for index in list(self._drafts):
            draft = self._drafts.pop(index)
            self._fs.close(draft.file)
            self._fs.unlink(draft.path)
        self._homes.clear()

    def _draft(self, unit: Unit, version: int) -> _Draft:
        draft = self._drafts.get(unit.index)
        if draft is not None and draft.version != version:
            self.abandon(unit)
            draft = None
        if draft is None:
            path = self._path(unit, version)
            if path == self._homes[unit.index].path:  # the same step again with other bytes (a checkpoint was loaded)
                path = path.with_name(f"{path.name}+")
            draft = _Draft(path, self._fs.create(path, unit.n_bytes), version)
            self._drafts[unit.index] = draft
        return draft

    def _path(self, unit: Unit, version: int) -> Path:
        return self._folder / f"{unit.name}@{version}"


def _host_bytes(data: torch.Tensor) -> memoryview:
    return data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
