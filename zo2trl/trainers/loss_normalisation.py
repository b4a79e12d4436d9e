"""This module finds the number that the loss of a micro-batch must be divided by.

The Trainer passes `num_items_in_batch` to every model that accepts keyword arguments and then assumes that the loss is
divided by it. Several model classes (sequence classification, masked LM, T5) accept it and average over their own
batch all the same; their loss would be multiplied by the number of micro-batches. So the loss is evaluated with two
values of it, once.

With several processes the Trainer (and TRL) multiply a loss by their number, because DDP would average over them; a
loss of the user's own may not, and one that averages over its own batch should not have been multiplied. Here losses
are summed over processes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["LossNormalisation"]


class LossNormalisation:
    """LossNormalisation finds, once per trainer, whether its loss uses `num_items_in_batch` and was multiplied."""

    _consumes: bool | None = None
    _was_multiplied: bool | None = None

    def detect(self, trainer: Any, model: nn.Module, batches: list[tuple[Any, Any]]) -> None:
        """Compare losses of one micro-batch with its losses for twice as many items.

        Undecided micro-batches (no label that counts, a loss that is not finite) are skipped. If all of them are
        undecided, the next step decides.
        """
        n_shares = trainer.ranks.n_shares_of_data
        if self._consumes is not None or len(batches) * n_shares == 1 or batches[0][1] is None:
            return
        if trainer.objective is not None or (n_shares == 1 and self._declared(trainer) is not None):
            return
        found = next(filter(None, (self._compare(trainer, model, *batch) for batch in batches)), (-1, -1))
        votes = [row for row in trainer.ranks.gather("normalisation of the loss", found) if row[0] >= 0]
        if votes:
            self._consumes, self._was_multiplied = map(bool, votes[0])

    def divisor(self, trainer: Any, num_items_in_batch: Any) -> int:
        """Return what a micro-batch's loss must be divided by.

        The sum over micro-batches and processes is then the loss of the step.
        """
        n_shares, consumes = trainer.ranks.n_shares_of_data, self._consumes
        normalised = self._declared(trainer)
        if consumes is None:
            consumes = num_items_in_batch is not None if normalised is None else normalised
        if normalised is None:
            normalised = consumes
        counts_all = trainer.args.average_tokens_across_devices and num_items_in_batch is not None
        divisor = 1 if normalised else trainer.current_gradient_accumulation_steps
        if not (consumes and counts_all):
            divisor *= n_shares  # each process has normalised over its own items
        multiplies = counts_all and trainer.objective is None
        return (
            divisor * n_shares if (multiplies if self._was_multiplied is None else self._was_multiplied) else divisor
        )

    def _compare(self, trainer: Any, model: nn.Module, inputs: Any, n_items: Any) -> tuple[int, int] | None:
        """Return whether a loss depends on the number of items and whether it was multiplied; None if undecided."""
        closures = [partial(self._loss_given, trainer, model, inputs, items) for items in (n_items, 2 * n_items)]
        once, twice = (abs(float(value.mean())) for value in trainer.engine.run_clean(closures))
        if not math.isfinite(once) or once == 0.0:
            return None
        if trainer.ranks.n_shares_of_data == 1:
            return int(twice < 0.75 * once), 0
        with _not_averaging(trainer.args):  # in a separate traversal, because passes of one interleave
            (alone,) = (abs(float(value.mean())) for value in trainer.engine.run_clean(closures[:1]))
        return int(twice < 0.75 * once), int(alone < 0.75 * once)

    def _declared(self, trainer: Any) -> bool | None:
        if trainer.objective is not None:
            return trainer.divides_by_items
        if trainer.compute_loss_func is not None:
            return None  # some functions divide by `num_items_in_batch`, some return the mean of their batch
        return getattr(trainer, "loss_is_scaled_for_ga", None)

    def _loss_given(self, trainer: Any, model: nn.Module, inputs: Any, n_items: Any) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(inputs), num_items_in_batch=n_items)


@contextmanager
def _not_averaging(args: Any) -> Iterator[None]:
    before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before
