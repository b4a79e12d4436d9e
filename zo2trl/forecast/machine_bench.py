"""Measuring what this machine does per second, in about ten seconds: products, visits, copies and the drive.

Does not: keep what it finds (rates.py), or train anything.
Invariant: what is measured is the code that a step runs, on memory of its own; nothing outlives the call.
"""

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.os_errors import naming
from zo2trl.planning.known_rates import drive_folder
from zo2trl.planning.rates import MachineRates, TraversalCost, VisitCost, dtype_name
from zo2trl.tiers.host import pin, unpin
from zo2trl.tiers.readers import N_READ_THREADS, READ_PIECE_BYTES, aligned_bytes
from zo2trl.zo.noise import make_noise
from zo2trl.zo.records import StepRecord
from zo2trl.zo.rules import Rounding, UpdateRule
from zo2trl.zo.tiles import TILE, Perturbed, Span, TileMap

__all__ = ["measure_rates", "scratch_on_drive"]

PART_S = 0.15  # for each of some twenty measurements
MAX_FILE_BYTES = 512 << 20
DRIVE_S = 1.5  # for writing, and again for reading
N_PENDING = 2  # steps that a visit absorbs
_RECORD = StepRecord(
    step=1, seed=1, projected_grads=(0.1,), learning_rate=1e-6, weight_decay=0.0, zo_eps=1e-3, loss_plus=1.0,
    loss_minus=1.0, grad_norm=0.1,
)  # fmt: skip
_KINDS: tuple[tuple[torch.dtype, Rounding], ...] = (
    (torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "stochastic"),
)  # fmt: skip


def measure_rates(device: torch.device, store_dir: Path, *, traversal: TraversalCost, fs: FS = LOCAL) -> MachineRates:
    """Measure; the folder (or its nearest parent that exists) says which drive.

    Args:
        traversal: is measured higher up (forecast/traversal_bench.py).

    Raises:
        StoreError: the folder cannot be written to.
    """
    up, down = _copy_rates(device)
    read, write, cpu_s = _drive_rates(store_dir, fs=fs)
    with torch.no_grad():
        return MachineRates(
            flops={dtype_name(dtype): _flops(device, dtype) for dtype, _ in _KINDS}
            | {f"{dtype_name(dtype)} attention": _attention_flops(device, dtype) for dtype, _ in _KINDS},
            moved_bytes=_moved_bytes(device), new_bytes=_new_bytes(),
            operation_s=_operation_s(device),
            visits={
                f"{dtype_name(dtype)} {direction} {rounding}": _visit(device, dtype, direction, rounding=rounding)
                for dtype, rounding in _KINDS
                for direction in ("rademacher", "gaussian")
            },
            upload_bytes=up, download_bytes=down, disk_read_bytes=read, disk_write_bytes=write, disk_cpu_s=cpu_s,
            traversal=traversal, cores=torch.get_num_threads(), measured_at=time.time(),
        )  # fmt: skip


@contextmanager
def scratch_on_drive(store_dir: Path) -> Iterator[Path]:
    """A folder that is gone after the block, on the drive of a store.

    Raises:
        StoreError: nothing can be made there.
    """
    folder = drive_folder(store_dir)
    with ExitStack() as until_then:
        with naming("write to", folder):
            scratch = until_then.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".zo2trl-probe-"))
        yield Path(scratch)


def _seconds(work: Callable[[], object], device: torch.device, *, for_s: float = PART_S) -> float:
    """Wall time of one call: the mean, for a step takes each as it comes, also those that had to wait for a thread."""
    found: list[float] = []
    work()
    ends_s = time.perf_counter() + for_s
    for number in range(1000):
        _wait(device)
        started_s = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - started_s)
        if number and time.perf_counter() > ends_s:
            break
    return statistics.mean(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    rows, width = (512, 1024) if device.type == "cpu" else (4096, 4096)
    x = torch.randn(rows, width, device=device).to(dtype)
    w = torch.randn(width, width, device=device).to(dtype)
    return 2 * rows * width * width / _seconds(lambda: torch.nn.functional.linear(x, w), device)


def _attention_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Counted as workload.py does: every score, whether or not it is masked."""
    rows, heads, length, width = (2, 16, 256, 64) if device.type == "cpu" else (8, 32, 1024, 128)
    x = torch.randn(rows, heads, length, width, device=device).to(dtype)
    seconds = _seconds(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), device)
    return 4 * rows * heads * length * length * width / seconds


def _new_bytes() -> float:
    """The first touch of every page, of pieces that no allocator keeps for the next one."""
    cpu, n_bytes = torch.device("cpu"), 64 << 20
    again = torch.zeros(n_bytes, dtype=torch.uint8)
    new_s = _seconds(lambda: torch.empty(n_bytes, dtype=torch.uint8).fill_(1), cpu)
    return n_bytes / max(new_s - _seconds(lambda: again.fill_(1), cpu), 1e-9)


def _moved_bytes(device: torch.device) -> float:
    """As a forward's element-wise operations do it: into new memory, one of them not a bare addition."""
    x = torch.randn(1 << (20 if device.type == "cpu" else 26), device=device)
    seconds = _seconds(lambda: torch.nn.functional.silu(x), device) + _seconds(lambda: x + x, device)
    return 4 * x.nbytes / seconds


def _operation_s(device: torch.device) -> float:
    """One small operation in a module, as model code asks for it."""
    many = torch.nn.Sequential(*(torch.nn.LayerNorm(8) for _ in range(100))).to(device)
    x = torch.randn(2, 8, device=device)
    return _seconds(lambda: many(x), device) / 100


def _visit(device: torch.device, dtype: torch.dtype, direction: str, *, rounding: Rounding) -> VisitCost:
    few, many = (TILE * n for n in ((1, 1 << 10) if device.type == "cpu" else (1, 1 << 14)))
    alone_s, pair_s, steps_s = _visits_s(device, dtype, direction, rounding=rounding, n=many)
    *_, small_s = _visits_s(device, dtype, direction, rounding=rounding, n=few)
    n_draws = 1 + N_PENDING
    step_s = max((steps_s - pair_s) / N_PENDING / many, 0.0)
    return VisitCost(
        alone_s=alone_s / many, pair_s=pair_s / many, step_s=step_s,
        span_s=max(small_s - few * (pair_s / many + N_PENDING * step_s), 0.0) / n_draws,
    )  # fmt: skip


def _visits_s(
    device: torch.device, dtype: torch.dtype, direction: str, *, rounding: Rounding, n: int
) -> tuple[float, float, float]:
    """Seconds of a visit to `n` weights: one copy, both, and both with pending steps."""
    rule = UpdateRule(noise=make_noise(direction), rounding=rounding)
    span = Span(dtype=dtype, byte_start=0, tiles=TileMap.for_tensors([(0, n)]), decays=False)
    weights, *copies = (torch.zeros(n * dtype.itemsize, dtype=torch.uint8, device=device) for _ in range(3))

    def seconds(n_probes: int, n_steps: int) -> float:
        probes = [Perturbed(1, 1e-3, copy) for copy in copies[:n_probes]]
        return _seconds(lambda: rule.visit(weights, [span], [_RECORD] * n_steps, probes=probes), device)

    return seconds(1, 0), seconds(2, 0), seconds(2, N_PENDING)


def _copy_rates(device: torch.device) -> tuple[float, float]:
    """Up and down, bytes per second; on a CPU-only machine both are copies within host memory."""
    n_bytes = (128 << 20) if device.type == "cpu" else (256 << 20)  # more than a processor's cache
    host = aligned_bytes(n_bytes)
    there = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        pin(host)
    try:
        up_s = _seconds(lambda: there.copy_(host, non_blocking=True), device)
        down_s = _seconds(lambda: host.copy_(there, non_blocking=True), device)
    finally:
        if device.type == "cuda":
            unpin(host)
    return n_bytes / up_s, n_bytes / down_s


def _drive_rates(store_dir: Path, *, fs: FS) -> tuple[float, float, float]:
    """Bytes per second read and written, seconds of a core per byte read and checked."""
    n_bytes = min(MAX_FILE_BYTES, fs.free_bytes(drive_folder(store_dir)) // 4) // READ_PIECE_BYTES * READ_PIECE_BYTES
    with (
        scratch_on_drive(store_dir) as scratch,
        _file(scratch / "bytes", max(n_bytes, READ_PIECE_BYTES), fs=fs) as (path, fd),
    ):
        piece = aligned_bytes(READ_PIECE_BYTES)
        piece.random_(0, 256)
        started_s, n_written = time.perf_counter(), 0
        while n_written < n_bytes and time.perf_counter() < started_s + DRIVE_S:
            fs.write_at(fd, piece.numpy().data, n_written)
            n_written += READ_PIECE_BYTES
        fs.sync_data(fd)
        write = max(n_written, 1) / (time.perf_counter() - started_s)
        read, cpu_s = _read_rate(path, fd, n_written, fs=fs)
        return read, write, cpu_s


@contextmanager
def _file(path: Path, n_bytes: int, *, fs: FS) -> Iterator[tuple[Path, int]]:
    fd = fs.create(path, n_bytes)
    try:
        yield path, fd
    finally:
        fs.close(fd)


def _read_rate(path: Path, fd: int, n_bytes: int, *, fs: FS) -> tuple[float, float]:
    """As readers do it: several pieces at once, past the page cache where that works, every byte in a checksum."""
    direct = fs.open_direct(fd) if fs.can_read_direct(fd) else None
    ends_s = time.perf_counter() + DRIVE_S
    sizes: list[int] = []

    def read(start: int) -> None:
        if time.perf_counter() < ends_s:
            into = aligned_bytes(READ_PIECE_BYTES).numpy().data
            fs.read_at(fd, into, start, path=path, direct=direct)
            zlib.crc32(into)
            sizes.append(READ_PIECE_BYTES)

    try:
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(N_READ_THREADS) as threads:
            list(threads.map(read, range(0, n_bytes, READ_PIECE_BYTES)))
        seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    finally:
        if direct is not None:
            fs.close(direct)
    return sum(sizes) / seconds, cpu_s / max(sum(sizes), 1)
