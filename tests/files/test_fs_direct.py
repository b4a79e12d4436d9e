"""Reads past the page cache: the same bytes and the same errors as through it, wherever they are possible."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.faulty_fs import FaultyFS
from zo2trl.errors import ShortRead, StoreError
from zo2trl.files.fs import DIRECT_ALIGNMENT, FS
from zo2trl.tiers.readers import aligned_bytes

N_BYTES = 10 * DIRECT_ALIGNMENT + 123


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def open_files() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


class WatchedFS(FS):
    """Notes which way reads went, and refuses direct ones if told to."""

    def __init__(self, *, refuses: bool = False, moves: int = 1 << 40) -> None:
        self.refuses, self.moves = refuses, moves
        self.direct: list[int] = []  # lengths of direct reads
        self.buffered: list[int] = []

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        if is_direct(fd) and self.refuses:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        (self.direct if is_direct(fd) else self.buffered).append(len(into))
        return super().read_some(fd, into[: self.moves], offset)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(np.random.default_rng(0).bytes(N_BYTES))
    return tmp_path / "f"


@pytest.fixture
def fds() -> Iterator[list[int]]:
    opened: list[int] = []
    yield opened
    for fd in opened:
        os.close(fd)


def opened(fs: FS, path: Path, fds: list[int]) -> tuple[int, int]:
    fds.append(fs.open(path))
    if not fs.can_read_direct(fds[0]):
        pytest.skip("this file system has no direct reads")
    fds.append(fs.open_direct(fds[0]))
    return fds[0], fds[1]


@pytest.mark.parametrize("blocks", [(0, 1), (0, 10), (3, 7), (9, 10)])
def test_aligned_reads_bring_the_files_bytes_past_the_page_cache(path: Path, fds: list[int], blocks) -> None:
    fs = WatchedFS()
    fd, direct = opened(fs, path, fds)
    fs.direct.clear()
    first, last = (block * DIRECT_ALIGNMENT for block in blocks)
    into = aligned_bytes(last - first)
    fs.read_at(fd, into.numpy(), first, path=path, direct=direct)
    assert into.numpy().tobytes() == path.read_bytes()[first:last]
    assert fs.direct == [last - first] and fs.buffered == []


@pytest.mark.parametrize(("offset", "address", "length"), [(1, 0, 4096), (0, 1, 4096), (0, 0, 4095), (512, 512, 512)])
def test_what_is_not_aligned_comes_through_the_page_cache(
    path: Path, fds: list[int], offset: int, address: int, length: int
) -> None:
    fs = WatchedFS()
    fd, direct = opened(fs, path, fds)
    fs.direct.clear()
    into = aligned_bytes(3 * DIRECT_ALIGNMENT)[address : address + length]
    fs.read_at(fd, into.numpy(), offset, path=path, direct=direct)
    assert into.numpy().tobytes() == path.read_bytes()[offset : offset + length]
    assert fs.direct == [] and fs.buffered == [length]


@pytest.mark.parametrize("moves", [3, 512, 4096, 5000])
def test_reads_that_are_cut_short_are_finished_whichever_way_is_left(path: Path, fds: list[int], moves: int) -> None:
    fs = WatchedFS()
    fd, direct = opened(fs, path, fds)
    fs.moves = moves
    into = aligned_bytes(4 * DIRECT_ALIGNMENT)
    fs.read_at(fd, into.numpy(), DIRECT_ALIGNMENT, path=path, direct=direct)
    assert into.numpy().tobytes() == path.read_bytes()[DIRECT_ALIGNMENT : 5 * DIRECT_ALIGNMENT]


def test_a_file_system_that_takes_direct_reads_back_is_read_through_the_page_cache(path: Path, fds: list[int]) -> None:
    fs = WatchedFS()
    fd, direct = opened(fs, path, fds)
    fs.refuses = True
    into = aligned_bytes(2 * DIRECT_ALIGNMENT)
    fs.read_at(fd, into.numpy(), 0, path=path, direct=direct)
    assert into.numpy().tobytes() == path.read_bytes()[: 2 * DIRECT_ALIGNMENT]
    assert fs.buffered == [2 * DIRECT_ALIGNMENT]


def test_a_file_that_ends_too_early_is_named_with_its_numbers(path: Path, fds: list[int]) -> None:
    fs = WatchedFS()
    fd, direct = opened(fs, path, fds)
    os.truncate(path, 2 * DIRECT_ALIGNMENT)
    with pytest.raises(ShortRead, match=rf"{path} .* wanted 16384 bytes from offset 4096, got 4096"):
        fs.read_at(fd, aligned_bytes(4 * DIRECT_ALIGNMENT).numpy(), DIRECT_ALIGNMENT, path=path, direct=direct)


def test_an_open_file_is_read_although_its_name_is_gone_or_anothers(path: Path, fds: list[int]) -> None:
    fs, before = WatchedFS(), path.read_bytes()
    fds.append(fs.open(path))
    path.unlink()
    path.write_bytes(bytes(N_BYTES))
    if not fs.can_read_direct(fds[0]):
        pytest.skip("this file system has no direct reads")
    fds.append(fs.open_direct(fds[0]))
    into = aligned_bytes(DIRECT_ALIGNMENT)
    fs.read_at(fds[0], into.numpy(), 0, path=path, direct=fds[1])
    assert into.numpy().tobytes() == before[:DIRECT_ALIGNMENT]


# -- the probe


def test_a_file_system_that_opens_but_does_not_read_directly_is_found_out(path: Path, fds: list[int]) -> None:
    fs = WatchedFS(refuses=True)
    fds.append(fs.open(path))
    assert not fs.can_read_direct(fds[0])


def test_a_file_system_that_does_not_open_directly_is_found_out(
    path: Path, fds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, real = FS(), os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    fds.append(fs.open(path))
    monkeypatch.setattr(os, "open", refuse)
    assert not fs.can_read_direct(fds[0])


def test_a_drive_that_fails_is_no_file_system_without_direct_reads(path: Path, fds: list[int]) -> None:
    fs = FaultyFS("EIO")
    fds.append(fs.open(path))
    fs.only("read_some", 1)
    with pytest.raises(StoreError, match=rf"Cannot try a direct read of {path}: .*errno 5"):
        fs.can_read_direct(fds[0])


@pytest.mark.parametrize("fault", ["EINTR", "short read"])
def test_an_interrupted_probe_says_the_same(path: Path, fds: list[int], fault: str) -> None:
    fs = FaultyFS(fault)
    fds.append(fs.open(path))
    wanted = fs.can_read_direct(fds[0])
    fs.only("read_some", 1)
    assert fs.can_read_direct(fds[0]) == wanted


def test_neither_a_probe_nor_its_failure_leaves_a_descriptor(path: Path, fds: list[int]) -> None:
    fs = FaultyFS("EIO")
    fds.append(fs.open(path))
    before = open_files()
    fs.can_read_direct(fds[0])
    fs.only("read_some", 1)
    with pytest.raises(StoreError):
        fs.can_read_direct(fds[0])
    assert open_files() == before
