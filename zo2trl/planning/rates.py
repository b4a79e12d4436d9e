"""MachineRates: what a machine does per second, in one table that placement, write schedule and forecasts share.

Does not: measure (forecast/machine_bench.py), find rates of the machine at hand (known_rates.py), or decide anything.
Invariant: plain numbers, which JSON can hold.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["MachineRates", "TraversalCost", "VisitCost", "dtype_name", "rates_from"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisitCost:
    """Seconds that a visit takes, per weight if not said otherwise, for one dtype, direction and rounding."""

    alone_s: float
    """One perturbed copy is made from clean weights."""
    pair_s: float
    """Both copies of a direction are made in one pass."""
    step_s: float
    """One more pending step is absorbed in that pass, where arithmetic and not memory bounds it."""
    base_s: float | None = None
    """Arithmetic of making both copies, under whose memory traffic pending steps hide; None: nothing hides."""
    span_s: float = 0.0
    """For each span and each direction drawn, whatever its size. (`TraversalCost` has a visit's first span.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraversalCost:
    """Seconds that a traversal takes beside passes and arithmetic on weights: Python, mostly."""

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
    """Rates of one machine with one drive.

    Attributes:
        flops: of matrix products by the name of their dtype, and of fused attention as "<dtype> attention".
        moved_bytes: device memory that element-wise operations and visits read and write per second.
        new_bytes: memory that the system gives a process, page by page, per second.
        operation_s: seconds that launching one operation takes.
        visits: "dtype direction rounding" -> what a visit costs per weight.
        upload_bytes, download_bytes: copied between host memory and the device per second.
        upload_delay_s: seconds by which a byte copied down delays the uploads beside it.
        compute_delay_s: seconds by which a byte copied either way delays the computing beside it.
        disk_read_bytes, disk_write_bytes: of the drive, per second.
        disk_cpu_s: seconds of one core that a byte from the drive costs, checksum included.
        traversal: what a traversal costs beside all that.
        cores: how many computing shares with copies and checksums.
        name: of a preset; empty for rates that were measured on the machine at hand.
        measured_at: seconds since the epoch; 0 for a preset.
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
    upload_delay_s: float = 0.0
    compute_delay_s: float = 0.0
    cores: int = 1
    name: str = ""
    measured_at: float = 0.0

    @property
    def age_s(self) -> float | None:
        """Seconds since they were measured; None for a preset."""
        return time.time() - self.measured_at if self.measured_at else None

    def visit(self, *, dtype: str, direction: str, rounding: str) -> VisitCost:
        """The cost of one kind of visit; where it was not measured, that of the slowest kind that was."""
        found = self.visits.get(f"{dtype} {direction} {rounding}")
        return found or max(self.visits.values(), key=lambda visit: visit.pair_s)

    def flops_of(self, kind: str) -> float:
        """Operations per second of a dtype's products or attention; of the nearest kind where it was not measured."""
        return self.flops.get(kind) or self.flops.get(kind.removesuffix(" attention")) or min(self.flops.values())


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in tables of rates: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rates_from(table: Any) -> MachineRates:
    """Rates from a table of plain values, as `dataclasses.asdict` makes it.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: a field is missing, is no number, or cannot be divided by.
    """
    values = {each.name: table[each.name] for each in fields(MachineRates)}
    numbers = _numbers({key: value for key, value in values.items() if key != "name"})
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers if n is not None):
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
    """All values in tables in tables."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _numbers(each)
    else:
        yield value
