"""This module compares the time of a step with its lower bounds.

Does not: measure anything.
"""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks._floors import DriveRates

__all__ = ["Steps", "bounds_ms", "drive_floors", "judged", "line"]


@dataclass(frozen=True)
class Steps:
    """Steps holds timed steps; the sum of two has the steps of both."""

    seconds: list[float] = field(default_factory=list)
    moved: Counter[str] = field(default_factory=Counter)
    """These are the bytes of all steps by link."""
    cpu_s: float = 0.0

    def __add__(self, other: "Steps") -> "Steps":
        """Return the steps of both."""
        return Steps([*self.seconds, *other.seconds], self.moved + other.moved, self.cpu_s + other.cpu_s)


def bounds_ms(n_bytes: Mapping[str, float], floors: Mapping[str, float], *, compute_ms: float) -> dict[str, float]:
    """Compute lower bounds of a step in milliseconds: bytes of a step by link over GB/s of each link."""
    up, down = n_bytes["h2d"], n_bytes["d2h"]
    bounds = {
        "compute": compute_ms,
        "upload": up / floors["up_gb_s"] / 1e6,
        # Downloads share the link with uploads: with both at once each way is slower.
        "both ways": min(up, down) / floors["each_way_gb_s"] / 1e6 + max(up - down, 0.0) / floors["up_gb_s"] / 1e6,
    }
    if n_bytes["disk_read"]:
        read_ms = n_bytes["disk_read"] / floors["disk_read_gb_s"] / 1e6
        written_ms = n_bytes["disk_written"] / floors["disk_write_gb_s"] / 1e6
        bounds |= {"disk read": read_ms, "disk read and written": read_ms + written_ms}
    return {name: bound for name, bound in bounds.items() if bound}


def judged(step_s: list[float], n_bytes: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, Any]:
    """Divide a step's time by its bounds; with a drive it is the mean, because steps write different amounts there."""
    mean_ms, median_ms = statistics.mean(step_s) * 1e3, statistics.median(step_s) * 1e3
    judged_ms = mean_ms if n_bytes["disk_read"] else median_ms
    bound = max(bounds, key=lambda name: bounds[name])
    return {
        "step_ms": median_ms,
        "least_step_ms": min(step_s) * 1e3,
        "mean_step_ms": mean_ms,
        "steps_ms": [one * 1e3 for one in step_s],
        "bounds_ms": dict(bounds),
        "bound": bound,
        "over_bound": judged_ms / bounds[bound],
        "over": {name: judged_ms / bound_ms for name, bound_ms in bounds.items()},
        "least_over": {name: min(step_s) * 1e3 / bound_ms for name, bound_ms in bounds.items()},
        "disk_read_gb_s": n_bytes["disk_read"] / judged_ms / 1e6,
    }


def drive_floors(drive: list[DriveRates]) -> dict[str, float]:
    """Average the rates from before and between the steps, as if equally many bytes had been moved at each."""
    return {
        "disk_read_gb_s": statistics.harmonic_mean(one.read for one in drive),
        "disk_write_gb_s": statistics.harmonic_mean(one.write for one in drive),
    }


def line(label: str, row: Mapping[str, Any]) -> str:
    """Format the line that a run prints for one mode."""
    over = " ".join(f"{ratio:.3f} x {name}," for name, ratio in row["over"].items())
    names = {"allocator_peak": "allocated", "reserved_peak": "reserved", "device_used": "used"}
    memory = ", ".join(f"{row[f'{key}_bytes'] / 1e9:.2f} {name}" for key, name in names.items())
    drive = ""
    if "drive" in row:
        raw = ", ".join(f"{one['read']:.2f}" for one in row["drive"])
        written = row["bytes_per_step"]["disk_written"] / 1e6
        drive = f"; disk {row['disk_read_gb_s']:.2f} of bare {raw} GB/s, {written:.0f} MB written a step"
    times = f"{row['step_ms']:.1f} ms (least {row['least_step_ms']:.1f}, mean {row['mean_step_ms']:.1f})"
    return f"{label}: {times} {over} GB {memory}; {row['cpu_cores']:.2f} cores{drive}"
