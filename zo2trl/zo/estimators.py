"""Which points of weight space a step looks at, and what their losses say about the slope.

Does not: make noise, touch weights, or know how a loss is computed.
Invariant: `combine` is given one loss for each probe that `probes` returned, in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CLEAN", "Estimate", "Probe", "TwoSidedSPSA"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One forward evaluation at clean weights + coefficient * z(direction)."""

    direction: int
    coefficient: float


CLEAN = Probe(direction=0, coefficient=0.0)
"""The probe of evaluation and generation: the weights as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the probes of one step say: a slope along each direction, and the losses it was read from."""

    projected_grads: tuple[float, ...]
    loss_plus: float
    loss_minus: float

    @property
    def loss(self) -> float:
        """Mean of the plus and the minus losses: the loss at clean weights up to O(eps^2)."""
        return 0.5 * (self.loss_plus + self.loss_minus)

    @property
    def projected_grad(self) -> float:
        """Mean slope over the directions, the scalar that logs show."""
        return math.fsum(self.projected_grads) / len(self.projected_grads)

    @property
    def is_finite(self) -> bool:
        """False when any loss or slope was NaN or infinite: such a step must not touch the weights."""
        return all(map(math.isfinite, (self.loss_plus, self.loss_minus, *self.projected_grads)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSPSA:
    """Simultaneous perturbation: g_d = (loss(w + eps z_d) - loss(w - eps z_d)) / (2 eps).

    Spall 1992; MeZO (Malladi et al. 2023, algorithm 1) is the case of one Gaussian direction. On a quadratic the
    value is the exact directional derivative at any eps.
    """

    zo_eps: float
    num_directions: int = 1

    def probes(self) -> list[Probe]:
        """Plus and minus of each direction, in direction order."""
        signs = (self.zo_eps, -self.zo_eps)
        return [Probe(direction, sign) for direction in range(self.num_directions) for sign in signs]

    def combine(self, losses: Sequence[float]) -> Estimate:
        """Slopes from the losses of `probes()`, in float64."""
        plus, minus = losses[0::2], losses[1::2]
        return Estimate(
            projected_grads=tuple((p - m) / (2.0 * self.zo_eps) for p, m in zip(plus, minus, strict=True)),
            loss_plus=math.fsum(plus) / len(plus) if all(map(math.isfinite, plus)) else math.nan,
            loss_minus=math.fsum(minus) / len(minus) if all(map(math.isfinite, minus)) else math.nan,
        )
