"""Journals for tests: steps, skips, unit records, and files that hold them."""

import zlib
from pathlib import Path
from typing import Any

from zo2trl.journal.journal import JSON, RECORD_BYTES, Journal, UnitRecord
from zo2trl.zo.records import Record, SkipRecord, StepRecord

HEADER: dict[str, JSON] = {"method": "toy", "layout": "abc", "nested": {"b": [1, None, 2.5]}}


def step(number: int, *gradients: float, **fields: Any) -> StepRecord:
    scalars = {"learning_rate": 1e-6, "weight_decay": 0.0, "zo_eps": 1e-3}
    values: dict[str, Any] = {"losses": (2.5, 2.0 + number), "scalars": (0.5,)}
    return StepRecord(
        step=number, seed=2**64 - 1 - number, coefficients=gradients or (0.5,), **(scalars | values | fields)
    )


def skip(number: int) -> SkipRecord:
    return SkipRecord(step=number, seed=number, losses=(float("nan"), float("-inf")))


def unit(index: int, position: int, revision: int = 0, *, is_base: bool = False) -> UnitRecord:
    crc = zlib.crc32(bytes([index, position % 256, revision]))
    return UnitRecord(index, position, revision, n_bytes=4096 * index, crc=crc, is_base=is_base)


def written(path: Path, *records: Record, header: dict[str, JSON] | None = None) -> Path:
    """A closed journal with these records. (No syncs: what a power cut keeps is not what its tests are about.)"""
    with Journal.create(path, header=HEADER if header is None else header, sync_every=0) as journal:
        for record in records:
            journal.append(record)
    return path


def header_bytes(path: Path) -> int:
    return int(path.read_bytes().split(b"\n")[0].split(b" ")[-1], 16)


def used_bytes(path: Path) -> int:
    """Length of the file without the reserved zeros, in whole records."""
    return -(-len(path.read_bytes().rstrip(b"\0")) // RECORD_BYTES) * RECORD_BYTES


def exact(records: list[Record]) -> list[str]:
    """The records as texts that tell all floats apart, and in which NaN equals itself."""
    return list(map(repr, records))
