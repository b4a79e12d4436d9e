"""The registry of fused kernels: which one makes a whole visit for which direction and update, by their identities.

Does not: launch anything itself. Where it names no kernel, the generic path of method.py serves.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from zo2trl.zo.records import StepRecord
from zo2trl.zo.tiles import DOMAIN_GAUSSIAN, DOMAIN_RADEMACHER, Perturbed, Span

__all__ = ["FusedVisit", "fused_visit"]

_DOMAINS = {"philox4x32-10/rademacher-1": DOMAIN_RADEMACHER, "philox4x32-10/gaussian-2": DOMAIN_GAUSSIAN}
_IS_STOCHASTIC = {"sgd-1/nearest": False, "sgd-1/stochastic": True}


class FusedVisit(Protocol):
    """`Method.visit` in one pass over the weights; `in_place`: a probe takes the place of the clean weights."""

    def __call__(
        self,
        weights: torch.Tensor,
        spans: Sequence[Span],
        steps: Sequence[StepRecord],
        /,
        *,
        probes: Sequence[Perturbed],
        keep: bool,
        in_place: bool,
    ) -> bool:
        """See `Method.visit`."""
        ...


def fused_visit(direction: str, update: str) -> FusedVisit | None:
    """Return the kernel for a direction and an update, by their identities; None if there is none."""
    domain, is_stochastic = _DOMAINS.get(direction), _IS_STOCHASTIC.get(update)
    if domain is None or is_stochastic is None:
        return None

    def visit(
        weights: torch.Tensor,
        spans: Sequence[Span],
        steps: Sequence[StepRecord],
        /,
        *,
        probes: Sequence[Perturbed],
        keep: bool,
        in_place: bool,
    ) -> bool:
        from zo2trl.zo.kernels import visit_triton  # Triton comes with torch's CUDA builds only

        return visit_triton.visit(
            weights, spans, steps, domain=domain, is_stochastic=is_stochastic, probes=probes, keep=keep,
            in_place=in_place,
        )  # fmt: skip

    return visit
