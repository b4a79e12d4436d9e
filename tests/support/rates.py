"""Rates of a machine with two cores and no GPU, for tests that need seconds, and the file to find them in."""

from dataclasses import replace
from pathlib import Path

import torch

from zo2trl.planning.known_rates import identity, save_rates
from zo2trl.planning.presets import PRESETS
from zo2trl.planning.rates import MachineRates, TraversalCost, VisitCost

TWO_CORES = MachineRates(
    flops={"float32": 1.5e11, "bfloat16": 1.5e11}, moved_bytes=4e10, new_bytes=4e9, operation_s=1e-5,
    visits={
        "float32 rademacher nearest": VisitCost(alone_s=6e-10, pair_s=1e-9, step_s=1e-9, span_s=1e-4),
        "bfloat16 rademacher stochastic": VisitCost(alone_s=1e-9, pair_s=1.5e-9, step_s=4e-9, span_s=1.5e-4),
    },
    upload_bytes=1e10, download_bytes=1e10, disk_read_bytes=1e9, disk_write_bytes=0.5e9, disk_cpu_s=1e-9,
    traversal=TraversalCost(resident_visit_s=2e-4, streamed_visit_s=5e-4, tensor_s=5e-6, file_s=2e-3, step_s=5e-3),
    cores=2, measured_at=1.7e9,
)  # fmt: skip
H200 = PRESETS["H200"]


def know(store_dir: Path, **changes: object) -> None:
    """Let this machine have been measured: `TWO_CORES`, with these changes. The cache folder is the test's own."""
    save_rates(identity(torch.device("cpu"), store_dir), replace(TWO_CORES, **changes))  # type: ignore[arg-type]
