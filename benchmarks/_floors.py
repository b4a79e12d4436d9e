"""This module measures lower bounds of a step: bare forwards, raw copies and bare reads, in the run they bound.

Does not: read or write a drive with the package's own readers.
"""

import math
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import median_seconds
from zo2trl.tiers.host import pin, unpin

__all__ = [
    "DriveRates",
    "Extent",
    "copy_rates",
    "drive_rates",
    "raw_read_s",
    "raw_write_s",
    "spread_over",
    "two_forwards_s",
]

COPY_BYTES = 1 << 30


def two_forwards_s(model: Any, ids: torch.Tensor, *, repeats: int) -> float:
    """Time two forwards with a loss; `ids` are [batch, tokens] on the device."""

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=ids, labels=ids)

    return median_seconds(forwards, repeats=repeats, warm_up=2)


def copy_rates() -> dict[str, float]:
    """Measure GB/s between pinned host memory and the device: up, down, and each way with both at once."""
    hosts = [torch.zeros(COPY_BYTES, dtype=torch.uint8) for _ in range(2)]
    for host in hosts:
        pin(host)
    devices = [torch.empty_like(host, device="cuda") for host in hosts]
    streams = [torch.cuda.Stream() for _ in hosts]

    def copying(up: bool, down: bool) -> Callable[[], None]:
        def run() -> None:
            if up:
                with torch.cuda.stream(streams[0]):
                    devices[0].copy_(hosts[0], non_blocking=True)
            if down:
                with torch.cuda.stream(streams[1]):
                    hosts[1].copy_(devices[1], non_blocking=True)

        return run

    rates = {
        name: COPY_BYTES / median_seconds(copying(up, down), repeats=7, warm_up=2) / 1e9
        for name, up, down in (("up_gb_s", True, False), ("down_gb_s", False, True), ("each_way_gb_s", True, True))
    }
    for host in hosts:
        unpin(host)
    return rates


# -- a drive

DEPTHS = ((4, 8 << 20), (8, 4 << 20), (16, 4 << 20))  # threads, bytes that each has in flight
MAX_RAW_BYTES = 4 << 30  # read for one figure
RAW_WRITES = 3
BLOCK_BYTES = 4096  # offsets, addresses and lengths of direct reads and writes are multiples of it

Extent = tuple[Path, int]
"""An Extent is a file, and the number of bytes to read from its start."""


@dataclass(frozen=True)
class DriveRates:
    """DriveRates holds GB/s of bare direct reads and writes."""

    read: float
    write: float
    threads: int  # the number with which reading was fastest
    piece_bytes: int


def drive_rates(extents: Sequence[Extent], *, like: DriveRates | None = None) -> DriveRates:
    """Measure bare reads of these files, at the fastest queue depth, and bare writes beside them.

    `like` gives earlier rates, whose depth is used again.
    """
    depths = DEPTHS if like is None else ((like.threads, like.piece_bytes),)
    extents = spread_over(extents, MAX_RAW_BYTES)
    n_bytes = sum(length for _, length in extents)
    reads = [(n_bytes / raw_read_s(extents, threads=t, piece_bytes=p) / 1e9, t, p) for t, p in depths]
    rate, threads, piece_bytes = max(reads)
    largest = max(length for _, length in extents)
    write_s = statistics.median(raw_write_s(extents[0][0].parent, largest) for _ in range(RAW_WRITES))
    return DriveRates(read=rate, write=largest / write_s / 1e9, threads=threads, piece_bytes=piece_bytes)


def spread_over(extents: Sequence[Extent], max_bytes: int) -> list[Extent]:
    """Choose files evenly so that they hold about `max_bytes`."""
    every = math.ceil(sum(length for _, length in extents) / max_bytes)
    return [(path, length // BLOCK_BYTES * BLOCK_BYTES) for path, length in extents[:: max(every, 1)]]


def raw_read_s(extents: Sequence[Extent], *, threads: int, piece_bytes: int) -> float:
    """Measure the seconds to read these bytes past the page cache into a buffer per thread, without using them."""
    with ExitStack() as files:
        fds = [files.enter_context(_open_direct(path, os.O_RDONLY)) for path, _ in extents]
        pieces = [
            (fd, start, min(piece_bytes, length - start))
            for fd, (_, length) in zip(fds, extents, strict=True)
            for start in range(0, length, piece_bytes)
        ]

        def read(buffer: mmap.mmap, fd: int, start: int, length: int) -> None:
            n_read = os.preadv(fd, [memoryview(buffer)[:length]], start)
            assert n_read == length, f"{n_read} bytes read instead of {length}"

        return _in_threads(read, pieces, threads=threads, piece_bytes=piece_bytes)


def raw_write_s(folder: Path, n_bytes: int, *, threads: int = 4, piece_bytes: int = 8 << 20) -> float:
    """Measure the seconds to write `n_bytes` past the page cache into a preallocated file, and to sync it."""
    n_bytes = max(n_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
    path = folder / "raw_write.tmp"
    try:
        path.touch()
        with _open_direct(path, os.O_WRONLY) as fd:
            os.posix_fallocate(fd, 0, n_bytes)
            pieces = [(fd, start, min(piece_bytes, n_bytes - start)) for start in range(0, n_bytes, piece_bytes)]

            def write(buffer: mmap.mmap, fd: int, start: int, length: int) -> None:
                n_written = os.pwritev(fd, [memoryview(buffer)[:length]], start)
                assert n_written == length, f"{n_written} bytes written instead of {length}"

            written_s = _in_threads(write, pieces, threads=threads, piece_bytes=piece_bytes)
            started_s = time.perf_counter()
            os.fdatasync(fd)
            return written_s + time.perf_counter() - started_s
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _open_direct(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def _in_threads(
    work: Callable[[mmap.mmap, int, int, int], None],
    pieces: Sequence[tuple[int, int, int]],
    *,
    threads: int,
    piece_bytes: int,
) -> float:
    """Measure the seconds for `work` on all pieces (descriptor, start, length); each thread takes the next one."""
    left = iter(pieces)
    buffers = [mmap.mmap(-1, piece_bytes) for _ in range(threads)]
    noise = os.urandom(BLOCK_BYTES)  # a drive may skip zeros
    for buffer in buffers:
        buffer.write((noise * (piece_bytes // BLOCK_BYTES + 1))[:piece_bytes])

    def work_on_pieces(buffer: mmap.mmap) -> None:
        for fd, start, length in left:
            work(buffer, fd, start, length)

    with ThreadPoolExecutor(threads) as pool:
        started_s = time.perf_counter()
        list(pool.map(work_on_pieces, buffers))
        return time.perf_counter() - started_s
