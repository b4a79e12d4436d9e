"""The journal: an append-only log of finished steps, from which weights can be brought to any step by replay.

Does not: lock anything (store.py), apply records (zo/updates.py), or know its bytes (format.py, which shows the file,
and scan.py). Damage is never repaired by guessing: only the rest of a last append that a crash cut off is removed,
after a copy of the file as it was.

Invariants:
- When `append` returns, the record and all before it survive a power cut (with `sync_every=1`); until then, the file
  opens to the records before it.
- Bytes that are not durable yet lie in one sector at most, so that a power cut, which may keep any of the sectors
  being written, cannot keep a later record without an earlier one.
"""

import logging
import math
import threading
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain as chain_of
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from zo2trl.errors import StoreCorrupt, StoreError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.format import (
    JSON,
    MAX_VALUES,
    RECORD_BYTES,
    History,
    MarkKind,
    MarkRecord,
    UnitRecord,
    chain,
    crc_at,
    encode_header,
    encode_mark,
    encode_record,
    encode_settings,
    encode_unit,
)
from zo2trl.journal.scan import Scan, scan
from zo2trl.zo.records import Record, StepRecord

__all__ = ["GROWTH", "JSON", "RECORD_BYTES", "Journal", "MarkKind", "MarkRecord", "UnitRecord"]

logger = logging.getLogger(__name__)

SECTOR = 512  # bytes that a drive writes whole or not at all; a multiple of RECORD_BYTES
GROWTH = 64 * 1024  # bytes; a multiple of SECTOR, so that no record crosses a growth step
_READ_TRIES = 5  # attempts of a reader whose file changes under it
_FINGERPRINTED = 64  # records: losses tell runs apart, but ten skips in a row may not


class Journal:
    """One open journal file. Several threads may use it at once.

    Make one with `Journal.create` or `Journal.open`, and close it (or use it as a context manager).
    """

    path: Path
    header: dict[str, JSON]
    """What the creator recorded about the store: noise identity, layout hash, rounding, versions ..."""
    repaired: str | None
    """A sentence for the user, if a crash had cut off the last append and `open` removed the rest of it."""

    _fs: FS
    _fd: int | None
    _lock: threading.RLock  # over every change; a writer thread publishes units while the steps go on
    _history: History
    _sync_every: int
    _read_only: bool
    _failure: str | None  # what kept an append from its end: the file may hold any part of it
    _settings: bytes  # body of the SETTINGS in force
    _crc: int  # CRC of the last record: the next one starts from it
    _end: int  # byte offset of the next record
    _capacity: int  # bytes of the file that are reserved and known to be zero from _end on
    _dirty_sector: int | None  # the one with bytes that were written and not synced
    _n_unsynced: int  # steps since the last sync

    def __init__(self, path: Path, fd: int, *, fs: FS, sync_every: int, read_only: bool) -> None:
        if sync_every < 0:
            raise ValueError(f"sync_every must be 0 (never) or a number of steps, got {sync_every}")
        self.path, self._fd, self._fs = path, fd, fs
        self._sync_every, self._read_only, self._failure = sync_every, read_only, None
        self._lock = threading.RLock()
        self._dirty_sector, self._n_unsynced = None, 0
        self.repaired = None

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        header: dict[str, JSON],
        units: Sequence[UnitRecord] = (),
        fs: FS = LOCAL,
        sync_every: int = 1,
    ) -> Self:
        """Start a journal without steps. Raises `StoreError` if `path` exists, or if the disk has no room for it.

        The name `path` appears only when the header and the records of `units`, the files that the run starts with,
        are durable. `sync_every=n` makes every n-th step durable and all before it, 0 trusts the machine not to lose
        power.
        """
        if fs.exists(path):
            raise StoreError(f"{path} exists already. Open it to go on with its run, or choose another folder.")
        first = encode_header(header)
        if any(record.position for record in units):
            raise ValueError("a journal without steps has units at position 0 only")
        first += chain([encode_unit(record, waits=False) for record in units], crc_at(first, len(first)))[0]
        # Zeros are written, not only reserved: the first write into a reserved extent costs a metadata commit.
        image = first.ljust(_room_for(len(first)), b"\0")
        fd = _create_durably(path, image, fs=fs, sync=sync_every > 0)
        journal = cls(path, fd, fs=fs, sync_every=sync_every, read_only=False)
        journal._take(scan(image, path), capacity=len(image))
        return journal

    @classmethod
    def open(cls, path: Path, *, fs: FS = LOCAL, read_only: bool = False, sync_every: int = 1) -> Self:
        """Read and check a whole journal. Raises `StoreCorrupt` with file, record and offset if a byte does not fit.

        A last append that a crash cut off is removed, see `repaired`; the file as it was is kept as `<name>.broken`.
        `read_only` needs no write permission, changes nothing, refuses to append, and may stand beside a writer.
        """
        fd = fs.open(path, write=not read_only)
        journal = cls(path, fd, fs=fs, sync_every=sync_every, read_only=read_only)
        with ExitStack() as on_error:
            on_error.callback(fs.close, fd)
            raw, found = journal._read(fd)
            journal._take(found, capacity=len(raw))
            if read_only:
                if found.torn:
                    journal.repaired = (
                        f"{path} does not end as it should ({found.torn}): a run is writing it just now, or a crash "
                        f"cut it off. {journal._summary()} The next run will remove the rest."
                    )
            elif found.torn:
                journal._cut(raw, found)
                return journal
            else:
                journal._settle(fd, raw)
            on_error.pop_all()
        return journal

    @property
    def records(self) -> list[Record]:
        """Every finished step that counts, steps strictly increasing. Read it; only `append` adds to it."""
        return self._history.records

    @property
    def marks(self) -> list[MarkRecord]:
        """The marks that count, in order. Read it; only `append_mark` and `rewind` add to it."""
        return self._history.marks

    def versions(self, unit: int) -> list[UnitRecord]:
        """A unit's files that must exist: all bases and the newest version, oldest first."""
        with self._lock:
            return list(self._history.versions.get(unit, ()))

    def append(self, record: Record) -> None:
        """Add a finished step. Its step must be above the last one, a StepRecord's floats finite.

        After a failure (a full disk, a failed sync) nothing more can be appended: what reached the disk is known only
        to the next `open`.
        """
        with self._lock:
            self._check_new(record)
            bodies, settings = encode_record(record), self._settings
            if isinstance(record, StepRecord) and (settings := encode_settings(record)) != self._settings:
                bodies.insert(0, settings)
            self._write(bodies, sync=self._n_unsynced + 1 >= self._sync_every, n_steps=1)
            self._settings = settings
            self.records.append(record)

    def append_unit(self, record: UnitRecord) -> None:
        """Make a file, which must be durable by now, its unit's newest version. Durable on return, as all before.

        Bases count only when a CHANGED mark follows: weights from outside replace those of all their units or none.
        """
        with self._lock:
            self._check_position(record.position)
            self._write([encode_unit(record, waits=record.is_base)], sync=True)
            self._history.add_unit(record, waits=record.is_base)

    def append_mark(self, kind: MarkKind, *, step: int) -> None:
        """Note that something happened after the records so far. Durable on return, as all before."""
        if kind == MarkKind.REWOUND:
            raise ValueError("history is rewound by `rewind`")
        with self._lock:
            self._write_mark(MarkRecord(kind, step, len(self.records)))

    def rewind(self, position: int) -> None:
        """Take back all records behind `position`, and the marks and unit versions that came after it, for good.

        Durable on return, as all before. The bytes stay in the file; no version that was replaced before comes back.
        """
        with self._lock:
            self._check_position(position)
            step = self.records[position - 1].step if position else 0
            self._write_mark(MarkRecord(MarkKind.REWOUND, step, position))

    def fingerprint(self, position: int) -> str:
        """A name of the first `position` records, 8 hex digits: another history has another one, a copy the same."""
        with self._lock:
            self._check_position(position)
            crc = 0
            for record in self.records[max(position - _FINGERPRINTED, 0) : position]:
                for body in encode_record(record):
                    crc = zlib.crc32(body, crc)
                if isinstance(record, StepRecord):
                    crc = zlib.crc32(encode_settings(record), crc)
        return f"{zlib.crc32(position.to_bytes(8, 'little'), crc):08x}" if position else "0"

    def close(self) -> None:
        """Make everything durable and close the file; closing twice is fine."""
        with self._lock:
            if self._fd is not None:
                fd, self._fd = self._fd, None
                try:
                    if self._dirty_sector is not None and self._failure is None:
                        self._sync(fd)
                finally:
                    self._fs.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- opening

    def _read(self, fd: int) -> tuple[bytearray, Scan]:
        """The file's bytes and their history; a reader beside a writer may meet half an append, and looks again."""
        before = None
        for tries_left in reversed(range(_READ_TRIES)):
            raw = bytearray(self._fs.size(fd))
            self._fs.read_at(fd, raw, 0, path=self.path)
            try:
                return raw, scan(raw, self.path)
            except StoreCorrupt:
                if not self._read_only or raw == before or not tries_left:
                    raise
                before = raw
        raise AssertionError("the last try returns or raises")

    def _take(self, found: Scan, *, capacity: int) -> None:
        self.header, self._history, self._settings = found.header, found.history, found.settings
        self._end, self._crc, self._capacity = found.end, found.crc, capacity
        self._history.waiting.clear()  # The change they belong to was never finished.

    def _settle(self, fd: int, raw: bytearray) -> None:
        """Make what was read durable, and the file's size a growth step."""
        # A process that died between a write and its sync, or whose sync failed, leaves bytes that we can read and
        # that the disk may not have. They are in the last sector: written again, they become durable with it.
        start = (self._end - 1) // SECTOR * SECTOR
        self._fs.write_at(fd, raw[start : self._end], start)
        # A crash while the file grew leaves a size in between.
        self._capacity = -(-len(raw) // GROWTH) * GROWTH
        self._fs.write_at(fd, bytes(self._capacity - len(raw)), len(raw))
        self._sync(fd)

    def _cut(self, raw: bytearray, found: Scan) -> None:
        """Replace the file by its good part at once; no crash on the way loses more, or the file as it was."""
        is_synced = self._sync_every > 0
        endings = chain_of([".broken"], (f".broken-{number}" for number in count(2)))
        names = (self.path.with_name(self.path.name + ending) for ending in endings)
        kept = next(name for name in names if not self._fs.exists(name))
        self._fs.close(_create_durably(kept, raw, fs=self._fs, sync=is_synced))
        self._capacity = max(_room_for(found.end), len(raw) // GROWTH * GROWTH)
        good = raw[: found.end].ljust(self._capacity, b"\0")
        self._fd = _create_durably(self.path, good, fs=self._fs, sync=is_synced)
        self.repaired = (
            f"{self.path} was cut off by a crash ({found.torn}). {self._summary()} The file as it was is {kept}."
        )
        logger.warning(self.repaired)

    def _summary(self) -> str:
        n_records = len(self.records)
        return f"It ends with step {self.records[-1].step} now ({n_records} in all)." if n_records else "It is empty."

    # -- appending

    def _check_new(self, record: Record) -> None:
        # A caller that breaks these has a bug that replay would turn into wrong weights: refuse before writing.
        if record.step <= self._history.last_step:
            raise ValueError(f"step {record.step} after step {self._history.last_step} in {self.path}")
        values = record.losses
        if isinstance(record, StepRecord):
            values = (*record.coefficients, *values, *record.scalars)
            settings = (record.learning_rate, record.weight_decay, record.zo_eps)
            if not (record.coefficients and all(map(math.isfinite, (*settings, *values)))):
                raise ValueError(f"not a finished step: {record}")
        if len(values) > MAX_VALUES:
            raise ValueError(f"a step of {len(values)} values in {self.path}; at most {MAX_VALUES} can be recorded")

    def _check_position(self, position: int) -> None:
        if not 0 <= position <= len(self.records):
            raise ValueError(f"position {position} in {self.path}, which has {len(self.records)} steps")

    def _write_mark(self, mark: MarkRecord) -> None:
        n_units = len(self._history.waiting) if mark.kind == MarkKind.CHANGED else 0
        self._write([encode_mark(mark, n_units=n_units)], sync=True)
        self._history.add_mark(mark, n_units=n_units)

    def _write(self, bodies: list[bytes], *, sync: bool, n_steps: int = 0) -> None:
        """Append a group of records; a failure is remembered, because nothing may follow it."""
        if self._fd is None or self._read_only:
            raise ValueError(f"{self.path} is {'open read-only' if self._read_only else 'closed'}: cannot append.")
        if self._failure is not None:
            raise StoreError(
                f"{self.path}: an earlier append failed after {len(self.records)} records, so what the file holds is "
                f"not known. It was: {self._failure} Cure that, then open the store again."
            )
        blocks, crc = chain(bodies, self._crc)
        end = self._end + len(blocks)
        try:
            self._reserve(self._fd, end)
            self._write_by_sector(self._fd, blocks)
            self._n_unsynced += n_steps
            if sync:
                self._sync(self._fd)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"  # not the error, whose traceback would keep files open
            raise
        self._end, self._crc = end, crc

    def _write_by_sector(self, fd: int, blocks: bytes) -> None:
        """Write at the end; what is in another sector is durable before the next one is touched."""
        done = 0
        while done < len(blocks):
            at = self._end + done
            sector = at // SECTOR
            if self._dirty_sector not in (None, sector):
                self._sync(fd)
            piece = blocks[done : done + (sector + 1) * SECTOR - at]
            self._fs.write_at(fd, piece, at)
            self._dirty_sector = sector
            done += len(piece)

    def _reserve(self, fd: int, end: int) -> None:
        """Grow the file so that records up to `end`, and one of zeros that marks the end, fit in it."""
        needed = _room_for(end)
        if needed > self._capacity:
            self._fs.write_at(fd, bytes(needed - self._capacity), self._capacity)
            # Before the record: otherwise a power cut could keep the record and lose the zeros behind it.
            self._sync(fd)
            self._capacity = needed

    def _sync(self, fd: int) -> None:
        if self._sync_every:
            self._fs.sync_data(fd)
        self._dirty_sector, self._n_unsynced = None, 0


def _room_for(end: int) -> int:
    """Bytes of a file whose last record ends at `end`."""
    return -(-(end + RECORD_BYTES) // GROWTH) * GROWTH


def _create_durably(path: Path, data: bytes | bytearray, *, fs: FS, sync: bool) -> int:
    """A descriptor of a new file whose name appears only when its bytes are durable."""
    draft = path.with_name(path.name + ".tmp")
    fs.unlink(draft, missing_ok=True)  # A crash may have left one; the store's lock keeps others out.
    fd = fs.create(draft, len(data))
    with ExitStack() as on_error:
        on_error.callback(fs.close, fd)
        fs.write_at(fd, data, 0)
        if sync:
            fs.sync_data(fd)
        fs.rename(draft, path)
        if sync:
            fs.sync_folder(path.parent)
        on_error.pop_all()
    return fd
