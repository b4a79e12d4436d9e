"""Budgets: byte ceilings from the user's arguments, with "auto" as a share of the memory that is free.

Does not: place anything (placement.py). This is the only module that reads how much memory the machine has.
"""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from zo2trl.errors import ConfigError
from zo2trl.files.sizes import parse_size

__all__ = ["TIERS", "Budgets", "Size", "TierName", "free_device_bytes", "resolve_budgets"]

TierName = Literal["gpu", "cpu", "disk"]
TIERS: tuple[TierName, ...] = ("gpu", "cpu", "disk")
Size = int | Literal["min"]

DEVICE_SHARE = 0.9  # of free GPU memory: the rest is for the allocator's rounding and for libraries
HOST_AS_DEVICE_SHARE = 0.5  # of available RAM, where the execution device is the CPU
HOST_SHARE = 0.7  # of available RAM, for everything that lives in host memory together


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgets:
    """Ceilings in bytes. `device` "min" asks for the least that works; `cpu` counts home copies, not staging.

    `reserve` bytes of `device` are kept free for activations; "min" leaves them to whatever is there.
    """

    device: Size
    cpu: int
    reserve: int = 0

    @property
    def for_weights(self) -> Size:
        """Bytes of the device that weights, ring and scratch may take."""
        return "min" if self.device == "min" else self.device - self.reserve


def free_device_bytes(device: torch.device) -> int:
    """Bytes that are free: of GPU memory, or of RAM on a CPU-only machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def resolve_budgets(
    *, device_memory: int | str, cpu_memory: int | str, device: torch.device, n_processes: int = 1
) -> Budgets:
    """Turn the user's arguments into byte ceilings.

    `device_memory`: a size, "min", or "auto" (90 % of free GPU memory; half of available RAM on a CPU-only machine).
    `cpu_memory`: a size, 0 for nothing, or "auto" (70 % of available RAM, less what the device budget takes of it).
    `n_processes`: of the same training, which share the machine's RAM and have a device each; sizes are per process.

    Raises:
        ConfigError: an argument is no size; the message names it.
    """
    device_bytes = parse_size(device_memory, argument="device_memory")
    if device_bytes == "auto":
        share = DEVICE_SHARE if device.type == "cuda" else HOST_AS_DEVICE_SHARE
        n_sharing = 1 if device.type == "cuda" else n_processes
        device_bytes = int(free_device_bytes(device) * share) // n_sharing
    cpu_bytes = parse_size(cpu_memory, argument="cpu_memory")
    if cpu_bytes == "min":
        raise ConfigError(
            '`cpu_memory="min"` means nothing: write 0 to keep no unit in host memory, a size, or "auto".'
        )
    if cpu_bytes == "auto":
        cpu_bytes = int(psutil.virtual_memory().available * HOST_SHARE) // n_processes
        if device.type == "cpu" and device_bytes != "min":
            cpu_bytes = max(cpu_bytes - device_bytes, 0)
    return Budgets(device=device_bytes, cpu=cpu_bytes)
