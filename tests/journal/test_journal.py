"""The journal keeps every step it was given, durably and in order, in the bytes its format says."""

import errno
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.journals import HEADER, exact, header_bytes, skip, step, unit, written
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS
from zo2trl.journal.journal import GROWTH, JSON, RECORD_BYTES, Journal, MarkKind
from zo2trl.zo.records import Record, SkipRecord, StepRecord

SECTOR = 512
PER_GROWTH = GROWTH // RECORD_BYTES

U64 = st.integers(0, 2**64 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
STEPS = st.builds(
    StepRecord,
    step=U64,
    seed=U64,
    coefficients=st.lists(FINITE, min_size=1, max_size=13).map(tuple),
    learning_rate=FINITE,
    weight_decay=FINITE,
    zo_eps=FINITE,
    losses=st.lists(FINITE, max_size=4).map(tuple),
    scalars=st.lists(FINITE, max_size=3).map(tuple),
)
RECORDS = st.lists(
    STEPS | st.builds(SkipRecord, step=U64, seed=U64, losses=st.lists(st.floats(), max_size=12).map(tuple)),
    unique_by=lambda record: record.step,
).map(lambda records: sorted(records, key=lambda record: record.step))


@settings(deadline=None, max_examples=60)
@given(records=RECORDS, reopen_at=st.integers(0, 10))
def test_every_record_comes_back_exactly_however_often_opened(records: list[Record], reopen_at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "journal", *records[:reopen_at])
        with Journal.open(path, sync_every=0) as journal:
            for record in records[reopen_at:]:
                journal.append(record)
            assert exact(journal.records) == exact(records)
        with Journal.open(path, read_only=True) as journal:
            assert exact(journal.records) == exact(records)
            assert journal.header == HEADER


@pytest.mark.parametrize("n_directions", [1, 2, 5, 6, 7, 11, 12])
def test_a_step_takes_one_record_and_one_more_for_every_five_directions(tmp_path: Path, n_directions: int) -> None:
    record = step(2, *(i / 7 for i in range(n_directions)))
    path = written(tmp_path / "journal", step(1), record, step(3))
    raw = path.read_bytes()[header_bytes(path) :]
    n_settings, n_blocks = 1 if n_directions == 1 else 3, 1 + -(-(n_directions - 1) // 5)
    assert len(raw.rstrip(b"\0")) == (n_settings + n_blocks + 2) * RECORD_BYTES
    with Journal.open(path) as journal:
        assert journal.records == [step(1), record, step(3)]


def test_settings_are_written_only_when_they_change(tmp_path: Path) -> None:
    records = [step(1), step(2), step(3, weight_decay=0.1), skip(4), step(5, weight_decay=0.1), step(6, zo_eps=0.01)]
    path = written(tmp_path / "journal", *records)
    kinds = path.read_bytes()[header_bytes(path) :: RECORD_BYTES]
    assert list(kinds[:9]) == [6, 1, 1, 6, 1, 3, 1, 6, 1]
    with Journal.open(path, sync_every=0) as journal:
        assert exact(journal.records) == exact(records)
        journal.append(step(7, zo_eps=0.01))
        journal.append(step(8))
    assert list(path.read_bytes()[header_bytes(path) :: RECORD_BYTES][9:13]) == [1, 6, 1, 0]


def test_the_bytes_are_the_format_that_released_journals_have(tmp_path: Path) -> None:
    """Written out by hand: if this fails, FORMAT must go up and the old format stay readable."""
    path = tmp_path / "journal"
    with Journal.create(path, header=HEADER, units=[unit(7, 0, is_base=True)], sync_every=0) as journal:
        journal.append(step(3, 0.5, -1.5, 2.5))
        journal.append(skip(9))
        journal.append_unit(unit(7, 1, 4))
        journal.append_unit(unit(8, 2, is_base=True))
        journal.append_mark(MarkKind.CHANGED, step=9)
        journal.rewind(1)
    text = json.dumps(HEADER, sort_keys=True).encode() + b"\n"
    header = (b"zo2trl journal 3 00000080\n" + text).ljust(0x80 - 4, b"\0")
    crc = zlib.crc32(header)
    expected = header + struct.pack("<I", crc)
    for body in (
        struct.pack("<BBxxIQQII28x", 4, 1, 7, 0, 4096 * 7, 0, zlib.crc32(b"\7\0\0")),
        struct.pack("<BxHHH2d36x", 6, 3, 2, 1, 0.0, 1e-3),
        struct.pack("<BBHQQ5d", 1, 0, 6, 3, 2**64 - 4, 1e-6, 0.5, -1.5, 2.5, 2.5),
        struct.pack("<BBxxIQ5d4x", 2, 2, 4, 3, 5.0, 0.5, 0.0, 0.0, 0.0),
        struct.pack("<BBHQQ5d", 3, 0, 2, 9, 9, float("nan"), float("-inf"), 0.0, 0.0, 0.0),
        struct.pack("<BBxxIQQII28x", 4, 0, 7, 1, 4096 * 7, 4, zlib.crc32(b"\7\1\4")),
        struct.pack("<BBxxIQQII28x", 4, 3, 8, 2, 4096 * 8, 0, zlib.crc32(b"\x08\2\0")),
        struct.pack("<BBxxIQQ36x", 5, 5, 1, 9, 2),
        struct.pack("<BBxxIQQ36x", 5, 4, 0, 3, 1),
    ):
        crc = zlib.crc32(body, crc)
        expected += body + struct.pack("<I", crc)
    assert path.read_bytes() == expected.ljust(GROWTH, b"\0")


class NotingFS(FS):
    """Notes what reaches the disk, in order, and can fail one kind of call from now on."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken = ""

    def note(self, call: str) -> None:
        self.calls.append(call)
        if self.broken and call.startswith(self.broken):
            raise StoreError(f"{call} failed on purpose")

    def write_at(self, fd: int, data: bytes, offset: int) -> None:
        if data:
            self.note(f"write {len(data)} at {offset}")
        super().write_at(fd, data, offset)

    def sync_data(self, fd: int) -> None:
        self.note("sync")
        super().sync_data(fd)

    def rename(self, old: Path, new: Path) -> None:
        self.note(f"rename {old.name} {new.name}")
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        self.note(f"sync folder {path.name}")
        super().sync_folder(path)

    def taken(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


class ShortFS(FS):
    """Moves at most 1,000 bytes a call."""

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        return super().write_some(fd, data[:1000], offset)

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        return super().read_some(fd, into[:1000], offset)


def test_a_record_is_written_and_then_synced_before_append_returns(tmp_path: Path) -> None:
    fs = NotingFS()
    with Journal.create(tmp_path / "journal", header=HEADER, fs=fs) as journal:
        created = [f"write {GROWTH} at 0", "sync", "rename journal.tmp journal", f"sync folder {tmp_path.name}"]
        assert fs.taken() == created
        journal.append(step(1))
        assert fs.taken() == ["write 128 at 128", "sync"]
    assert fs.taken() == []
    with Journal.open(tmp_path / "journal", fs=fs, sync_every=0) as journal:
        fs.calls.clear()
        journal.append(step(2))
        assert fs.taken() == ["write 64 at 256"]


def test_what_is_not_durable_yet_lies_in_one_sector(tmp_path: Path) -> None:
    fs, path = NotingFS(), tmp_path / "journal"
    with Journal.create(path, header=HEADER, fs=fs, sync_every=100) as journal:
        fs.calls.clear()
        journal.append(step(1, *map(float, range(60))))  # settings, step and 12 records of values from byte 128
        assert fs.taken() == ["write 384 at 128", "sync", "write 512 at 512"]
        journal.append(step(2))
        assert fs.taken() == ["sync", "write 128 at 1024"]  # settings, because it has fewer coefficients
        for number in range(3, 9):
            journal.append(step(number))
        assert "sync" not in fs.taken()
        journal.append(step(9))
        assert fs.taken() == ["sync", "write 64 at 1536"]


def test_every_nth_step_is_durable_and_units_and_marks_always(tmp_path: Path) -> None:
    fs, path = NotingFS(), tmp_path / "journal"

    def is_synced() -> bool:
        return fs.taken()[-1] == "sync"

    with Journal.create(path, header=HEADER, fs=fs, sync_every=3) as journal:
        fs.calls.clear()
        synced = []
        for number in range(1, 5):
            journal.append(step(number))
            synced.append(is_synced())
        assert synced == [False, False, True, False]
        for change in (
            lambda: journal.append_unit(unit(1, 4)),
            lambda: journal.append_mark(MarkKind.SAVED, step=4),
            lambda: journal.rewind(3),
        ):
            change()
            assert is_synced()
        journal.append(skip(5))
        assert not is_synced()
    assert fs.taken() == ["sync"], "closing makes the rest durable"


def test_the_file_grows_in_synced_steps_of_zeros_and_always_ends_in_zeros(tmp_path: Path) -> None:
    fs, path = NotingFS(), tmp_path / "journal"
    records = list(map(step, range(PER_GROWTH + 10)))
    room = PER_GROWTH - 2 - 1 - 1  # the header of 128 bytes, the settings, and the zeros at the end
    assert written(path, *records[:room]).stat().st_size == GROWTH
    with Journal.open(path, fs=fs) as journal:
        fs.calls.clear()
        journal.append(records[room])
        assert fs.taken() == [f"write {GROWTH} at {GROWTH}", "sync", f"write 64 at {GROWTH - 64}", "sync"]
    with Journal.open(path, sync_every=0) as journal:
        for record in records[room + 1 :]:
            journal.append(record)
        assert path.stat().st_size == 2 * GROWTH
    with Journal.open(path) as journal:
        assert journal.records == records


def test_short_reads_and_writes_are_invisible(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal", header=HEADER, fs=ShortFS()) as journal:
        journal.append(step(1, *map(float, range(200))))
    with Journal.open(tmp_path / "journal", fs=ShortFS()) as journal:
        assert journal.records == [step(1, *map(float, range(200)))]


@pytest.mark.parametrize("broken", ["write", "sync"])
def test_a_failed_append_is_not_retried_and_the_next_open_tells_what_is_there(tmp_path: Path, broken: str) -> None:
    fs, path = NotingFS(), tmp_path / "journal"
    with Journal.create(path, header=HEADER, fs=fs) as journal:
        journal.append(step(1))
        fs.broken = broken
        with pytest.raises(StoreError, match="failed on purpose"):
            journal.append(step(2))
        assert journal.records == [step(1)]
        fs.broken = ""
        fs.calls.clear()
        for change in (
            lambda: journal.append(step(2)),
            lambda: journal.append_unit(unit(1, 1)),
            lambda: journal.append_mark(MarkKind.SAVED, step=1),
            lambda: journal.rewind(0),
        ):
            with pytest.raises(StoreError, match=r"an earlier append failed after 1 records.*failed on purpose"):
                change()
        assert journal.records == [step(1)] and not journal.marks and not journal.versions(1)
    assert fs.calls == [], "closing does not retry either"
    with Journal.open(path) as journal:
        assert journal.records in ([step(1)], [step(1), step(2)])


def test_a_write_that_the_system_broke_off_costs_no_more_than_its_step(tmp_path: Path) -> None:
    class HalfFS(FS):
        n_bytes = 0

        def write_some(self, fd: int, data: memoryview, offset: int) -> int:
            if not self.n_bytes:
                return super().write_some(fd, data, offset)
            super().write_some(fd, data[: self.n_bytes], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n_bytes in range(1, 120):
        fs, path = HalfFS(), tmp_path / f"journal{n_bytes}"
        with Journal.create(path, header=HEADER, fs=fs, sync_every=0) as journal:
            journal.append(step(1))
            fs.n_bytes = n_bytes
            with pytest.raises(StoreError, match="No space left"):
                journal.append(step(2, 1.0, 2.0))
        if n_bytes % RECORD_BYTES <= RECORD_BYTES - 4:
            with Journal.open(path, sync_every=0) as journal:
                assert journal.records == [step(1)] and journal.repaired


def test_bytes_that_a_dead_process_left_unsynced_are_synced_by_the_next(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", *map(step, range(20)))  # written without a sync
    fs = NotingFS()
    with Journal.open(path, fs=fs):
        end = header_bytes(path) + 21 * RECORD_BYTES
        start = end // SECTOR * SECTOR
        assert fs.taken() == [f"write {end - start} at {start}", "sync"]


@pytest.mark.parametrize("broken", ["write", "sync", "rename", "sync folder"])
def test_a_journal_that_could_not_be_created_can_be_created_again_or_is_whole(tmp_path: Path, broken: str) -> None:
    fs, path = NotingFS(), tmp_path / "journal"
    fs.broken = broken
    with pytest.raises(StoreError, match="failed on purpose"):
        Journal.create(path, header=HEADER, fs=fs)
    if not path.exists():
        Journal.create(path, header=HEADER).close()
    Journal.open(path).close()
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_too_full_to_grow_is_said_and_keeps_what_was_there(tmp_path: Path) -> None:
    class FullFS(FS):
        is_full = False

        def write_some(self, fd: int, data: memoryview, offset: int) -> int:
            if not self.is_full:
                return super().write_some(fd, data, offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = list(map(step, range(PER_GROWTH - 4)))
    fs, path = FullFS(), written(tmp_path / "journal", *records)
    with Journal.open(path, fs=fs) as journal:
        fs.is_full = True
        with pytest.raises(StoreError, match="65,536 bytes are needed"):
            journal.append(step(PER_GROWTH))
    with Journal.open(path) as journal:
        assert journal.records == records


def test_an_existing_journal_is_never_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    with pytest.raises(StoreError, match="exists already"):
        Journal.create(path, header={})
    with Journal.open(path) as journal:
        assert journal.records == [step(1)]
    with pytest.raises(StoreError, match="No such file"):
        Journal.open(tmp_path / "none")


NOT_NEXT = [step(5), step(4), skip(5), step(6, float("nan")), step(6, 1.0, float("inf"))]
NOT_NEXT += [step(6, **{name: float("inf")}) for name in ("learning_rate", "weight_decay", "zo_eps")]
NOT_NEXT += [step(6, losses=(1.0, float("nan"))), step(6, scalars=(float("nan"),)), step(6)._replace(coefficients=())]


@pytest.mark.parametrize("record", NOT_NEXT, ids=repr)
def test_a_record_that_is_not_a_next_step_is_refused_and_nothing_is_written(tmp_path: Path, record: Record) -> None:
    path = written(tmp_path / "journal", step(5))
    raw = path.read_bytes()
    with Journal.open(path) as journal:
        with pytest.raises(ValueError):
            journal.append(record)
        assert path.read_bytes() == raw
        journal.append(step(6))
        assert journal.records == [step(5), step(6)]


def test_a_closed_or_read_only_journal_takes_no_records(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    journal = Journal.open(path)
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="is closed"):
        journal.append(step(2))
    with Journal.open(path, read_only=True) as journal:
        for change in (
            lambda: journal.append(step(2)),
            lambda: journal.append_unit(unit(1, 1)),
            lambda: journal.append_mark(MarkKind.SAVED, step=1),
            lambda: journal.rewind(0),
        ):
            with pytest.raises(ValueError, match="read-only"):
                change()


@pytest.mark.parametrize("header", [{"a": float("nan")}, {"a": "x" * (1 << 20)}], ids=["nan", "too long"])
def test_a_header_that_could_not_be_read_back_is_refused_when_written(tmp_path: Path, header: dict[str, JSON]) -> None:
    with pytest.raises(ValueError):
        Journal.create(tmp_path / "journal", header=header)
    assert not list(tmp_path.iterdir())
