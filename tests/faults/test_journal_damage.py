"""Damage to a journal: every bit of it, every length, and records that were moved, borrowed or wiped.

What no test here can ask for: a journal that was put back from an older copy, or whose newest records were wiped to
zeros, is a good journal of a shorter history. The units tell, which are further then: see the store's tests.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.covering import few_in_ci
from tests.support.journals import HEADER, exact, header_bytes, skip, step, unit, used_bytes, written
from zo2trl.errors import StoreCorrupt
from zo2trl.journal.journal import GROWTH, RECORD_BYTES, Journal, MarkKind
from zo2trl.zo.records import Record

N_RECORDS = 100


def history(seed: int = 0) -> Iterator[Record]:
    """Steps of one and of several directions, skips, and settings that change."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += draw.randint(1, 3)
        if draw.random() < 0.1:
            yield skip(number)
            continue
        n_directions = draw.choice([1, 1, 1, 2, 6, 9])
        gradients = [draw.gauss(0, 1) for _ in range(n_directions)]
        yield step(number, *gradients, weight_decay=draw.choice([0.0, 0.0, 0.1]), learning_rate=draw.random())


def hundred_records(path: Path, *, seed: int = 0, store: str = "a") -> dict[int, list[Record]]:
    """Write a journal of 100 records of every type; the history at each length that ends in a whole group."""
    base = [unit(0, 0, is_base=True)]
    with Journal.create(path, header={**HEADER, "store": store}, units=base, sync_every=0) as j:
        at: dict[int, list[Record]] = {header_bytes(path): [], used_bytes(path): []}
        for record in history(seed):
            j.append(record)
            at[used_bytes(path)] = list(j.records)
            n_records = (used_bytes(path) - header_bytes(path)) // RECORD_BYTES
            if n_records > N_RECORDS - 12:
                break
            if n_records % 7 == 0:
                j.append_unit(unit(n_records % 3, len(j.records)))
                at[used_bytes(path)] = list(j.records)
        while (used_bytes(path) - header_bytes(path)) // RECORD_BYTES < N_RECORDS:
            j.append_mark(MarkKind.SAVED, step=1)
            at[used_bytes(path)] = list(j.records)
    return at


def refused(path: Path) -> str:
    with pytest.raises(StoreCorrupt) as caught:
        Journal.open(path)
    return str(caught.value)


@contextmanager
def patched(path: Path) -> Iterator[int]:
    """A descriptor to change the file by, which costs less than writing all of it for every bit."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("every", few_in_ci(3, 1))
def test_no_flipped_bit_of_a_hundred_records_and_their_header_is_missed(tmp_path: Path, every: int) -> None:
    """CI flips every third bit, the night each of them."""
    path = tmp_path / "journal"
    hundred_records(path)
    raw, start = path.read_bytes(), header_bytes(path)
    end = used_bytes(path)
    assert end == start + N_RECORDS * RECORD_BYTES
    with patched(path) as fd:
        for position in range(end):
            number, in_record = divmod(position - start, RECORD_BYTES)
            where = f"{path} at offset {position - in_record}: record {number} of 100 has CRC" if number >= 0 else ""
            for bit in range(position % every, 8, every):
                os.pwrite(fd, bytes([raw[position] ^ 1 << bit]), position)
                message = refused(path)
                assert where in message and str(path) in message, f"bit {bit} of byte {position}"
            os.pwrite(fd, raw[position : position + 1], position)
    assert path.read_bytes() == raw
    assert not list(tmp_path.glob("*.broken*")), "damage must never be taken for a crash"


def test_a_bit_that_fell_into_the_room_reserved_for_later_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    hundred_records(path)
    raw, end = path.read_bytes(), used_bytes(path)
    positions = [*range(end, end + 2 * RECORD_BYTES), *range(end, GROWTH, 61), GROWTH - 1]
    with patched(path) as fd:
        for position in positions:
            os.pwrite(fd, bytes([1 << position % 8]), position)
            # A record of which only a part is there, and that at its start, is what a broken-off write leaves.
            is_torn_write = position < end + RECORD_BYTES - 4
            if is_torn_write:
                with Journal.open(path, read_only=True) as journal:
                    assert "written in part" in (journal.repaired or ""), f"byte {position}"
            else:
                refused(path)
            os.pwrite(fd, b"\0", position)
    assert path.read_bytes() == raw


def check_cuts(folder: Path, *, every: int, repair_every: int) -> None:
    """Look at the journal cut at every n-th byte, and let a run repair it at some and around every record."""
    path = folder / "journal"
    at = hundred_records(path)
    raw, start, end = path.read_bytes(), header_bytes(path), used_bytes(path)
    some = [n for n in range(end + 2 * RECORD_BYTES) if n % every == 0 or n % RECORD_BYTES in (0, 1, 63)]
    for n_bytes in [*some, *range(end, GROWTH, 997), GROWTH - 1]:
        path.write_bytes(raw[:n_bytes])
        if n_bytes < start:
            assert str(path) in refused(path), f"cut at {n_bytes}"
            assert path.read_bytes() == raw[:n_bytes]
            continue
        good = max(whole for whole in at if whole <= n_bytes)
        is_clean = n_bytes >= end + RECORD_BYTES
        with Journal.open(path, read_only=True) as journal:
            assert exact(journal.records) == exact(at[good]), f"cut at {n_bytes}"
            assert (journal.repaired is None) == is_clean, f"cut at {n_bytes}"
        assert path.read_bytes() == raw[:n_bytes]
        if n_bytes % repair_every and n_bytes % RECORD_BYTES not in (0, 1, 63):
            continue
        with Journal.open(path, sync_every=0) as journal:
            assert exact(journal.records) == exact(at[good]), f"cut at {n_bytes}"
        assert path.read_bytes() == raw[:good].ljust(GROWTH, b"\0"), f"cut at {n_bytes}"
        kept = folder / "journal.broken"
        assert kept.exists() != is_clean, f"cut at {n_bytes}"
        if not is_clean:
            assert kept.read_bytes() == raw[:n_bytes], f"cut at {n_bytes}"
            kept.unlink()


def test_cut_at_any_byte_it_opens_to_the_longest_whole_history_or_not_at_all(tmp_path: Path) -> None:
    check_cuts(tmp_path, every=3, repair_every=29)


@pytest.mark.nightly
def test_cut_at_any_byte_it_is_repaired(tmp_path: Path) -> None:
    check_cuts(tmp_path, every=1, repair_every=1)


def edit(records: list[bytes], foreign: list[bytes], draw: random.Random) -> str:
    """Change a list of records in one of the ways that leave whole records; says which."""
    zeros = bytes(RECORD_BYTES)
    i, j = draw.randrange(N_RECORDS - 3), draw.randrange(N_RECORDS - 3)  # up to 3 edits: as many may be gone
    kind = draw.choice(["zero", "double", "drop", "swap", "overwrite", "borrow", "splice", "insert zeros", "reverse"])
    if kind == "zero":
        records[i] = zeros
    elif kind == "double":
        records.insert(j, records[i])
    elif kind == "drop":
        del records[i]
    elif kind == "swap":
        records[i], records[j] = records[j], records[i]
    elif kind == "overwrite":
        records[i] = records[j]
    elif kind == "borrow":
        records[i] = foreign[i]
    elif kind == "splice":
        records[i:] = foreign[i:]
    elif kind == "insert zeros":
        records.insert(i, zeros)
    else:
        records[min(i, j) : max(i, j) + 1] = records[min(i, j) : max(i, j) + 1][::-1]
    return f"{kind} {i} {j}"


def check_edits(folder: Path, seeds: range) -> None:
    path, other = folder / "journal", folder / "other"
    at = hundred_records(path)
    hundred_records(other, store="b")
    start = header_bytes(path)

    def blocks(file: Path) -> list[bytes]:
        raw = file.read_bytes()[start:]
        return [raw[i * RECORD_BYTES :][:RECORD_BYTES] for i in range(N_RECORDS)]

    raw, records, foreign = path.read_bytes(), blocks(path), blocks(other)
    n_refused = 0
    for seed in seeds:
        edited, draw = list(records), random.Random(seed)
        what = " then ".join(edit(edited, foreign, draw) for _ in range(draw.choice([1, 1, 1, 2, 3])))
        image = (raw[:start] + b"".join(edited)).ljust(GROWTH, b"\0")
        path.write_bytes(image)
        if raw.startswith(image.rstrip(b"\0")):  # the end was wiped, or nothing changed: a whole, shorter history
            good = max(whole for whole in at if whole <= used_bytes(path))
            with Journal.open(path, read_only=True) as journal:
                assert exact(journal.records) == exact(at[good]), f"seed {seed}: {what}"
            continue
        try:
            Journal.open(path).close()
        except StoreCorrupt as error:
            assert f"{path} at offset " in str(error) and "record" in str(error), f"seed {seed}: {what}"
            assert path.read_bytes() == image
            n_refused += 1
        else:
            pytest.fail(f"seed {seed}: {what} was not noticed")
    assert n_refused > 0.8 * len(seeds)
    assert not list(folder.glob("*.broken*"))


def test_records_zeroed_doubled_dropped_swapped_or_borrowed_are_refused(tmp_path: Path) -> None:
    check_edits(tmp_path, range(500))


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_many_more_edits_are_refused(tmp_path: Path, part: int) -> None:
    check_edits(tmp_path, range(1000 + part * 2000, 3000 + part * 2000))


def test_a_burst_of_damage_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    hundred_records(path)
    raw, end = path.read_bytes(), used_bytes(path)
    for seed in range(500):
        draw = random.Random(seed)
        n_bytes = draw.randint(2, 600)
        position = draw.randrange(end - n_bytes)
        damaged = bytearray(raw)
        damaged[position : position + n_bytes] = draw.randbytes(n_bytes)
        path.write_bytes(damaged)
        assert str(path) in refused(path), f"seed {seed}: {n_bytes} bytes at {position}"


def test_the_header_of_one_store_does_not_fit_the_records_of_another(tmp_path: Path) -> None:
    path, other = tmp_path / "journal", tmp_path / "other"
    hundred_records(path)
    hundred_records(other, store="b")
    start = header_bytes(path)
    for header, records in ((path, other), (other, path)):
        image = header.read_bytes()[:start] + records.read_bytes()[start:]
        (tmp_path / "mixed").write_bytes(image)
        assert "record 0 of 100" in refused(tmp_path / "mixed")


def test_an_older_copy_put_back_is_a_shorter_history_and_another_name(tmp_path: Path) -> None:
    """The journal alone cannot know; whoever kept a fingerprint, as checkpoints do, or newer units can."""
    path = written(tmp_path / "journal", *map(step, range(5)))
    old = path.read_bytes()
    with Journal.open(path, sync_every=0) as journal:
        journal.append(step(5))
        newest = journal.fingerprint(6)
    path.write_bytes(old)
    with Journal.open(path, sync_every=0) as journal:
        assert len(journal.records) == 5
        journal.append(step(5, -0.5))
        assert journal.fingerprint(6) != newest
