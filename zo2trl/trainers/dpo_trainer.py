"""This module defines ZODPOTrainer: TRL's DPOTrainer, trained with forward passes only.

Does not: hold a second copy of the model. With adapters the reference is the base below them, evaluated once a step
for all probes; else its log-probabilities are computed before training, from the weights as they are then.

Invariant: a reference log-probability is computed from clean weights, and is the same in both probes.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from zo2trl.engine.activations import n_tokens
from zo2trl.errors import UnsupportedError
from zo2trl.trainers.arguments.config import ZOArguments
from zo2trl.trainers.evaluation import MAX_BATCHES_PER_TRAVERSAL
from zo2trl.trainers.trl_mixin import ZOTRLMixin

__all__ = ["ZODPOConfig", "ZODPOTrainer"]

logger = logging.getLogger(__name__)

_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
_IMAGES = ("image", "images")


@dataclass
class ZODPOConfig(ZOArguments, DPOConfig):
    """
    Configuration of [`ZODPOTrainer`]: the parameters of [`ZOArguments`] and of [`~trl.DPOConfig`].
    """


class ZODPOTrainer(ZOTRLMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that trains with forward passes only, out of GPU memory, host memory and disk.

    Takes the arguments of [`~trl.DPOTrainer`], with these differences:

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `str`):
            A loaded model, or the path of a checkpoint, which is then read unit by unit in the checkpoint's own dtype
            (unless `model_init_kwargs["dtype"]` says otherwise) and never held in memory.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            It is evaluated once for every row before training, and is on the device only then. Without it the
            reference is `model` as it is before training: with adapters the base below them, evaluated in every
            step unless `precompute_ref_log_probs=True`; without adapters `precompute_ref_log_probs` is switched on,
            because a second copy of the model is never made. Datasets that have the columns `ref_chosen_logps` and
            `ref_rejected_logps` need no reference at all.
        args ([`ZODPOConfig`] or [`~trl.DPOConfig`], *optional*):
            A plain `DPOConfig` is converted with ZO defaults.
    """

    config_class = ZODPOConfig
    rows_are_pairs = True

    def _check_given(self, given: dict[str, Any]) -> None:
        config, model, reference = given["args"], given.get("model"), given.get("ref_model")
        is_adapted = given.get("peft_config") is not None or hasattr(model, "peft_config")
        if config.precompute_ref_log_probs or (is_adapted and reference is None):
            return
        _refuse_streams_and_images(given.get("train_dataset"))
        config.precompute_ref_log_probs = True
        logger.warning(
            "`precompute_ref_log_probs` is switched on: the log-probabilities of %s are computed once for every row, "
            "before training, instead of keeping a second model through it.",
            "`model` as it is now, the reference," if reference is None else "`ref_model`",
        )

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.precompute_ref_logps = True  # `compute_loss` reads them from batches; methods below add them

    # -- reference log-probabilities for whole datasets

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add the columns of reference log-probabilities to the dataset, several batches a traversal.

        The cache is the dataset's own, as upstream; its key holds everything that changes a value.
        """
        columns = dataset.column_names or []
        if not self.args.precompute_ref_log_probs or set(_REFERENCES) <= set(columns):
            return dataset
        _refuse_streams_and_images(dataset)
        args = self.args
        choices = (args.ld_alpha, args.max_length, args.truncation_mode, args.pad_to_multiple_of, args.bf16, args.fp16)
        key = (dataset._fingerprint, self._precompute_model_hash, batch_size, *choices)
        with self._reference_on_device():
            return dataset.map(
                partial(self._with_references, batch_size=batch_size), batched=True,
                batch_size=batch_size * MAX_BATCHES_PER_TRAVERSAL, new_fingerprint=Hasher.hash(key),
                desc=f"Computing reference log probs for {name} dataset",
            )  # fmt: skip

    def _with_references(self, columns: dict[str, list], *, batch_size: int) -> dict[str, list[float]]:
        n_rows = len(next(iter(columns.values())))
        rows = [{name: values[i] for name, values in columns.items()} for i in range(n_rows)]
        batches = [self.data_collator(rows[i : i + batch_size]) for i in range(0, n_rows, batch_size)]
        batches = [self._prepare_inputs(batch) for batch in batches]
        if self.ref_model is not None:
            pairs = [self.compute_ref_log_probs(self.ref_model, batch) for batch in batches]
        else:
            pairs = self._reference_logps(batches)
        return {
            name: torch.cat([pair[side] for pair in pairs]).tolist() for side, name in enumerate(_REFERENCES)
        }  # fmt: skip

    @contextmanager
    def _reference_on_device(self) -> Iterator[None]:
        """Keep a separate reference model on the device while it is evaluated."""
        if self.ref_model is None:
            yield
            return
        self.ref_model.to(self.args.device)
        try:
            yield
        finally:
            self.ref_model.to("cpu")

    # -- reference log-probabilities of the base below adapters, batch by batch

    def _reference_logps(self, batches: Sequence[Any]) -> list[Any]:
        """Compute the reference log-probabilities of some batches, at clean weights.

        A traversal takes as many batches as there is memory for.
        """
        engine = self.engine
        largest = max(batches, key=n_tokens)
        size = min(self.device_fit.passes_per_traversal(largest), MAX_BATCHES_PER_TRAVERSAL)
        self.device_fit.before_evaluation(largest, n_passes=min(size, len(batches)), whole_logits=False)
        pairs: list[Any] = []
        for start in range(0, len(batches), size):
            closures = [
                partial(self.compute_ref_log_probs, self.model, dict(b)) for b in batches[start : start + size]
            ]
            with self._adapters_off():
                pairs += engine.run_clean(closures)
        return pairs

    def _adapters_off(self) -> Any:
        if not hasattr(self.model, "peft_config"):
            return nullcontext()
        return use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None)

    def _add_references(self, batches: Sequence[dict[str, Any]]) -> None:
        without = [batch for batch in batches if _REFERENCES[0] not in batch]
        if without:
            for batch, pair in zip(without, self._reference_logps(without), strict=True):
                batch |= dict(zip(_REFERENCES, pair, strict=True))

    def _prepare_step(self, model: Any, batches: list[tuple[Any, Any]]) -> int:
        was_training = model.training
        self._add_references([inputs for inputs, _ in batches])
        model.training = was_training
        return super()._prepare_step(model, batches)

    def before_predictions(self, batches: Sequence[Any]) -> None:
        """See `ObjectiveMixin.before_predictions`: the reference scores all batches in a traversal of its own."""
        for batch in batches:
            batch.update(self._prepare_inputs(dict(batch)))
        self._add_references(batches)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See [`~trl.DPOTrainer`]. Reference log-probabilities that a batch lacks are computed first."""
        if _REFERENCES[0] not in inputs:
            inputs |= dict(zip(_REFERENCES, self.compute_ref_log_probs(model, inputs), strict=True))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _refuse_streams_and_images(dataset: Any) -> None:
    what: str | None = None
    if set(_REFERENCES) <= set(getattr(dataset, "column_names", None) or ()):
        return
    if isinstance(dataset, IterableDataset):
        what = "it is a stream"
    elif isinstance(dataset, Dataset) and set(_IMAGES) & set(dataset.column_names):
        what = "its rows hold images, which are processed on the fly"
    if what is not None:
        raise UnsupportedError(
            "Without adapters the reference is the model before training, so its log-probabilities are computed for "
            f"all rows of `train_dataset` first, and {what}. A second copy of the model is never made. Train adapters "
            "(`peft_config=`), use a dataset with a length, or add the columns `ref_chosen_logps` and "
            "`ref_rejected_logps`."
        )
