"""RecordingMixin: what a run measures is noted, so that going through its steps again reports the same.

Does not: measure; the Trainer does.
Invariant: an evaluation consumes none of the global random numbers, so that data comes in the same order without it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import Trainer

from zo2trl.engine.loop_notes import note_evaluation
from zo2trl.engine.retrace import Retrace
from zo2trl.engine.step import Engine
from zo2trl.trainers.arguments.data_checks import global_random_state_kept
from zo2trl.trainers.parallel import ParallelMixin
from zo2trl.trainers.resume.randomness import RandomnessKeeper

__all__ = ["RecordingMixin"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)


class RecordingMixin(ParallelMixin, _Base):
    """The part of `ZOTrainerMixin` that keeps evaluations and random states."""

    args: Any
    model: Any

    engine: Engine
    _retrace: Retrace | None = None

    @property
    def is_replaying(self) -> bool:
        """True while `train` goes through steps that the journal holds already: the model is ahead of the loop.

        A callback that changes weights asks this first, because they are changed already.
        """
        return self._retrace is not None and (not self._retrace.is_over or self._retrace.ends_changed)

    # -- hooks of the Trainer: evaluating

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See [`~transformers.Trainer.evaluate`]. An evaluation that the journal's steps had is not made again."""
        given = {"eval_dataset": eval_dataset, "ignore_keys": ignore_keys, "metric_key_prefix": metric_key_prefix}
        with global_random_state_kept(self.args.device):
            datasets = eval_dataset if eval_dataset is not None else self.eval_dataset
            if isinstance(datasets, dict) or not self.is_in_train:
                return super().evaluate(**given)  # type: ignore[misc]
            known = None if self._retrace is None else self._retrace.evaluation(metric_key_prefix)
            # A process that was stopped while others noted the evaluation lacks it: all make it again.
            if self._retrace is not None and self.ranks.all_true("evaluations that are known", known is not None):
                assert known is not None
                return self._report_again(dict(known))
            if self._retrace is not None and not self._retrace.is_over:
                logger.warning("The evaluation at step %d is left out: it was not made then.", self.state.global_step)
                return {}
            metrics = super().evaluate(**given)  # type: ignore[misc]
        self._note_evaluation(metric_key_prefix, metrics)
        return metrics

    def _report_again(self, metrics: dict[str, float]) -> dict[str, float]:
        self.model.eval()  # as after an evaluation: trainers file metrics by this flag
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _note_evaluation(self, name: str, metrics: dict[str, float]) -> None:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (bool, int, float))}
        numbers |= {key: value.item() for key, value in metrics.items() if isinstance(value, np.generic)}
        note_evaluation(self.engine, name, numbers, step=self.state.global_step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._retrace is not None and not self._retrace.is_over and self.control.should_evaluate:
            had_one = self.ranks.all_true("evaluations that were made", self._retrace.had_evaluation)
            self.control.should_evaluate = had_one
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    # -- random numbers of the data pipeline

    @property
    def _randomness(self) -> RandomnessKeeper:
        if not hasattr(self, "_randomness_keeper"):
            self._randomness_keeper = RandomnessKeeper()
        return self._randomness_keeper

    def get_train_dataloader(self) -> Any:
        """See [`~transformers.Trainer.get_train_dataloader`]; the collator's random numbers are kept track of."""
        with self._watching_collator():
            return super().get_train_dataloader()  # type: ignore[misc]

    @contextmanager
    def _watching_collator(self) -> Iterator[None]:
        collator, self.data_collator = self.data_collator, self._randomness.watch(self.data_collator)
        try:
            yield
        finally:
            self.data_collator = collator
