"""DeviceFit: `device_memory` as a ceiling for everything, activations included, and used to the full below it.

Does not: choose tiers or byte counts by itself (planning/placement.py), or run outside the moment before a traversal.

What a traversal holds beside weights is known when the first batch is there. A trainer that can count a pass of its
model, as `zo2trl plan` does, hands over a function that counts; the counted bytes are then kept free, so that a run
places its units as the plan does. A traversal is also made without a step and measured: where it takes more than was
counted, or nothing could be counted, the measured bytes are kept free. Both happen again for a larger batch.
Invariant: weights move with every step absorbed, so where they live never shows in a bit.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from zo2trl.engine.activations import activation_bytes, n_tokens, passes_per_traversal, workspace_bytes
from zo2trl.engine.discovery import settle_granularity
from zo2trl.engine.opening import EngineOptions, place_units, plan_engine, write_back_intervals
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError
from zo2trl.files.sizes import format_bytes
from zo2trl.layout.layout import Layout
from zo2trl.planning.placement import smallest_device_budget
from zo2trl.planning.workload import UNBOUNDED, Workload

__all__ = ["DeviceFit", "reserve_for"]

logger = logging.getLogger(__name__)

SPARE_SHARE = 1.02  # of what was counted or measured: other batches of the same size need not hold exactly as much
SPARE_BYTES = 8 << 20
GROWTH = 1.25  # room for larger batches, made when the second size comes along


Count = Callable[[Mapping[str, Any]], Workload | None]


def reserve_for(workload: Workload, *, n_passes: int, device: torch.device) -> int:
    """Bytes of the device that are kept free for so many passes; the same for a plan and for the run."""
    n_bytes = int(workload.activation_bytes(n_passes=n_passes) * SPARE_SHARE)
    return n_bytes + SPARE_BYTES + workspace_bytes(device)


class DeviceFit:
    """Keeps an engine's units where the batches so far leave room for them.

    Args:
        engine: opened with `options`.
        options: a `device` budget of "min" asks for nothing to be fitted, and on the CPU there is nothing to measure.
        count: counts one pass over a micro-batch; returns None if it cannot.
    """

    def __init__(self, engine: Engine, options: EngineOptions, *, count: Count = lambda inputs: None) -> None:
        self._engine, self._options, self._count = engine, options, count
        self._covered = 0  # tokens times passes that the present reserve is known to be enough for
        self._least: tuple[Layout, int] | None = None
        self._is_settled = False

    @property
    def options(self) -> EngineOptions:
        """The options that the engine was opened with, and the reserve that was found."""
        return self._options

    def passes_per_traversal(self, inputs: Mapping[str, Any]) -> int:
        """See `activations.passes_per_traversal`; never fewer than a micro-batch has probes."""
        engine = self._engine
        most = passes_per_traversal(engine.store, engine.model, inputs, room=self._room())
        return max(most, len(engine.probes))

    def before_steps(self, loss: Callable[[], Any], inputs: Mapping[str, Any], *, n_passes: int) -> bool:
        """Make sure that a traversal of so many passes over such a micro-batch fits; return whether anything changed.

        Args:
            loss: runs the model on the micro-batch; deterministic.

        Raises:
            BudgetError: activations and the least that weights need are more than `device_memory`.
            TraversalError: see `settle_granularity`.
        """
        together = self.passes_per_traversal(inputs)
        self._note_work(inputs, n_passes=n_passes, together=together)
        n_passes = min(n_passes, together)
        size, changed = n_tokens(inputs) * n_passes, False
        if self._is_wanted and size > self._covered:
            self._fit(loss, inputs, n_passes=n_passes)
            changed = True
        if not self._is_settled:
            settle_granularity(self._engine, loss, options=self._options)
            self._is_settled = changed = True
        if changed:
            self._find_write_schedule()
        return changed

    def before_evaluation(self, inputs: Mapping[str, Any], *, n_passes: int, whole_logits: bool) -> None:
        """Make room for so many passes at clean weights, by estimate: measuring would make, and count, outputs twice.

        Raises:
            BudgetError: see `before_steps`.
        """
        size = n_tokens(inputs) * n_passes
        if self._is_wanted and (whole_logits or size > self._covered):
            n_bytes = activation_bytes(self._engine.model, inputs, n_passes=n_passes, whole_logits=whole_logits)
            if n_bytes > self._options.budgets.reserve:
                self._make_room(n_bytes, is_estimate=True)

    def _note_work(self, inputs: Mapping[str, Any], *, n_passes: int, together: int) -> None:
        """Keep what the largest step so far computes, which decides what device memory is best used for."""
        n_probes = len(self._engine.probes)
        tokens = max(n_tokens(inputs) * n_passes // n_probes, 1)
        if not self._is_settled or tokens > self._options.tokens_per_step:
            is_used = self._is_wanted or self._options.rates is not None
            forward = self._count(inputs) if is_used else None
            self._options = replace(
                self._options, tokens_per_step=tokens, forward=forward, n_micro_batches=max(n_passes // n_probes, 1),
                passes_per_traversal=min(together, UNBOUNDED),
            )  # fmt: skip

    def _fit(self, loss: Callable[[], Any], inputs: Mapping[str, Any], *, n_passes: int) -> None:
        """Place units beside what a traversal of so many passes holds."""
        # Room for a generous estimate comes first, or the traversal that is measured might not fit.
        self._make_room(activation_bytes(self._engine.model, inputs, n_passes=n_passes), is_estimate=True)
        found, growth = self._measured(loss, n_passes=n_passes), GROWTH if self._covered else 1.0
        reserve, forward = int(found * growth * SPARE_SHARE) + SPARE_BYTES, self._options.forward
        if forward is not None:
            counted = reserve_for(forward, n_passes=n_passes, device=self._options.device)
            if found > counted:
                logger.warning(
                    "Activations take %s of the device, and %s were counted: more is kept free than `zo2trl plan` "
                    "foresees.", format_bytes(found), format_bytes(counted),
                )  # fmt: skip
            else:
                reserve = max(counted, int(found * growth))
        self._make_room(reserve, is_estimate=False)
        self._covered = int(n_tokens(inputs) * n_passes * growth)

    def _find_write_schedule(self) -> None:
        """Choose how often units are written, which depends on how much a visit computes."""
        store = self._engine.store
        every = write_back_intervals(store.layout, store.placement, self._options)
        store.write_schedule = replace(store.write_schedule, write_back=every)

    @property
    def _is_wanted(self) -> bool:
        return self._options.device.type == "cuda" and self._options.budgets.device != "min"

    def _make_room(self, n_bytes: int, *, is_estimate: bool) -> None:
        budgets = self._options.budgets
        assert budgets.device != "min"
        if is_estimate:  # too generous an estimate must not refuse what may well fit
            n_bytes = min(n_bytes, max(self._room() or 0, budgets.reserve))
        self._options = options = replace(self._options, budgets=replace(budgets, reserve=n_bytes))
        store = self._engine.store
        try:
            layout, placement = store.layout, place_units(store.layout, options)
        except BudgetError:
            if self._is_settled:
                raise
            plan = plan_engine(self._engine.model, options)  # leaf by leaf, perhaps
            layout, placement = plan.layout, plan.placement
        if layout is not store.layout or placement != store.placement:
            self._engine.relayout(layout, placement)

    def _room(self) -> int | None:
        """Bytes that are left of the device budget when weights take the least; kept, because every step reads it."""
        device, layout = self._options.budgets.device, self._engine.store.layout
        if device == "min":
            return None
        if self._least is None or self._least[0] is not layout:
            self._least = layout, smallest_device_budget(layout)
        return device - self._least[1]

    def _measured(self, loss: Callable[[], Any], *, n_passes: int) -> int:
        """Bytes that the traversal of a step takes beside what the placement counts."""
        engine, device = self._engine, self._options.device
        torch.cuda.reset_peak_memory_stats(device)
        engine.dry_run([loss] * max(n_passes // len(engine.probes), 1))
        return max(torch.cuda.max_memory_allocated(device) - engine.store.placement.device_bytes, 0)
