"""Records: what one finished optimizer step was, in scalars: enough to repeat it on any weights, at any time.

Does not: define how records become bytes (journal/format.py) or how they change weights (updates.py).
Invariant: a record is a value; two runs that made equal records made equal weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Record", "SkipRecord", "StepRecord"]


class StepRecord(NamedTuple):
    """A step that changed the weights. All floats are float64 and finite. Write the fields by name.

    How many coefficients, losses and scalars there are is the estimator's choice. A named tuple, because a journal of
    a million records has to open in a second or two.
    """

    step: int
    """1-based or 0-based as the trainer counts; the journal only asks that it grows (u64)."""
    seed: int
    """u64 that the step's directions are derived from."""
    learning_rate: float
    weight_decay: float
    zo_eps: float
    coefficients: tuple[float, ...]
    """How far the update moves along each direction, in direction order, before the learning rate; SPSA: slopes."""
    losses: tuple[float, ...]
    """What a resumed trainer reports without a forward pass; two-sided SPSA: mean loss at +eps and at -eps."""
    scalars: tuple[float, ...]
    """Further numbers that are logged; the first is the norm of the projected gradients before clipping."""

    @property
    def loss_plus(self) -> float:
        """The first loss; two-sided SPSA: the mean at +eps."""
        return self.losses[0]

    @property
    def loss_minus(self) -> float:
        """The last loss; two-sided SPSA: the mean at -eps."""
        return self.losses[-1]

    @property
    def grad_norm(self) -> float:
        """What the trainer logs: the norm of the projected gradients before clipping."""
        return self.scalars[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipRecord:
    """A step that left the weights alone, because a loss was not finite."""

    step: int
    seed: int
    """The seed the step would have used: the step is consumed, so resuming must not reuse it."""
    losses: tuple[float, ...]
    """As in `StepRecord`; they may be NaN or infinite."""

    @property
    def loss_plus(self) -> float:
        """See `StepRecord.loss_plus`."""
        return self.losses[0]

    @property
    def loss_minus(self) -> float:
        """See `StepRecord.loss_minus`."""
        return self.losses[-1]


Record = StepRecord | SkipRecord
