"""CostModel: how long a step takes with weights here and there, and how often it pays to write them back.

Does not: decide where a unit lives (placement.py), know a model, or measure anything: rates are the caller's.
Invariant: pure functions of their arguments. Placement, write schedule, the start-up line and `zo2trl plan` all take
seconds from here, by the same rates.

A step takes the longest of what happens at once: computing, copying up, reading a drive. On a CPU-only machine the
cores that compute also copy, so copies count as computing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from zo2trl.planning.budgets import TierName
from zo2trl.planning.rates import MachineRates, VisitCost
from zo2trl.planning.workload import NO_LOAD, TierLoad, Work

__all__ = ["MAX_WRITE_BACK_INTERVAL", "Bound", "CostModel", "Links", "StepTime", "links_of"]

MAX_WRITE_BACK_INTERVAL = 64
AS_GOOD = 1.003  # intervals whose steps are this close count as equally fast
PROBES_OF_A_DIRECTION = 2
LEAST_STEP_S = 1e-15  # a machine that is measured as absorbing pending steps for nothing still takes time for them

Bound = Literal["compute", "upload", "disk"]
Loads = Mapping[TierName, TierLoad]
Intervals = Mapping[TierName, int]


class Links(NamedTuple):
    """Bytes of one step on each link, on average over steps."""

    up: float
    down: float
    disk_read: float
    disk_written: float


class StepTime(NamedTuple):
    """Seconds of what a step does at once.

    `visit_s` has everything beside forwards that the device, or on a CPU-only machine the cores, must do.
    """

    forward_s: float
    visit_s: float
    upload_s: float
    disk_s: float

    @property
    def compute_s(self) -> float:
        """Forwards and visits."""
        return self.forward_s + self.visit_s

    @property
    def step_s(self) -> float:
        """The step takes as long as the longest."""
        return max(self.compute_s, self.upload_s, self.disk_s)

    @property
    def bound(self) -> Bound:
        """What the step waits for."""
        lanes: dict[Bound, float] = {"compute": self.compute_s, "upload": self.upload_s, "disk": self.disk_s}
        return max(lanes, key=lambda lane: lanes[lane])


def links_of(loads: Loads, every: Intervals, work: Work) -> Links:
    """Bytes that a step moves.

    Args:
        every: steps between two times that a tier's weights are stored; a tier that is not named: every step.
    """
    n_traversals = work.n_traversals
    cpu, disk = loads.get("cpu", NO_LOAD), loads.get("disk", NO_LOAD)
    read, written = float(n_traversals * disk.n_bytes), disk.trained_bytes / every.get("disk", 1)
    up, down = float(n_traversals * cpu.n_bytes), cpu.trained_bytes / every.get("cpu", 1)
    if not work.on_cpu:  # to a GPU it goes through host memory
        up, down = up + read, down + written
    return Links(up=up, down=down, disk_read=read, disk_written=written)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The seconds that one kind of work takes on one machine."""

    rates: MachineRates
    work: Work

    def step_time(self, loads: Loads, *, every: Intervals, makes_pairs: bool) -> StepTime:
        """One step in the steady state.

        Args:
            loads: see `loads_of`.
            every: see `links_of`.
            makes_pairs: there is memory for both probes of a direction, so one pass over the weights makes both.
        """
        rates, work, links = self.rates, self.work, links_of(loads, every, self.work)
        forward_s = work.n_passes * self.pass_s()
        visit_s = sum(
            self._visits_s(tier, load, every=every.get(tier, 1), makes_pairs=makes_pairs)
            for tier, load in loads.items()
        )
        python_s = rates.traversal.step_s + work.n_traversals * self._traversal_s(loads)
        disk_s = links.disk_read / rates.disk_read_bytes + links.disk_written / rates.disk_write_bytes
        disk_s += rates.traversal.file_s * loads.get("disk", NO_LOAD).n_trained_units / every.get("disk", 1)
        if work.on_cpu:
            checked = links.disk_read / (1 if every.get("disk", 1) == 1 else work.checks_every) + links.disk_written
            visit_s += python_s + links.up / rates.upload_bytes + links.down / rates.download_bytes
            visit_s += checked * rates.disk_cpu_s / rates.cores
            return StepTime(forward_s=forward_s, visit_s=visit_s, upload_s=0.0, disk_s=disk_s)
        visit_s += (links.up + links.down) * rates.compute_delay_s
        # The device works while Python launches what comes next, so the longer of the two counts.
        launching_s = python_s + work.n_passes * work.forward.n_operations * rates.operation_s
        up_s = links.up / rates.upload_bytes + links.down * rates.upload_delay_s
        return StepTime(
            forward_s=forward_s, visit_s=max(visit_s, launching_s - forward_s),
            upload_s=max(up_s, links.down / rates.download_bytes), disk_s=disk_s,
        )  # fmt: skip

    def pass_s(self) -> float:
        """Seconds of one pass over one micro-batch."""
        rates, forward = self.rates, self.work.forward
        working_s = sum(flops / rates.flops_of(kind) for kind, flops in forward.flops.items())
        working_s += forward.moved_bytes / rates.moved_bytes
        launching_s = forward.n_operations * rates.operation_s
        if self.work.on_cpu:
            # A pass frees at its end more than the C library keeps, and the next one asks the system for it again.
            return working_s + launching_s + forward.peak_bytes / rates.new_bytes
        return max(working_s, launching_s)

    def write_back_intervals(self, loads: Loads, *, makes_pairs: bool = True) -> dict[TierName, int]:
        """Steps between write-backs of a unit, by tier: the numbers with which a step takes the least time.

        A number is large where a link is what a step waits for, as long as replay hides under it, and small where
        computing hides the writes. Of all numbers that are as good as the best, units in memory take the smallest,
        which leaves the least to catch up with, and units on disk the largest, for drives wear out by writing.
        """
        every: dict[TierName, int] = {"gpu": 1}
        for tier in ("disk", "cpu"):  # what is written to a drive takes longest, so it is decided first
            if loads.get(tier, NO_LOAD).n_bytes:
                every[tier] = self._best_interval(tier, loads, every=every, makes_pairs=makes_pairs)
        return {tier: every[tier] for tier in loads if tier != "gpu" and tier in every}

    def _best_interval(self, tier: TierName, loads: Loads, *, every: Intervals, makes_pairs: bool) -> int:
        intervals = range(1, MAX_WRITE_BACK_INTERVAL + 1)
        seconds = [
            self.step_time(loads, every={**every, tier: interval}, makes_pairs=makes_pairs).step_s
            for interval in intervals
        ]
        as_good = [interval for interval in intervals if seconds[interval - 1] <= min(seconds) * AS_GOOD]
        return as_good[-1] if tier == "disk" else as_good[0]

    def steps_replayed_in(self, seconds: float, *, loads: Loads) -> int:
        """How many steps of all trained weights are brought up to date in that time."""
        replaying_s = sum(
            kind.n * self._visit_cost(*key).step_s for load in loads.values() for key, kind in load.kinds.items()
        )
        return int(seconds / self.work.num_directions / max(replaying_s, LEAST_STEP_S))

    def _visit_cost(self, dtype: str, itemsize: int) -> VisitCost:
        rounding = "nearest" if itemsize > 2 else self.work.rounding
        return self.rates.visit(dtype=dtype, direction=self.work.direction, rounding=rounding)

    def _traversal_s(self, loads: Loads) -> float:
        """Python of one traversal's visits."""
        cost, total_s = self.rates.traversal, 0.0
        for tier, load in loads.items():
            visit_s = cost.resident_visit_s if tier == "gpu" else cost.streamed_visit_s
            total_s += load.n_visits * visit_s
            total_s += load.n_bound * self.work.n_probes / PROBES_OF_A_DIRECTION * cost.tensor_s
        return total_s

    def _visits_s(self, tier: TierName, load: TierLoad, *, every: int, makes_pairs: bool) -> float:
        """Perturbed copies of a tier's trained weights, and the pending steps that they absorb first.

        What one traversal stores at home, the next one of the same step need not absorb again.
        """
        n_traversals, total_s = self.work.n_traversals, 0.0
        n_absorbing = 1 if every == 1 else n_traversals
        n_pending = (every + 1) / 2 * self.work.num_directions
        for key, kind in load.kinds.items():
            cost = self._visit_cost(*key)
            visits = [
                self._visit(cost, itemsize=key[1], pending=n, stored=n == every,
                            in_pairs=makes_pairs, in_place=tier != "gpu" and n < every)
                for n in range(1, every + 1)
            ]  # fmt: skip
            made_s, absorbed_s, n_draws = (sum(each) / every for each in zip(*visits, strict=True))
            total_s += n_traversals * (kind.n_copied * made_s + kind.n_beside_copied * n_draws * cost.span_s)
            total_s += n_absorbing * (kind.n * absorbed_s + kind.n_beside * n_pending * cost.span_s)
        return total_s

    def _visit(
        self, cost: VisitCost, *, itemsize: int, pending: int, stored: bool, in_pairs: bool, in_place: bool
    ) -> tuple[float, float, float]:
        """(seconds per weight of all copies, seconds that pending steps add to the first, times a direction is drawn).

        Both copies are made at once where there is memory for two; a streamed unit's last copy may take the place of
        its own bytes (`in_place`).
        """
        n_directions = self.work.num_directions
        if in_pairs:
            made_s, n_draws = n_directions * cost.pair_s, n_directions
        else:
            last_s, n_last = (cost.pair_s, 1) if in_place else (2 * cost.alone_s, 2)
            made_s, n_draws = 2 * (n_directions - 1) * cost.alone_s + last_s, 2 * (n_directions - 1) + n_last
        first_s = cost.pair_s if in_pairs or (in_place and n_directions == 1) else cost.alone_s
        base_s = first_s if cost.base_s is None else min(cost.base_s, first_s)
        absorbing_s = base_s + pending * n_directions * cost.step_s
        storing_s = first_s + (itemsize / self.rates.moved_bytes if stored and cost.base_s is not None else 0.0)
        return made_s, max(absorbing_s, storing_s) - first_s, float(n_draws)
