"""This module reads a run from a store without the model: its steps, its units, and the arithmetic that repeats them.

Does not: read weights, lock or change anything. It may read during a training, and then gets one moment of it.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zo2trl.errors import ConfigError, StoreForeign
from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.journal import JSON, Journal
from zo2trl.layout.layout import Layout
from zo2trl.layout.layout_file import StoredLayout, base_digest, read_layout
from zo2trl.tiers.folder import StoreFolder
from zo2trl.tiers.unit_files import UnitFiles
from zo2trl.zo.method import DrawnOtherwise, Method, UnknownPart, method_of
from zo2trl.zo.mezo import device_kind
from zo2trl.zo.records import Record

__all__ = ["Moment", "StoredRun", "method_to_repeat", "mismatches"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A Moment is a position in a run's history, as a checkpoint names it."""

    store_id: str
    """This is the `store` in the run's header."""
    position: int
    fingerprint: str
    """This is `Journal.fingerprint(position)`; another history of the same run has another one."""


@dataclass(eq=False)
class StoredRun:
    """A StoredRun is a store's run as it was at one moment; `look` makes one."""

    folder: StoreFolder
    header: dict[str, JSON]
    records: list[Record]
    stored: StoredLayout
    files: UnitFiles
    _fs: FS
    _fingerprint: Callable[[int], str] = field(repr=False)

    @classmethod
    def look(cls, store_dir: Path, *, fs: FS = LOCAL) -> "StoredRun":
        """Read the run in a folder without locking or changing anything.

        Raises:
            StoreForeign: there is no run, or its parts belong to different runs.
            StoreCorrupt: journal or layout is damaged.
        """
        folder = StoreFolder.look(store_dir, fs=fs)
        journal = _read_journal(folder.journal, fs)
        stored = read_layout(folder.layout, fs=fs)
        for problem in mismatches(folder, journal.header, stored):
            raise StoreForeign(problem)
        files = UnitFiles(folder.units, fs=fs)
        files.attach(journal, stored.units)
        return cls(folder, journal.header, list(journal.records), stored, files, fs, journal.fingerprint)

    @property
    def path(self) -> Path:
        """Return the store's folder."""
        return self.folder.path

    def position_of(self, step: int | None) -> int:
        """Return the number of records before `step`; for None, of all records.

        Raises:
            ConfigError: the run has not reached that step.
        """
        if step is None:
            return len(self.records)
        last = self.records[-1].step + 1 if self.records else 0
        if not 0 <= step <= last:
            raise ConfigError(f"`step` must be from 0 to {last}, where {self.folder.journal} ends; got {step}.")
        return bisect_left([record.step for record in self.records], step)

    def position_at(self, moment: Moment) -> int:
        """Return the position of a checkpoint, after checking that the run still holds its records.

        Raises:
            StoreForeign: it belongs to another run, or to steps that were rewound.
        """
        if self.header.get("store") != moment.store_id:
            raise StoreForeign(
                f"{self.path} holds another run ({str(self.header.get('store'))[:12]}) than the checkpoint's "
                f"({moment.store_id[:12]}). Name its store with `--store`, or use the checkpoint's own weights."
            )
        is_there = moment.position <= len(self.records)
        if not is_there or self._fingerprint(moment.position) != moment.fingerprint:
            raise StoreForeign(
                f"{self.folder.journal} does not hold the {moment.position} records that lead to the checkpoint: it "
                "has others, or fewer. Restore the store from a copy that does."
            )
        return moment.position

    def is_same_until(self, position: int) -> bool:
        """Read the journal again and return whether its first `position` records are still the same.

        The run may have been rewound or replaced.
        """
        now = _read_journal(self.folder.journal, self._fs)
        same_run = now.header == self.header and len(now.records) >= position
        return same_run and now.fingerprint(position) == self._fingerprint(position)

    def look_again(self) -> None:
        """Read the journal again for versions of units that have been published since."""
        self.files.attach(_read_journal(self.folder.journal, self._fs), self.stored.units)


def mismatches(folder: StoreFolder, header: Mapping[str, JSON], stored: StoredLayout) -> Iterator[str]:
    """Describe each contradiction between a journal and a layout, which then belong to different runs."""
    cure = "Restore both from one copy."
    for name, found in {"layout": stored.digest, "base": base_digest(stored, stored.base_crcs)}.items():
        if header.get(name) != found:
            yield (
                f"{folder.layout} does not belong to {folder.journal}: the header's `{name}` is "
                f"{str(header.get(name))[:12]}, the file's {found[:12]}. {cure}"
            )
    decays = {spec.name for unit in stored.units for spec in unit.tensors if spec.decays}
    listed = header.get("decays")
    if not decays <= set(map(str, listed if isinstance(listed, list) else [])):
        yield f"{folder.layout} lets weights decay that do not in {folder.journal}. {cure}"


def method_to_repeat(run: StoredRun, device: torch.device) -> Method:
    """Return the method that repeats a run's steps on `device`.

    Raises:
        StoreForeign: repeating them needs another zo2trl, or another kind of device.
    """
    if run.header.get("codec") != run.stored.layout.stored_forms:
        raise _unknown(run, "codec")
    layout = Layout(units=run.stored.units, points=(), stack_ends=frozenset(), leaf_blocks=frozenset())
    tensors = [(spec.tensor_id, spec.numel) for spec in layout.trainable_tensors()]
    kind = device_kind(device)
    try:
        return method_of(str(run.header.get("method")), tensors=tensors, device_kind=kind)
    except DrawnOtherwise as error:
        raise StoreForeign(
            f"{run.folder.journal} was recorded with the directions {error.name!r}, which this device draws otherwise "
            f"({error.here!r}). Use `--device {run.header.get('device')}` on the kind of machine that made it."
        ) from error
    except UnknownPart as error:
        raise _unknown(run, "method") from error


def _unknown(run: StoredRun, name: str) -> StoreForeign:
    versions = run.header.get("versions")
    wrote = versions.get("zo2trl") if isinstance(versions, dict) else None
    return StoreForeign(
        f"{run.folder.journal} has the {name} {str(run.header.get(name))[:100]!r}, which this zo2trl does not know. "
        f"Use zo2trl {wrote or 'in the version that wrote it'}."
    )


def _read_journal(path: Path, fs: FS) -> Journal:
    with Journal.open(path, fs=fs, read_only=True) as journal:
        return journal
