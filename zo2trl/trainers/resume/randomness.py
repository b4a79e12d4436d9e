"""Random numbers of the data pipeline: which state a batch was collated from.

A loader collates a batch ahead of the one in use, so the random state that a checkpoint sees is one batch too late for
the batch that comes next. Collators that draw (masking, noising) would then make other batches after a resume.

Does not: see what is drawn in worker processes (`dataloader_num_workers`) or by a dataset's `__getitem__`.
"""

import os
from collections import deque
from collections.abc import Callable
from typing import Any

from zo2trl.trainers.resume.states import rng_state, set_rng_state

__all__ = ["RandomnessKeeper"]

_KEPT = 64  # states of the newest batches; loaders are one batch ahead, plus the micro-batches of a step


class RandomnessKeeper:
    """Notes the global random state before each batch, and brings one back before the first."""

    def __init__(self) -> None:
        self._states: deque[Any] = deque(maxlen=_KEPT)
        self._n_collated = self._n_used = 0
        self._restore: Any = None
        self.was_restored = False

    def watch(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The collator, telling this object about every call made in this process."""
        return _Watched(collator, self)

    def used(self, n_batches: int) -> None:
        """A step has used this many batches."""
        self._n_used += n_batches

    def start(self, state: Any) -> None:
        """A training begins; `state` (see `state`) is brought back before its first batch, unless it is None."""
        self._states.clear()
        self._n_collated = self._n_used = 0
        self._restore, self.was_restored = state, False

    def state(self) -> Any:
        """The random state before the batch that comes next, as JSON; None if that was not collated yet."""
        n_ahead = self._n_collated - self._n_used
        return self._states[-n_ahead] if 0 < n_ahead <= len(self._states) else None

    def before_batch(self) -> None:
        """A batch is about to be collated."""
        if self._restore is not None:
            set_rng_state(self._restore, where="checkpoint")
            self._restore, self.was_restored = None, True
        self._states.append(rng_state())
        self._n_collated += 1


class _Watched:
    def __init__(self, collator: Callable[[Any], Any], keeper: RandomnessKeeper) -> None:
        self._collator, self._keeper, self._process = collator, keeper, os.getpid()

    def __call__(self, features: Any) -> Any:
        if os.getpid() == self._process:
            self._keeper.before_batch()
        return self._collator(features)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_collator":
            raise AttributeError(name)
        return getattr(self._collator, name)
