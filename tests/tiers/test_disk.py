"""Reading a version from disk: which way, what is compared with its checksum when, and what is said of damage."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.durable import QuickFS, base_weights
from tests.support.faulty_fs import FaultyFS
from tests.support.stores import synthetic_layout
from zo2trl.errors import ShortRead, StoreCorrupt, StoreError
from zo2trl.files.fs import FS
from zo2trl.layout.layout import Unit
from zo2trl.tiers.disk import CHECK_EVERY, DiskTier, VersionHome
from zo2trl.tiers.readers import aligned_bytes
from zo2trl.tiers.tier import host_bytes
from zo2trl.tiers.unit_files import UnitFiles

UNIT = synthetic_layout([[1, 2, 1, 3]]).units[1]
PIECE = 5 * 4096  # cuts tensors


class QuickFaultyFS(FaultyFS, QuickFS):
    """Does not wait for the drive."""


class WatchedFS(QuickFS):
    """Counts the bytes that come past the page cache, and may be a file system that refuses that."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses, self.direct_bytes = refuses, 0

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            if self.refuses:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.direct_bytes += len(into)
        return super().read_some(fd, into, offset)


def a_home(folder: Path, *, fs: FS, unit: Unit = UNIT) -> VersionHome:
    (folder / "units").mkdir(parents=True, exist_ok=True)
    files = UnitFiles(folder / "units", fs=fs)
    draft = files.draft(unit, lambda spec: host_bytes(base_weights(spec)), position=0)
    return VersionHome(files, unit, files.publish(draft), fs=fs)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[VersionHome]:
    home = a_home(tmp_path, fs=QuickFaultyFS())
    yield home
    home.close()
    home.__dict__.pop("map", None)  # pytest holds the home for longer than a map may be open


def read(home: VersionHome, *, tensors=UNIT.tensors, **how) -> tuple[torch.Tensor, bool]:
    """The bytes, and whether all of them were compared."""
    into = aligned_bytes(sum(spec.n_padded_bytes for spec in tensors))
    reading = home.reading(tensors, **how)
    for start in range(0, len(into), PIECE):
        reading.fill(into[start : start + PIECE], start)
    reading.finish()
    return into, reading.is_checked


def stored(home: VersionHome) -> torch.Tensor:
    return torch.from_numpy(home.map.copy())


# -- which way


def test_aligned_memory_is_filled_past_the_page_cache_where_that_is_possible(tmp_path: Path) -> None:
    fs = WatchedFS()
    home = a_home(tmp_path, fs=fs)
    if home._direct is None:
        pytest.skip("this file system has no direct reads")
    fs.direct_bytes = 0
    into = aligned_bytes(UNIT.n_bytes)
    home.read(UNIT.tensors, into.numpy().data)
    assert fs.direct_bytes == UNIT.n_bytes
    assert torch.equal(into, stored(home))
    home.close()


@pytest.mark.parametrize("shift", [1, 64, 4095])
def test_memory_at_any_address_is_filled(tmp_path: Path, shift: int) -> None:
    home = a_home(tmp_path, fs=WatchedFS())
    into = aligned_bytes(UNIT.n_bytes + shift)[shift:]
    home.read(UNIT.tensors, into.numpy().data)
    assert torch.equal(into, stored(home))
    home.close()


def test_a_file_system_without_direct_reads_is_found_out_once_and_read_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fs = WatchedFS(refuses=True)
    with caplog.at_level(logging.INFO, "zo2trl"):
        home = a_home(tmp_path, fs=fs)
    assert [r.getMessage() for r in caplog.records] == [f"Units in {tmp_path}/units are read through the page cache."]
    assert home._direct is None
    assert torch.equal(read(home)[0], stored(home))
    home.close()


@pytest.mark.parametrize("tensors", [UNIT.tensors, UNIT.tensors[1:3], UNIT.tensors[3:]])
def test_every_part_of_a_version_is_aligned(tmp_path: Path, tensors) -> None:
    """So that a leaf is read past the page cache as well as a block."""
    fs = WatchedFS()
    home = a_home(tmp_path, fs=fs)
    fs.direct_bytes = 0
    into, start = read(home, tensors=tensors)[0], tensors[0].byte_offset
    assert torch.equal(into, stored(home)[start : start + into.numel()])
    assert home._direct is None or fs.direct_bytes == into.numel()
    home.close()


def test_a_version_is_read_although_a_newer_one_has_taken_its_name(home: VersionHome) -> None:
    before = stored(home)
    home._path.unlink()
    assert torch.equal(read(home)[0], before)


def test_a_home_closes_all_it_opened_also_when_opening_fails(tmp_path: Path) -> None:
    fs = QuickFaultyFS("EIO")
    a_home(tmp_path, fs=fs).close()
    for nth in range(1, 4):
        fs.only("read_some", nth)
        try:
            home = a_home(tmp_path / f"{nth}", fs=fs)
        except StoreError as error:
            assert "errno 5" in str(error)
        else:
            home.close()
    # The fixture `nothing_left_open` looks for descriptors.


# -- what is compared when


def test_the_first_read_after_opening_compares_everything(home: VersionHome) -> None:
    assert read(home, check_all=False)[1] is True
    assert read(home, check_all=False)[1] is False


def test_whoever_asks_for_everything_gets_everything_compared(home: VersionHome) -> None:
    for _ in range(2 * CHECK_EVERY):
        assert read(home, check_all=True)[1] is True


def test_a_first_read_that_failed_does_not_count(home: VersionHome) -> None:
    fs = home._fs
    assert isinstance(fs, QuickFaultyFS)
    fs.only("read_some", 2)
    with pytest.raises(StoreError, match="errno 5"):
        read(home, check_all=False)
    fs.only("read_some", 0)
    assert read(home, check_all=False)[1] is True


def compared_at(home: VersionHome, n_reads: int, groups) -> dict[str, list[int]]:
    """Tensor -> its own reads (0, 1, 2 ...) at which it was compared; `groups` are read in turns."""
    found: dict[str, list[int]] = {spec.name: [] for spec in UNIT.tensors}
    seen: dict[int, int] = {}
    real, comparing = home.compare, []
    home.compare = lambda crcs: (comparing.extend(crcs), real(crcs))[1]  # type: ignore[method-assign]
    for number in range(n_reads):
        tensors = groups[number % len(groups)]
        comparing.clear()
        read(home, tensors=tensors, check_all=False)
        for spec in tensors:
            if spec.tensor_id in comparing:
                found[spec.name].append(seen.get(spec.tensor_id, 0))
            seen[spec.tensor_id] = seen.get(spec.tensor_id, 0) + 1
    return found


GROUPINGS = {
    "whole": [UNIT.tensors],
    "leaves": [UNIT.tensors[:1], UNIT.tensors[1:3], UNIT.tensors[3:]],
    "some twice": [UNIT.tensors, UNIT.tensors[2:]],
}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
def test_every_tensor_is_compared_at_its_first_read_and_then_at_least_once_in_every_n(
    home: VersionHome, groups
) -> None:
    found = compared_at(home, 10 * CHECK_EVERY * len(groups), groups)
    for name, reads in found.items():
        assert reads[0] == 0, name
        gaps = [later - earlier for earlier, later in pairwise(reads)]
        assert max(gaps) == CHECK_EVERY, f"{name}: {reads}"
        assert gaps[1:] == [CHECK_EVERY] * len(gaps[1:]), f"not more often than promised: {name}: {reads}"


def test_tensors_take_turns_so_that_no_read_compares_much_more_than_another(home: VersionHome) -> None:
    found = compared_at(home, 4 * CHECK_EVERY, [UNIT.tensors])
    later = [number for reads in found.values() for number in reads[1:]]
    assert len(later) == len(set(later)), "no two tensors of this unit at once"


def test_the_same_tensor_of_different_units_is_not_compared_in_the_same_step(tmp_path: Path) -> None:
    layout = synthetic_layout([[1, 1]] * 4)
    phases = set()
    for unit in layout.units[1:]:
        home = a_home(tmp_path, fs=QuickFS(), unit=unit)
        read(home, tensors=unit.tensors, check_all=False)
        phases.add(home._ages[unit.tensors[0].tensor_id])
        home.close()
    assert len(phases) == 4


# -- damage


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * UNIT.n_bytes - 1))
def test_a_bit_that_flips_later_is_refused_within_n_reads_naming_file_unit_and_tensor(
    tmp_path_factory: pytest.TempPathFactory, bit: int
) -> None:
    fs = QuickFaultyFS()
    home = a_home(tmp_path_factory.mktemp("store"), fs=fs)
    read(home, check_all=False)
    fs.flip_bit(UNIT.name, bit)
    (hit,) = (s for s in UNIT.tensors if s.byte_offset <= bit // 8 < s.byte_offset + s.n_padded_bytes)
    try:
        with pytest.raises(
            StoreCorrupt, match=rf"{home._path} at offset {hit.byte_offset}, unit {UNIT.name}: {hit.name} "
        ):
            for _ in range(CHECK_EVERY):
                read(home, check_all=False)
    finally:
        home.close()


def test_a_bit_that_flipped_before_the_first_read_is_refused_at_once_and_always(home: VersionHome) -> None:
    home._fs.flip_bit(UNIT.name, 5)  # type: ignore[attr-defined]
    for _ in range(3):
        with pytest.raises(StoreCorrupt):
            read(home, check_all=False)


def test_a_file_that_somebody_cuts_is_an_error_with_a_path(home: VersionHome) -> None:
    os.truncate(home._path, 100)
    with pytest.raises(ShortRead, match=f"{home._path} ended too early"):
        read(home)


# -- what somebody wrote into the view


def test_what_was_written_into_the_view_is_brought_and_told(home: VersionHome) -> None:
    wanted = stored(home)
    home.map[3:30_000] ^= 255
    wanted[3:30_000] ^= 255
    reading, into = home.reading(UNIT.tensors, check_all=False, beside_view=True), aligned_bytes(UNIT.n_bytes)
    for start in range(0, UNIT.n_bytes, 16_384):
        reading.fill(into[start : start + 16_384], start)
    reading.finish()
    assert reading.was_written_to and torch.equal(into, wanted)


def test_without_a_view_or_without_writes_to_it_nothing_is_told(tmp_path: Path) -> None:
    for look in (False, True):
        home = a_home(tmp_path / f"{look}", fs=QuickFS())
        if look:
            assert home.map is not None
        reading, into = home.reading(UNIT.tensors, beside_view=True), aligned_bytes(UNIT.n_bytes)
        reading.fill(into, 0)
        reading.finish()
        assert not reading.was_written_to
        home.close()


def test_damage_is_not_taken_for_what_somebody_wrote(home: VersionHome) -> None:
    """A difference between file and view is the user's only if the file is sound: all of it is compared."""
    read(home, check_all=False)
    assert home.map is not None
    home._fs.flip_bit(UNIT.name, 8 * 5000)  # type: ignore[attr-defined]
    reading, into = home.reading(UNIT.tensors, check_all=False, beside_view=True), aligned_bytes(UNIT.n_bytes)
    assert reading.is_checked
    reading.fill(into, 0)
    with pytest.raises(StoreCorrupt):
        reading.finish()


# -- writing in pieces


@pytest.mark.parametrize("piece", [1000, 4096, 20_000, 10**9])
def test_a_version_written_in_pieces_is_the_one_written_at_once(tmp_path: Path, piece: int) -> None:
    (segment, *_), unit = [s for s in synthetic_layout([[5]]).segments if s.unit.index], UNIT
    unit = segment.unit
    data = torch.randint(0, 256, (segment.n_bytes,), dtype=torch.uint8)
    written = []
    for name, size in (("whole", 10**9), ("pieces", piece)):
        (tmp_path / name).mkdir()
        tier = DiskTier(UnitFiles(tmp_path / name, fs=QuickFS()), fs=QuickFS())
        tier.add(unit, base_weights)
        parts = ((start, data[start : start + size].numpy().data) for start in range(0, segment.n_bytes, size))
        assert tier.write_pieces(segment, parts, version=1)
        tier.publish(unit)()
        written.append((tmp_path / name / f"{unit.name}@1").read_bytes())
        assert torch.equal(tier.view(unit), data)
        tier.close()
    assert written[0] == written[1]
