"""CostModel: how long a step takes with weights here and there, and how often it pays to write them back.

Does not: decide where a unit lives, know a model, or measure anything: rates are the caller's, or those measured once.
Invariant: pure functions of their arguments.

A step takes the longest of what happens at once: computing, copying up, reading a drive. Computing is a multiplication
and an addition per weight, token and pass, and one visit per weight, which reads it, writes it where it is stored, and
writes its probes; replaying pending steps takes arithmetic that hides under that traffic as long as it is little.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from zo2trl.planning.budgets import TierName

__all__ = ["MAX_WRITE_BACK_INTERVAL", "CostModel", "Rates", "StepTime", "Work"]

MAX_WRITE_BACK_INTERVAL = 64
AS_GOOD = 1.002  # of two intervals this close, other things decide


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a machine does per second. The names say of what; copies are between host memory and the device."""

    upload_bytes: float
    write_bytes: float
    """Copied down, as far as it delays the uploads beside it."""
    disk_read_bytes: float
    disk_write_bytes: float
    copied_beside_computing_bytes: float
    """Copied either way, as far as it delays the computing beside it."""
    memory_bytes: float
    """The device's own, as a visit reads and writes it."""
    flops: float
    updates: Mapping[tuple[str, str], float] = field(hash=False)
    """(direction, rounding) -> weights brought over one pending step, or given a probe's perturbation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one step does with every weight.

    Args:
        token_passes: tokens that one visit computes, summed over probes and micro-batches.
        num_directions: of one step; each is replayed.
        itemsize: bytes of a stored weight.
        direction: name of the directions' distribution.
        rounding: "nearest" or "stochastic".
        trained_share: how much of the weights is trained; the others are read only.
    """

    token_passes: int = 4096
    num_directions: int = 1
    itemsize: int = 2
    direction: str = "rademacher"
    rounding: str = "stochastic"
    trained_share: float = 1.0


class StepTime(NamedTuple):
    """Seconds of what a step does at once; it takes as long as the longest."""

    compute_s: float
    upload_s: float
    disk_s: float

    @property
    def bound(self) -> Literal["compute", "upload", "disk"]:
        """What the step waits for."""
        return max(zip(self, ("compute", "upload", "disk"), strict=True))[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """One kind of work on one machine."""

    rates: Rates
    work: Work

    @classmethod
    def on(cls, device_type: str, work: Work) -> "CostModel":
        """By the rates measured for "cuda" or "cpu"."""
        return cls(rates=_H200 if device_type == "cuda" else _ONE_CORE, work=work)

    def step_time(
        self, n_bytes: Mapping["TierName", int], *, every: Mapping["TierName", int], makes_pairs: bool
    ) -> StepTime:
        """One step in the steady state.

        Args:
            n_bytes: of the weights in each tier.
            every: steps between two times that a tier's weights are stored.
            makes_pairs: there is memory for both probes of a direction, so one pass over the weights makes both.
        """
        rates, itemsize = self.rates, self.work.itemsize
        trained: dict[TierName, float] = {tier: n * self.work.trained_share for tier, n in n_bytes.items()}
        visits_s = sum(
            n / itemsize * self._mean_visit_s(every.get(tier, 1), in_pairs=makes_pairs, may_perturb=tier != "gpu")
            for tier, n in trained.items()
        )
        up = sum(n for tier, n in n_bytes.items() if tier != "gpu")
        down = sum(n / every.get(tier, 1) for tier, n in trained.items() if tier != "gpu")
        to_disk = trained.get("disk", 0.0) / every.get("disk", 1)
        return StepTime(
            compute_s=sum(n_bytes.values()) / itemsize * self._forward_s + visits_s
            + (up + down) / rates.copied_beside_computing_bytes,
            upload_s=up / rates.upload_bytes + down / rates.write_bytes,
            disk_s=n_bytes.get("disk", 0) / rates.disk_read_bytes + to_disk / rates.disk_write_bytes,
        )  # fmt: skip

    def write_back_intervals(self, n_bytes: Mapping["TierName", int]) -> dict["TierName", int]:
        """`write_back_interval` of every tier that holds so many bytes."""
        total = max(sum(n_bytes.values()), 1)
        return {tier: self.write_back_interval(tier, share=n / total) for tier, n in n_bytes.items()}

    def write_back_interval(self, tier: "TierName", *, share: float = 1.0) -> int:
        """Steps between write-backs of a unit: the number with which a step takes the least time.

        It is large where the link is what a step waits for, as long as replay hides under it; small where computing
        hides the writes. Of all that are as good as the best, units in memory take the smallest, which leaves the
        least to catch up with, and units on disk the largest, for drives wear out by writing.

        Args:
            tier: where the units live.
            share: how much of all weights they are, in (0, 1]; the rest counts as resident.
        """
        n_bytes = 1 << 40
        kept = {"gpu": int(n_bytes * (1 - share)), tier: int(n_bytes * share)} if tier != "gpu" else {tier: n_bytes}

        def seconds(interval: int) -> float:
            every = {"gpu": 1, tier: interval}
            return max(self.step_time(kept, every=every, makes_pairs=True))  # type: ignore[arg-type]

        intervals = range(1, MAX_WRITE_BACK_INTERVAL + 1)
        best = min(map(seconds, intervals))
        as_good = [interval for interval in intervals if seconds(interval) <= best * AS_GOOD]
        return as_good[-1] if tier == "disk" else as_good[0]

    def steps_replayed_in(self, seconds: float, *, n_weights: int) -> int:
        """How many steps of so many trainable weights are brought up to date in that time."""
        return int(seconds * self._updates / self.work.num_directions / max(n_weights, 1))

    @property
    def _updates(self) -> float:
        updates = self.rates.updates
        return updates.get((self.work.direction, self.work.rounding)) or min(updates.values())

    @property
    def _forward_s(self) -> float:
        """Of one weight in all passes."""
        return 2 * self.work.token_passes / self.rates.flops

    def _mean_visit_s(self, every: int, *, in_pairs: bool, may_perturb: bool) -> float:
        """Of one weight, with 1 to `every` steps pending, stored with the last of them."""
        visits = [
            self._visit_s(pending=n, stored=n == every, in_pairs=in_pairs or (may_perturb and n < every))
            for n in range(1, every + 1)
        ]
        return sum(visits) / every

    def _visit_s(self, *, pending: int, stored: bool, in_pairs: bool) -> float:
        n_directions = self.work.num_directions
        alone = self._pass_s(n_moved=2, n_updates=1)  # one probe, from clean weights
        first = self._pass_s(
            n_moved=1 + stored + (2 if in_pairs else 1), n_updates=1 + pending * n_directions
        ) + (0.0 if in_pairs else alone)  # fmt: skip
        other = self._pass_s(n_moved=3, n_updates=1) if in_pairs else 2 * alone
        return first + (n_directions - 1) * other

    def _pass_s(self, *, n_moved: int, n_updates: int) -> float:
        return max(n_moved * self.work.itemsize / self.rates.memory_bytes, n_updates / self._updates)


# OPT-13B in bf16 on an H200, 2,048 tokens a micro-batch (docs/performance.md): 455 ms a step read-only and 502, 473,
# 461, 459 written back every 1, 2, 4, 8 steps, so a written byte delays the reads by 1/535 GB/s; with a quarter of the
# blocks streamed in 24 GB a step takes 9 ms longer than with all resident. zo/kernels/visit_triton.py: 4.05 TB/s
# where memory bounds it, and further steps at the rates below. The drive gave 2.9 GB/s and took 0.94.
# rates.py has its own rates of the same machine, by dtype, for forecasts.
_H200 = Rates(
    upload_bytes=55e9, write_bytes=535e9, disk_read_bytes=2.9e9, disk_write_bytes=0.94e9,
    copied_beside_computing_bytes=1e12, memory_bytes=4.05e12, flops=600e12,
    updates={
        ("rademacher", "nearest"): 4e12, ("rademacher", "stochastic"): 1.6e12,
        ("gaussian", "nearest"): 1e12, ("gaussian", "stochastic"): 0.85e12,
        ("mezo", "nearest"): 0.1e12,
    },
)  # fmt: skip
_ONE_CORE = Rates(
    upload_bytes=5e9, write_bytes=5e9, disk_read_bytes=2.9e9, disk_write_bytes=0.94e9,
    copied_beside_computing_bytes=5e9, memory_bytes=5e9, flops=50e9,
    updates={("rademacher", "nearest"): 0.1e9},
)  # fmt: skip
