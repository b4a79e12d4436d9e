"""Compare the store's reads of units from disk with bare direct reads of the same files in the same run.

    python -m benchmarks.disk --out benchmarks/results/disk.json

The benchmark makes files of transformer-block-shaped units with random bytes in `--folder`, then reads the same ones
in turns: bare (O_DIRECT `preadv` at the fastest queue depth, without using the bytes) and through the store
(residency, prefetcher, staging, and the upload if there is a GPU), with checksums compared by sampling, with all of
them compared, and through the page cache, cold. Rates are medians; CPU seconds are those of all threads of the
process.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from benchmarks._floors import DriveRates, Extent, drive_rates, raw_read_s
from benchmarks._report import add_out, write_report
from zo2trl.files.fs import FS, LOCAL
from zo2trl.layout.layout import Layout, Segment, TensorSpec
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.prefetch import Prefetcher
from zo2trl.tiers.readers import N_READ_THREADS, READ_PIECE_BYTES
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.tier import Tiers
from zo2trl.tiers.unit_files import UnitFiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RING_SEGMENTS = 3
Sample = tuple[float, float]  # seconds, CPU seconds


class ThroughPageCache(FS):
    """ThroughPageCache is a file system without direct reads."""

    def can_read_direct(self, fd: int) -> bool:
        """Return that it cannot."""
        return False


def main() -> None:
    """Make the files, read them in turns, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the blocks: 24 x its square bytes each")
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_report(
            options.out,
            **measure(Path(folder), hidden=options.hidden, n_units=options.units, repeats=options.repeats),
        )


class Block(nn.Module):
    """A Block has the parameters of an OPT block, without memory for them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.attention = nn.ModuleList(nn.Linear(hidden, hidden, dtype=torch.bfloat16) for _ in range(4))
            self.up = nn.Linear(hidden, 4 * hidden, dtype=torch.bfloat16)
            self.down = nn.Linear(4 * hidden, hidden, dtype=torch.bfloat16)
            self.norms = nn.ModuleList(nn.LayerNorm(hidden, dtype=torch.bfloat16) for _ in range(2))


class Model(nn.Module):
    """A Model has blocks, and nothing outside them."""

    _no_split_modules = ("Block",)

    def __init__(self, hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(n_blocks))


def random_bits(spec: TensorSpec) -> torch.Tensor:
    """Draw random bytes for a tensor."""
    return torch.randint(0, 256, (spec.n_bytes,), dtype=torch.uint8).view(spec.dtype).view(spec.shape)


def measure(folder: Path, *, hidden: int, n_units: int, repeats: int) -> dict[str, object]:
    """Measure GB/s and CPU seconds per GB of every way of reading, in turns."""
    layout = plan_layout(Model(hidden, n_units))
    samples: dict[str, list[Sample]] = {}
    with opened(layout, folder, LOCAL) as direct, opened(layout, folder, ThroughPageCache(), like=direct) as cached:
        extents = [
            (direct.files.path(unit, record), unit.stored_bytes)
            for unit, record in zip(layout.units, direct.files.first_records, strict=True)
        ]
        can_read_direct = reads_directly(extents[0][0])
        depth = drive_rates(extents)
        ways: dict[str, Callable[[], Sample]] = {
            "bare": lambda: bare(extents, depth),
            "store, sampled checksums": lambda: through_store(direct, check_all=False),
            "store, all checksums": lambda: through_store(direct, check_all=True),
            "store, page cache, sampled": lambda: through_store(cached, check_all=False, cold=folder),
        }
        through_store(direct, check_all=True)
        through_store(cached, check_all=True)
        for turn in range(repeats):
            for name in [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]:  # none always comes first
                samples.setdefault(name, []).append(ways[name]())
    n_bytes = sum(length for _, length in extents)
    rows = {name: row(taken, n_bytes) for name, taken in samples.items()}
    bare_rate = rows["bare"]["gb_s"]
    return {
        "device": DEVICE.type,
        "units": n_units,
        "bytes": n_bytes,
        "threads": N_READ_THREADS,
        "piece_bytes": READ_PIECE_BYTES,
        "bare_threads": depth.threads,
        "bare_piece_bytes": depth.piece_bytes,
        "bare_write_gb_s": depth.write,
        "direct_reads": can_read_direct,
        "ways": rows,
        "over_bare": {name: rows[name]["gb_s"] / bare_rate for name in rows if name != "bare"},
    }


def reads_directly(path: Path) -> bool:
    """Return whether the store reads this file past the page cache."""
    fd = LOCAL.open(path)
    try:
        return LOCAL.can_read_direct(fd)
    finally:
        LOCAL.close(fd)


def row(samples: list[Sample], n_bytes: int) -> dict[str, float]:
    """Compute medians, and the range of the rates."""
    rates = [n_bytes / seconds / 1e9 for seconds, _ in samples]
    return {
        "gb_s": statistics.median(rates),
        "worst_gb_s": min(rates),
        "best_gb_s": max(rates),
        "cpu_s_per_gb": statistics.median(cpu_s / n_bytes * 1e9 for _, cpu_s in samples),
        "cores": statistics.median(cpu_s / seconds for seconds, cpu_s in samples),
    }


@contextmanager
def timing(samples: list[Sample]) -> Iterator[None]:
    """Append wall and CPU seconds of the block to `samples`."""
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    yield
    samples.append((time.perf_counter() - started_s, time.process_time() - cpu_started_s))


def bare(extents: list[Extent], depth: DriveRates) -> Sample:
    """Time direct reads at the fastest queue depth, without using the bytes."""
    cpu_started_s = time.process_time()
    read_s = raw_read_s(extents, threads=depth.threads, piece_bytes=depth.piece_bytes)
    return read_s, time.process_time() - cpu_started_s


@contextmanager
def opened(layout: Layout, folder: Path, fs: FS, *, like: Residency | None = None) -> Iterator[Residency]:
    """Open a residency of all units in new files of a folder, or in the files of another residency."""
    files = UnitFiles(folder, fs=fs)
    tiers = Tiers(gpu=DeviceTier(DEVICE), cpu=HostTier([], pinned=False), disk=DiskTier(files, fs=fs))
    placement = place(layout, Budgets(device="min", cpu=0))
    residency = Residency(layout, placement, tiers=tiers, files=files, device=DEVICE)
    try:
        if like is None:
            residency.populate(random_bits, keep_base=False)
        else:
            for unit, record in zip(layout.units, like.files.first_records, strict=True):
                tiers.disk.open_version(unit, record)
        residency.transfers.make_staging(placement.largest_segment_bytes)
        yield residency
    finally:
        residency.close()


def through_store(residency: Residency, *, check_all: bool, cold: Path | None = None) -> Sample:
    """Time reading every unit once, in the steady state of a prefetcher whose ring is never full for long.

    `cold` is a folder whose files are dropped from the page cache before each read.
    """
    segments = residency.layout.segments
    largest = max(segment.stored_bytes for segment in segments)
    residency.transfers.will_write_back = lambda segment: check_all
    samples: list[Sample] = []
    fetcher = Prefetcher(
        segments, residency.transfers.load, ring_bytes=RING_SEGMENTS * largest, device=DEVICE,
        on_disk=lambda segment: True,
    )  # fmt: skip

    def traverse(part: list[Segment]) -> None:
        for segment in part:
            if cold is not None:
                forget(cold)
            fetch, _ = fetcher.take(segment)
            fetcher.give_back(fetch)

    traverse(segments[:RING_SEGMENTS])
    with timing(samples):
        traverse([*segments[RING_SEGMENTS:], *segments[:RING_SEGMENTS]])
    fetcher.close()
    return samples[0]


def forget(folder: Path) -> None:
    """Drop every file in a folder from the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


if __name__ == "__main__":
    main()
