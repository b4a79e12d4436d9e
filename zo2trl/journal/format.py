"""The bytes of a journal and how they are written: its header, its records, and what a history of them amounts to.

Does not: touch files (journal.py), or read records back (scan.py).
Invariant: equal histories with equal headers are equal bytes, on every machine.

The file, all numbers little-endian::

    header      "zo2trl journal 3 <bytes of the header, 8 hex digits>\\n", JSON with sorted keys, zeros, CRC32;
                a multiple of 64 bytes
    record      64 bytes: type (1 byte), 59 bytes by type, CRC32 of these 60 that starts from the CRC32 before it
                (the header's for the first record), so that records cannot be swapped, doubled, dropped or borrowed
    zeros       at least one record of them, up to a multiple of 64 KiB: the room reserved for the next records

Records come in groups that count whole or not at all. A finished step is SETTINGS (only if they differ from those in
force: weight decay, eps, and how many coefficients, losses and scalars a step has), STEP with its learning rate and
first four values, and VALUES with five more each. The values are the coefficients, then the losses, then the scalars;
a two-sided step along one direction has four. A skipped step is SKIP with its first five losses, and VALUES. Every
other record is a group of its own.
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeGuard, cast

from zo2trl.errors import StoreCorrupt, StoreForeign
from zo2trl.zo.records import Record, SkipRecord, StepRecord

__all__ = [
    "JSON", "RECORD_BYTES", "History", "MarkKind", "MarkRecord", "UnitRecord", "chain", "crc_at", "damaged",
    "encode_header", "encode_mark", "encode_record", "encode_settings", "encode_unit", "parse_header",
]  # fmt: skip

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

FORMAT = 3
RECORD_BYTES = 64
BODY_BYTES = 60
MAX_HEADER_BYTES = 1 << 20

_MAGIC = b"zo2trl journal "
_FIRST_LINE_BYTES = len(_MAGIC) + len("1 00000040\n")
CRC = struct.Struct("<I")


class Type(IntEnum):
    STEP = 1
    VALUES = 2
    SKIP = 3
    UNIT = 4
    MARK = 5
    SETTINGS = 6


# Bodies without their CRC. STEP: type, flags (0), n values, step, seed, learning rate, the first four values.
STEP = struct.Struct("<BBHQQ5d")
# SKIP: type, flags (0), n values, step, seed, the first five values (losses, which need not be finite).
SKIP = struct.Struct("<BBHQQ5d")
# VALUES: type, how many of the five are used, number of the first, step, values.
VALUES = struct.Struct("<BBxxIQ5d4x")
# UNIT: type, flags (1: base, 2: waits for a CHANGED mark), unit, position, bytes, revision, CRC32 of the file's
# table of CRC32s.
UNIT = struct.Struct("<BBxxIQQII28x")
# MARK: type, kind, how many UNIT records of those that wait count from here on (CHANGED only), step, position.
MARK = struct.Struct("<BBxxIQQ36x")
# SETTINGS: type, n coefficients, n losses, n scalars of a step, weight decay, eps.
SETTINGS = struct.Struct("<BxHHH2d36x")
IN_STEP, IN_SKIP, IN_VALUES = 4, 5, 5  # values
MAX_VALUES = (1 << 16) - 1
assert {s.size for s in (STEP, VALUES, SKIP, UNIT, MARK, SETTINGS)} == {BODY_BYTES}
assert BODY_BYTES + CRC.size == RECORD_BYTES


class UnitRecord(NamedTuple):
    """A unit's file was published: from here on it is the unit's newest version."""

    unit: int
    position: int
    """Step records that its bytes have absorbed."""
    revision: int
    """0, unless the unit was published at this position before."""
    n_bytes: int
    """Bytes of data, without the table of checksums."""
    crc: int
    """CRC32 of the file's table of checksums."""
    is_base: bool
    """No record leads to these bytes: the weights the run began with, or some loaded from outside."""


class MarkKind(IntEnum):
    """What a mark states about the step it names.

    REWOUND takes back the records behind its position; CHANGED makes the bases published before it count, together.
    """

    STARTED = 1
    EVALUATED = 2
    SAVED = 3
    REWOUND = 4
    CHANGED = 5


class MarkRecord(NamedTuple):
    """Something that happened between two steps."""

    kind: MarkKind
    step: int
    position: int


@dataclass
class History:
    """What the records so far amount to: the same whether they were appended one by one or read from a file."""

    records: list[Record] = field(default_factory=list)
    marks: list[MarkRecord] = field(default_factory=list)
    versions: dict[int, list[UnitRecord]] = field(default_factory=dict)
    waiting: list[UnitRecord] = field(default_factory=list)
    """Bases that no CHANGED mark has followed yet: weights from outside replace all units or none."""

    @property
    def last_step(self) -> int:
        """The step of the newest record; -1 before the first."""
        return self.records[-1].step if self.records else -1

    def add_unit(self, record: UnitRecord, *, waits: bool) -> None:
        """A new newest version: the one before is not needed any more, unless it is a base."""
        if waits:
            self.waiting.append(record)
            return
        name = record.position, record.revision  # one file, so the older record of it does not hold any more
        before = self.versions.setdefault(record.unit, [])
        before[:] = [old for old in before if old.is_base and (old.position, old.revision) != name] + [record]

    def add_mark(self, mark: MarkRecord, *, n_units: int = 0) -> None:
        """A mark, with the number of waiting bases that it makes count: the last ones; others never will."""
        if mark.kind == MarkKind.CHANGED:
            for record in self.waiting[len(self.waiting) - n_units :]:
                self.add_unit(record, waits=False)
            self.waiting.clear()
        elif mark.kind == MarkKind.REWOUND:
            del self.records[mark.position :]
            self.marks[:] = [old for old in self.marks if old.position <= mark.position]
            # A version that a newer one replaced is gone from the disk: dropping the newer one does not revive it.
            for versions in (self.waiting, *self.versions.values()):
                versions[:] = [old for old in versions if old.position <= mark.position]
        self.marks.append(mark)


def damaged(path: Path, offset: int, what: str) -> NoReturn:
    """Refuse a journal."""
    raise StoreCorrupt(
        f"{path} at offset {offset}: {what}. Nothing was changed. Restore the file from a copy, or start again with "
        "an empty store folder."
    )


# -- the header ------------------------------------------------------------------------------------------------------


def encode_header(header: dict[str, JSON]) -> bytes:
    """The header's bytes. Raises `ValueError` for what could not be read back."""
    text = json.dumps(header, sort_keys=True, allow_nan=False).encode() + b"\n"
    n_bytes = -(-(_FIRST_LINE_BYTES + len(text) + CRC.size) // RECORD_BYTES) * RECORD_BYTES
    if n_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a journal header of {n_bytes} bytes; at most {MAX_HEADER_BYTES} can be read back")
    body = (_MAGIC + b"%d %08x\n" % (FORMAT, n_bytes) + text).ljust(n_bytes - CRC.size, b"\0")
    return body + CRC.pack(zlib.crc32(body))


def crc_at(raw: bytes | bytearray, end: int) -> int:
    """The CRC32 that a header or record ending at byte `end` closes with, and the next record's starts from."""
    return CRC.unpack_from(raw, end - CRC.size)[0]


def _header_bytes(raw: bytes | bytearray, path: Path) -> int:
    """Length of the header: the first line of every format, past and future, says it the same way."""
    line = bytes(raw[:_FIRST_LINE_BYTES])
    try:
        n_bytes = int(line[-9:-1], 16)
    except ValueError:
        n_bytes = 0
    if not line.startswith(_MAGIC) or n_bytes % RECORD_BYTES or not 0 < n_bytes <= min(len(raw), MAX_HEADER_BYTES):
        damaged(path, 0, f"the first line is {line!r}: not a journal, or a damaged one of {len(raw)} bytes")
    return n_bytes


def parse_header(raw: bytes | bytearray, path: Path) -> tuple[dict[str, JSON], int]:
    """The header and its length in bytes.

    Raises:
        StoreCorrupt: it is cut or damaged.
        StoreForeign: another version of the format.
    """
    n_bytes = _header_bytes(raw, path)
    body, stored = bytes(raw[: n_bytes - CRC.size]), crc_at(raw, n_bytes)
    if zlib.crc32(body) != stored:
        damaged(path, 0, f"the header (bytes 0 to {n_bytes}) has CRC {zlib.crc32(body):08x}, expected {stored:08x}")
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
        damaged(path, _FIRST_LINE_BYTES, "the header is not JSON as this format writes it")
    return header, n_bytes


def _is_header(header: object, *, encoded: bytes) -> TypeGuard[dict[str, JSON]]:
    """Writing it again gives the same bytes only without NaN, overflow, double keys and the like."""
    try:
        return isinstance(header, dict) and encode_header(cast(dict[str, JSON], header)) == encoded
    except ValueError:
        return False


# -- records to bytes ------------------------------------------------------------------------------------------------


def encode_record(record: Record) -> list[bytes]:
    """The bodies of a finished step, without SETTINGS."""
    if isinstance(record, SkipRecord):
        values, room = record.losses, IN_SKIP
        head = (Type.SKIP, 0, len(values), record.step, record.seed)
    else:
        values, room = (*record.coefficients, *record.losses, *record.scalars), IN_STEP
        head = (Type.STEP, 0, len(values), record.step, record.seed, record.learning_rate)
    bodies = [STEP.pack(*head, *_padded(values[:room], room))]
    for start in range(room, len(values), IN_VALUES):
        part = values[start : start + IN_VALUES]
        bodies.append(VALUES.pack(Type.VALUES, len(part), start, record.step, *_padded(part, IN_VALUES)))
    return bodies


def _padded(values: tuple[float, ...], n: int) -> tuple[float, ...]:
    return values + (0.0,) * (n - len(values))


def n_value_records(n_values: int, kind: int) -> int:
    """How many VALUES follow a STEP or SKIP with so many values."""
    return max(-(-(n_values - (IN_STEP if kind == Type.STEP else IN_SKIP)) // IN_VALUES), 0)


def encode_settings(record: StepRecord) -> bytes:
    """The body of the SETTINGS that a step is taken under; equal bytes are equal settings."""
    shape = len(record.coefficients), len(record.losses), len(record.scalars)
    return SETTINGS.pack(Type.SETTINGS, *shape, record.weight_decay, record.zo_eps)


def encode_unit(record: UnitRecord, *, waits: bool) -> bytes:
    """The body of a UNIT record; `waits` if it does not count before a CHANGED mark."""
    flags = record.is_base | waits << 1
    return UNIT.pack(Type.UNIT, flags, record.unit, record.position, record.n_bytes, record.revision, record.crc)


def encode_mark(mark: MarkRecord, *, n_units: int) -> bytes:
    """The body of a MARK record; `n_units` as `History.add_mark` takes it."""
    return MARK.pack(Type.MARK, mark.kind, n_units, mark.step, mark.position)


def chain(bodies: list[bytes], crc: int) -> tuple[bytes, int]:
    """Records of these bodies behind the one whose CRC is `crc`, and the CRC of the last of them."""
    blocks = bytearray()
    for body in bodies:
        crc = zlib.crc32(body, crc)
        blocks += body + CRC.pack(crc)
    return bytes(blocks), crc
