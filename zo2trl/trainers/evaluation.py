"""This module runs several evaluation batches per traversal, inside the Trainer's own evaluation loop.

The loop iterates over an `EvaluationTraversal` instead of the dataloader, and calls `take` instead of
`prediction_step`. When the loop requests the first batch of a group, the prediction steps of the whole group run in
lockstep, so streamed blocks are fetched once for all of them.

Invariant: the loop gets the same batches, in the same order, with the same end-of-dataloader flag as without this.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from zo2trl.engine.activations import n_tokens
from zo2trl.engine.heads import deferring_logits
from zo2trl.trainers.objective.objectives import without_columns
from zo2trl.trainers.signals import stop_if_asked

__all__ = ["EvaluationTraversal"]

MAX_BATCHES_PER_TRAVERSAL = 16  # predictions of a whole group stay in memory until the loop takes them


class EvaluationTraversal:
    """An EvaluationTraversal replaces a dataloader, and passes on everything but iteration to it."""

    def __init__(self, trainer: Any, dataloader: Any, *, prediction_loss_only: bool, ignore_keys: Any) -> None:
        self._trainer, self._dataloader = trainer, dataloader
        self._loss_only, self._ignore_keys = prediction_loss_only, ignore_keys
        self._ready: deque[tuple[Any, Any]] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Any]:
        state = self._trainer.accelerator.gradient_state
        batches = iter(self._dataloader)
        group: list[tuple[Any, bool]] = []
        for inputs in batches:
            group.append((inputs, state.end_of_dataloader))
            if len(group) == 1:
                size = self._group_size(inputs)
            if state.end_of_dataloader or len(group) >= size:
                yield from self._traversal(group)
                group = []
        yield from self._traversal(group)

    def take(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return what `prediction_step` returned for a batch that this object has yielded."""
        stop_if_asked()
        expected, outputs = self._ready.popleft()
        assert expected is inputs, "the evaluation loop takes batches in the order it got them"
        return outputs

    def _traversal(self, group: list[tuple[Any, bool]]) -> Iterator[Any]:
        if not group:
            return
        trainer = self._trainer
        engine, largest = trainer.engine, max((inputs for inputs, _ in group), key=n_tokens)
        trainer.device_fit.before_evaluation(largest, n_passes=len(group), whole_logits=not self._loss_only)
        trainer.before_predictions([inputs for inputs, _ in group])
        outputs = engine.run_clean([partial(self._predict, inputs) for inputs, _ in group])
        self._ready.extend((inputs, output) for (inputs, _), output in zip(group, outputs, strict=True))
        loader = trainer.accelerator.gradient_state.active_dataloader
        for inputs, is_last in group:
            if loader is not None:
                loader.end_of_dataloader = is_last  # by this flag the loop drops the padding of the last batch
            yield inputs

    def _predict(self, inputs: Any) -> Any:
        trainer, step = self._trainer, type(self._trainer).prediction_step
        with deferring_logits(wanted=self._loss_only):
            outputs = step(
                trainer, trainer.model, without_columns(inputs), self._loss_only, ignore_keys=self._ignore_keys
            )
            trainer.note_objective(inputs)
        return outputs

    def _group_size(self, inputs: Any) -> int:
        size = min(self._trainer.device_fit.passes_per_traversal(inputs), MAX_BATCHES_PER_TRAVERSAL)
        if not self._trainer.engine.store.placement.ring_bytes:
            size = 1  # nothing is streamed: lockstep would only keep more predictions in memory
        # The loop gathers after each batch, and losses may gather in the traversal: all processes must gather alike.
        return self._trainer.ranks.all_min("evaluation batches of a traversal", size)
