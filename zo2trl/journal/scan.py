"""Reading a journal's bytes: the history they hold, where its good part ends, and whether its end is torn.

Does not: touch files (journal.py), or cut anything off.
Invariant: whatever the bytes are, they give the history that was written, a prefix of it with a sentence that says
so, or `StoreCorrupt` with record, offset and cure. A million steps take about a second.
"""

import gc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from operator import lt
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from zo2trl.journal.format import (
    BODY_BYTES,
    IN_STEP,
    IN_VALUES,
    JSON,
    MARK,
    RECORD_BYTES,
    SKIP,
    STEP,
    UNIT,
    VALUES,
    History,
    MarkKind,
    MarkRecord,
    Type,
    UnitRecord,
    crc_at,
    damaged,
    n_value_records,
    parse_header,
)
from zo2trl.zo.records import SkipRecord, StepRecord

__all__ = ["Scan", "scan"]

# STEP and SETTINGS once more, as arrays: the types that come by the million.
_STEP_ROWS = np.dtype({
    "names": ["n", "step", "seed", "lr", "first", "second", "third", "fourth"],
    "formats": ["<u2", "<u8", "<u8", *["<f8"] * 5],
    "offsets": [2, 4, 12, 20, 28, 36, 44, 52],
    "itemsize": RECORD_BYTES,
})  # fmt: skip
_SETTINGS_ROWS = np.dtype({
    "names": ["n_coefficients", "n_losses", "n_scalars", "decay", "eps"],
    "formats": ["<u2", "<u2", "<u2", "<f8", "<f8"],
    "offsets": [2, 4, 6, 8, 16],
    "itemsize": RECORD_BYTES,
})  # fmt: skip
_PLAIN_SHAPE = (1, 2, 1)  # a two-sided step along one direction: by far the most frequent

_STEPS_AT_ONCE = 1 << 16  # on the way from columns to records, which bounds the memory that takes
_MARK_KINDS = frozenset(MarkKind)

Shape = tuple[int, int, int]
"""How many coefficients, losses and scalars a step has."""
Values = tuple[float, ...]


@dataclass(frozen=True)
class Scan:
    """A journal's bytes, understood."""

    header: dict[str, JSON]
    history: History
    settings: bytes
    """Body of the SETTINGS in force; empty before the first."""
    end: int
    """Offset behind the last whole group of records: where the next one goes."""
    used: int
    """Offset behind the last byte that is not zero."""
    crc: int
    """That the next record starts from."""
    torn: str | None
    """Why the file does not end as it should, if so: what lies behind `end` is a part of an append."""


def scan(raw: bytes | bytearray, path: Path) -> Scan:
    """Read and check a whole journal.

    Raises:
        StoreCorrupt: a header that is cut or damaged; a record that is neither whole nor zeros; zeros with data behind
            them; records that make no sense together.
        StoreForeign: a journal of another format.
    """
    header, start = parse_header(raw, path)
    n_whole = (len(raw) - start) // RECORD_BYTES
    table: NDArray[np.uint8] = np.frombuffer(raw, np.uint8, count=n_whole * RECORD_BYTES, offset=start)
    table = table.reshape(-1, RECORD_BYTES)
    used = np.flatnonzero(table.view("<u8").any(axis=1))
    n_used = int(used[-1]) + 1 if len(used) else 0
    rest = bytes(raw[start + n_whole * RECORD_BYTES :])
    in_rest = len(rest.rstrip(b"\0"))
    if in_rest and n_used < n_whole:
        _refuse_gap(path, start, number=n_used, data_at=start + n_whole * RECORD_BYTES)
    n_chained = _check_chain(raw, start, n_used=n_used, ends_whole=not in_rest, path=path)

    n_good = _whole_groups(table[:n_chained])
    reader = _Reader(table[:n_good], start, path)
    with _without_collections():
        history = reader.history()
    end = start + n_good * RECORD_BYTES
    torn = None
    if in_rest:
        torn = f"its last {len(rest)} bytes are a part of a record"
    elif n_chained < n_used:
        torn = "its last record was written in part"
    elif n_good < n_used:
        torn = "its last step is incomplete"
    elif n_used == n_whole:
        torn = f"it ends at byte {len(raw)}, without the zeros that follow the last record"
    return Scan(
        header=header, history=history, settings=reader.settings(), end=end,
        used=start + n_whole * RECORD_BYTES + in_rest if in_rest else start + n_used * RECORD_BYTES,
        crc=crc_at(raw, end), torn=torn,
    )  # fmt: skip


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection: a million new records, none of them garbage, would be walked again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_gap(path: Path, start: int, *, number: int, data_at: int) -> NoReturn:
    offset = start + number * RECORD_BYTES
    damaged(path, offset, f"record {number} is all zeros, but there is data behind it, at offset {data_at}")


def _check_chain(raw: bytes | bytearray, start: int, *, n_used: int, ends_whole: bool, path: Path) -> int:
    """Check the CRC of every record up to the last that is not zero; the number of good ones: all, or all but one.

    A write that the system broke off leaves the first part of a record: one whose CRC is still zeros. That is no
    damage if it is the last. (A CRC that is zeros by right is one in four thousand million.)
    """
    crc = crc_at(raw, start)
    blocks: NDArray[np.uint8] = np.frombuffer(raw, np.uint8, count=n_used * RECORD_BYTES, offset=start)
    stored: list[int] = blocks.reshape(-1, RECORD_BYTES)[:, BODY_BYTES:].copy().view("<u4").ravel().tolist()
    view, crc32 = memoryview(raw), zlib.crc32
    for number, expected in enumerate(stored):
        offset = start + number * RECORD_BYTES
        crc = crc32(view[offset : offset + BODY_BYTES], crc)
        if crc != expected:
            if ends_whole and not expected and number == n_used - 1:
                return number
            if not any(view[offset : offset + RECORD_BYTES]):
                _refuse_gap(path, start, number=number, data_at=offset + RECORD_BYTES)
            what = f"record {number} of {n_used} has CRC {crc:08x}, expected {expected:08x}"
            damaged(path, offset, f"{what}: it was changed after it was written")
    return n_used


def _whole_groups(table: NDArray[np.uint8]) -> int:
    """Number of records without an incomplete group at the end."""
    n_used = len(table)
    last = n_used - 1
    while last >= 0 and table[last, 0] == Type.VALUES:
        last -= 1
    if last < 0 or table[last, 0] not in (Type.STEP, Type.SKIP, Type.SETTINGS):
        return n_used
    if table[last, 0] == Type.SETTINGS:
        return last if last == n_used - 1 else n_used
    kind, _, n_values, *_ = STEP.unpack_from(table[last].tobytes())
    if n_used - 1 - last >= n_value_records(n_values, kind):
        return n_used
    return last - 1 if last and table[last - 1, 0] == Type.SETTINGS else last


@dataclass
class _Reader:
    """Whole groups of records whose CRCs are right: what is wrong here was written wrong."""

    table: NDArray[np.uint8]  # [n_records, 64]
    start: int
    path: Path
    kinds: NDArray[np.uint8] = field(init=False)
    unclaimed: NDArray[np.bool_] = field(init=False)  # VALUES that no step has had yet

    def __post_init__(self) -> None:
        self.kinds = self.table[:, 0]
        self.unclaimed = self.kinds == Type.VALUES

    def history(self) -> History:
        """What the records amount to."""
        self._check_types()
        steps_at = np.flatnonzero(self.kinds == Type.STEP)
        steps = self._steps(steps_at)
        history, done = History(), 0
        others_at = np.flatnonzero(np.isin(self.kinds, (Type.SKIP, Type.UNIT, Type.MARK)))
        n_steps_before: list[int] = np.searchsorted(steps_at, others_at).tolist()
        for at, upto in zip(others_at.tolist(), n_steps_before, strict=True):
            self._extend(history, steps[done:upto], at=steps_at[done:upto])
            done = upto
            self._add(history, at)
        self._extend(history, steps[done:], at=steps_at[done:])
        for number in np.flatnonzero(self.unclaimed)[:1]:
            self._refuse(int(number), "has values of no step")
        return history

    def settings(self) -> bytes:
        """Body of the last SETTINGS."""
        rows = np.flatnonzero(self.kinds == Type.SETTINGS)
        return self.table[rows[-1], :BODY_BYTES].tobytes() if len(rows) else b""

    def _refuse(self, number: int, what: str) -> NoReturn:
        damaged(self.path, self.start + number * RECORD_BYTES, f"record {number} {what}")

    def _check_types(self) -> None:
        kinds = self.kinds
        for number in np.flatnonzero(~np.isin(kinds, list(Type)))[:1]:
            self._refuse(int(number), f"has type {kinds[number]}, which this version does not know")
        # The last group is whole, so there is a record behind every SETTINGS.
        for number in (np.flatnonzero(kinds[:-1] == Type.SETTINGS) + 1).tolist():
            if kinds[number] != Type.STEP:
                self._refuse(number, "should be the step that the settings before it are for")

    def _steps(self, steps_at: NDArray[np.intp]) -> list[StepRecord]:
        """All steps, also those that are taken back later."""
        settings_at = np.flatnonzero(self.kinds == Type.SETTINGS)
        in_force = np.searchsorted(settings_at, steps_at) - 1
        if len(steps_at) and in_force[0] < 0:
            self._refuse(int(steps_at[0]), "is a step without settings before it")
        settings = self.table[settings_at].view(_SETTINGS_ROWS).ravel()
        columns = [settings["decay"], settings["eps"]]
        for number in settings_at[~np.isfinite(columns).all(axis=0)][:1]:
            self._refuse(int(number), "has a number that is not finite")
        # As objects, so that the steps share them.
        decays, epsilons = (column.astype(object) for column in columns)
        shapes = np.empty(len(settings), object)
        for number, row in enumerate(settings.tolist()):
            shapes[number] = row[:3]
        steps: list[StepRecord] = []
        for first in range(0, len(steps_at), _STEPS_AT_ONCE):
            part = slice(first, first + _STEPS_AT_ONCE)
            under = in_force[part]
            steps += self._steps_under(
                steps_at[part],
                shapes[under].tolist(),
                decays=decays[under].tolist(),
                epsilons=epsilons[under].tolist(),
            )
        return steps

    def _steps_under(
        self, at: NDArray[np.intp], shapes: list[Shape], *, decays: list[float], epsilons: list[float]
    ) -> Iterator[StepRecord]:
        rows = self.table[at].view(_STEP_ROWS).ravel()
        floats = [rows[name] for name in ("lr", "first", "second", "third", "fourth")]
        for number in at[~np.isfinite(floats).all(axis=0)][:1]:
            self._refuse(int(number), "is a step with a number that is not finite")
        rates, *values = (column.tolist() for column in floats)
        if set(shapes) == {_PLAIN_SHAPE} and (rows["n"] == IN_STEP).all():
            groups = [zip(values[0], strict=True), zip(values[1], values[2], strict=True), zip(values[3], strict=True)]
        else:
            groups = self._grouped(at, rows, shapes=shapes, firsts=list(zip(*values, strict=True)))
        columns = rows["step"].tolist(), rows["seed"].tolist(), rates, decays, epsilons, *groups
        # What StepRecord._make does, without a Python call per record.
        return map(partial(tuple.__new__, StepRecord), zip(*columns, strict=True))

    def _grouped(
        self, steps_at: NDArray[np.intp], rows: NDArray[np.void], *, shapes: list[Shape], firsts: list[Values]
    ) -> list[list[Values]]:
        """Coefficients, losses and scalars of steps of any shape."""
        groups: list[list[Values]] = [[], [], []]
        columns = steps_at.tolist(), rows["n"].tolist(), rows["step"].tolist(), shapes, firsts
        for at, n_values, step, shape, first in zip(*columns, strict=True):
            if n_values != sum(shape) or not shape[0]:
                self._refuse(at, f"is step {step} with {n_values} values, and the settings before it say {shape}")
            values = self._values(at, n_values, step=step, first=first)
            if not np.isfinite(values).all():
                self._refuse(at, "is a step with a number that is not finite")
            cuts = accumulate(shape, initial=0)
            for group, (start, stop) in zip(groups, pairwise(cuts), strict=True):
                group.append(values[start:stop])
        return groups

    def _values(self, at: int, n_values: int, *, step: int, first: Values) -> Values:
        """All values of the step or skip at record `at`, of which `first` are in it."""
        n_more = n_value_records(n_values, int(self.kinds[at]))
        values = first[:n_values]
        for number in range(at + 1, min(at + 1 + n_more, len(self.table))):
            kind, n_used, start, of_step, *five = VALUES.unpack_from(self._body(number))
            expected = Type.VALUES, len(values), step, min(IN_VALUES, n_values - len(values))
            if (kind, start, of_step, n_used) != expected:
                break
            values += tuple(five[:n_used])
        if len(values) != n_values:
            self._refuse(at, f"is step {step} with {n_values} values, but {len(values)} are there")
        self.unclaimed[at + 1 : at + 1 + n_more] = False
        return values

    def _extend(self, history: History, steps: list[StepRecord], *, at: NDArray[np.intp]) -> None:
        numbers = [step.step for step in steps]
        before = [history.last_step, *numbers[:-1]]
        if not all(map(lt, before, numbers)):
            i = next(i for i, step in enumerate(numbers) if step <= before[i])
            self._refuse(int(at[i]), f"is step {numbers[i]} after step {before[i]}")
        history.records += steps

    def _add(self, history: History, at: int) -> None:
        """Add a record that is no step."""
        body = self._body(at)
        n_records = len(history.records)
        if body[0] == Type.SKIP:
            _, _, n_losses, step, seed, *losses = SKIP.unpack(body)
            if step <= history.last_step:
                self._refuse(at, f"is step {step} after step {history.last_step}")
            values = self._values(at, n_losses, step=step, first=tuple(losses))
            history.records.append(SkipRecord(step=step, seed=seed, losses=values))
            return
        if body[0] == Type.UNIT:
            _, flags, unit, position, n_bytes, revision, crc = UNIT.unpack(body)
            record = UnitRecord(unit, position, revision, n_bytes, crc, bool(flags & 1))
            history.add_unit(record, waits=bool(flags & 2))
        else:
            _, kind, n_units, step, position = MARK.unpack(body)
            if kind not in _MARK_KINDS:
                self._refuse(at, f"is a mark of kind {kind}, which this version does not know")
            if n_units > (n_waiting := len(history.waiting)):
                self._refuse(at, f"is a mark about {n_units} units, but only {n_waiting} come before it")
            if position <= n_records:
                history.add_mark(MarkRecord(MarkKind(kind), step, position), n_units=n_units)
        if position > n_records:
            self._refuse(at, f"is about position {position}, but only {n_records} steps come before it")

    def _body(self, number: int) -> bytes:
        return self.table[number, :BODY_BYTES].tobytes()
