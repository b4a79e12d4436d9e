"""ZOSFTTrainer: TRL's SFTTrainer, trained with forward passes only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from zo2trl.trainers.arguments import ZOArguments
from zo2trl.trainers.mixin import ZOTrainerMixin

__all__ = ["ZOSFTConfig", "ZOSFTTrainer"]


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):
    """
    Configuration of [`ZOSFTTrainer`]: the parameters of [`ZOArguments`] and of [`~trl.SFTConfig`].
    """


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains with forward passes only, out of GPU memory, host memory and disk.

    Takes the arguments of [`~trl.SFTTrainer`], with two differences:

    Args:
        model ([`~transformers.PreTrainedModel`] or `str`):
            A loaded model, or the path of a checkpoint, which is then read unit by unit in the checkpoint's own dtype
            (unless `model_init_kwargs["dtype"]` says otherwise) and never held in memory.
        args ([`ZOSFTConfig`] or [`~trl.SFTConfig`], *optional*):
            A plain `SFTConfig` is converted with ZO defaults.
    """

    config_class = ZOSFTConfig
    _lengths_before: dict[str, int]

    @contextmanager
    def probes_counted_once(self, n_probes: int) -> Iterator[None]:
        """TRL adds up the tokens of every call of `compute_loss`, and a step makes one per probe."""
        before, metrics = (
            self._total_train_tokens,
            {key: list(values) for key, values in self._metrics["train"].items()},
        )
        yield
        if not n_probes:  # a look at the loss that is no training step
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            self._total_train_tokens = before
            return
        self._total_train_tokens = before + (self._total_train_tokens - before) / n_probes
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self._lengths_before = {key: len(values) for key, values in metrics.items()}

    def _measured(self) -> Any:
        known = self._lengths_before
        new = {key: list(values)[known.get(key, 0) :] for key, values in self._metrics["train"].items()}
        return {"metrics": new | {"num_tokens": []}, "num_tokens": self._total_train_tokens}

    def _measured_before(self, measured: Any) -> None:
        for key, values in measured["metrics"].items():
            self._metrics["train"][key] += values
        self._total_train_tokens = measured["num_tokens"]
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _counters(self) -> dict[str, Any]:
        metrics = {key: list(values) for key, values in self._metrics["train"].items()}
        return super()._counters() | {"trl": {"metrics": metrics, "num_tokens": self._total_train_tokens}}

    def _forget_counters(self) -> None:
        super()._forget_counters()
        self._metrics["train"].clear()
        self._total_train_tokens = 0

    def _set_counters(self, counters: dict[str, Any]) -> None:
        super()._set_counters(counters)
        self._metrics["train"].clear()
        self._metrics["train"].update(counters["trl"]["metrics"])
        self._total_train_tokens = counters["trl"]["num_tokens"]
