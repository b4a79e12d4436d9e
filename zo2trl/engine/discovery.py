"""Which blocks may be visited leaf by leaf: found out once, by comparing losses, before the first step.

A leaf hook is wrong without a sound where a parent module reads a child's weights without calling it, or where a leaf
runs twice. Parameters that are not leased are NaN during a traversal, so the first case shows in the loss; the second
shows in the list of visits; and where whole blocks fit the budgets as well, the losses must agree to the last bit.

Blocks of one class with the same leaves are judged together.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import torch

from zo2trl.engine.opening import EngineOptions, plan_again
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError, TraversalError
from zo2trl.layout.layout import Layout

__all__ = ["settle_granularity"]

logger = logging.getLogger(__name__)


def settle_granularity(engine: Engine, loss: Callable[[], torch.Tensor], *, options: EngineOptions) -> None:
    """Keep leaf visits where they are right, and visit the other blocks whole. No-op for block granularity.

    Args:
        loss: one micro-batch's loss, deterministic.
        options: what the engine was opened with.

    Raises:
        BudgetError: a block must stay whole and does not fit `device_memory`.
        TraversalError: the loss is not finite leaf by leaf, and whole blocks do not fit to tell why.
    """
    leafy = engine.store.layout.leaf_blocks
    if not leafy:
        return
    run = partial(_loss_with_leaves, engine, loss, options=options)
    groups = _groups(engine.store.layout, engine)
    by_block = run(frozenset())
    good: set[str] = set()
    for group in groups:
        by_leaf = run(leafy if by_block is None else group)
        if by_block is None and not math.isfinite(by_leaf or math.nan):
            raise TraversalError(
                "The loss is not finite when this model is visited leaf by leaf, and `device_memory` is too small to "
                "compare with whole blocks. Either the weights or the batch give NaN, or modules of this model read "
                'each other\'s weights: raise `device_memory` and set `granularity="block"`.'
            )
        if by_block in (None, by_leaf) and not _visits_twice(engine, group):
            good |= group
    if good != leafy:
        whole = sorted(leafy - good)
        logger.warning(
            "%d blocks (%s ...) are visited whole: no leaf of them can be visited alone.", len(whole), whole[0]
        )
    plan = plan_again(engine.model, options, current=engine.store.placement, leaf_blocks=good)
    engine.relayout(plan.layout, plan.placement)


def _loss_with_leaves(
    engine: Engine, loss: Callable[[], torch.Tensor], leaf_blocks: frozenset[str], *, options: EngineOptions
) -> float | None:
    """The loss at clean weights with these blocks visited by leaf and the others whole; None if that does not fit."""
    try:
        plan = plan_again(engine.model, options, current=engine.store.placement, leaf_blocks=leaf_blocks)
    except BudgetError:
        return None
    engine.relayout(plan.layout, plan.placement)
    return float(engine.run_clean([loss])[0])


def _visits_twice(engine: Engine, group: frozenset[str]) -> bool:
    points = engine.store.layout.points
    visits = Counter(points[i].module_name for i in engine.visited if points[i].block_name in group)
    n_runs = min(visits.values(), default=1)  # a loss may call the model more than once: then every leaf repeats
    return any(count > n_runs for count in visits.values())


def _groups(layout: Layout, engine: Engine) -> list[frozenset[str]]:
    leaves: dict[str, list[str]] = defaultdict(list)
    for point in layout.points[1:]:
        leaves[point.block_name].append(point.module_name.removeprefix(point.block_name))
    groups: dict[tuple, set[str]] = defaultdict(set)
    for block in layout.leaf_blocks:
        groups[type(engine.model.get_submodule(block)), tuple(leaves[block])].add(block)
    return [frozenset(group) for group in groups.values()]
