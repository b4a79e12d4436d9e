"""This module defines SteppingMixin, which makes the Trainer's training step with forward passes only.

Does not: open or close the engine (mixin.py), or make checkpoints (resume/saving.py).

`training_step` collects micro-batches until gradients would sync, then estimates; `_clip_grad_norm` clips the scalar;
the optimizer's `step` commits it to the journal.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import Trainer

from zo2trl.engine.activations import n_tokens
from zo2trl.engine.device_fit import DeviceFit
from zo2trl.engine.loop_notes import note_measured
from zo2trl.engine.retrace import Retrace, refuse_changed_weights
from zo2trl.files.malloc_trim import return_free_pages
from zo2trl.trainers.loss_normalisation import LossNormalisation
from zo2trl.trainers.metrics import StepMetrics
from zo2trl.trainers.objective.objective_mixin import ObjectiveMixin
from zo2trl.trainers.resume.resuming import ResumingMixin
from zo2trl.trainers.signals import stop_if_asked
from zo2trl.trainers.startup_report import announce

__all__ = ["SteppingMixin"]

_Base = Trainer if TYPE_CHECKING else object

# TRL's callbacks that read parameters after every step, so that pending updates must be applied before.
READS_PARAMETERS = frozenset({"BEMACallback"})


class SteppingMixin(ObjectiveMixin, ResumingMixin, _Base):
    """SteppingMixin is the part of `ZOTrainerMixin` that makes steps."""

    device_fit: DeviceFit
    _normalisation: LossNormalisation
    _step_metrics: StepMetrics
    _micro_batches: list[tuple[Any, Any]]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Collect micro-batches until gradients would sync, then estimate the slope from all in one traversal."""
        stop_if_asked()
        self._micro_batches.append((self._prepare_inputs(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        self._randomness.used(len(batches))
        # Loss and metric code reads `training` of the root module; its submodules run without dropout, as in MeZO.
        model.eval()
        model.training = True
        if self._retrace is not None and not self._retrace.is_over:
            return self._retrace_step(self._retrace)
        self._retrace = None
        engine = self.engine
        step_offset = self._prepare_step(model, batches)
        started_s = time.perf_counter()
        passes_per_traversal, n_tokens_of_step = self._agree_on_step(
            [inputs for inputs, _ in batches], self.device_fit.passes_per_traversal(batches[0][0])
        )
        with self.probes_counted_once(len(engine.estimator.probes())):
            estimate = engine.step(
                [partial(self._loss, model, *batch) for batch in batches],
                step=step_offset + self.state.global_step,
                passes_per_traversal=passes_per_traversal,
            )
        self._estimate, self._grads = estimate, estimate.coefficients
        every = self.args.torch_empty_cache_steps
        if every and self.state.global_step % every == 0:
            clear_device_cache()
        moved, self._moved_before = engine.store.traffic - self._moved_before, engine.store.traffic.copy()
        self._step_metrics.add_work(
            n_tokens=n_tokens_of_step, seconds=time.perf_counter() - started_s, moved=moved,
        )  # fmt: skip
        return torch.tensor(estimate.loss, device=self.args.device)

    def _retrace_step(self, retrace: Retrace) -> torch.Tensor:
        refuse_changed_weights(
            self.engine, step=self.state.global_step,
            advice="If a callback did it, let it ask `trainer.is_replaying` first.",
        )  # fmt: skip
        self._estimate = retrace.estimate
        self._grads = self._estimate.coefficients
        measured = retrace.measured()
        if measured is not None:
            self._restore_measured(measured)
        return torch.tensor(self._estimate.loss, device=self.args.device)

    def _prepare_step(self, model: nn.Module, batches: list[tuple[Any, Any]]) -> int:
        with self.probes_counted_once(0), self._without_gathering():
            self._normalisation.detect(self, model, batches)
            largest = max(batches, key=lambda batch: n_tokens(batch[0]))
            n_passes = len(self.engine.probes) * len(batches)
            look = partial(self.weight_sensitive_loss, model, *largest)
            if self.device_fit.before_steps(look, largest[0], n_passes=n_passes):
                self._moved_before = self.engine.store.traffic.copy()
                announce(self, largest[0], n_micro_batches=len(batches))
        if self._step_offset is None:
            self._step_offset = self._find_step_offset()
        if self._begins_a_training:
            self._begins_a_training = False
            self._note_start(self._step_offset)
        return self._step_offset

    def _find_step_offset(self) -> int:
        # A second call of `train()` counts steps from 0 again, but must not reuse directions and records.
        records, first_step = self.engine.store.records, self.state.global_step
        return records[-1].step + 1 - first_step if records and records[-1].step >= first_step else 0

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        with self.compute_loss_context_manager():
            loss: Any = self.compute_step_loss(model, dict(inputs), num_items_in_batch)
        if self.args.device.type == "cpu":  # else freed memory of every pass would add up, in fragments
            return_free_pages()
        return loss.mean() / self._normalisation.divisor(self, num_items_in_batch)

    @contextmanager
    def probes_counted_once(self, n_probes: int) -> Iterator[None]:
        """Enclose a traversal in which `n_probes` probes see every batch.

        Trainers that count tokens in `compute_loss` override it to divide their counts.
        """
        yield

    def _clip_grad_norm(self, model: nn.Module) -> float:
        if (norm := self._get_grad_norm(model)) > self.args.max_grad_norm > 0:
            self._grads = tuple(g * self.args.max_grad_norm / norm for g in self._grads)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        if grad_norm is None:
            grad_norm = abs(self._estimate.projected_grad) if self._estimate.is_finite else math.nan
            self._grad_norm = grad_norm
        return grad_norm

    def _commit(self, *, learning_rate: float) -> None:
        self._step_metrics.add(self._estimate)
        if self._retrace is not None:
            self._retrace.advance(learning_rate=learning_rate)
            return
        measured = self._measured()
        if measured is not None:
            note_measured(self.engine, measured)
        self.engine.commit(
            learning_rate=learning_rate, weight_decay=self.args.weight_decay, coefficients=self._grads,
            grad_norm=self._grad_norm,
        )  # fmt: skip
        kinds = (kind.__name__ for callback in self.callback_handler.callbacks for kind in type(callback).__mro__)
        if not READS_PARAMETERS.isdisjoint(kinds):
            self.engine.flush()

    def _measured(self) -> Any:
        """Return, as JSON, what the forwards of this step measured besides losses, if the trainer logs it."""
        return None

    def _restore_measured(self, measured: Any) -> None:
        """Restore what `_measured` returned for a step that is retraced without forwards."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `zo/*` means since the last log to training logs."""
        if "loss" in logs:
            logs.update(self._with_objective(self._step_metrics.take()))
        super().log(logs, start_time)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> int:
        """Count a forward (2 of the usual 6 units) per probe of this process, and no backward."""
        n_probes = len(self.engine.probes)
        return super().floating_point_ops(inputs) * n_probes // 3  # type: ignore[misc]
