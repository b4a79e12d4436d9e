"""Micro-benchmarks of a machine: products, visits, memory, copies and the drive, each within a share of time.

Does not: measure traversals (traversal_bench.py), decide how long it takes (probe.py), or train anything.
Invariant: what is measured is the code that a step runs, on memory of its own; nothing outlives a call.
"""

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from zo2trl.files.fs import FS
from zo2trl.files.os_errors import naming
from zo2trl.forecast.time_share import TimeShare
from zo2trl.planning.known_rates import drive_folder
from zo2trl.planning.rates import VisitCost, dtype_name
from zo2trl.tiers.host import pin, unpin
from zo2trl.tiers.readers import N_READ_THREADS, READ_PIECE_BYTES, aligned_bytes
from zo2trl.zo.method import make_method
from zo2trl.zo.records import StepRecord
from zo2trl.zo.rounding import Rounding
from zo2trl.zo.tiles import TILE, Perturbed, Span, TileMap

__all__ = [
    "MAIN_KINDS", "RARER_KINDS", "copy_rates", "drive_rates", "memory_rates", "product_rates", "scratch_on_drive",
    "visit_costs",
]  # fmt: skip

MAX_FILE_BYTES = 512 << 20
SYNCED_PIECES = 8  # are written between two syncs, which cannot be cut short
N_PENDING, MANY_PENDING = 2, 10  # steps that a visit absorbs
N_PRODUCTS = 8  # beside which a copy is made
_RECORD = StepRecord(
    step=1, seed=1, learning_rate=1e-6, weight_decay=0.0, zo_eps=1e-3, coefficients=(0.1,),
    losses=(1.0, 1.0), scalars=(0.1,),
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Kind = tuple[torch.dtype, str, Rounding]
MAIN_KINDS: tuple[Kind, ...] = (
    (torch.bfloat16, "rademacher", "stochastic"), (torch.float32, "rademacher", "nearest"),
)  # fmt: skip
RARER_KINDS: tuple[Kind, ...] = (
    (torch.bfloat16, "gaussian", "stochastic"), (torch.float32, "gaussian", "nearest"),
    (torch.float16, "rademacher", "stochastic"), (torch.float16, "gaussian", "stochastic"),
)  # fmt: skip


@contextmanager
def scratch_on_drive(store_dir: Path) -> Iterator[Path]:
    """A folder on the drive of a store, which is removed after the block.

    Raises:
        StoreError: nothing can be made there.
    """
    folder = drive_folder(store_dir)
    with ExitStack() as until_then:
        with naming("write to", folder):
            scratch = until_then.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".zo2trl-probe-"))
        yield Path(scratch)


def _seconds(work: Callable[[], object], device: torch.device, *, share: TimeShare) -> float:
    """Wall time of one call: the mean, because a step takes each as it comes, also those that wait for a thread."""
    found: list[float] = []
    if not share.is_over:
        work()  # to warm up
    for _ in range(1000):
        _wait(device)
        started_s = share.clock()
        work()
        _wait(device)
        found.append(share.clock() - started_s)
        if share.is_over:
            break
    return max(statistics.mean(found), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rates(device: torch.device, *, share: TimeShare) -> dict[str, object]:
    """Products and fused attention in each dtype, and what launching one operation takes."""
    shares = share.split(2 * len(_DTYPES) + 1)
    flops = {dtype_name(dtype): _flops(device, dtype, share=next(shares)) for dtype in _DTYPES}
    flops |= {f"{dtype_name(dtype)} attention": _attention(device, dtype, share=next(shares)) for dtype in _DTYPES}
    many = torch.nn.Sequential(*(torch.nn.LayerNorm(8) for _ in range(100))).to(device)
    x = torch.randn(2, 8, device=device)
    return {"flops": flops, "operation_s": _seconds(lambda: many(x), device, share=next(shares)) / 100}


def _flops(device: torch.device, dtype: torch.dtype, *, share: TimeShare) -> float:
    rows, width = (512, 1024) if device.type == "cpu" else (4096, 4096)
    x = torch.randn(rows, width, device=device).to(dtype)
    w = torch.randn(width, width, device=device).to(dtype)
    return 2 * rows * width * width / _seconds(lambda: torch.nn.functional.linear(x, w), device, share=share)


def _attention(device: torch.device, dtype: torch.dtype, *, share: TimeShare) -> float:
    """Counted as workload.py does: every score, whether or not it is masked."""
    rows, heads, length, width = (2, 16, 256, 64) if device.type == "cpu" else (8, 32, 1024, 128)
    x = torch.randn(rows, heads, length, width, device=device).to(dtype)
    work = lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
    return 4 * rows * heads * length * length * width / _seconds(work, device, share=share)


def memory_rates(device: torch.device, *, share: TimeShare) -> dict[str, float]:
    """The device's memory, and new memory of the process."""
    shares = share.split(4)
    # As a forward's element-wise operations do it: into new memory, one of them not a bare addition.
    x = torch.randn(1 << (20 if device.type == "cpu" else 26), device=device)
    moving_s = _seconds(lambda: torch.nn.functional.silu(x), device, share=next(shares))
    moving_s += _seconds(lambda: x + x, device, share=next(shares))
    # The first touch of every page, of pieces that no allocator keeps for the next one.
    cpu, n_bytes = torch.device("cpu"), 64 << 20
    again = torch.zeros(n_bytes, dtype=torch.uint8)
    new_s = _seconds(lambda: torch.empty(n_bytes, dtype=torch.uint8).fill_(1), cpu, share=next(shares))
    new_s -= _seconds(lambda: again.fill_(1), cpu, share=next(shares))
    return {"moved_bytes": 4 * x.nbytes / moving_s, "new_bytes": n_bytes / max(new_s, n_bytes / 1e12)}


def visit_costs(device: torch.device, kinds: Sequence[Kind], *, share: TimeShare) -> dict[str, VisitCost]:
    """Visits of these kinds; those that no time is left for are left out, but for the main ones."""
    found: dict[str, VisitCost] = {}
    for kind, part in zip(kinds, share.split(len(kinds)), strict=True):
        if kind in MAIN_KINDS or not share.is_over:
            dtype, direction, rounding = kind
            found[f"{dtype_name(dtype)} {direction} {rounding}"] = _visit(device, kind, share=part)
    return found


def _visit(device: torch.device, kind: Kind, *, share: TimeShare) -> VisitCost:
    on_cpu, shares = device.type == "cpu", share.split(5)
    few, many = (TILE * n for n in ((1, 1 << 10) if on_cpu else (1, 1 << 14)))

    def seconds(n: int, *, n_probes: int = 2, n_steps: int = 0) -> float:
        work = _visiting(device, kind, n, n_probes=n_probes, n_steps=n_steps)
        return _seconds(work, device, share=next(shares))

    alone_s, pair_s, some_s = seconds(many, n_probes=1), seconds(many), seconds(many, n_steps=N_PENDING)
    small_s, base_s = seconds(few, n_steps=N_PENDING), None
    step_s = max((some_s - pair_s) / N_PENDING / many, 0.0)
    if not on_cpu:  # a few pending steps hide under the memory traffic of a visit, many do not
        many_s = seconds(many, n_steps=MANY_PENDING)
        step_s = max((many_s - some_s) / (MANY_PENDING - N_PENDING) / many, 0.0)
        base_s = min(max(some_s / many - N_PENDING * step_s, 0.0), pair_s / many)
    span_s = max(small_s - few * (pair_s / many + N_PENDING * step_s), 0.0) / (1 + N_PENDING)
    return VisitCost(alone_s=alone_s / many, pair_s=pair_s / many, step_s=step_s, base_s=base_s, span_s=span_s)


def _visiting(device: torch.device, kind: Kind, n: int, *, n_probes: int, n_steps: int) -> Callable[[], object]:
    """A visit to `n` weights that absorbs `n_steps` pending steps and makes `n_probes` copies."""
    dtype, direction, rounding = kind
    method = make_method(direction, rounding=rounding)
    span = Span(dtype=dtype, byte_start=0, tiles=TileMap.for_tensors([(0, n)]), decays=False)
    weights, *copies = (torch.zeros(n * dtype.itemsize, dtype=torch.uint8, device=device) for _ in range(3))
    probes = [Perturbed(1, 1e-3, copy) for copy in copies[:n_probes]]
    return lambda: method.visit(weights, [span], [_RECORD] * n_steps, probes=probes)


def copy_rates(device: torch.device, *, share: TimeShare) -> dict[str, float]:
    """Copies up and down, and on a GPU their delays; on a CPU-only machine both are copies within host memory."""
    n_bytes = (128 << 20) if device.type == "cpu" else (256 << 20)  # more than a processor's cache
    on_gpu, shares = device.type == "cuda", share.split(5)
    host, beside = aligned_bytes(n_bytes), aligned_bytes(n_bytes if on_gpu else 1)
    there = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    if on_gpu:
        pin(host)
        pin(beside)
    try:
        up_s = _seconds(lambda: there.copy_(host, non_blocking=True), device, share=next(shares))
        down_s = _seconds(lambda: host.copy_(there, non_blocking=True), device, share=next(shares))
        delays = _copy_delays(there, host, beside, up_s=up_s, shares=shares) if on_gpu else {}
    finally:
        if on_gpu:
            unpin(host)
            unpin(beside)
    return {"upload_bytes": n_bytes / up_s, "download_bytes": n_bytes / down_s, **delays}


def _copy_delays(
    there: torch.Tensor, host: torch.Tensor, beside: torch.Tensor, *, up_s: float, shares: Iterator[TimeShare]
) -> dict[str, float]:
    """Seconds by which a byte copied down delays uploads, and a byte copied up delays computing, beside it."""
    device, n_bytes = there.device, there.nbytes
    upload, download = torch.cuda.Stream(device), torch.cuda.Stream(device)
    source = torch.zeros_like(there)
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def copy_both_ways() -> None:
        with torch.cuda.stream(upload):
            there.copy_(host, non_blocking=True)
        with torch.cuda.stream(download):
            beside.copy_(source, non_blocking=True)

    def compute(*, copied_bytes: int) -> None:
        if copied_bytes:
            with torch.cuda.stream(upload):
                there[:copied_bytes].copy_(host[:copied_bytes], non_blocking=True)
        for _ in range(N_PRODUCTS):
            torch.nn.functional.linear(x, x)

    both_s = _seconds(copy_both_ways, device, share=next(shares))
    alone_s = _seconds(lambda: compute(copied_bytes=0), device, share=next(shares))
    copied_bytes = min(int(n_bytes * alone_s / up_s / 2), n_bytes)  # the copy ends before the products do
    beside_s = _seconds(lambda: compute(copied_bytes=copied_bytes), device, share=next(shares))
    return {
        "upload_delay_s": max(both_s - up_s, 0.0) / n_bytes,
        "compute_delay_s": max(beside_s - alone_s, 0.0) / max(copied_bytes, 1),
    }


def drive_rates(store_dir: Path, *, share: TimeShare, fs: FS) -> dict[str, float]:
    """Bytes per second read and written, seconds of a core per byte read and checked."""
    n_bytes = min(MAX_FILE_BYTES, fs.free_bytes(drive_folder(store_dir)) // 4) // READ_PIECE_BYTES * READ_PIECE_BYTES
    n_bytes, clock = max(n_bytes, READ_PIECE_BYTES), share.clock
    with scratch_on_drive(store_dir) as scratch, _file(scratch / "bytes", n_bytes, fs=fs) as (path, fd):
        piece = aligned_bytes(READ_PIECE_BYTES)
        piece.random_(0, 256)
        writing, started_s, n_written = share.part(0.5), clock(), 0
        while n_written < n_bytes and not (n_written and writing.is_over):
            fs.write_at(fd, piece.numpy().data, n_written)
            n_written += READ_PIECE_BYTES
            if n_written % (SYNCED_PIECES * READ_PIECE_BYTES) == 0:
                fs.sync_data(fd)
        fs.sync_data(fd)
        write = n_written / max(clock() - started_s, 1e-9)
        read, cpu_s = _read_rate(path, fd, n_written, share=share, fs=fs)
        return {"disk_read_bytes": read, "disk_write_bytes": write, "disk_cpu_s": cpu_s}


@contextmanager
def _file(path: Path, n_bytes: int, *, fs: FS) -> Iterator[tuple[Path, int]]:
    fd = fs.create(path, n_bytes)
    try:
        yield path, fd
    finally:
        fs.close(fd)


def _read_rate(path: Path, fd: int, n_bytes: int, *, share: TimeShare, fs: FS) -> tuple[float, float]:
    """As readers do it: several pieces at once, past the page cache where that works, every byte in a checksum."""
    direct = fs.open_direct(fd) if fs.can_read_direct(fd) else None
    sizes: list[int] = []

    def read(start: int) -> None:
        if start == 0 or not share.is_over:
            into = aligned_bytes(READ_PIECE_BYTES).numpy().data
            fs.read_at(fd, into, start, path=path, direct=direct)
            zlib.crc32(into)
            sizes.append(READ_PIECE_BYTES)

    try:
        started_s, cpu_started_s = share.clock(), time.process_time()
        with ThreadPoolExecutor(N_READ_THREADS) as threads:
            list(threads.map(read, range(0, n_bytes, READ_PIECE_BYTES)))
        seconds, cpu_s = share.clock() - started_s, time.process_time() - cpu_started_s
    finally:
        if direct is not None:
            fs.close(direct)
    return sum(sizes) / max(seconds, 1e-9), cpu_s / sum(sizes)
