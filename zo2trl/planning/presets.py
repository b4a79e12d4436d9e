"""Presets: rates of machines that were measured elsewhere, by the name of their device.

Does not: hold a guess. A device that is not in the table has no preset, and a machine without a GPU never has one,
because processors, threads and drives differ too much.
"""

from collections.abc import Mapping

from zo2trl.planning.rates import MachineRates, TraversalCost, VisitCost

__all__ = ["PRESETS", "preset_for"]


def preset_for(device_name: str) -> MachineRates | None:
    """The preset of the device that calls itself so (`torch.cuda.get_device_name`); None if there is none."""
    words = device_name.split()
    return next((rates for name, rates in PRESETS.items() if name in words), None)


# OPT-13B in bf16 on an H200, 2,048 tokens a micro-batch (docs/performance.md): 455 ms a step read-only and 502, 473,
# 461, 459 written back every 1, 2, 4, 8 steps, so a written byte delays the reads by 1/535 GB/s; with a quarter of the
# blocks streamed in 24 GB a step takes 9 ms longer than with all resident. zo/kernels/visit_triton.py: 4.05 TB/s
# where memory bounds a visit of 314.6 M weights, and further steps at 4 and 1.6 (Rademacher, nearest and stochastic),
# 1 and 0.85 (Gaussian) 1e12 weights a second. The drive gave 2.9 GB/s and took 0.94.
_H200 = MachineRates(
    name="H200",
    flops={"bfloat16": 6e14, "float16": 6e14, "float32": 4e13}, moved_bytes=4.05e12, new_bytes=5e9, operation_s=6e-6,
    visits={
        "bfloat16 rademacher nearest": VisitCost(alone_s=1.0e-12, pair_s=1.49e-12, step_s=2.5e-13, base_s=2.5e-13),
        "bfloat16 rademacher stochastic": VisitCost(alone_s=1.0e-12, pair_s=1.49e-12, step_s=6.2e-13, base_s=6.2e-13),
        "bfloat16 gaussian nearest": VisitCost(alone_s=1.2e-12, pair_s=1.49e-12, step_s=1.0e-12, base_s=1.0e-12),
        "bfloat16 gaussian stochastic": VisitCost(alone_s=1.2e-12, pair_s=1.49e-12, step_s=1.18e-12, base_s=1.18e-12),
        "float32 rademacher nearest": VisitCost(alone_s=2.0e-12, pair_s=3.0e-12, step_s=2.5e-13, base_s=2.5e-13),
        "float32 gaussian nearest": VisitCost(alone_s=2.0e-12, pair_s=3.0e-12, step_s=1.0e-12, base_s=1.0e-12),
        "float32 mezo nearest": VisitCost(alone_s=1.0e-11, pair_s=1.0e-11, step_s=1.0e-11),
    },
    upload_bytes=55e9, download_bytes=50e9, upload_delay_s=1 / 535e9, compute_delay_s=1e-12,
    disk_read_bytes=2.9e9, disk_write_bytes=0.94e9, disk_cpu_s=2e-10,
    traversal=TraversalCost(resident_visit_s=2e-4, streamed_visit_s=4e-4, tensor_s=5e-6, file_s=1e-3, step_s=3e-3),
    cores=16,
)  # fmt: skip

PRESETS: Mapping[str, MachineRates] = {_H200.name: _H200}
