"""Forecast: what a step will move, hold and take, from the very plan that a run opens with.

Does not: place anything (opening.py, planning/placement.py), count operations (workload.py), or know this machine:
rates are the caller's.
Invariant: bytes and places are those of the plan. Seconds, and what a process holds beside weights, are estimates.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zo2trl.engine.opening import EngineOptions, Plan, n_probes, write_back_intervals
from zo2trl.forecast.workload import Workload
from zo2trl.layout.layout import Unit, VisitPoint
from zo2trl.planning.budgets import TierName
from zo2trl.planning.rates import MachineRates, VisitCost, dtype_name
from zo2trl.tiers.disk import CHECK_EVERY
from zo2trl.tiers.readers import READ_PIECE_BYTES
from zo2trl.tiers.ring import plan_regions
from zo2trl.tiers.staging import N_PIECES_DOWN, N_PIECES_UP
from zo2trl.zo.tiles import TILE

__all__ = ["Forecast", "Links", "Peaks", "forecast"]

Bound = Literal["compute", "upload", "disk"]

HOST_WORKING_BYTES = 50 << 20  # libraries' threads and packing buffers, noise, the allocator's slack
# A chunk of weights on a CPU (zo/rules.py: 1 Mi in fp32) as noise, exact, moved, as bits and rounded: the holes that
# these leave are too small for a head's logits, which come before they are given back.
VISITOR_BYTES = 5 * (4 << 20)
WRITER_BYTES = 40 << 20  # versions of units on their way from a GPU to files
PROBES_OF_A_DIRECTION = 2


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes of one step on each link, on average over steps."""

    up: float
    down: float
    disk_read: float
    disk_written: float


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
        links, peaks: bytes.
        disk_written_first: bytes written once, before the first step: units that live on disk.
        forward_s, visit_s, upload_s, disk_s: seconds of the parts; the step takes the longest of what runs at once.
        tokens: in a step, all micro-batches.
        step_s: seconds of a step.
        bound: what it waits for.
        hiding_tokens: tokens a step from which computing hides the transfer; 0 if nothing is moved.
    """

    plan: Plan
    every: Mapping[TierName, int]
    links: Links
    peaks: Peaks
    disk_written_first: int
    forward_s: float
    visit_s: float
    upload_s: float
    disk_s: float
    tokens: int
    step_s: float
    bound: Bound
    hiding_tokens: int

    @property
    def compute_s(self) -> float:
        """Forwards and visits."""
        return self.forward_s + self.visit_s

    @property
    def tokens_per_s(self) -> float:
        """Trained on."""
        return self.tokens / self.step_s


def forecast(
    plan: Plan,
    options: EngineOptions,
    workload: Workload,
    *,
    rates: MachineRates,
    n_micro_batches: int,
    tokens: int,
    passes_per_traversal: int = 1 << 30,
    process_bytes: int = 0,
    copied: Collection[int] = (),
) -> Forecast:
    """What a step takes.

    Args:
        plan: of `plan_engine` with the same `options`.
        workload: of one pass over one micro-batch.
        tokens: in all micro-batches.
        passes_per_traversal: a step with more passes traverses the model several times.
        process_bytes: what a process holds before it opens a store (libraries).
        copied: indices of frozen units that the checkpoint's files do not hold as they are used.
    """
    on_cpu = options.device.type == "cpu"
    every = write_back_intervals(plan.layout, plan.placement, options)
    probes = n_probes(options)
    n_passes, per_traversal = probes * n_micro_batches, max(passes_per_traversal // probes, 1)
    n_traversals, n_together = -(-n_micro_batches // per_traversal), min(n_passes, probes * per_traversal)
    links = _links(plan, every, on_cpu=on_cpu, n_traversals=n_traversals)
    forward_s = n_passes * _pass_s(workload, rates, on_cpu=on_cpu)
    visit_s = _visits_s(plan, every, options=options, rates=rates, n_traversals=n_traversals)
    traversal_s = rates.traversal.step_s + n_traversals * _traversal_s(plan, rates, n_probes=probes)
    n_files = sum(unit.is_trained for unit in _filed(plan, ())) / every.get("disk", 1)
    disk_s = links.disk_read / rates.disk_read_bytes + links.disk_written / rates.disk_write_bytes
    disk_s += n_files * rates.traversal.file_s
    if on_cpu:  # the cores that compute also copy and check
        visit_s += traversal_s + links.up / rates.upload_bytes + links.down / rates.download_bytes
        checked = links.disk_read * (1 if every.get("disk", 1) == 1 else 1 / CHECK_EVERY) + links.disk_written
        visit_s += checked * rates.disk_cpu_s / rates.cores
        upload_s = 0.0
    else:  # the device works while Python asks
        asking_s = traversal_s + n_passes * workload.n_operations * rates.operation_s
        visit_s = max(visit_s, asking_s - forward_s)
        upload_s = max(links.up / rates.upload_bytes, links.down / rates.download_bytes)
    lanes: dict[Bound, float] = {"compute": forward_s + visit_s, "upload": upload_s, "disk": disk_s}
    bound = max(lanes, key=lambda lane: lanes[lane])
    moving_s = max(upload_s, disk_s)
    per_token_s = forward_s / tokens
    first = sum(unit.n_bytes for unit in _filed(plan, copied))
    peaks = _peaks(plan, workload, n_passes=n_together, on_cpu=on_cpu, process_bytes=process_bytes, copied=copied)
    return Forecast(
        plan=plan, every=every, links=links, peaks=peaks, disk_written_first=first,
        forward_s=forward_s, visit_s=visit_s, upload_s=upload_s, disk_s=disk_s, tokens=tokens,
        step_s=lanes[bound], bound=bound,
        hiding_tokens=max(round((moving_s - visit_s) / per_token_s), 0) if moving_s and forward_s else 0,
    )  # fmt: skip


def _pass_s(workload: Workload, rates: MachineRates, *, on_cpu: bool) -> float:
    working_s = sum(flops / rates.flops_of(kind) for kind, flops in workload.flops.items())
    working_s += workload.moved_bytes / rates.moved_bytes
    asking_s = workload.n_operations * rates.operation_s
    # A pass frees at its end more than the C library keeps, and the next one asks the system for it again.
    return working_s + asking_s + workload.peak_bytes / rates.new_bytes if on_cpu else max(working_s, asking_s)


def _links(plan: Plan, every: Mapping[TierName, int], *, on_cpu: bool, n_traversals: int) -> Links:
    moved: Counter[str] = Counter()
    for unit in plan.layout.units:
        tier = plan.placement.tier_of[unit.index]
        read, written = n_traversals * unit.n_bytes, unit.n_bytes / every.get(tier, 1) if unit.is_trained else 0.0
        if tier == "cpu":
            moved.update({"up": read, "down": written})  # type: ignore[arg-type]
        elif tier == "disk":
            moved.update({"disk_read": read, "disk_written": written})  # type: ignore[arg-type]
            if not on_cpu:
                moved.update({"up": read, "down": written})  # type: ignore[arg-type]
    return Links(**{name: float(moved[name]) for name in ("up", "down", "disk_read", "disk_written")})


def _traversal_s(plan: Plan, rates: MachineRates, *, n_probes: int) -> float:
    """Python of one traversal's visits."""
    cost, total_s = rates.traversal, 0.0
    for point, n_visits in _visited(plan):
        is_streamed = any(plan.placement.tier_of[segment.unit.index] != "gpu" for segment in point.segments)
        n_bound = sum(len(segment.tensors) for segment in point.segments) * n_probes / PROBES_OF_A_DIRECTION
        visit_s = cost.streamed_visit_s if is_streamed else cost.resident_visit_s
        total_s += n_visits * (visit_s + n_bound * cost.tensor_s)
    return total_s


def _visited(plan: Plan) -> Iterator[tuple[VisitPoint, int]]:
    """What a traversal visits, and how often: what is outside the blocks is wanted before and behind every stack."""
    for point in plan.layout.points:
        yield point, 1 if point.index else 1 + len(plan.layout.stack_ends)


def _visits_s(
    plan: Plan, every: Mapping[TierName, int], *, options: EngineOptions, rates: MachineRates, n_traversals: int
) -> float:
    """Perturbed copies of trainable weights, and the pending steps that they absorb first.

    What one traversal stores at home, the next of the same step need not absorb again.
    """
    n_copied: Counter[int] = Counter()  # segment -> visits
    for point, n_visits in _visited(plan):
        n_copied.update({segment.index: n_traversals * n_visits for segment in point.segments})
    total_s = 0.0
    for segment in plan.layout.segments:
        tier = plan.placement.tier_of[segment.unit.index]
        interval = every.get(tier, 1)
        n_pending = (interval + 1) / 2 * options.num_directions * (1 if interval == 1 else n_traversals)
        for number, span in enumerate(segment.spans):
            kept = "nearest" if span.dtype.itemsize > 2 else options.rounding or "stochastic"
            cost = rates.visit(dtype=dtype_name(span.dtype), direction=options.direction, rounding=kept)
            made_s, n_draws = _copies(cost, plan, tier, interval=interval, options=options)
            n, beside_s = len(span.tiles) * TILE, cost.span_s if number else 0.0  # a visit's own cost has the first
            total_s += n_copied[segment.index] * (n * made_s + n_draws * beside_s)
            total_s += n_pending * (n * cost.step_s + beside_s)
    return total_s


def _copies(
    cost: VisitCost, plan: Plan, tier: TierName, *, interval: int, options: EngineOptions
) -> tuple[float, float]:
    """Seconds per weight of all copies of one visit, and the times that a direction is drawn for them.

    Both copies are made at once where there is memory for two; a streamed unit's last may take the place of its bytes.
    """
    if plan.placement.scratch_copies > 1:
        return options.num_directions * cost.pair_s, options.num_directions
    in_place = (interval - 1) / interval if tier != "gpu" else 0.0
    others = 2 * (options.num_directions - 1)
    last_s = in_place * cost.pair_s + (1 - in_place) * 2 * cost.alone_s
    return others * cost.alone_s + last_s, others + in_place + (1 - in_place) * 2


def _filed(plan: Plan, copied: Collection[int]) -> list[Unit]:
    """Units with a file in the store."""
    on_disk = [unit for unit in plan.layout.units if plan.placement.tier_of[unit.index] == "disk"]
    return [unit for unit in on_disk if unit.is_trained or unit.index in copied]


def _peaks(
    plan: Plan, workload: Workload, *, n_passes: int, on_cpu: bool, process_bytes: int, copied: Collection[int]
) -> Peaks:
    placement, units = plan.placement, plan.layout.units
    on_disk = [unit.n_bytes for unit in units if placement.tier_of[unit.index] == "disk"]
    filed = _filed(plan, copied)
    device = placement.device_bytes + workload.activation_bytes(n_passes=n_passes)
    host = process_bytes + HOST_WORKING_BYTES + placement.cpu_bytes
    return Peaks(
        device=device,
        pinned=0 if on_cpu else placement.cpu_bytes + _staging_bytes(plan, on_disk),
        host=host + (device - _untouched_bytes(plan) + VISITOR_BYTES if on_cpu else WRITER_BYTES if on_disk else 0),
        disk=sum(u.n_bytes for u in filed) + max((u.n_bytes for u in filed if u.is_trained), default=0),
    )


def _untouched_bytes(plan: Plan) -> int:
    """Of the ring: what segments of its sizes never reach. Pages that nobody writes to are never there."""
    streamed = [s for p in plan.layout.points for s in p.segments if plan.placement.tier_of[s.unit.index] != "gpu"]
    regions = plan_regions(streamed, plan.placement.ring_bytes).values()
    return plan.placement.ring_bytes - max((region.stop for region in regions), default=0)


def _staging_bytes(plan: Plan, on_disk: Sequence[int]) -> int:
    """Pinned pieces for what comes from and goes to disk, and for a unit read ahead beside units in host memory."""
    if not on_disk:
        return 0
    piece = min(plan.placement.largest_segment_bytes, READ_PIECE_BYTES)
    ahead = max(on_disk) if plan.placement.units_in("cpu") else 0
    return (N_PIECES_UP + N_PIECES_DOWN) * piece + ahead
