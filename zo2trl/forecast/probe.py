"""The probe: measure the rates of this machine, part by part, and end within the time that was announced.

Does not: keep what it finds (planning/known_rates.py), or show anything: progress goes to a callback.
Invariant: the parts share less time than is announced, and each stops when its share is used up. What is left over is
for the one piece of work that each part finishes late on a loaded machine.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zo2trl.files.fs import FS, LOCAL
from zo2trl.forecast.machine_bench import (
    MAIN_KINDS,
    RARER_KINDS,
    copy_rates,
    drive_rates,
    memory_rates,
    product_rates,
    visit_costs,
)
from zo2trl.forecast.time_share import TimeShare
from zo2trl.forecast.traversal_bench import measure_traversals
from zo2trl.planning.rates import MachineRates

__all__ = ["announced_s", "measure_machine"]

MEASURING_SHARE = 0.6  # of the announced time


def announced_s(device: torch.device) -> int:
    """Seconds within which the probe ends; with a GPU it also starts CUDA and compiles kernels."""
    return 20 if device.type == "cpu" else 75


def measure_machine(
    device: torch.device,
    store_dir: Path,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_part: Callable[[str, float], None] = lambda name, done: None,
    fs: FS = LOCAL,
) -> MachineRates:
    """Measure this machine, and the drive that a folder (or its nearest parent that exists) is on.

    Args:
        on_part: is called with the name of each part as it begins, and the share of the work that is done.

    Raises:
        StoreError: the folder cannot be written to.
    """
    parts: dict[str, tuple[float, Callable[[TimeShare], Any]]] = {
        "traversals": (4.0, lambda share: measure_traversals(device, store_dir, share=share)),
        "visits": (3.0, lambda share: visit_costs(device, MAIN_KINDS, share=share)),
        "products": (2.0, lambda share: product_rates(device, share=share)),
        "memory": (1.0, lambda share: memory_rates(device, share=share)),
        "copies": (1.0, lambda share: copy_rates(device, share=share)),
        "drive": (3.0, lambda share: drive_rates(store_dir, share=share, fs=fs)),
        "rarer visits": (2.0, lambda share: visit_costs(device, RARER_KINDS, share=share)),
    }
    whole = TimeShare.of(announced_s(device) * MEASURING_SHARE, clock=clock)
    weight_left = weight = sum(each for each, _ in parts.values())
    found: dict[str, Any] = {}
    for name, (part_weight, measure) in parts.items():
        on_part(name, 1 - weight_left / weight)
        with torch.no_grad():
            found[name] = measure(whole.part(part_weight / weight_left))
        weight_left -= part_weight
    on_part("done", 1.0)
    return MachineRates(
        **found["products"], **found["memory"], **found["copies"], **found["drive"],
        visits=found["visits"] | found["rarer visits"], traversal=found["traversals"],
        cores=torch.get_num_threads(), measured_at=time.time(),
    )  # fmt: skip
