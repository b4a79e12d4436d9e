"""Measure what traversals cost beside arithmetic, Python mostly, by traversing a model that weighs nothing.

Does not: measure rates of arithmetic and copies (machine_bench.py), or keep what it finds (planning/known_rates.py).
Invariant: what is measured is an engine's own step, from the first lease to the journal; nothing outlives the call.
"""

import statistics
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import Engine
from zo2trl.forecast.machine_bench import scratch_on_drive
from zo2trl.forecast.time_share import TimeShare
from zo2trl.planning.budgets import Budgets, TierName
from zo2trl.planning.rates import TraversalCost

__all__ = ["measure_traversals"]

N_WARM_UP, N_STEPS, LEAST_STEPS = 3, 12, 3
FEW_BLOCKS, MANY_BLOCKS = 4, 24
MANY_TENSORS = 9
N_RUNS = 7


class _Block(GradientCheckpointingLayer):
    """Holds parameters that are bound at every visit and computed with at none."""

    def __init__(self, n_tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(1) for _ in range(n_tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Chain(nn.Module):
    def __init__(self, n_blocks: int, n_tensors: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(_Block(n_tensors) for _ in range(n_blocks))

    def forward(self) -> torch.Tensor:
        x = self.scale
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def measure_traversals(device: torch.device, store_dir: Path, *, share: TimeShare) -> TraversalCost:
    """Time steps with few and many blocks of few and many tensors, in every tier.

    Args:
        store_dir: it, or its nearest parent that exists, is on the drive that is measured.
        share: every run makes three steps at least, and ends when its part of the time does.

    Raises:
        StoreError: the folder cannot be written to.
    """

    shares = share.split(N_RUNS)

    def step_s(tier: TierName, n_blocks: int, *, n_tensors: int = 1) -> float:
        return _step_s(_Chain(n_blocks, n_tensors), device, store_dir, tier=tier, share=next(shares))

    def visit_s(tier: TierName) -> float:
        return (step_s(tier, MANY_BLOCKS) - step_s(tier, FEW_BLOCKS)) / (MANY_BLOCKS - FEW_BLOCKS)

    few, many = step_s("gpu", FEW_BLOCKS), step_s("gpu", MANY_BLOCKS)
    resident_s, streamed_s, filed_s = (many - few) / (MANY_BLOCKS - FEW_BLOCKS), visit_s("cpu"), visit_s("disk")
    tensors_s = (step_s("gpu", MANY_BLOCKS, n_tensors=MANY_TENSORS) - many) / MANY_BLOCKS
    tensor_s = max(tensors_s / (MANY_TENSORS - 1), 0.0)
    resident_visit_s = max(resident_s - tensor_s, 0.0)
    return TraversalCost(
        resident_visit_s=resident_visit_s,
        # It has all that a resident visit has, and more: less is noise of a busy machine.
        streamed_visit_s=max(streamed_s - tensor_s, resident_visit_s),
        tensor_s=tensor_s, file_s=max(filed_s - streamed_s, 0.0), step_s=max(few - FEW_BLOCKS * resident_s, 0.0),
    )  # fmt: skip


def _step_s(model: nn.Module, device: torch.device, store_dir: Path, *, tier: TierName, share: TimeShare) -> float:
    """Seconds of a step: the median of some."""
    plenty = 1 << 40
    budgets = Budgets(device=plenty if tier == "gpu" else "min", cpu=plenty if tier == "cpu" else 0)
    with scratch_on_drive(store_dir) as scratch:
        options = EngineOptions(
            budgets=budgets, device=device, store_dir=scratch / "store", seed=0, granularity="block",
            write_back_every=1,
        )  # fmt: skip
        engine = open_engine(model, options)
        try:
            found = _steps_s(engine, model, share=share)
            return statistics.median(found[min(N_WARM_UP, len(found) // 2) :])
        finally:
            engine.shutdown(flush=False)


def _steps_s(engine: Engine, model: nn.Module, *, share: TimeShare) -> list[float]:
    found: list[float] = []
    for step in range(N_WARM_UP + N_STEPS):
        started_s = share.clock()
        engine.step([model], step=step)
        engine.commit(learning_rate=0.0, weight_decay=0.0)
        found.append(share.clock() - started_s)
        if share.is_over and len(found) >= LEAST_STEPS:
            break
    return found
