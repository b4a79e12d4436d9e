"""Who divides the loss by the number of accumulated micro-batches.

The Trainer hands `num_items_in_batch` to every model that accepts keyword arguments and then takes the loss to be
normalised by it. Several model classes (sequence classification, masked LM, T5) accept it and average over their own
batch all the same; their loss would be multiplied by the number of micro-batches. So we ask the loss itself, once.
"""

import math
from functools import partial
from typing import Any

from torch import nn

__all__ = ["LossScaling"]


class LossScaling:
    """Decides once per trainer whether its loss consumes `num_items_in_batch`."""

    _consumes: bool | None = None

    def find_out(self, trainer: Any, model: nn.Module, batches: list[tuple[Any, Any]]) -> None:
        """Compare losses of one micro-batch with the losses when told that there are twice as many items.

        Undecided micro-batches (no label that counts, a loss that is not finite) are passed over; if there is no
        other, the next step is asked.
        """
        if self._consumes is not None or len(batches) == 1 or self._declared(trainer) is not None:
            return
        for inputs, n_items in batches:
            if n_items is None:
                return
            looks = [partial(self._loss_given, trainer, model, inputs, items) for items in (n_items, 2 * n_items)]
            once, twice = (abs(float(value.mean())) for value in trainer.engine.run_clean(looks))
            if math.isfinite(once) and once > 0.0:
                self._consumes = twice < 0.75 * once
                return

    def divisor(self, trainer: Any, num_items_in_batch: Any) -> int:
        """What a micro-batch's loss must be divided by."""
        normalised = self._declared(trainer)
        if normalised is None:
            normalised = num_items_in_batch is not None if self._consumes is None else self._consumes
        return 1 if normalised else trainer.current_gradient_accumulation_steps

    def _declared(self, trainer: Any) -> bool | None:
        if trainer.compute_loss_func is not None:
            return True
        return getattr(trainer, "loss_is_scaled_for_ga", None)

    def _loss_given(self, trainer: Any, model: nn.Module, inputs: Any, n_items: Any) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(inputs), num_items_in_batch=n_items)
