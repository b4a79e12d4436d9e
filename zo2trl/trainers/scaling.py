"""Who divides the loss by the number of accumulated micro-batches.

The Trainer hands `num_items_in_batch` to every model that accepts keyword arguments and then takes the loss to be
normalised by it. Several model classes (sequence classification, masked LM, T5) accept it and average over their own
batch all the same; their loss would be multiplied by the number of micro-batches. So we ask the loss itself, once.
"""

from typing import Any

from torch import nn

from zo2trl.engine.lockstep import current_pass

__all__ = ["LossScaling"]


class LossScaling:
    """Decides once per trainer whether its loss consumes `num_items_in_batch`."""

    _consumes: bool | None = None

    def find_out(self, trainer: Any, model: nn.Module, batches: list[tuple[Any, Any]]) -> None:
        """Compare the loss of one micro-batch with the loss when told that there are twice as many items."""
        inputs, n_items = batches[0]
        if self._consumes is not None or len(batches) == 1 or n_items is None:
            return
        self._consumes = False  # while we look, `divisor` must not depend on the answer

        def loss(items: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)

        assert current_pass() is None
        once, twice = trainer.engine.run_clean([lambda: loss(n_items), lambda: loss(2 * n_items)])
        self._consumes = float(twice.mean()) < 0.75 * float(once.mean())

    def divisor(self, trainer: Any, num_items_in_batch: Any) -> int:
        """What a micro-batch's loss must be divided by."""
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is None and trainer.compute_loss_func is not None:
            declared = True
        if declared is None:
            declared = self._consumes if self._consumes is not None else num_items_in_batch is not None
        return 1 if declared else trainer.current_gradient_accumulation_steps
