"""Damaged unit files are refused before a byte of them is used, and the message says where the damage is."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.covering import few_in_ci
from tests.support.durable import Player, QuickFS, Setup, base_weights, listing, small_layout, state_of, steps
from tests.support.processes import single_threaded
from zo2trl.errors import StoreCorrupt, StoreError
from zo2trl.files.fs import FS
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import Unit
from zo2trl.tiers.tier import host_bytes
from zo2trl.tiers.unit_files import UnitFiles, file_name

N_FLIPS = 20_000
N_BURSTS = 1_000
N_LENGTHS = 200
UNIT = small_layout(by_leaf=True).units[2]  # two tensors of one tile each


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


class MemoryFS(FS):
    """One file, in memory."""

    data = bytearray()

    def open(self, path: Path, *, write: bool = False) -> int:
        return 0

    def close(self, fd: int) -> None:
        pass

    def exists(self, path: Path) -> bool:
        return True

    def size(self, fd: int) -> int:
        return len(self.data)

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        part = self.data[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)


def saved(folder: Path, unit: Unit, *, fs: FS) -> tuple[UnitFiles, UnitRecord]:
    """A published version of a unit."""
    files = UnitFiles(folder, fs=fs)
    draft = files.create(unit, position=0)
    for spec in unit.tensors:
        files.write(draft, [spec], host_bytes(base_weights(spec)))
    return files, files.publish(draft)


@pytest.fixture
def in_memory(tmp_path: Path) -> tuple[MemoryFS, UnitFiles, UnitRecord]:
    _, record = saved(tmp_path, UNIT, fs=QuickFS())
    fs = MemoryFS()
    fs.data = bytearray((tmp_path / file_name(UNIT, position=0)).read_bytes())
    return fs, UnitFiles(tmp_path, fs=fs), record


def assert_refused(files: UnitFiles, record: UnitRecord, *, damaged: range, trial: str) -> None:
    """The message names file, unit and the damaged parameter (either of the two if the damage is in both)."""
    with pytest.raises(StoreCorrupt) as refusal:
        files.check(UNIT, record)
    text = str(refusal.value)
    assert str(files.path(UNIT, record)) in text and f"unit {UNIT.name}" in text, f"{trial}: {text}"
    offset = re.search(r"at offset (\d+)", text)
    assert offset is not None, f"{trial}: {text}"
    if damaged.start >= UNIT.n_bytes:
        assert "table of checksums" in text and int(offset[1]) == UNIT.n_bytes, f"{trial}: {text}"
        return
    hit = [
        spec for spec in UNIT.tensors
        if spec.byte_offset < damaged.stop and damaged.start < spec.byte_offset + spec.n_padded_bytes
    ]  # fmt: skip
    if damaged.stop > UNIT.n_bytes:
        return  # both in the last tensor and in the table: any of them may be named
    assert any(f" {spec.name} " in text and int(offset[1]) == spec.byte_offset for spec in hit), f"{trial}: {text}"


def flip(data: bytearray, bits: list[int]) -> range:
    """Flip bits; the bytes they are in."""
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    return range(min(bits) // 8, max(bits) // 8 + 1)


@pytest.mark.parametrize("n_flips", few_in_ci(N_FLIPS // 4, N_FLIPS))
def test_every_flipped_bit_is_refused_naming_unit_and_parameter(
    in_memory: tuple[MemoryFS, UnitFiles, UnitRecord], n_flips: int
) -> None:
    fs, files, record = in_memory
    files.check(UNIT, record)
    draw = random.Random(20)
    for trial in range(n_flips):
        bits = [draw.randrange(len(fs.data) * 8)]
        assert_refused(files, record, damaged=flip(fs.data, bits), trial=f"trial {trial}, bit {bits[0]}")
        flip(fs.data, bits)
    files.check(UNIT, record)


def test_every_burst_of_up_to_32_bits_is_refused(in_memory: tuple[MemoryFS, UnitFiles, UnitRecord]):
    fs, files, record = in_memory
    draw = random.Random(21)
    for trial in range(N_BURSTS):
        length = draw.randrange(2, 33)
        start = draw.randrange(len(fs.data) * 8 - length)
        if trial % 4 == 0:  # across the boundary of two tensors, or of the last one and the table
            start = draw.choice([UNIT.tensors[1].byte_offset, UNIT.n_bytes]) * 8 - draw.randrange(1, length)
        inner = [start + i for i in range(1, length - 1) if draw.random() < 0.5]
        bits = [start, *inner, start + length - 1]
        assert_refused(files, record, damaged=flip(fs.data, bits), trial=f"trial {trial}, bits {bits}")
        flip(fs.data, bits)
    files.check(UNIT, record)


def test_a_file_of_any_other_length_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    class NoMap(QuickFS):
        def map(self, path: Path):
            raise AssertionError("mapped a file of the wrong length")

    files, record = saved(tmp_path, UNIT, fs=NoMap())
    path = files.path(UNIT, record)
    whole = path.read_bytes()
    lengths = {0, 1, len(whole) - 1, len(whole) + 1, 2 * len(whole), UNIT.n_bytes}
    lengths |= set(random.Random(22).sample(range(len(whole)), N_LENGTHS - len(lengths)))
    for length in sorted(lengths):
        path.write_bytes(whole[:length].ljust(length, b"\0"))
        for use in (files.check, lambda unit, record: files.open(unit, record)):
            with pytest.raises(StoreCorrupt, match=f"unit {UNIT.name}: .*{length:,} bytes instead of {len(whole):,}"):
                use(UNIT, record)
    path.unlink()
    with pytest.raises(StoreCorrupt, match=f"{path} .* unit {UNIT.name}: the file is missing"):
        files.check(UNIT, record)


# -- through the store, in every tier


def a_store(path: Path, setup: Setup) -> Player:
    player = Player(setup, path, fs=QuickFS())
    player.play(steps(1, 6))
    player.close()
    return player


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("unit", range(4))
def test_a_store_with_a_damaged_unit_is_refused_whatever_its_tier_and_nothing_is_changed(
    tmp_path: Path, unit: int, mode: str
) -> None:
    setup = Setup()
    player = a_store(tmp_path / "store", setup)
    whole = {path: path.read_bytes() for path in (tmp_path / "store" / "units").iterdir()}
    name = setup.layout.units[unit].name
    newest = max((path for path in whole if path.name.startswith(f"{name}@")), key=lambda p: int(p.name.split("@")[1]))
    data = bytearray(whole[newest])
    data[-100] ^= 4
    newest.write_bytes(data)
    before = listing(tmp_path / "store" / "units")
    with pytest.raises(StoreCorrupt, match=f"{newest} at offset .*, unit {name}: .*Nothing was changed"):
        setup.open(tmp_path / "store", mode=mode, fs=QuickFS())
    assert listing(tmp_path / "store" / "units") == before
    newest.write_bytes(whole[newest])
    with setup.opened(tmp_path / "store", mode=mode, fs=QuickFS()) as store:
        assert state_of(store) == player.oracle.states[-1]


def test_a_file_that_is_cut_while_the_store_is_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    setup = Setup()
    a_store(tmp_path / "store", setup)
    with setup.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        for path in (tmp_path / "store" / "units").iterdir():
            os.truncate(path, 100)
        with pytest.raises(StoreError, match=r"units/block\d@\d+ ended too early|StoreCorrupt"):
            for _ in range(3):
                state_of(store)
