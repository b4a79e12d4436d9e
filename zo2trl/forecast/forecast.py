"""Forecast: what a step moves, holds and takes, from the very plan that a run opens with.

Does not: place anything (engine/opening.py, planning/placement.py), count operations (workload.py), or add up seconds,
which all come from planning/cost_model.py.
Invariant: bytes and places are those of the plan. Seconds, and what a process holds beside weights, are estimates.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from zo2trl.engine.activations import workspace_bytes
from zo2trl.engine.opening import EngineOptions, Plan, cost_model_of, work_of, write_back_intervals
from zo2trl.layout.layout import Unit
from zo2trl.planning.budgets import TierName
from zo2trl.planning.cost_model import Links, StepTime, links_of
from zo2trl.planning.workload import Work, loads_of
from zo2trl.tiers.readers import READ_PIECE_BYTES
from zo2trl.tiers.ring import plan_regions
from zo2trl.tiers.staging import N_PIECES_DOWN, N_PIECES_UP

__all__ = ["Forecast", "Peaks", "forecast"]

HOST_WORKING_BYTES = 50 << 20  # libraries' threads and packing buffers, noise, the allocator's slack
# A chunk of weights on a CPU (zo/updates.py: 1 Mi in fp32) as noise, exact, moved, as bits and rounded: the holes that
# these leave are too small for a head's logits, which come before they are given back.
VISITOR_BYTES = 5 * (4 << 20)
WRITER_BYTES = 40 << 20  # versions of units on their way from a GPU to files


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes at once.

    Attributes:
        device: weights, ring, scratch and activations; on a CPU-only machine a part of `host`.
        pinned: home copies in host memory, and staging.
        host: of the process, beside mapped files.
        disk: of the store's unit files, with one new version of the largest in the making. Frozen units that the
            checkpoint holds as they are used are read from there, and the others are copied.
    """

    device: int
    pinned: int
    host: int
    disk: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One step in the steady state.

    Attributes:
        plan, every: where units live; steps between write-backs, by tier.
        work: what a step does.
        links, peaks: bytes.
        disk_written_first: bytes written once, before the first step: units that live on disk.
        tokens: in a step, all micro-batches.
        time: seconds; None if the machine's rates are not known.
    """

    plan: Plan
    every: Mapping[TierName, int]
    work: Work
    links: Links
    peaks: Peaks
    disk_written_first: int
    tokens: int
    time: StepTime | None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained on per second."""
        return None if self.time is None else self.tokens / self.time.step_s

    @property
    def hiding_tokens(self) -> int | None:
        """Tokens a step from which computing hides the transfer; 0 if nothing is moved."""
        if self.time is None:
            return None
        moving_s, forward_s = max(self.time.upload_s, self.time.disk_s), self.time.forward_s
        if not moving_s or not forward_s:
            return 0
        return max(round((moving_s - self.time.visit_s) / forward_s * self.tokens), 0)


def forecast(
    plan: Plan, options: EngineOptions, *, tokens: int, process_bytes: int = 0, copied: Collection[int] = ()
) -> Forecast:
    """Forecast a step of a training.

    Args:
        plan: of `plan_engine` with the same `options`, which have the counted pass if there is one.
        tokens: in all micro-batches.
        process_bytes: what a process holds before it opens a store (libraries).
        copied: indices of frozen units that the checkpoint's files do not hold as they are used.
    """
    every = write_back_intervals(plan.layout, plan.placement, options)
    loads, work = loads_of(plan.layout, plan.placement.tier_of), work_of(plan.layout, options)
    cost_model = cost_model_of(plan.layout, options)
    makes_pairs = plan.placement.scratch_copies > 1
    return Forecast(
        plan=plan, every=every, work=work, links=links_of(loads, every, work),
        peaks=_peaks(plan, options, work=work, process_bytes=process_bytes, copied=copied),
        disk_written_first=sum(unit.stored_bytes for unit in _filed(plan, copied)), tokens=tokens,
        time=None if cost_model is None else cost_model.step_time(loads, every=every, makes_pairs=makes_pairs),
    )  # fmt: skip


def _filed(plan: Plan, copied: Collection[int]) -> list[Unit]:
    """The units that have a file in the store."""
    on_disk = [unit for unit in plan.layout.units if plan.placement.tier_of[unit.index] == "disk"]
    return [unit for unit in on_disk if unit.is_trained or unit.index in copied]


def _peaks(plan: Plan, options: EngineOptions, *, work: Work, process_bytes: int, copied: Collection[int]) -> Peaks:
    placement, units, on_cpu = plan.placement, plan.layout.units, work.on_cpu
    on_disk = [unit.stored_bytes for unit in units if placement.tier_of[unit.index] == "disk"]
    filed = _filed(plan, copied)
    activations = work.forward.activation_bytes(n_passes=work.passes_together)
    device = placement.device_bytes + activations + workspace_bytes(options.device)
    host = process_bytes + HOST_WORKING_BYTES + placement.cpu_bytes
    return Peaks(
        device=device,
        pinned=0 if on_cpu else placement.cpu_bytes + _staging_bytes(plan, on_disk),
        host=host + (device - _untouched_bytes(plan) + VISITOR_BYTES if on_cpu else WRITER_BYTES if on_disk else 0),
        disk=sum(u.stored_bytes for u in filed) + max((u.stored_bytes for u in filed if u.is_trained), default=0),
    )


def _untouched_bytes(plan: Plan) -> int:
    """Bytes of the ring that segments of these sizes never reach: pages that nothing writes to take no memory."""
    streamed = [s for p in plan.layout.points for s in p.segments if plan.placement.tier_of[s.unit.index] != "gpu"]
    regions = plan_regions(streamed, plan.placement.ring_bytes).values()
    return plan.placement.ring_bytes - max((region.stop for region in regions), default=0)


def _staging_bytes(plan: Plan, on_disk: Sequence[int]) -> int:
    """Bytes of pinned pieces for transfers from and to disk, and of a unit read ahead beside those in host memory."""
    if not on_disk:
        return 0
    piece = min(plan.placement.largest_segment_bytes, READ_PIECE_BYTES)
    ahead = max(on_disk) if plan.placement.units_in("cpu") else 0
    return (N_PIECES_UP + N_PIECES_DOWN) * piece + ahead
