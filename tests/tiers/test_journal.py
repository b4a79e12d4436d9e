"""The journal keeps every step it was given, in the bytes its format says, and opens to nothing else."""

import errno
import json
import os
import re
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo2trl.errors import StoreCorrupt, StoreError, StoreForeign
from zo2trl.tiers.fs import FS
from zo2trl.tiers.journal import GROWTH, JSON, RECORD_BYTES, Journal
from zo2trl.zo.records import Record, SkipRecord, StepRecord

HEADER: dict[str, JSON] = {"noise": "philox4x32-10/rademacher-1", "layout": "abc", "nested": {"b": [1, None, 2.5]}}
PER_GROWTH = GROWTH // RECORD_BYTES


def step(number: int, *gradients: float) -> StepRecord:
    scalars = {"learning_rate": 1e-6, "weight_decay": 0.0, "zo_eps": 1e-3}
    return StepRecord(step=number, seed=2**64 - 1 - number, projected_grads=gradients or (0.5,), **scalars)


def skip(number: int) -> SkipRecord:
    return SkipRecord(step=number, seed=number, loss_plus=float("nan"), loss_minus=float("-inf"))


def written(path: Path, *records: Record) -> Path:
    """A closed journal with these records. (No syncs: what a power cut keeps is not what its tests are about.)"""
    with Journal.create(path, header=HEADER, sync=False) as journal:
        for record in records:
            journal.append(record)
    return path


def header_bytes(path: Path) -> int:
    return int(path.read_bytes().split(b"\n")[0].split(b" ")[-1], 16)


def exact(records: list[Record]) -> list[str]:
    """The records as texts that tell all floats apart, and in which NaN equals itself."""
    return list(map(repr, records))


U64 = st.integers(0, 2**64 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
STEPS = st.builds(
    StepRecord,
    step=U64,
    seed=U64,
    projected_grads=st.lists(FINITE, min_size=1, max_size=13).map(tuple),
    learning_rate=FINITE,
    weight_decay=FINITE,
    zo_eps=FINITE,
)
RECORDS = st.lists(
    STEPS | st.builds(SkipRecord, step=U64, seed=U64, loss_plus=st.floats(), loss_minus=st.floats()),
    unique_by=lambda record: record.step,
).map(lambda records: sorted(records, key=lambda record: record.step))


@settings(deadline=None, max_examples=60)
@given(records=RECORDS, reopen_at=st.integers(0, 10))
def test_every_record_comes_back_exactly_however_often_opened(records: list[Record], reopen_at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "journal", *records[:reopen_at])
        with Journal.open(path, sync=False) as journal:
            for record in records[reopen_at:]:
                journal.append(record)
            assert exact(journal.records) == exact(records)
        with Journal.open(path, read_only=True) as journal:
            assert exact(journal.records) == exact(records)
            assert journal.header == HEADER


@pytest.mark.parametrize("n_directions", [1, 2, 5, 6, 7, 11, 12])
def test_a_step_takes_one_record_and_one_more_for_every_five_directions(tmp_path: Path, n_directions: int) -> None:
    record = step(1, *(i / 7 for i in range(n_directions)))
    path = written(tmp_path / "journal", record, step(2))
    raw = path.read_bytes()[header_bytes(path) :]
    n_blocks = 1 + -(-(n_directions - 1) // 5)
    assert len(raw.rstrip(b"\0")) == (n_blocks + 1) * RECORD_BYTES
    with Journal.open(path) as journal:
        assert journal.records == [record, step(2)]


def test_the_bytes_are_the_format_that_released_journals_have(tmp_path: Path) -> None:
    """Written out by hand: if this fails, FORMAT must go up and the old format stay readable."""
    path = written(tmp_path / "journal", step(3, 0.5, -1.5, 2.5), skip(9))
    text = json.dumps(HEADER, sort_keys=True).encode() + b"\n"
    header = (b"zo2trl journal 1 00000080\n" + text).ljust(0x80 - 4, b"\0")
    crc = zlib.crc32(header)
    expected = header + struct.pack("<I", crc)
    for body in (
        struct.pack("<B3xIQQ4d4x", 1, 3, 3, 2**64 - 4, 0.5, 1e-6, 0.0, 1e-3),
        struct.pack("<BBxxIQ5d4x", 2, 2, 1, 3, -1.5, 2.5, 0.0, 0.0, 0.0),
        struct.pack("<B7xQQ2d20x", 3, 9, 9, float("nan"), float("-inf")),
    ):
        crc = zlib.crc32(body, crc)
        expected += body + struct.pack("<I", crc)
    assert path.read_bytes() == expected.ljust(GROWTH, b"\0")


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt) as caught:
        Journal.open(path)
    assert path.read_bytes() == data, "a refused journal must not be changed"
    assert str(path) in str(caught.value) and "Restore the file" in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_at_any_byte_is_refused_with_file_and_offset(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2, 1.0, 2.0), skip(3))
    raw, start = path.read_bytes(), header_bytes(path)
    end = start + 4 * RECORD_BYTES
    positions = [*range(end + RECORD_BYTES), *range(end + RECORD_BYTES, GROWTH, 997), GROWTH - 1]
    for position in positions:
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        message = refusal(path, bytes(damaged))
        if start <= position < end:
            number, offset = divmod(position - start, RECORD_BYTES)
            assert f"at offset {position - offset}: record {number} of 4 has CRC" in message
        else:
            assert re.search(r"at offset \d+: ", message)


def test_a_journal_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2))
    raw, end = path.read_bytes(), header_bytes(path) + 2 * RECORD_BYTES
    for n_bytes in [*range(end + RECORD_BYTES), *range(end, GROWTH, 997), GROWTH - 1]:
        refusal(path, raw[:n_bytes])


def test_a_journal_cut_where_it_grew_or_with_more_behind_it_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", *map(step, range(PER_GROWTH + 5)))
    assert "end in a record, not in the reserved zeros" in refusal(path, path.read_bytes()[:GROWTH])
    refusal(tmp_path / "small", crafted(b"{}\n") + b"\0x")


@pytest.mark.parametrize("n_bytes", [1, 17, 63])
def test_a_torn_last_record_is_refused_and_said_to_be_the_last(tmp_path: Path, n_bytes: int) -> None:
    path = written(tmp_path / "journal", step(1), step(2))
    raw, last = path.read_bytes(), header_bytes(path) + RECORD_BYTES
    message = refusal(path, raw[: last + n_bytes].ljust(GROWTH, b"\0"))
    assert f"at offset {last}: record 1 of 2" in message and "cut off by a crash" in message


def test_a_step_without_all_of_its_directions_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(7, *map(float, range(12))))
    raw, start = path.read_bytes(), header_bytes(path)
    message = refusal(path, raw[: start + 2 * RECORD_BYTES].ljust(GROWTH, b"\0"))
    assert f"offset {start}: step 7 has 12 directions, only 6 are there" in message


@pytest.mark.parametrize("order", ["132", "1123", "13", "23", "103", "1233", "1203", "0123"])
def test_records_swapped_doubled_dropped_zeroed_or_moved_are_refused(tmp_path: Path, order: str) -> None:
    path = written(tmp_path / "journal", step(1), step(2), step(3))
    raw, start = path.read_bytes(), header_bytes(path)
    blocks = [bytes(RECORD_BYTES), *(raw[start + i * RECORD_BYTES :][:RECORD_BYTES] for i in range(3))]
    refusal(path, (raw[:start] + b"".join(blocks[int(digit)] for digit in order)).ljust(GROWTH, b"\0"))


def test_records_of_another_store_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    with Journal.create(tmp_path / "other", header={**HEADER, "layout": "abd"}, sync=False) as other:
        other.append(step(1))
    start = header_bytes(path)
    assert "record 0 of 1" in refusal(path, path.read_bytes()[:start] + other.path.read_bytes()[start:])


def crafted(text: bytes, *bodies: bytes, version: int = 1) -> bytes:
    """A journal whose CRCs are all right, whatever it says."""
    n_bytes = -(-(len(text) + 30) // RECORD_BYTES) * RECORD_BYTES
    raw = (b"zo2trl journal %d %08x\n" % (version, n_bytes) + text).ljust(n_bytes - 4, b"\0")
    crc = zlib.crc32(raw)
    raw += struct.pack("<I", crc)
    for body in bodies:
        crc = zlib.crc32(body.ljust(60, b"\0"), crc)
        raw += body.ljust(60, b"\0") + struct.pack("<I", crc)
    return raw.ljust(GROWTH, b"\0")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]\n", b'{"a": NaN}\n', b'{"a": 1e999}\n', b'{"a": 1, "a": 1}\n', b"{}\n\0\0x", b"[" * 100_000],
    ids=["empty", "cut", "list", "nan", "overflow", "double key", "more behind", "deep"],
)
def test_a_header_this_format_would_not_write_is_refused_whatever_its_crc(tmp_path: Path, text: bytes) -> None:
    refusal(tmp_path / "journal", crafted(text))


@pytest.mark.parametrize(
    ("bodies", "said"),
    [
        ([b"\4"], "record 0 has type 4"),
        ([b"\2"], "record 0 has type 2"),
        ([struct.pack("<B7xQ", 3, 5), struct.pack("<B7xQ", 3, 5)], "record 1 is step 5 after step 5"),
        ([struct.pack("<B3xIQ", 1, 0, 5)], "step 5 has 0 directions"),
        ([struct.pack("<B3xIQ", 1, 2, 5), struct.pack("<BBxxIQ", 2, 5, 1, 5)], "step 5 has 2 directions"),
        ([struct.pack("<B3xIQ", 1, 2, 5), struct.pack("<BBxxIQ", 2, 1, 1, 6)], "step 5 has 2 directions"),
    ],
)
def test_records_that_make_no_sense_are_refused_although_their_crcs_are_right(
    tmp_path: Path, bodies: list[bytes], said: str
) -> None:
    assert said in refusal(tmp_path / "journal", crafted(b"{}\n", *bodies))


def test_a_newer_format_is_named_and_not_called_damage(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(crafted(b"{}\n", version=2))
    with pytest.raises(StoreForeign, match="has journal format 2; this zo2trl reads format 1"):
        Journal.open(tmp_path / "journal")


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
        journal.append(step(1, 1.0, 2.0))
        assert fs.taken() == ["write 128 at 128", "sync"]
    with Journal.open(tmp_path / "journal", fs=fs, sync=False) as journal:
        journal.append(step(2))
        assert fs.taken() == ["write 64 at 256"]


def test_the_file_grows_in_synced_steps_of_zeros_and_always_ends_in_zeros(tmp_path: Path) -> None:
    fs, path = NotingFS(), tmp_path / "journal"
    records = list(map(step, range(PER_GROWTH + 10)))
    room = PER_GROWTH - 2 - 1  # the header of 128 bytes and the zeros at the end
    assert written(path, *records[:room]).stat().st_size == GROWTH
    with Journal.open(path, fs=fs) as journal:
        journal.append(records[room])
        assert fs.taken() == [f"write {GROWTH} at {GROWTH}", "sync", f"write 64 at {GROWTH - 64}", "sync"]
    with Journal.open(path, sync=False) as journal:
        for record in records[room + 1 :]:
            journal.append(record)
        assert path.stat().st_size == 2 * GROWTH
    with Journal.open(path) as journal:
        assert journal.records == records


def test_a_crash_while_the_file_grows_loses_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2))
    with path.open("ab") as file:
        file.write(bytes(1000))
    with Journal.open(path, sync=False) as journal:
        for number in range(3, PER_GROWTH + 10):
            journal.append(step(number))
    with Journal.open(path) as journal:
        assert [record.step for record in journal.records] == list(range(1, PER_GROWTH + 10))
    assert path.stat().st_size == 2 * GROWTH


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
        with pytest.raises(StoreError, match="an earlier append failed after 1 records"):
            journal.append(step(2))
        assert fs.calls == []
    with Journal.open(path) as journal:
        assert journal.records in ([step(1)], [step(1), step(2)])


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
        def write_some(self, fd: int, data: memoryview, offset: int) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = list(map(step, range(PER_GROWTH - 3)))
    path = written(tmp_path / "journal", *records)
    with Journal.open(path, fs=FullFS()) as journal, pytest.raises(StoreError, match="65,536 bytes are needed"):
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
NOT_NEXT += [replace(step(6), learning_rate=float("inf")), replace(step(6), projected_grads=())]


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
    with Journal.open(path, read_only=True) as journal, pytest.raises(ValueError, match="read-only"):
        journal.append(step(2))


@pytest.mark.parametrize("header", [{"a": float("nan")}, {"a": "x" * (1 << 20)}], ids=["nan", "too long"])
def test_a_header_that_could_not_be_read_back_is_refused_when_written(tmp_path: Path, header: dict[str, JSON]) -> None:
    with pytest.raises(ValueError):
        Journal.create(tmp_path / "journal", header=header)
    assert not list(tmp_path.iterdir())
