"""Estimators: which points of weight space a step looks at, and how their losses estimate the slope.

Does not: generate noise, touch weights, or know how a loss is computed.
Invariant: an estimator receives one loss for each probe that it asked for, in the same order.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["CLEAN", "Estimate", "Estimation", "Estimator", "Probe", "TwoSidedSPSA"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One forward evaluation at clean weights + coefficient * z(direction)."""

    direction: int
    coefficient: float


CLEAN = Probe(direction=0, coefficient=0.0)
"""The probe of evaluation and generation: the weights as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the probes of one step yield: a coefficient for each direction, and the losses it was read from.

    `coefficients` and `losses` become those of the step's record (records.py).
    """

    coefficients: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean of the losses; two-sided SPSA: the loss at clean weights up to O(eps^2)."""
        return sum(self.losses) / len(self.losses)

    @property
    def loss_plus(self) -> float:
        """The first loss; two-sided SPSA: the mean at +eps."""
        return self.losses[0]

    @property
    def loss_minus(self) -> float:
        """The last loss; two-sided SPSA: the mean at -eps."""
        return self.losses[-1]

    @property
    def projected_grad(self) -> float:
        """The mean coefficient over the directions, the scalar that logs show."""
        return math.fsum(self.coefficients) / len(self.coefficients)

    @property
    def is_finite(self) -> bool:
        """False when any loss or coefficient is NaN or infinite: such a step must not touch the weights."""
        return all(map(math.isfinite, (*self.losses, *self.coefficients)))


Estimation = Generator[list[Probe], Sequence[float], Estimate]
"""One step's estimation: it yields probes, receives their losses, and returns the estimate.

Each question is answered by one traversal of the model, so an estimator that asks twice costs two.
"""


class Estimator(Protocol):
    """Chooses the probes of a step and turns their losses into coefficients."""

    identity: ClassVar[str]
    """Part of `Method.identity`; what may change within a run (`zo_eps`, `num_directions`) is not in it."""

    @property
    def zo_eps(self) -> float:
        """The distance of a probe from the clean weights, in units of a direction's elements."""
        ...

    @property
    def num_directions(self) -> int:
        """How many directions a step has."""
        ...

    def probes(self) -> list[Probe]:
        """The probes of the largest question: a traversal evaluates at most so many at once."""
        ...

    def estimation(self) -> Estimation:
        """Start the estimation of one step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSPSA:
    """Simultaneous perturbation: g_d = (loss(w + eps z_d) - loss(w - eps z_d)) / (2 eps).

    Spall 1992; MeZO (Malladi et al. 2023, algorithm 1) is the case of one Gaussian direction. On a quadratic the
    value is the exact directional derivative at any eps.
    """

    identity: ClassVar[str] = "two-sided-spsa-1"

    zo_eps: float = 1e-3
    num_directions: int = 1

    def probes(self) -> list[Probe]:
        """Plus and minus of each direction, in direction order."""
        signs = (self.zo_eps, -self.zo_eps)
        return [Probe(direction, sign) for direction in range(self.num_directions) for sign in signs]

    def estimation(self) -> Estimation:
        """Ask for all probes at once; slopes and mean losses are computed in float64."""
        losses = yield self.probes()
        plus, minus = losses[0::2], losses[1::2]
        return Estimate(
            coefficients=tuple((p - m) / (2.0 * self.zo_eps) for p, m in zip(plus, minus, strict=True)),
            losses=(_mean(plus), _mean(minus)),
        )


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
