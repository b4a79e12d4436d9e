"""What this machine does per second: measured once (probe.py), and kept in the user's cache folder with its age.

Does not: measure, or decide anything.
Invariant: rates are taken from the file only for the machine, software and drive that they were measured on.
"""

import errno
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from zo2trl.errors import ZO2TRLError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.os_errors import naming
from zo2trl.files.strict_json import read_json, write_json

__all__ = [
    "MachineRates",
    "TraversalCost",
    "VisitCost",
    "cache_file",
    "drive_folder",
    "dtype_name",
    "identity",
    "load_rates",
    "save_rates",
    "typical_rates",
]

MAX_CACHE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class VisitCost:
    """Seconds of what a visit does, per weight if not said otherwise, for one dtype, direction and rounding."""

    alone_s: float
    """One perturbed copy is made from clean weights."""
    pair_s: float
    """Both copies of a direction are made in one pass."""
    step_s: float
    """One more pending step is absorbed in that pass."""
    span_s: float = 0.0
    """For each span and each direction drawn, whatever its size. (`TraversalCost` has a visit's first span.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraversalCost:
    """Seconds of what leads from one visit to the next, beside passes and arithmetic on weights: Python, mostly."""

    resident_visit_s: float
    streamed_visit_s: float
    """With a slot of the ring, a fetch and a write-back."""
    tensor_s: float
    """For each tensor that a visit binds."""
    file_s: float
    """Making one new version of a unit on disk durable, whatever its size."""
    step_s: float
    """For a step, beside its visits: collecting losses, the journal, the ends of the traversal."""


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """One machine, one drive.

    Attributes:
        flops: of matrix products by the name of their dtype, and of fused attention as "<dtype> attention".
        moved_bytes: read and written by element-wise operations, per second.
        new_bytes: of memory that the system gives a process, page by page, per second.
        operation_s: what asking for one operation costs.
        visits: "dtype direction rounding" -> what a visit costs per weight.
        upload_bytes, download_bytes: between host memory and the device, per second.
        disk_read_bytes, disk_write_bytes: of the drive, per second.
        disk_cpu_s: seconds of one core that a byte from the drive costs, checksum included.
        traversal: what a traversal costs beside all that.
        cores: that computing shares with copies and checksums.
        measured_at: seconds since the epoch; 0 for rates that were not measured on this machine.
    """

    flops: Mapping[str, float]
    moved_bytes: float
    new_bytes: float
    operation_s: float
    visits: Mapping[str, VisitCost]
    upload_bytes: float
    download_bytes: float
    disk_read_bytes: float
    disk_write_bytes: float
    disk_cpu_s: float
    traversal: TraversalCost
    cores: int = 1
    measured_at: float = 0.0

    @property
    def age_s(self) -> float | None:
        """Seconds since they were measured; None if they never were."""
        return time.time() - self.measured_at if self.measured_at else None

    def visit(self, *, dtype: str, direction: str, rounding: str) -> VisitCost:
        """The cost of one kind of visit; of the slowest that is known where that one was not measured."""
        found = self.visits.get(f"{dtype} {direction} {rounding}")
        return found or max(self.visits.values(), key=lambda visit: visit.pair_s)

    def flops_of(self, kind: str) -> float:
        """Of a dtype's products or attention; of the nearest that was measured where these were not."""
        return self.flops.get(kind) or self.flops.get(kind.removesuffix(" attention")) or min(self.flops.values())


def dtype_name(dtype: torch.dtype) -> str:
    """What rates call a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cache_file() -> Path:
    """Where rates are kept: `$XDG_CACHE_HOME/zo2trl/rates.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo2trl" / "rates.json"


def drive_folder(store_dir: Path) -> Path:
    """The folder, or its nearest parent that exists: it says which drive.

    Raises:
        StoreError: that is a file.
    """
    path = store_dir.absolute()
    found = next(path for path in (path, *path.parents) if path.exists())
    with naming("make the folder", store_dir):
        if not found.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(found))
    return found


def identity(device: torch.device, store_dir: Path) -> str:
    """What rates hold for: processor, GPU (else the number of threads), torch, and the file system of a folder."""
    folder = drive_folder(store_dir)
    on_gpu = device.type == "cuda"
    computing = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    parts = (
        platform.node(), platform.machine(), f"{psutil.cpu_count()} cores", computing, f"torch {torch.__version__}",
        f"drive {folder.stat().st_dev}",
    )  # fmt: skip
    return ", ".join(parts)


def load_rates(key: str, *, file: Path | None = None, fs: FS = LOCAL) -> MachineRates | None:
    """What was measured for this identity; None if nothing was, or the file cannot be read or makes no sense."""
    try:
        file = file or cache_file()
        if not file.is_file():
            return None
        entries: Any = read_json(file, max_bytes=MAX_CACHE_BYTES, fs=fs)
        return _from_table(entries[key]) if key in entries else None
    except (ZO2TRLError, OSError, RuntimeError, AttributeError, TypeError, KeyError, ValueError):
        return None  # a cache that cannot be read is measured again


def save_rates(key: str, rates: MachineRates, *, file: Path | None = None, fs: FS = LOCAL) -> None:
    """Keep rates, beside those of other machines that share the folder.

    Raises:
        StoreError: the file cannot be written.
    """
    file = file or cache_file()
    fs.make_dir(file.parent)
    try:
        known: Any = read_json(file, max_bytes=MAX_CACHE_BYTES, fs=fs) if file.is_file() else {}
    except ZO2TRLError:
        known = {}
    write_json(file, {**(known if isinstance(known, dict) else {}), key: asdict(rates)}, fs=fs)


def _from_table(table: Any) -> MachineRates:
    values = {each.name: table[each.name] for each in fields(MachineRates)}
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in _numbers(values)):
        raise ValueError("rates are numbers")
    values["visits"] = {name: VisitCost(**visit) for name, visit in values["visits"].items()}
    values["traversal"] = TraversalCost(**values["traversal"])
    rates = MachineRates(**values)
    per_second = (
        *rates.flops.values(), rates.moved_bytes, rates.new_bytes, rates.upload_bytes, rates.download_bytes,
        rates.disk_read_bytes, rates.disk_write_bytes, rates.cores,
    )  # fmt: skip
    if not rates.flops or not rates.visits or min(per_second) <= 0:
        raise ValueError("rates must be positive")
    return rates


def _numbers(value: Any) -> Iterator[Any]:
    """All that is in tables in tables."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers(each)
    else:
        yield value


def typical_rates(device_type: str) -> MachineRates:
    """Rates of one H200 machine ("cuda") or of one with two cores, for estimates before anything was measured."""
    return _H200 if device_type == "cuda" else _TWO_CORES


# docs/performance.md, one visit's kernel on a block of 314.6 M weights. pace.py has its own rates of the same machine.
_H200 = MachineRates(
    flops={"bfloat16": 6e14, "float16": 6e14, "float32": 4e13}, moved_bytes=4e12, new_bytes=5e9, operation_s=6e-6,
    visits={
        "bfloat16 rademacher stochastic": VisitCost(alone_s=1.0e-12, pair_s=1.49e-12, step_s=0.6e-12),
        "bfloat16 gaussian stochastic": VisitCost(alone_s=1.2e-12, pair_s=1.49e-12, step_s=1.1e-12),
        "float32 rademacher nearest": VisitCost(alone_s=2.0e-12, pair_s=3.0e-12, step_s=0.5e-12),
    },
    upload_bytes=55e9, download_bytes=50e9, disk_read_bytes=2.9e9, disk_write_bytes=0.94e9, disk_cpu_s=2e-10,
    traversal=TraversalCost(resident_visit_s=2e-4, streamed_visit_s=4e-4, tensor_s=5e-6, file_s=1e-3, step_s=3e-3),
    cores=16,
)  # fmt: skip
_TWO_CORES = MachineRates(
    flops={"float32": 1.5e11, "bfloat16": 1.5e11}, moved_bytes=4e10, new_bytes=4e9, operation_s=1e-5,
    visits={
        "float32 rademacher nearest": VisitCost(alone_s=6e-10, pair_s=1e-9, step_s=1e-9, span_s=1e-4),
        "bfloat16 rademacher stochastic": VisitCost(alone_s=1e-9, pair_s=1.5e-9, step_s=4e-9, span_s=1.5e-4),
    },
    upload_bytes=1e10, download_bytes=1e10, disk_read_bytes=1e9, disk_write_bytes=0.5e9, disk_cpu_s=1e-9,
    traversal=TraversalCost(resident_visit_s=2e-4, streamed_visit_s=5e-4, tensor_s=5e-6, file_s=2e-3, step_s=5e-3),
    cores=2,
)  # fmt: skip
