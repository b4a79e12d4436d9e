"""Unit files: the versions of units on disk, and the order of operations that makes a new version the valid one.

Does not: place units in tiers, or decide when a unit is written.

A file `<unit>@<position>` holds a unit's bytes after the first `position` records of the journal, then a table with
one CRC32 (u32, little-endian) per tensor, so that damage is traced to a parameter. It counts from the moment its UNIT
record is in the journal: data synced -> folder synced -> UNIT record synced -> the version it replaces is unlinked.

Invariants:
- A file that a UNIT record names is never written to again, and never holds perturbation.
- A base version (weights that no record leads to: the first ones, or a state dict loaded later) is never unlinked.
"""

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from zo2trl.errors import StoreCorrupt, StoreError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.paths import inside
from zo2trl.files.tracing import traced
from zo2trl.journal.journal import Journal, MarkKind, UnitRecord
from zo2trl.layout.layout import TensorSpec, Unit
from zo2trl.tiers.checksums import TensorSums

__all__ = ["Draft", "UnitFiles", "check_crc", "file_name", "padded_crc", "table_crc", "tensor_crcs"]

logger = logging.getLogger(__name__)

CRC_BYTES = 4
CHECK_BYTES = 64 * 2**20  # read at a time while a file is checked
_MAX_NAME_BYTES = 200

Report = Callable[[int, str], None]
"""Receives damage in a file: (byte offset, what is wrong)."""


@dataclass(eq=False)
class Draft:
    """A version that is being written, and is not valid yet."""

    unit: Unit
    position: int
    revision: int
    path: Path
    fd: int | None
    crcs: dict[int, int] = field(default_factory=dict)  # tensor id -> CRC32 of its padded bytes
    may_count: bool = False  # its record was handed to the journal: after an error it may be there or not

    def lacks(self) -> list[TensorSpec]:
        """Tensors that were not written yet."""
        return [spec for spec in self.unit.tensors if spec.tensor_id not in self.crcs]


class UnitFiles:
    """The versions of all units of one store.

    Until `attach` there is no journal: records of published versions are collected in `first_records`, and the journal
    is created with them.
    """

    first_records: list[UnitRecord]

    _versions: dict[int, list[UnitRecord]]  # unit -> base versions and the newest one, oldest first
    _commit: Callable[[UnitRecord], None]

    def __init__(self, folder: Path, *, fs: FS = LOCAL) -> None:
        self.folder, self._fs = folder, fs
        self._versions = {}
        self.first_records = []
        self._commit = self.first_records.append
        self._journal: Journal | None = None
        self._failure: str | None = None
        self._can_read_direct: bool | None = None  # found out once, by the first file

    def attach(self, journal: Journal, units: Sequence[Unit]) -> None:
        """From here on a version counts when its record is in `journal`; those that are there count already."""
        self._versions = {unit.index: journal.versions(unit.index) for unit in units}
        self._journal, self._commit = journal, journal.append_unit

    def versions(self, unit: Unit) -> list[UnitRecord]:
        """A unit's base versions and its newest one, oldest first."""
        return list(self._versions.get(unit.index, ()))

    def newest(self, unit: Unit) -> UnitRecord | None:
        """The version that would be loaded after a crash: steps before a later base version do not lead to it."""
        return _last(self.versions(unit))

    def start_for(self, unit: Unit, position: int) -> UnitRecord | None:
        """The newest version from which replay leads to `position`; None: only the base weights do."""
        return _last([record for record in self.versions(unit) if record.position <= position])

    def path(self, unit: Unit, record: UnitRecord) -> Path:
        """Where a version lies; refused unless that is in the folder."""
        name = file_name(unit, position=record.position, revision=record.revision)
        return inside(self.folder, name, error=StoreCorrupt)

    # -- writing

    def create(self, unit: Unit, *, position: int) -> Draft:
        """Reserve room for a new version. Raises `StoreError` with both byte counts if the disk is full."""
        self._refuse_second_try()
        same = [record.revision for record in self.versions(unit) if record.position == position]
        revision = max(same, default=-1) + 1
        path = self.folder / file_name(unit, position=position, revision=revision)
        self._fs.unlink(path, missing_ok=True)  # a draft that a crash left behind: no record names it
        fd = self._fs.create(path, unit.stored_bytes + CRC_BYTES * len(unit.tensors))
        return Draft(unit, position, revision, path, fd)

    def write(self, draft: Draft, tensors: Sequence[TensorSpec], data: memoryview) -> None:
        """Write consecutive tensors; `data` (bytes) holds them with their padding, except for the last one's."""
        self.write_pieces(draft, tensors, [(tensors[0].stored_offset, data)])

    @traced("disk write", lambda files, draft, *_: draft.unit.name)
    def write_pieces(
        self, draft: Draft, tensors: Sequence[TensorSpec], pieces: Iterable[tuple[int, memoryview]]
    ) -> None:
        """`write`, from pieces of the unit in order: (byte offset, bytes that are valid until the next one)."""
        assert draft.fd is not None
        sums = TensorSums(tensors)
        for start, data in pieces:
            self._fs.write_at(draft.fd, data, start)
            sums.add(data, start)
        draft.crcs.update(sums.crcs())

    def draft(self, unit: Unit, bytes_of: Callable[[TensorSpec], memoryview], *, position: int) -> Draft:
        """A complete draft, written tensor by tensor. An error on the way leaves nothing of it."""
        draft = self.create(unit, position=position)
        try:
            for spec in unit.tensors:
                self.write(draft, [spec], bytes_of(spec))
        except BaseException:
            self.discard(draft)
            raise
        return draft

    def publish(self, draft: Draft, *, is_base: bool = False) -> UnitRecord:
        """Make a complete draft durable, then valid, then remove the version it replaces."""
        with self._no_second_try([draft]):
            record = self._seal(draft, is_base=is_base)
            self._fs.sync_folder(self.folder)
            draft.may_count = True
            self._commit(record)
        self._replace(draft.unit, record)
        return record

    def publish_together(self, drafts: Sequence[Draft]) -> list[UnitRecord]:
        """Make drafts of several units base versions at once: after a crash all of them count, or none."""
        assert self._journal is not None, "first versions are published unit by unit"
        with self._no_second_try(drafts):
            records = [self._seal(draft, is_base=True) for draft in drafts]
            self._fs.sync_folder(self.folder)
            for draft, record in zip(drafts, records, strict=True):
                draft.may_count = True
                self._commit(record)
            self._journal.append_mark(MarkKind.CHANGED, step=0)
        for draft, record in zip(drafts, records, strict=True):
            self._replace(draft.unit, record)
        return records

    @contextmanager
    def _no_second_try(self, drafts: Sequence[Draft]) -> Iterator[None]:
        """Publish nothing after a sync that failed: the kernel may have dropped the pages that it could not write."""
        try:
            self._refuse_second_try()
            yield
        except BaseException as error:
            if self._failure is None and isinstance(error, StoreError):
                self._failure = str(error)  # not the error, whose traceback would keep files open
            for draft in drafts:
                self._close(draft)
            raise

    def _refuse_second_try(self) -> None:
        if self._failure is not None:
            raise StoreError(
                f"{self.folder}: nothing is written any more since this failed: {self._failure} Cure the cause, then "
                "open the store again: the journal has every step."
            )

    def _seal(self, draft: Draft, *, is_base: bool) -> UnitRecord:
        assert not draft.lacks(), "a version is published whole"
        unit = draft.unit
        crcs = [draft.crcs[spec.tensor_id] for spec in unit.tensors]
        assert draft.fd is not None
        try:
            self._fs.write_at(draft.fd, _table(crcs), unit.stored_bytes)
            self._fs.sync_data(draft.fd)
        finally:
            self._close(draft)
        return UnitRecord(
            unit=unit.index, position=draft.position, revision=draft.revision, n_bytes=unit.stored_bytes,
            crc=table_crc(crcs), is_base=is_base,
        )  # fmt: skip

    def _replace(self, unit: Unit, record: UnitRecord) -> None:
        before = self._versions.setdefault(unit.index, [])
        replaced = [old for old in before if not old.is_base]
        self._versions[unit.index] = [old for old in before if old.is_base] + [record]
        for old in replaced:
            self._fs.unlink(self.path(unit, old), missing_ok=True)

    def discard(self, draft: Draft) -> None:
        """Remove a draft; a file whose record may be in the journal stays until the next opening decides."""
        self._close(draft)
        if not draft.may_count:
            self._fs.unlink(draft.path, missing_ok=True)

    def _close(self, draft: Draft) -> None:
        fd, draft.fd = draft.fd, None
        if fd is not None:
            self._fs.close(fd)

    def forget_after(self, position: int) -> None:
        """Forget versions beyond `position`, after the journal was rewound. Every unit has an earlier one."""
        for index, records in self._versions.items():
            self._versions[index] = [record for record in records if record.position <= position]

    def sweep(self, units: Sequence[Unit]) -> list[str]:
        """Remove the files that no record names: drafts and replaced versions that a crash left. Returns names."""
        named = {self.path(unit, record).name for unit in units for record in self.versions(unit)}
        stray = [name for name in self._fs.list_names(self.folder) if name not in named]
        for name in stray:
            self._fs.unlink(self.folder / name)
        return stray

    # -- reading

    def open(self, unit: Unit, record: UnitRecord) -> int:
        """A descriptor of a version, for `read`; `StoreCorrupt` if it is missing or has another length."""
        path = self.path(unit, record)
        if not self._fs.exists(path):
            raise _damaged(path, 0, unit, what="the file is missing")
        fd = self._fs.open(path)
        expected = unit.stored_bytes + CRC_BYTES * len(unit.tensors)
        try:
            size = self._fs.size(fd)
        except BaseException:
            self._fs.close(fd)
            raise
        if record.n_bytes != unit.stored_bytes or size != expected:
            self._fs.close(fd)
            what = f"the file has {size:,} bytes instead of {expected:,}"
            raise _damaged(path, min(size, expected), unit, what=what)
        return fd

    def open_direct(self, fd: int) -> int | None:
        """A second descriptor of an open version, for reads past the page cache; None if this folder cannot."""
        if self._can_read_direct is None:
            self._can_read_direct = self._fs.can_read_direct(fd)
            how = "past" if self._can_read_direct else "through"
            logger.info("Units in %s are read %s the page cache.", self.folder, how)
        return self._fs.open_direct(fd) if self._can_read_direct else None

    def read_table(self, unit: Unit, record: UnitRecord, fd: int, *, report: Report | None = None) -> dict[int, int]:
        """Tensor id -> CRC32 of its padded bytes, from an open version; the table itself is checked (see `check`)."""
        path = self.path(unit, record)
        table = bytearray(CRC_BYTES * len(unit.tensors))
        self._fs.read_at(fd, table, unit.stored_bytes, path=path)
        if zlib.crc32(table) != record.crc:
            report = report or _refusing(path, unit)
            report(unit.stored_bytes, "its table of checksums does not match the journal")
        crcs: list[int] = np.frombuffer(table, "<u4").tolist()
        return {spec.tensor_id: crc for spec, crc in zip(unit.tensors, crcs, strict=True)}

    def check(self, unit: Unit, record: UnitRecord, *, report: Report | None = None) -> None:
        """Read a whole version and compare every tensor with its CRC.

        Args:
            report: receives every part whose checksum differs; None: the first one is an error.

        Raises:
            StoreCorrupt: names file, offset, unit, parameter and the way out.
        """
        for _ in self.read_checked(unit, record, report=report):
            pass

    def read_checked(
        self, unit: Unit, record: UnitRecord, *, report: Report | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """The version's bytes in pieces, (offset, bytes valid until the next one), each tensor checked at its end."""
        path = self.path(unit, record)
        fd = self.open(unit, record)
        try:
            expected = self.read_table(unit, record, fd, report=report)
            largest = max((spec.stored_padded_bytes for spec in unit.tensors), default=0)
            buffer = memoryview(bytearray(max(min(CHECK_BYTES, largest), 1)))
            for spec in unit.tensors:
                found = 0
                for start in range(0, spec.stored_padded_bytes, len(buffer)):
                    piece = buffer[: min(len(buffer), spec.stored_padded_bytes - start)]
                    self._fs.read_at(fd, piece, spec.stored_offset + start, path=path)
                    found = zlib.crc32(piece, found)
                    yield spec.stored_offset + start, piece
                _compare(spec, report or _refusing(path, unit), found=found, expected=expected[spec.tensor_id])
        finally:
            self._fs.close(fd)

    def map(self, unit: Unit, record: UnitRecord) -> NDArray[np.uint8]:
        """The unit's bytes [n_bytes] as a copy-on-write map; see `FS.map`."""
        return self._fs.map(self.path(unit, record))[: unit.stored_bytes]


def file_name(unit: Unit, *, position: int, revision: int = 0) -> str:
    """The file of a version. Module names may hold anything, so they are quoted; very long ones are hashed."""
    name = quote(unit.name, safe=" ()")
    if len(name) > _MAX_NAME_BYTES:
        name = hashlib.sha256(unit.name.encode()).hexdigest()
    return f"{name}@{position}" + (f".{revision}" if revision else "")


def tensor_crcs(unit: Unit, data: memoryview) -> list[int]:
    """CRC32 of each tensor's padded bytes in a unit's buffer."""
    return [
        zlib.crc32(data[spec.stored_offset : spec.stored_offset + spec.stored_padded_bytes]) for spec in unit.tensors
    ]


def table_crc(crcs: Sequence[int]) -> int:
    """CRC32 of a file's table of checksums: what its UNIT record holds."""
    return zlib.crc32(_table(crcs))


def padded_crc(spec: TensorSpec, data: memoryview) -> int:
    """CRC32 of a tensor's bytes and the zeros that pad them to whole tiles."""
    return zlib.crc32(bytes(spec.stored_padded_bytes - len(data)), zlib.crc32(data))


def _table(crcs: Sequence[int]) -> bytes:
    return np.array(crcs, "<u4").tobytes()


def check_crc(path: Path, unit: Unit, spec: TensorSpec, *, found: int, expected: int) -> None:
    """Raise `StoreCorrupt` unless a tensor's padded bytes, read from `path`, have the CRC32 they should have."""
    _compare(spec, _refusing(path, unit), found=found, expected=expected)


def _compare(spec: TensorSpec, report: Report, *, found: int, expected: int) -> None:
    if found != expected:
        report(spec.stored_offset, f"{spec.name} has CRC {found:08x}, expected {expected:08x}")


def _refusing(path: Path, unit: Unit) -> Report:
    def refuse(offset: int, what: str) -> None:
        raise _damaged(path, offset, unit, what=what)

    return refuse


def _last(records: Sequence[UnitRecord]) -> UnitRecord | None:
    """Return the record with the largest position; of several, the one that was published last."""
    return max(reversed(records), key=lambda record: record.position, default=None)


def _damaged(path: Path, offset: int, unit: Unit, *, what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{path} at offset {offset}, unit {unit.name}: {what}. Nothing was changed. `zo2trl verify` lists all damage; "
        "restore the file from a copy, or rebuild the weights from the base model with `zo2trl export --base`."
    )
