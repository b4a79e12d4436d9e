"""Rates of the machine at hand: those measured on it and kept in a file, else the preset of its device, else none.

Does not: measure (forecast/machine_bench.py), or guess: rates that are not known are None.
Invariant: measured rates are taken from the file only for the machine, software and drive that they were measured on.
"""

import errno
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from zo2trl.errors import ZO2TRLError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.os_errors import naming
from zo2trl.files.strict_json import read_json, write_json
from zo2trl.planning.presets import preset_for
from zo2trl.planning.rates import MachineRates, rates_from

__all__ = ["cache_file", "drive_folder", "identity", "load_rates", "rates_for", "save_rates"]

MAX_CACHE_BYTES = 1 << 20


def rates_for(
    device: torch.device, store_dir: Path, *, file: Path | None = None, fs: FS = LOCAL
) -> MachineRates | None:
    """The rates that placement, write schedule and forecasts use here; None if nothing is known of this machine.

    Args:
        store_dir: it, or its nearest parent that exists, names the drive.
        file: where measured rates are kept; None: in `cache_file()`.

    Raises:
        StoreError: a part of `store_dir` is a file.
    """
    measured = load_rates(identity(device, store_dir), file=file, fs=fs)
    if measured is not None:
        return measured
    return preset_for(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def cache_file() -> Path:
    """Where rates are kept: `$XDG_CACHE_HOME/zo2trl/rates.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo2trl" / "rates.json"


def drive_folder(store_dir: Path) -> Path:
    """The folder, or its nearest parent that exists: a file made there is on the store's drive.

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
    """The rates measured for this identity; None if there are none, or the file cannot be read or makes no sense."""
    try:
        file = file or cache_file()
        if not file.is_file():
            return None
        entries: Any = read_json(file, max_bytes=MAX_CACHE_BYTES, fs=fs)
        return rates_from(entries[key]) if key in entries else None
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
