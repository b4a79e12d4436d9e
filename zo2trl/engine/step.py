"""Engine: probes -> passes in lockstep over leased weights -> losses -> a record in the journal.

Does not: know what a batch, a trainer or a file is. A caller hands in closures that each return one loss.

Invariant: weights at home stay clean. A probe's weights exist in scratch and in ring slots about to be refilled only,
and a step touches the store in one way: by appending its record.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from zo2trl.engine.audit import Audit, exchange_losses
from zo2trl.engine.binding import Binding, Forward
from zo2trl.engine.lockstep import Pass, PassLocal, current_pass, traverse
from zo2trl.engine.perturbing import Perturber
from zo2trl.errors import LossPrecisionError, TrainingDiverged, TraversalError
from zo2trl.files.interrupts import let_interrupts_in, uninterrupted
from zo2trl.files.tracing import traced
from zo2trl.layout.layout import Layout, VisitPoint
from zo2trl.parallel.ranks import ALONE, Ranks
from zo2trl.planning.placement import Placement
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import Source
from zo2trl.zo.estimators import CLEAN, Estimate, Estimator, Probe
from zo2trl.zo.records import Record, SkipRecord, StepRecord

__all__ = ["MAX_SKIPS_IN_A_ROW", "Engine"]

MAX_SKIPS_IN_A_ROW = 10
logger = logging.getLogger(__name__)

ROOT = 0  # index of the root point in every layout

Closure = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class _Pending:
    step: int
    seed: int
    estimate: Estimate


class Engine:
    """Runs ZO steps, evaluations and plain forwards of one model whose parameters live in a store.

    Args:
        model: its blocks' forwards are hooked until `close`.
        store: has adopted the model's weights; closed by `shutdown`.
        estimator: chooses probes and turns losses into slopes.
        seeds: step number -> the step's seed.
        ranks: the processes that make the steps together, each with a store of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        store: TieredStore,
        *,
        estimator: Estimator,
        seeds: Callable[[int], int],
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.store, self.estimator, self.ranks = model, store, estimator, ranks
        self._seeds = seeds
        self._audit: Audit | None = None  # the current traversal's audit, where weights are compared
        self._pending: _Pending | None = None
        self._n_skips = _skips_at_end(store.journal.records)
        self.visited: list[int] = []  # indices of the points the last traversal served, in order
        self._perturber = Perturber(store)
        self._is_poisoned = False  # by the traversal that goes on
        self.on_shutdown: list[Callable[[], Any]] = []  # what callers did to the model, to be undone
        self.pass_locals: list[PassLocal] = []  # what every pass has its own of
        self._bind()

    def _bind(self) -> None:
        self.binding = Binding(self.model, self.store.layout, self.store)
        self.binding.bind_home()
        self.binding.hook(self._around, after_stack=self._after_stack, before_state=self.flush)

    @property
    def probes(self) -> list[Probe]:
        """The probes of a step that this process evaluates."""
        return self.ranks.share(self.estimator.probes())

    # -- what callers do

    def step(self, losses: Sequence[Closure], *, step: int, passes_per_traversal: int = 1 << 30) -> Estimate:
        """Evaluate every probe on every micro-batch and estimate the slope; weights do not change yet.

        Args:
            losses: one closure a micro-batch; each returns a scalar tensor in fp32 or float64. A probe's loss is
                their sum, over all processes. Closures are called once per probe of this process, in `no_grad`.
            step: the optimizer step, which names the directions.
            passes_per_traversal: micro-batches are split over several traversals so that no more passes are alive at
                once. The same in all processes: losses may gather metrics, which they do in the order of passes.

        Raises:
            LossPrecisionError: a loss is a 16-bit number.
            ParallelError: another process has ended, or holds other weights or another journal.
        """
        self._pending = None
        estimation, seed = self.estimator.estimation(), self._seeds(step)
        asked = next(estimation)
        while True:
            answers = self._evaluate(asked, losses, step=step, seed=seed, passes_per_traversal=passes_per_traversal)
            try:
                asked = estimation.send(answers)
            except StopIteration as end:
                self._pending = _Pending(step, seed, end.value)
                return end.value

    def _evaluate(
        self, asked: Sequence[Probe], losses: Sequence[Closure], *, step: int, seed: int, passes_per_traversal: int
    ) -> list[float]:
        """The loss of each probe: the sum over the micro-batches of all processes."""
        probes = self.ranks.share(asked)
        group = max(passes_per_traversal // max(len(probes), 1), 1)
        values: list[torch.Tensor] = []
        with self._auditing(step) as audit:
            for start in range(0, len(losses), group):
                values += self._traversal(
                    [(run, probe) for run in losses[start : start + group] for probe in probes], seed=seed
                )
        losses_there = _in_fp64(values)
        self._wait_for_device()
        everybody: list[Sequence[float]] = [losses_there.tolist()]
        if audit is not None:
            everybody = exchange_losses(self.ranks, everybody[0], step=step, store=self.store, audit=audit)
        return [_sum(numbers) for numbers in self.ranks.by_probe(asked, everybody)]

    @contextmanager
    def _auditing(self, step: int) -> Iterator[Audit | None]:
        self._audit = Audit(self.store.layout, turn=step) if self.ranks.size > 1 else None
        try:
            yield self._audit
        finally:
            self._audit = None

    def commit(
        self,
        *,
        learning_rate: float,
        weight_decay: float,
        coefficients: Sequence[float] | None = None,
        grad_norm: float | None = None,
    ) -> None:
        """Append the pending step to the journal; a non-finite loss becomes a skip that leaves the weights alone.

        Args:
            coefficients: replace the estimate's own (after clipping, say).
            grad_norm: what logs show; the mean slope's absolute value by default.

        Raises:
            TrainingDiverged: ten skips in a row.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        estimate = pending.estimate
        if not estimate.is_finite:
            self._skip(pending)
            return
        self._n_skips = 0
        record = StepRecord(
            step=pending.step, seed=pending.seed, learning_rate=learning_rate, weight_decay=weight_decay,
            zo_eps=self.estimator.zo_eps, losses=estimate.losses,
            coefficients=tuple(estimate.coefficients if coefficients is None else coefficients),
            scalars=(abs(estimate.projected_grad) if grad_norm is None else grad_norm,),
        )  # fmt: skip
        with self._saying_what_fills_memory():
            self.store.append(record)

    def dry_run(self, losses: Sequence[Closure]) -> None:
        """Do what a step does up to its losses, and nothing with them: for those who measure."""
        self._traversal([(run, probe) for run in losses for probe in self.probes], seed=0)

    def run_clean(self, closures: Sequence[Closure]) -> list[Any]:
        """Call every closure once on the weights as they are, all in one traversal; their values in order."""
        with self.store.writing_back():
            return self._traversal([(run, CLEAN) for run in closures], seed=0)

    @uninterrupted
    def flush(self) -> None:
        """Bring homes and parameters up to date: from here on `model.state_dict()` shows every finished step."""
        if current_pass() is None and self.store.is_open:
            self._commit_changes()
            self.store.flush()
            self.binding.bind_home()

    def replace_weights(self, source: Source) -> None:
        """Overwrite every weight from outside (a checkpoint)."""
        self.store.replace(source)
        self.binding.bind_home()

    def go_back(self, position: int, *, base: Source) -> None:
        """Show the weights after `position` records; see `TieredStore.go_back`."""
        self.store.go_back(position, base=base)
        self.binding.bind_home()

    def relayout(self, layout: Layout, placement: Placement) -> None:
        """Visit the same units at other points (whole blocks, leaves), or let them live elsewhere."""
        self._commit_changes()  # what was written into the views up to here would not be seen through new ones
        self.binding.unhook()
        self.binding.let_go()  # a unit that moves away should not be held here as well
        self._perturber.free()
        try:
            self.store.relayout(layout, placement)
        finally:
            self._bind()

    def shutdown(self, *, flush: bool = True) -> None:
        """Absorb every step, take the hooks off and close the store; idempotent, and done even where a part fails.

        The parameters keep showing what their homes held, so on the CPU the model stays an ordinary model. Without
        `flush` that may be a few steps old: for processes that have to end now, with everything in the journal.
        """
        if not self.store.is_open:
            return
        with ExitStack() as everything:
            for undo in reversed(self.on_shutdown):
                everything.callback(undo)
            everything.callback(self.store.close)
            everything.callback(self._perturber.free)
            everything.callback(self.binding.unhook)
            if flush:
                everything.callback(self.binding.set_misfits_aside())
                self.flush()

    # -- traversing

    # Signals wait while parameters are bound or poisoned: what they point to would be taken for a user's new weights.
    @uninterrupted
    @traced("traversal", lambda engine, runs, **_: f"{len(runs)} passes")
    def _traversal(self, runs: Sequence[tuple[Closure, Probe]], *, seed: int) -> list[Any]:
        if current_pass() is not None:
            raise TraversalError(
                "A traversal was started from inside another traversal: a loss closure must only run the model."
            )
        self._commit_changes()
        self.visited = []
        own = self.pass_locals
        self._is_poisoned = False
        passes = [Pass(run, probe, first_point=ROOT, pass_locals=own) for run, probe in runs]
        with torch.no_grad(), self._saying_what_fills_memory():
            try:
                values = traverse(passes, lambda index, waiting: self._serve(index, waiting, seed), pass_locals=own)
            except BaseException:
                self.store.settle()  # unit versions that this traversal leaves incomplete are forgotten
                raise
            finally:
                self.binding.bind_home()
        self.store.end_traversal()
        self._expect_the_same_again()
        return values

    def _wait_for_device(self) -> None:
        # Reading a number from the device waits for it with the interpreter locked: threads that write units back and
        # fetch the next ones would stand still until the traversal has been computed. This wait lets them go on.
        if self.store.device.type == "cuda":
            torch.cuda.current_stream(self.store.device).synchronize()

    @contextmanager
    def _saying_what_fills_memory(self) -> Iterator[None]:
        """A note leaves an out-of-memory error what it was: trainers look for it to try a smaller batch."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(_memory_note(self.store))
            raise

    @traced("visit", lambda engine, index, *_: engine.store.layout.points[index].module_name or "root")
    def _serve(self, index: int, waiting: Sequence[Pass], seed: int) -> None:
        let_interrupts_in()  # between two visits no lease is open
        point = self.store.layout.points[index]
        self.visited.append(index)
        probes = list(dict.fromkeys(one.probe for one in waiting))
        with self.store.lease(point) as leases:
            if self._audit is not None:
                self._audit.see(leases)
            weights = [lease.weights for lease in leases]
            for round_ in self._perturber.rounds(leases, probes, seed=seed):
                if (
                    not self._is_poisoned
                ):  # only now: the device has waited for its first work since the last traversal
                    self.binding.poison_all()
                    self._is_poisoned = True
                for probe, perturbed in round_:
                    self.binding.bind(point, weights, perturbed=perturbed)
                    for one in waiting:
                        if one.probe == probe:
                            one.resume()
            self.binding.poison(point)

    def _expect_the_same_again(self) -> None:
        points = self.store.layout.points
        self.store.expect([points[index] for index in self.visited])

    # -- hooks in the model

    def _around(self, point: VisitPoint, forward: Forward, arguments: tuple[tuple, dict]) -> Any:
        running = current_pass()
        if running is not None:
            running.wait_for(point.index)
            return forward(*arguments[0], **arguments[1])
        return self._visit_alone(point, forward, arguments)

    @uninterrupted
    def _visit_alone(self, point: VisitPoint, forward: Forward, arguments: tuple[tuple, dict]) -> Any:
        """Run a forward outside any traversal: lease, bind, run, bind home."""
        self._commit_changes(point)
        with self.store.writing_back(), self.store.lease_clean(point) as clean:
            self.binding.bind(point, clean)
            try:
                with self._refusing_backward(point):
                    return forward(*arguments[0], **arguments[1])
            finally:
                self.binding.bind_home_of(point)

    def _commit_changes(self, point: VisitPoint | None = None) -> None:
        if changed := self.binding.collect_changes(point):
            if point is not None:  # other points may be written to as well: all of it becomes durable together
                changed = list(dict.fromkeys([*changed, *self.binding.collect_changes()]))
            self.store.commit_changes(changed)
            self.binding.bind_home()

    def _refusing_backward(self, point: VisitPoint) -> AbstractContextManager[Any]:
        # Autograd would keep views of a ring slot, which holds other weights by the time of the backward pass.
        if not torch.is_grad_enabled() or all(self.store.tier_of(s.unit) == "gpu" for s in point.segments):
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda saved: None, _no_backward)

    def _after_stack(self) -> None:
        running = current_pass()
        if running is not None:
            running.wait_for(ROOT)
        else:  # the user is next: what they write must not meet copies fetched ahead
            self.store.weights_changed()

    def _skip(self, pending: _Pending) -> None:
        self._n_skips += 1
        estimate = pending.estimate
        logger.warning(
            "Step %d is skipped and the weights stay as they are: the loss is not finite (plus %s, minus %s).",
            pending.step, estimate.loss_plus, estimate.loss_minus,
        )  # fmt: skip
        self.store.append(SkipRecord(step=pending.step, seed=pending.seed, losses=estimate.losses))
        if self._n_skips >= MAX_SKIPS_IN_A_ROW:
            raise TrainingDiverged(
                f"The loss was not finite in {self._n_skips} steps in a row (at step {pending.step}: plus "
                f"{estimate.loss_plus}, minus {estimate.loss_minus}). No weights were changed by them; the last good "
                f"step is {len(self.store.records) - self._n_skips}. Look at the batches of these steps, lower "
                "`learning_rate` or `zo_eps`, or load the model in bfloat16 or float32."
            )


def _memory_note(store: TieredStore) -> str:
    """Describe what to change when the device is full."""
    planned = store.placement.device_bytes
    peak = torch.cuda.max_memory_allocated(store.device) if store.device.type == "cuda" else planned
    return (
        f"zo2trl: weights, ring and scratch take {planned:,} bytes of `device_memory`, the allocator's peak was "
        f"{peak:,}: activations come on top. Lower `per_device_train_batch_size` or `max_length`, or set "
        "`device_memory` so much lower that they fit. Every step so far is in the journal."
    )


def _skips_at_end(records: Sequence[Record]) -> int:
    return sum(1 for _ in takewhile(lambda record: isinstance(record, SkipRecord), reversed(records)))


def _no_backward(saved: Any) -> Any:
    raise TraversalError(
        "A backward pass cannot go through streamed weights: they are gone from the device by now. Call "
        "`trainer.close()` first, which leaves an ordinary model, or use `torch.no_grad()`."
    )


def _in_fp64(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Losses as one tensor, where they were made."""
    for value in values:
        if value.dtype in (torch.float16, torch.bfloat16):
            raise LossPrecisionError(
                f"The loss is a {value.dtype} number. At loss 0.5 and eps 1e-3 that quantises the projected gradient "
                "in steps of 0.24 (float16) or 1.95 (bfloat16). Return the loss in float32: compute it from "
                "`logits.float()`."
            )
    return torch.stack([value.detach().double().reshape(()) for value in values])


def _sum(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan
