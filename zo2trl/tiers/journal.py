"""The journal: an append-only log of finished steps, from which weights can be brought to any step by replay.

Does not: lock anything (store.py), apply records (zo/rules.py), or repair damage: what does not check is refused.
Invariant: when `append` returns, the record and all before it survive a power cut; until then, the file opens to the
records before it or is refused.

The file, all numbers little-endian::

    header      "zo2trl journal 1 <bytes of the header, 8 hex digits>\\n", JSON with sorted keys, zeros, CRC32;
                a multiple of 64 bytes
    record      64 bytes: type (1 byte), 59 bytes by type, CRC32 of these 60 that starts from the CRC32 before it
                (the header's for the first record), so that records cannot be swapped, doubled, dropped or borrowed
    zeros       at least one record of them, up to a multiple of 64 KiB: the room reserved for the next records

A step with n > 1 directions is a STEP with the first projected gradient and COEFFS with 5 more each, in one write.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from zo2trl.errors import StoreCorrupt, StoreError, StoreForeign
from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.zo.records import Record, SkipRecord, StepRecord

__all__ = ["GROWTH", "JSON", "RECORD_BYTES", "Journal"]

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

FORMAT = 1
RECORD_BYTES = 64
BODY_BYTES = 60
GROWTH = 64 * 1024  # bytes; a multiple of RECORD_BYTES, so that no record crosses a growth step
MAX_HEADER_BYTES = 1 << 20

_MAGIC = b"zo2trl journal "
_FIRST_LINE_BYTES = len(_MAGIC) + len("1 00000040\n")
_CRC = struct.Struct("<I")


class _Type(IntEnum):
    STEP = 1
    COEFFS = 2
    SKIP = 3
    UNIT = 4  # reserved: a unit's bytes were published
    MARK = 5  # reserved: a step's evaluation and save are done


# Bodies without their CRC. STEP: type, n directions, step, seed, first projected gradient, lr, weight decay, eps.
_STEP = struct.Struct("<B3xIQQ4d4x")
# COEFFS: type, how many of the five are used, direction of the first, step, projected gradients.
_COEFFS = struct.Struct("<BBxxIQ5d4x")
# SKIP: type, step, seed, loss plus, loss minus.
_SKIP = struct.Struct("<B7xQQ2d20x")
_PER_COEFFS = 5
assert _STEP.size == _COEFFS.size == _SKIP.size == BODY_BYTES == RECORD_BYTES - _CRC.size


class Journal:
    """One open journal file; not safe for use by several threads at once.

    Make one with `Journal.create` or `Journal.open`, and close it (or use it as a context manager).
    """

    path: Path
    header: dict[str, JSON]
    """What the creator said about the store: noise identity, layout hash, rounding, versions ..."""
    records: list[Record]
    """Every finished step, steps strictly increasing. Read it; only `append` adds to it."""

    _fs: FS
    _fd: int | None
    _sync: bool
    _read_only: bool
    _in_doubt: bool  # an append did not come to its end: the file may hold any part of it
    _crc: int  # of the last record: the next one starts from it
    _end: int  # byte offset of the next record
    _capacity: int  # bytes of the file that are reserved and known to be zero from _end on

    def __init__(self, path: Path, fd: int, *, fs: FS, sync: bool, read_only: bool) -> None:
        self.path, self._fd, self._fs = path, fd, fs
        self._sync, self._read_only, self._in_doubt = sync, read_only, False

    @classmethod
    def create(cls, path: Path, *, header: dict[str, JSON], fs: FS = LOCAL, sync: bool = True) -> Self:
        """Start an empty journal. Raises `StoreError` if `path` exists, or if the disk has no room for it.

        The name `path` appears only when the header is durable. `sync=False` trusts the machine not to lose power.
        """
        if fs.exists(path):
            raise StoreError(f"{path} exists already. Open it to go on with its run, or choose another folder.")
        first = _encode_header(header)
        capacity = _room_for(len(first))
        draft = path.with_name(path.name + ".tmp")
        fs.unlink(draft, missing_ok=True)  # A crash may have left one; the store's lock keeps others out.
        fd = fs.create(draft, capacity)
        journal = cls(path, fd, fs=fs, sync=sync, read_only=False)
        with ExitStack() as on_error:
            on_error.callback(journal.close)
            # Zeros are written, not only reserved: the first write into a reserved extent costs a metadata commit.
            image = first.ljust(capacity, b"\0")
            fs.write_at(fd, image, 0)
            if sync:
                fs.sync_data(fd)
            fs.rename(draft, path)
            if sync:
                fs.sync_folder(path.parent)
            journal._load(image)
            on_error.pop_all()
        return journal

    @classmethod
    def open(cls, path: Path, *, fs: FS = LOCAL, read_only: bool = False, sync: bool = True) -> Self:
        """Read and check a whole journal. Raises `StoreCorrupt` with file, record and offset if a byte does not fit.

        Nothing is changed on disk, whatever is found. `read_only` needs no write permission and refuses `append`;
        beside a running writer it may meet half a record and refuse: try again.
        """
        fd = fs.open(path, write=not read_only)
        journal = cls(path, fd, fs=fs, sync=sync, read_only=read_only)
        with ExitStack() as on_error:
            on_error.callback(journal.close)
            raw = bytearray(fs.size(fd))
            fs.read_at(fd, raw, 0, path=path)
            journal._load(raw)
            on_error.pop_all()
        return journal

    def append(self, record: Record) -> None:
        """Add a finished step; durable on return. Its step must be above the last one, a StepRecord's floats finite.

        After a failure (a full disk, a failed sync) nothing more can be appended: what reached the disk is known only
        to the next `open`.
        """
        if self._fd is None or self._read_only:
            raise ValueError(f"{self.path} is {'open read-only' if self._read_only else 'closed'}: cannot append.")
        if self._in_doubt:
            raise StoreError(
                f"{self.path}: an earlier append failed after {len(self.records)} records, so what the file holds is "
                "not known. Cure the cause, then open the store again."
            )
        self._check_new(record)
        blocks, crc = _encode(record, self._crc)
        self._in_doubt = True
        self._reserve(self._fd, len(blocks))
        self._fs.write_at(self._fd, blocks, self._end)
        if self._sync:
            self._fs.sync_data(self._fd)
        self._in_doubt = False
        self._crc = crc
        self._end += len(blocks)
        self.records.append(record)

    def close(self) -> None:
        """Close the file. Appended records are durable already; closing twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._fs.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, raw: bytes | bytearray) -> None:
        self.header = _parse_header(raw, self.path)
        start = _header_bytes(raw, self.path)
        n_blocks = _count_blocks(raw, start, self.path)
        self._end = start + n_blocks * RECORD_BYTES
        self._capacity = len(raw) // GROWTH * GROWTH
        self._crc = _check_chain(raw, start, n_blocks=n_blocks, path=self.path)
        self.records = list(_decode(memoryview(raw)[start : self._end], start, path=self.path))

    def _check_new(self, record: Record) -> None:
        # A caller that breaks these has a bug that replay would turn into wrong weights: refuse before writing.
        if self.records and record.step <= self.records[-1].step:
            raise ValueError(f"step {record.step} after step {self.records[-1].step} in {self.path}")
        if isinstance(record, StepRecord):
            scalars = (*record.projected_grads, record.learning_rate, record.weight_decay, record.zo_eps)
            if not record.projected_grads or not all(map(math.isfinite, scalars)):
                raise ValueError(f"not a finished step: {record}")

    def _reserve(self, fd: int, n_bytes: int) -> None:
        """Grow the file so that the next `n_bytes` and a record of zeros, which marks the end, fit in it."""
        needed = _room_for(self._end + n_bytes)
        if needed > self._capacity:
            self._fs.write_at(fd, bytes(needed - self._capacity), self._capacity)
            if self._sync:
                # Before the record: otherwise a power cut could keep the record and lose the zeros behind it.
                self._fs.sync_data(fd)
            self._capacity = needed


def _room_for(end: int) -> int:
    """Bytes of a file whose last record ends at `end`."""
    return -(-(end + RECORD_BYTES) // GROWTH) * GROWTH


def _damaged(path: Path, offset: int, what: str) -> NoReturn:
    raise StoreCorrupt(
        f"{path} at offset {offset}: {what}. Nothing was changed. Restore the file from a copy, or start again with "
        "an empty store folder."
    )


# -- the header ------------------------------------------------------------------------------------------------------


def _encode_header(header: dict[str, JSON]) -> bytes:
    text = json.dumps(header, sort_keys=True, allow_nan=False).encode() + b"\n"
    n_bytes = -(-(_FIRST_LINE_BYTES + len(text) + _CRC.size) // RECORD_BYTES) * RECORD_BYTES
    if n_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a journal header of {n_bytes} bytes; at most {MAX_HEADER_BYTES} can be read back")
    body = (_MAGIC + b"%d %08x\n" % (FORMAT, n_bytes) + text).ljust(n_bytes - _CRC.size, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def _header_bytes(raw: bytes | bytearray, path: Path) -> int:
    """Length of the header: the first line of every format, past and future, says it the same way."""
    line = bytes(raw[:_FIRST_LINE_BYTES])
    try:
        n_bytes = int(line[-9:-1], 16)
    except ValueError:
        n_bytes = 0
    if not line.startswith(_MAGIC) or n_bytes % RECORD_BYTES or not 0 < n_bytes <= min(len(raw), MAX_HEADER_BYTES):
        _damaged(path, 0, f"the first line is {line!r}: not a journal, or a damaged one of {len(raw)} bytes")
    return n_bytes


def _parse_header(raw: bytes | bytearray, path: Path) -> dict[str, JSON]:
    n_bytes = _header_bytes(raw, path)
    body, stored = bytes(raw[: n_bytes - _CRC.size]), _CRC.unpack_from(raw, n_bytes - _CRC.size)[0]
    if zlib.crc32(body) != stored:
        _damaged(path, 0, f"the header (bytes 0 to {n_bytes}) has CRC {zlib.crc32(body):08x}, expected {stored:08x}")
    version = body[len(_MAGIC) : _FIRST_LINE_BYTES - 10]
    if version != b"%d" % FORMAT:
        raise StoreForeign(
            f"{path} has journal format {version.decode('ascii', 'replace')}; this zo2trl reads format {FORMAT}. Open "
            "it with the zo2trl that wrote it."
        )
    try:
        header: object = json.loads(body[_FIRST_LINE_BYTES:].rstrip(b"\0"))
    except (ValueError, RecursionError):
        header = None
    if not _is_header(header, encoded=bytes(raw[:n_bytes])):
        _damaged(path, _FIRST_LINE_BYTES, "the header is not JSON as this format writes it")
    return header


def _is_header(header: object, *, encoded: bytes) -> TypeGuard[dict[str, JSON]]:
    """Writing it again gives the same bytes only without NaN, overflow, double keys and the like."""
    try:
        return isinstance(header, dict) and _encode_header(cast(dict[str, JSON], header)) == encoded
    except ValueError:
        return False


# -- the records -----------------------------------------------------------------------------------------------------


def _count_blocks(raw: bytes | bytearray, start: int, path: Path) -> int:
    """Number of records before the reserved zeros. The file always ends in a whole record of them, unless it was cut.

    A crash while the file grows leaves a size off the growth step; then all bytes past the last step are zeros.
    """
    whole = len(raw) // GROWTH * GROWTH
    if not whole or any(memoryview(raw)[whole:]):
        _damaged(path, len(raw), f"the file was cut: {len(raw)} bytes do not end in the reserved zeros")
    room: NDArray[np.uint8] = np.frombuffer(raw, np.uint8, count=whole - start, offset=start)
    used = np.flatnonzero(room.reshape(-1, RECORD_BYTES).max(axis=1))
    n_blocks = int(used[-1]) + 1 if len(used) else 0
    if n_blocks * RECORD_BYTES == len(room):
        _damaged(path, len(raw), f"the file was cut: {len(raw)} bytes end in a record, not in the reserved zeros")
    return n_blocks


def _check_chain(raw: bytes | bytearray, start: int, *, n_blocks: int, path: Path) -> int:
    """Check every record's CRC; the last one's CRC (the header's if there are no records)."""
    crc: int = _CRC.unpack_from(raw, start - _CRC.size)[0]
    blocks: NDArray[np.uint8] = np.frombuffer(raw, np.uint8, count=n_blocks * RECORD_BYTES, offset=start)
    stored: list[int] = blocks.reshape(-1, RECORD_BYTES)[:, BODY_BYTES:].copy().view("<u4").ravel().tolist()
    view = memoryview(raw)
    for number, expected in enumerate(stored):
        offset = start + number * RECORD_BYTES
        crc = zlib.crc32(view[offset : offset + BODY_BYTES], crc)
        if crc != expected:
            last = " It is the last one: its append was probably cut off by a crash" if number + 1 == n_blocks else ""
            _damaged(path, offset, f"record {number} of {n_blocks} has CRC {crc:08x}, expected {expected:08x}.{last}")
    return crc


def _encode(record: Record, crc: int) -> tuple[bytes, int]:
    """The record's blocks, chained to the record whose CRC is `crc`, and the CRC of the last of them."""
    if isinstance(record, SkipRecord):
        bodies = [_SKIP.pack(_Type.SKIP, record.step, record.seed, record.loss_plus, record.loss_minus)]
    else:
        first, *others = record.projected_grads
        scalars = (first, record.learning_rate, record.weight_decay, record.zo_eps)
        bodies = [_STEP.pack(_Type.STEP, len(record.projected_grads), record.step, record.seed, *scalars)]
        for i in range(0, len(others), _PER_COEFFS):
            part = others[i : i + _PER_COEFFS]
            padded = part + [0.0] * (_PER_COEFFS - len(part))
            bodies.append(_COEFFS.pack(_Type.COEFFS, len(part), i + 1, record.step, *padded))
    blocks = bytearray()
    for body in bodies:
        crc = zlib.crc32(body, crc)
        blocks += body + _CRC.pack(crc)
    return bytes(blocks), crc


def _decode(blocks: memoryview, start: int, *, path: Path) -> Iterator[Record]:
    """Records from blocks whose CRCs are right: what is wrong here was written wrong."""
    number, n_blocks, last_step = 0, len(blocks) // RECORD_BYTES, -1
    while number < n_blocks:
        offset = number * RECORD_BYTES
        kind = blocks[offset]
        if kind == _Type.STEP:
            _, n, step, seed, gradient, lr, decay, eps = _STEP.unpack_from(blocks, offset)
            gradients: tuple[float, ...] = (gradient,)
            if n != 1:
                others, n_more = _decode_coeffs(blocks, offset, step=step, n_directions=n)
                gradients += others
                number += n_more
                if len(gradients) != n:
                    _damaged(path, start + offset, f"step {step} has {n} directions, only {len(gradients)} are there")
            record = StepRecord(
                step=step, seed=seed, projected_grads=gradients, learning_rate=lr, weight_decay=decay, zo_eps=eps
            )
        elif kind == _Type.SKIP:
            _, step, seed, plus, minus = _SKIP.unpack_from(blocks, offset)
            record = SkipRecord(step=step, seed=seed, loss_plus=plus, loss_minus=minus)
        else:
            _damaged(
                path, start + offset, f"record {number} has type {kind}, which this version does not expect there"
            )
        if step <= last_step:
            _damaged(path, start + offset, f"record {number} is step {step} after step {last_step}")
        last_step = step
        number += 1
        yield record


def _decode_coeffs(blocks: memoryview, offset: int, *, step: int, n_directions: int) -> tuple[tuple[float, ...], int]:
    """Projected gradients 1, 2, ... from the COEFFS behind the STEP at `offset`, as far as they belong to it."""
    gradients: list[float] = []
    n_coeffs = 0
    while len(gradients) < n_directions - 1 and (offset := offset + RECORD_BYTES) < len(blocks):
        kind, n_used, first, of_step, *five = _COEFFS.unpack_from(blocks, offset)
        if (kind, first, of_step) != (_Type.COEFFS, len(gradients) + 1, step) or not 1 <= n_used <= _PER_COEFFS:
            break
        gradients += five[:n_used]
        n_coeffs += 1
    return tuple(gradients), n_coeffs
