"""A journal opens to what was written, or to what a crash left of it with a word and a copy, or not at all."""

import logging
import struct
import threading
import zlib
from pathlib import Path

import pytest

from tests.support.faulty_fs import FaultyFS
from tests.support.journals import HEADER, header_bytes, skip, step, unit, used_bytes, written
from zo2trl.errors import StoreCorrupt, StoreError, StoreForeign
from zo2trl.files.fs import FS
from zo2trl.journal.journal import GROWTH, RECORD_BYTES, Journal, MarkKind

PER_GROWTH = GROWTH // RECORD_BYTES


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    for read_only in (True, False):
        with pytest.raises(StoreCorrupt) as caught:
            Journal.open(path, read_only=read_only)
        assert path.read_bytes() == data, "a refused journal must not be changed"
        assert str(path) in str(caught.value) and "Restore the file" in str(caught.value)
    assert not list(path.parent.glob("*.broken*"))
    return str(caught.value)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


# -- a crash cut the last append off


def test_a_torn_step_is_removed_with_a_warning_and_a_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "journal", step(1), step(2), step(7, *map(float, range(12)), weight_decay=0.5))
    raw = path.read_bytes()
    torn = raw[: used_bytes(path) - RECORD_BYTES].ljust(GROWTH, b"\0")  # settings, step and two of three coefficients
    path.write_bytes(torn)
    with caplog.at_level(logging.WARNING), Journal.open(path) as journal:
        assert journal.records == [step(1), step(2)]
        assert journal.repaired == (
            f"{path} was cut off by a crash (its last step is incomplete). It ends with step 2 now (2 in all). The "
            f"file as it was is {path}.broken."
        )
        assert [record.getMessage() for record in caplog.records] == [journal.repaired]
        journal.append(step(8))
    assert (tmp_path / "journal.broken").read_bytes() == torn
    with Journal.open(path) as journal:
        assert (journal.records, journal.repaired) == ([step(1), step(2), step(8)], None)
    assert sizes(tmp_path).keys() == {"journal", "journal.broken"}


def test_every_copy_of_a_torn_journal_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    for number in range(3):
        with path.open("r+b") as file:
            file.truncate(used_bytes(path) + 7 + number)
        with Journal.open(path, sync_every=0) as journal:
            assert journal.records == [step(1)]
    end = used_bytes(path)
    assert sizes(tmp_path) == {
        "journal": GROWTH, "journal.broken": end + 7, "journal.broken-2": end + 8, "journal.broken-3": end + 9,
    }  # fmt: skip


def test_settings_without_their_step_are_removed_and_written_again(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2, weight_decay=0.5))
    path.write_bytes(path.read_bytes()[: used_bytes(path) - RECORD_BYTES].ljust(GROWTH, b"\0"))
    with Journal.open(path, sync_every=0) as journal:
        assert journal.records == [step(1)] and journal.repaired
        journal.append(step(2, weight_decay=0.5))
        journal.append(step(3))
    with Journal.open(path, sync_every=0) as journal:
        assert journal.records == [step(1), step(2, weight_decay=0.5), step(3)]


def test_a_file_that_was_cut_where_it_grew_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", *map(step, range(PER_GROWTH + 5)))
    path.write_bytes(path.read_bytes()[:GROWTH])
    n_left = PER_GROWTH - 3  # the header of 128 bytes and the settings
    with Journal.open(path, sync_every=0) as journal:
        assert len(journal.records) == n_left
        assert f"ends at byte {GROWTH}, without the zeros" in (journal.repaired or "")
        journal.append(step(n_left))
    with Journal.open(path) as journal:
        assert len(journal.records) == n_left + 1 and not journal.repaired


@pytest.mark.parametrize("n_more", [1, 1000, GROWTH - 1])
def test_a_crash_while_the_file_grows_loses_nothing_and_is_not_mentioned(tmp_path: Path, n_more: int) -> None:
    path = written(tmp_path / "journal", step(1), step(2))
    with path.open("ab") as file:
        file.write(bytes(n_more))
    with Journal.open(path, sync_every=0) as journal:
        assert journal.repaired is None and path.stat().st_size == 2 * GROWTH
        for number in range(3, PER_GROWTH + 10):
            journal.append(step(number))
    with Journal.open(path) as journal:
        assert [record.step for record in journal.records] == list(range(1, PER_GROWTH + 10))
    assert path.stat().st_size == 2 * GROWTH


def test_looking_at_a_torn_journal_changes_nothing_and_tells_what_would_be_removed(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2, 1.0, 2.0))
    torn = path.read_bytes()[: used_bytes(path) - RECORD_BYTES]
    path.write_bytes(torn)
    path.chmod(0o444)
    with Journal.open(path, read_only=True) as journal:
        assert journal.records == [step(1)]
        assert "its last step is incomplete" in (journal.repaired or "")
        assert "The next run will remove the rest." in (journal.repaired or "")
    assert path.read_bytes() == torn and sizes(tmp_path).keys() == {"journal"}


def test_a_reader_may_stand_beside_a_writer(tmp_path: Path) -> None:
    path, done = tmp_path / "journal", threading.Event()
    with Journal.create(path, header=HEADER, sync_every=0) as journal:

        def write() -> None:
            number = 0
            while not done.is_set() and number < 2000:
                number += 1
                journal.append(step(number, *[0.25] * (number % 20 + 1), weight_decay=number % 7))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            n_seen = 0
            for _ in range(40):
                with Journal.open(path, read_only=True) as reader:
                    assert [record.step for record in reader.records] == list(range(1, len(reader.records) + 1))
                    assert len(reader.records) >= n_seen
                    n_seen = len(reader.records)
        finally:
            done.set()
            writer.join()


class TornReads(FS):
    """Shows the file with a hole for the first few reads: its front as it was before the writer got there."""

    n_torn = 0

    def read_at(self, fd: int, into: bytearray, offset: int, *, path: Path) -> None:
        super().read_at(fd, into, offset, path=path)
        if self.n_torn:
            hole = len(into.rstrip(b"\0")) // RECORD_BYTES * RECORD_BYTES - (self.n_torn + 1) * RECORD_BYTES
            into[hole : hole + RECORD_BYTES] = bytes(RECORD_BYTES)
            self.n_torn -= 1


def test_a_reader_that_caught_a_writer_in_the_act_looks_again(tmp_path: Path) -> None:
    fs, path = TornReads(), written(tmp_path / "journal", *map(step, range(9)))
    fs.n_torn = 4
    with Journal.open(path, fs=fs, read_only=True) as journal:
        assert len(journal.records) == 9
    fs.n_torn = 1
    with pytest.raises(StoreCorrupt):
        Journal.open(path, fs=fs)  # nobody else writes what we own: this is damage


# -- damage


@pytest.mark.parametrize("n_bytes", [61, 62, 63])
def test_a_last_record_that_is_neither_whole_nor_unwritten_is_refused(tmp_path: Path, n_bytes: int) -> None:
    """Its CRC is there in part, which no write leaves and which a damaged record looks like."""
    path = written(tmp_path / "journal", step(1), step(2))
    raw, last = path.read_bytes(), used_bytes(path) - RECORD_BYTES
    message = refusal(path, raw[: last + n_bytes].ljust(GROWTH, b"\0"))
    assert f"at offset {last}: record 2 of 3" in message and "changed after it was written" in message


@pytest.mark.parametrize("order", ["0132", "01123", "013", "023", "0.13", "01233", "012.3", ".0123", "10", "123"])
def test_records_swapped_doubled_dropped_zeroed_or_moved_are_refused(tmp_path: Path, order: str) -> None:
    path = written(tmp_path / "journal", step(1), step(2), step(3))
    raw, start = path.read_bytes(), header_bytes(path)
    blocks = [*(raw[start + i * RECORD_BYTES :][:RECORD_BYTES] for i in range(4)), bytes(RECORD_BYTES)]
    image = b"".join(blocks[int(digit)] if digit != "." else blocks[-1] for digit in order)
    message = refusal(path, (raw[:start] + image).ljust(GROWTH, b"\0"))
    if "." in order:
        number = order.index(".")
        assert f"at offset {start + number * RECORD_BYTES}: record {number} is all zeros, but there is data" in message


def test_records_of_another_store_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    other = written(tmp_path / "other", step(1), header={**HEADER, "layout": "abd"})
    start = header_bytes(path)
    assert "record 0 of 2" in refusal(path, path.read_bytes()[:start] + other.read_bytes()[start:])


def test_data_behind_the_zeros_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    raw = path.read_bytes()
    for data in (raw + b"x", raw[:-1] + b"x", raw + bytes(GROWTH - 1) + b"x", raw[: used_bytes(path) + 64] + b"x"):
        assert "record 2 is all zeros, but there is data behind it" in refusal(path, data)


def crafted(text: bytes, *bodies: bytes, version: int = 3) -> bytes:
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


SETTINGS = struct.pack("<BxHHH2d", 6, 1, 2, 1, 0.0, 1e-3)
TWO_DIRECTIONS = struct.pack("<BxHHH2d", 6, 2, 2, 1, 0.0, 1e-3)
INFINITE_SETTINGS = struct.pack("<BxHHH2d", 6, 1, 2, 1, 0.0, float("inf"))
END = struct.pack("<BxxxQ", 3, 2**60)  # a skip: what comes before it is not the torn end of the file


def step_body(number: int, n_values: int = 4, value: float = 0.5) -> bytes:
    return struct.pack("<BBHQQ5d", 1, 0, n_values, number, 0, *[value] * 5)


def values_body(number: int, *, n_used: int, first: int = 4, value: float = 0.5) -> bytes:
    return struct.pack("<BBxxIQ5d", 2, n_used, first, number, *[value] * 5)


@pytest.mark.parametrize(
    ("bodies", "said"),
    [
        ([b"\7"], "record 0 has type 7"),
        ([b"\0\1"], "record 0 has type 0"),
        ([values_body(1, n_used=1)], "record 0 has values of no step"),
        ([SETTINGS, step_body(5), values_body(5, n_used=1)], "record 2 has values of no step"),
        ([struct.pack("<BxxxQ", 3, 5), struct.pack("<BxxxQ", 3, 5)], "record 1 is step 5 after step 5"),
        ([SETTINGS, step_body(5), step_body(6), step_body(6)], "record 3 is step 6 after step 6"),
        ([SETTINGS, step_body(5), struct.pack("<BxxxQ", 3, 4)], "record 2 is step 4 after step 5"),
        ([step_body(5)], "record 0 is a step without settings before it"),
        ([SETTINGS, END], "record 1 should be the step that the settings before it are for"),
        ([SETTINGS, step_body(5, 0)], "step 5 with 0 values"),
        ([TWO_DIRECTIONS, step_body(5)], "step 5 with 4 values, and the settings before it say"),
        ([TWO_DIRECTIONS, step_body(5, 5), END], "step 5 with 5 values, but 4 are there"),
        ([TWO_DIRECTIONS, step_body(5, 5), values_body(5, n_used=5)], "step 5 with 5 values"),
        ([TWO_DIRECTIONS, step_body(5, 5), values_body(6, n_used=1)], "step 5 with 5 values"),
        ([TWO_DIRECTIONS, step_body(5, 5), values_body(5, n_used=1, first=5)], "step 5 with 5 values"),
        ([SETTINGS, step_body(5, value=float("nan"))], "record 1 is a step with a number that is not finite"),
        (
            [TWO_DIRECTIONS, step_body(5, 5), values_body(5, n_used=1, value=float("inf"))],
            "record 1 is a step with a",
        ),
        ([INFINITE_SETTINGS, step_body(5)], "record 0 has a number that is not finite"),
        ([struct.pack("<BBxxIQ", 4, 0, 1, 1)], "record 0 is about position 1, but only 0 steps come before it"),
        ([struct.pack("<BBxxIQQ", 5, 1, 0, 1, 1)], "record 0 is about position 1, but only 0 steps"),
        ([struct.pack("<BBxxIQQ", 5, 4, 0, 1, 2**63)], "record 0 is about position 9223372036854775808"),
        ([struct.pack("<BBxxIQQ", 5, 6, 0, 1, 0)], "record 0 is a mark of kind 6"),
        ([struct.pack("<BBxxIQQ", 5, 5, 1, 1, 0)], "record 0 is a mark about 1 units, but only 0 come before it"),
    ],
)
def test_records_that_make_no_sense_are_refused_although_their_crcs_are_right(
    tmp_path: Path, bodies: list[bytes], said: str
) -> None:
    assert said in refusal(tmp_path / "journal", crafted(b"{}\n", *bodies))


@pytest.mark.parametrize("version", [2, 4])
def test_another_format_is_named_and_not_called_damage(tmp_path: Path, version: int) -> None:
    (tmp_path / "journal").write_bytes(crafted(b"{}\n", version=version))
    with pytest.raises(StoreForeign, match=f"has journal format {version}; this zo2trl reads format 3"):
        Journal.open(tmp_path / "journal")


def test_steps_may_be_counted_again_after_they_were_taken_back(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), skip(2), step(3))
    with Journal.open(path, sync_every=0) as journal:
        journal.append_unit(unit(0, 1))
        journal.rewind(1)
        journal.append(step(2))
    with Journal.open(path) as journal:
        assert journal.records == [step(1), step(2)]
        assert [mark.kind for mark in journal.marks] == [MarkKind.REWOUND]


def test_a_disk_without_room_for_the_copy_keeps_the_torn_journal(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2, 1.0, 2.0))
    torn = path.read_bytes()[: used_bytes(path) - RECORD_BYTES].ljust(GROWTH, b"\0")
    for at in range(1, 20):
        path.write_bytes(torn)
        fs = FaultyFS("ENOSPC", at=at)
        try:
            Journal.open(path, fs=fs).close()
        except StoreError as error:
            assert "No space left" in str(error)
        with Journal.open(path, sync_every=0) as journal:
            assert journal.records == [step(1)]
        if not fs.struck:
            return
    pytest.fail("the fault was always met")
