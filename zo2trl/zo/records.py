"""What one finished optimizer step was, in scalars: enough to repeat it on any weights, at any time.

Does not: say how records become bytes (journal/journal.py) or how they change weights (rules.py).
Invariant: a record is a value; two runs that made equal records made equal weights.
"""

from dataclasses import dataclass
from typing import NamedTuple


class StepRecord(NamedTuple):
    """A step that changed the weights. All floats are float64 and finite. Write the fields by name.

    A named tuple, because a journal of a million of them has to open in a second or two.
    """

    step: int
    """1-based or 0-based as the trainer counts; the journal only asks that it grows (u64)."""
    seed: int
    """u64 that the step's directions are derived from."""
    projected_grads: tuple[float, ...]
    """(loss_plus - loss_minus) / (2 * zo_eps), one per direction, in direction order."""
    learning_rate: float
    weight_decay: float
    zo_eps: float
    loss_plus: float
    """Mean loss of the probes at +eps; with `loss_minus` what a resumed trainer reports without a forward pass."""
    loss_minus: float
    grad_norm: float
    """What the trainer logs: the norm of the projected gradients before clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipRecord:
    """A step that left the weights alone, because a loss was not finite."""

    step: int
    seed: int
    """The seed the step would have used: the step is consumed, so resuming must not reuse it."""
    loss_plus: float
    loss_minus: float


Record = StepRecord | SkipRecord
