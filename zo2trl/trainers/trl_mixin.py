"""This module defines ZOTRLMixin, which counts once a step what TRL's trainers count in every call of `compute_loss`.

Does not: distinguish TRL's trainers. They share `_metrics` (means since the last log) and, most of them,
`_total_train_tokens`; each keeps its own `_prepare_dataset` and the rest.

Invariant: a token is counted once, however many probes see it; evaluations of the loss outside steps change no count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from zo2trl.engine.lockstep import current_pass
from zo2trl.errors import UnsupportedError
from zo2trl.trainers.metrics import count_tokens
from zo2trl.trainers.mixin import ZOTrainerMixin

__all__ = ["ZOTRLMixin"]


class ZOTRLMixin(ZOTrainerMixin):
    """A ZOTRLMixin comes before a TRL trainer: `class ZOKTOTrainer(ZOTRLMixin, KTOTrainer)`, with a `config_class`."""

    takes_labels = False  # most losses of TRL are computed from other columns
    _metrics: dict[str, Any]
    _total_train_tokens: float
    _lengths_before: dict[str, int]
    ref_model: Any

    # -- reference models

    def _check_given(self, given: dict[str, Any]) -> None:
        config, is_given = given["args"], given.get("ref_model") is not None
        if not is_given and not hasattr(config, "precompute_ref_log_probs"):
            return  # this kind of trainer has no reference
        is_adapted = given.get("peft_config") is not None or hasattr(given.get("model"), "peft_config")
        if is_given or not (is_adapted or config.precompute_ref_log_probs):
            what = "`ref_model`" if is_given else "The reference of full fine-tuning"
            raise UnsupportedError(
                f"{what} would be a second whole model beside the one in the store. Train adapters (`peft_config=`): "
                "the reference is then the base below them. Or set `precompute_ref_log_probs=True` without a "
                "`ref_model`, if the trainer has that option: the reference then sees every row once, before training."
            )

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """See the trainer's own method.

        Outside a traversal this runs one, because the weights may be in any tier.
        """
        compute = super().compute_ref_log_probs  # type: ignore[misc]
        if self.ref_model is not None or current_pass() is not None:
            return compute(model, inputs)
        return self.engine.run_clean([partial(compute, self.model, self._prepare_inputs(inputs))])[0]

    # -- what is counted

    def compute_step_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        """See `ObjectiveMixin.compute_step_loss`.

        TRL's own loss counts tokens; where an objective replaces it, this method counts them.
        """
        if self.objective is not None and hasattr(self, "_total_train_tokens"):
            n_tokens = torch.tensor(count_tokens(inputs), device=self.args.device)
            n_tokens_of_all = self.accelerator.gather_for_metrics(n_tokens).sum().item()  # type: ignore[union-attr]
            self._total_train_tokens += n_tokens_of_all // getattr(self, "_tp_size", 1)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return super().compute_step_loss(model, inputs, num_items_in_batch)

    @contextmanager
    def probes_counted_once(self, n_probes: int) -> Iterator[None]:
        """Divide the counts of a step by its probes.

        TRL adds up the tokens of every call of `compute_loss`, and a step makes one call per probe.
        """
        metrics = {key: list(values) for key, values in self._metrics["train"].items()}
        before = self._n_tokens()
        yield
        if not n_probes:  # an evaluation of the loss outside a training step
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            self._set_n_tokens(before)
            return
        self._set_n_tokens(before + (self._n_tokens() - before) / n_probes)
        self._lengths_before = {key: len(values) for key, values in metrics.items()}

    def _n_tokens(self) -> float:
        return getattr(self, "_total_train_tokens", 0)

    def _set_n_tokens(self, n_tokens: float) -> None:
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = n_tokens
            if "num_tokens" in self._metrics["train"]:
                self._metrics["train"]["num_tokens"] = [n_tokens]

    def _measured(self) -> Any:
        known = self._lengths_before
        new = {key: list(values)[known.get(key, 0) :] for key, values in self._metrics["train"].items()}
        if "num_tokens" in new:  # this is a total, not a list of values
            new["num_tokens"] = []
        return {"metrics": new, "num_tokens": self._n_tokens()}

    def _restore_measured(self, measured: Any) -> None:
        for key, values in measured["metrics"].items():
            self._metrics["train"][key] += values
        self._set_n_tokens(measured["num_tokens"])

    def _counters(self) -> dict[str, Any]:
        metrics = {key: list(values) for key, values in self._metrics["train"].items()}
        return super()._counters() | {"trl": {"metrics": metrics, "num_tokens": self._n_tokens()}}

    def _forget_counters(self) -> None:
        super()._forget_counters()
        self._metrics["train"].clear()
        self._set_n_tokens(0)

    def _set_counters(self, counters: dict[str, Any]) -> None:
        super()._set_counters(counters)
        self._metrics["train"].clear()
        self._metrics["train"].update(counters["trl"]["metrics"])
        self._set_n_tokens(counters["trl"]["num_tokens"])
