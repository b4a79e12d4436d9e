"""Workload: what a step computes and touches, in counts that hold for every machine.

Does not: count operations (forecast/workload.py), or know how long anything takes (cost_model.py).
Invariant: pure functions of a layout, and of where its units live.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from zo2trl.layout.layout import Layout
from zo2trl.planning.budgets import TIERS, TierName
from zo2trl.planning.rates import dtype_name
from zo2trl.zo.tiles import TILE

__all__ = ["NO_LOAD", "KindLoad", "TierLoad", "Work", "Workload", "loads_of", "rough_workload"]

UNBOUNDED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One pass over one micro-batch.

    Attributes:
        flops: of matrix products by the name of their dtype, and of fused attention as "<dtype> attention".
        moved_bytes: read and written by all other operations.
        n_operations: how many there are in all.
        held_bytes: alive between two blocks: what a suspended pass holds.
        peak_bytes: alive at once at most, beside the weights.
    """

    flops: Mapping[str, float] = field(default_factory=Counter)
    moved_bytes: int = 0
    n_operations: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0

    def activation_bytes(self, *, n_passes: int) -> int:
        """Bytes that so many passes hold at once while one of them runs."""
        return self.peak_bytes + (n_passes - 1) * self.held_bytes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step does, wherever its weights live.

    Attributes:
        forward: one pass over one micro-batch.
        n_micro_batches: of the step.
        n_probes: passes over each micro-batch, in this process.
        num_directions: of the step; each is replayed.
        direction: name of the directions' distribution.
        rounding: of weights that are stored in 16 bits.
        passes_per_traversal: a step with more passes traverses the model several times.
        checks_every: traversals between two in which a file that did not change is checked against its checksum.
        on_cpu: the cores that compute also copy and check.
    """

    forward: Workload
    n_micro_batches: int = 1
    n_probes: int = 2
    num_directions: int = 1
    direction: str = "rademacher"
    rounding: str = "stochastic"
    passes_per_traversal: int = UNBOUNDED
    checks_every: int = 1
    on_cpu: bool = False

    @property
    def n_passes(self) -> int:
        """Passes of a step."""
        return self.n_probes * self.n_micro_batches

    @property
    def passes_together(self) -> int:
        """Passes that one traversal carries, which are all alive at once."""
        return min(self.n_passes, self.n_probes * self._micro_batches_together)

    @property
    def n_traversals(self) -> int:
        """Traversals of the model that a step takes."""
        return -(-self.n_micro_batches // self._micro_batches_together)

    @property
    def _micro_batches_together(self) -> int:
        return max(self.passes_per_traversal // self.n_probes, 1)


@dataclass(kw_only=True, slots=True)
class KindLoad:
    """Trained weights of one dtype in one tier.

    Attributes:
        n: weights, each of which absorbs pending steps once.
        n_copied: perturbed copies per probe and traversal: weights times the visits that bind them.
        n_beside, n_beside_copied: as many for spans behind the first of a visit, which are drawn by themselves.
    """

    n: int = 0
    n_copied: int = 0
    n_beside: int = 0
    n_beside_copied: int = 0


@dataclass(kw_only=True, slots=True)
class TierLoad:
    """What one traversal finds in one tier.

    Attributes:
        n_bytes, trained_bytes: of its units, all and those that are trained.
        n_trained_units: how many of these there are.
        n_visits: visits for which something of the tier, and nothing of a slower one, is bound.
        n_bound: tensors that these visits bind.
        kinds: its trained weights, by (dtype name, bytes of a weight).
    """

    n_bytes: int = 0
    trained_bytes: int = 0
    n_trained_units: int = 0
    n_visits: int = 0
    n_bound: int = 0
    kinds: dict[tuple[str, int], KindLoad] = field(default_factory=lambda: defaultdict(KindLoad))


NO_LOAD = TierLoad()


def loads_of(layout: Layout, tier_of: Mapping[int, TierName]) -> dict[TierName, TierLoad]:
    """The load of each tier that holds a unit."""
    loads: defaultdict[TierName, TierLoad] = defaultdict(TierLoad)
    for unit in layout.units:
        load = loads[tier_of[unit.index]]
        load.n_bytes += unit.stored_bytes
        if unit.is_trained:
            load.trained_bytes += unit.stored_bytes
            load.n_trained_units += 1
    n_visits_of: Counter[int] = Counter()  # segment -> visits in a traversal
    for point in layout.points:
        # What is outside the blocks is needed before the first stack and behind every one.
        n_visits = 1 if point.index else 1 + len(layout.stack_ends)
        n_visits_of.update({segment.index: n_visits for segment in point.segments})
        load = loads[_slowest({tier_of[segment.unit.index] for segment in point.segments})]
        load.n_visits += n_visits
        load.n_bound += n_visits * sum(len(segment.tensors) for segment in point.segments)
    for segment in layout.segments:
        for number, span in enumerate(segment.spans):
            kind = loads[tier_of[segment.unit.index]].kinds[dtype_name(span.dtype), span.dtype.itemsize]
            n, is_beside, n_visits = len(span.tiles) * TILE, number > 0, n_visits_of[segment.index]
            kind.n += n
            kind.n_copied += n * n_visits
            kind.n_beside += is_beside
            kind.n_beside_copied += is_beside * n_visits
    return dict(loads)


def rough_workload(layout: Layout, *, n_tokens: int) -> Workload:
    """One pass over so many tokens, at a multiplication and an addition per weight and token: without a model."""
    flops: Counter[str] = Counter()
    for unit in layout.units:
        for spec in unit.tensors:
            flops[dtype_name(spec.dtype)] += 2 * spec.numel * n_tokens
    return Workload(flops=flops)


def _slowest(tiers: Collection[TierName]) -> TierName:
    nothing: TierName = "gpu"
    return max(tiers, key=TIERS.index) if tiers else nothing
