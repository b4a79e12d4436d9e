"""Measure the journal: time and bytes per step, and the time to open a long one.

    python -m benchmarks.journal --out benchmarks/results/journal.json

Appends alternate with a bare write + fdatasync of 64 bytes to a file beside the journal, so that both meet the same
disk in the same state; `--folder` selects the disk. The long journal is written without syncs and opened by fresh
processes, one after the other: memory that a process already has would make the second opening faster.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks._report import add_out, write_report
from zo2trl.files.fs import LOCAL
from zo2trl.journal.journal import GROWTH, RECORD_BYTES, Journal
from zo2trl.zo.records import StepRecord

HEADER_BYTES = 64  # size of the empty header used here
WARM_UP = 50


def main() -> None:
    """Measure appending, then opening."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default: here")
    parser.add_argument("--appends", type=int, default=5000)
    parser.add_argument("--records", type=int, default=1_000_000, help="of the journal to open")
    parser.add_argument("--openings", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        appending = measure_appends(Path(folder), n_appends=options.appends)
        opening = measure_opening(Path(folder), n_records=options.records, n_openings=options.openings)
    write_report(options.out, appending=appending, opening=opening)


def some_step(number: int, draw: random.Random) -> StepRecord:
    """Draw a step with one direction and no float that repeats."""
    return StepRecord(
        step=number, seed=draw.getrandbits(64), coefficients=(draw.gauss(0, 1),), learning_rate=1e-6 / (1 + number),
        weight_decay=0.0, zo_eps=1e-3, losses=(draw.random(), draw.random()), scalars=(draw.random(),),
    )  # fmt: skip


def milliseconds(work: Callable[[], object]) -> float:
    """Measure the milliseconds of one call."""
    started_s = time.perf_counter()
    work()
    return (time.perf_counter() - started_s) * 1e3


def measure_appends(folder: Path, *, n_appends: int) -> dict[str, float]:
    """Measure milliseconds of durable appends and of bare writes, in turns, and bytes per step."""
    draw = random.Random(0)
    append_ms: list[float] = []
    bare_ms: list[float] = []
    n_bytes = -(-(n_appends + WARM_UP) * RECORD_BYTES // GROWTH) * GROWTH
    fd = LOCAL.create(folder / "bare", n_bytes)
    LOCAL.write_at(fd, bytes(n_bytes), 0)
    LOCAL.sync_data(fd)

    def write_bare(number: int, block: bytes) -> None:
        os.pwrite(fd, block, number * RECORD_BYTES)
        os.fdatasync(fd)

    with Journal.create(folder / "journal", header={}) as journal:
        for number in range(n_appends + WARM_UP):
            append = partial(journal.append, some_step(number, draw))
            bare = partial(write_bare, number, draw.randbytes(RECORD_BYTES))
            turns = [(append_ms, append), (bare_ms, bare)]
            for times, work in turns if number % 2 else reversed(turns):
                times.append(milliseconds(work))
    LOCAL.close(fd)
    used = len((folder / "journal").read_bytes().rstrip(b"\0"))
    append_ms, bare_ms = append_ms[WARM_UP:], bare_ms[WARM_UP:]
    return {
        "appends": n_appends,
        "append_median_ms": statistics.median(append_ms),
        "append_p99_ms": statistics.quantiles(append_ms, n=100)[98],
        "bare_median_ms": statistics.median(bare_ms),
        "bare_p99_ms": statistics.quantiles(bare_ms, n=100)[98],
        "ratio_of_medians": statistics.median(append_ms) / statistics.median(bare_ms),
        "bytes_per_step": (used - HEADER_BYTES) / (n_appends + WARM_UP),
    }


def measure_opening(folder: Path, *, n_records: int, n_openings: int) -> dict[str, object]:
    """Measure the seconds to open a journal of many steps."""
    path, draw = folder / "long", random.Random(0)
    with Journal.create(path, header={}, sync_every=0) as journal:
        for number in range(n_records):
            journal.append(some_step(number, draw))
    seconds = [open_in_new_process(path) for _ in range(n_openings)]
    return {
        "records": n_records,
        "file_bytes": path.stat().st_size,
        "median_s": statistics.median(seconds),
        "best_s": min(seconds),
        "worst_s": max(seconds),
    }


def open_in_new_process(path: Path) -> float:
    """Measure the seconds of the opening alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(opening_seconds, path).result()


def opening_seconds(path: Path) -> float:
    """Time opening a journal for writing, as a resumed run does."""
    started_s = time.perf_counter()
    journal = Journal.open(path)
    seconds = time.perf_counter() - started_s
    journal.close()
    return seconds


if __name__ == "__main__":
    main()
