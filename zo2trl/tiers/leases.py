"""Lease: one segment's weights for one visit, brought up to date in the same pass as its probes are made.

Does not: fetch, catch up or write back by itself; the store does.
Invariant: bytes that stay at home, or are written back, are never perturbed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from zo2trl.layout.layout import Segment
from zo2trl.tiers.prefetch import Fetch
from zo2trl.zo.tiles import Perturbed

__all__ = ["Lease"]

Materialize = Callable[["Lease", Sequence[Perturbed], bool], None]


@dataclass(eq=False, kw_only=True)
class Lease:
    """Flat uint8 weights on the device, valid until the lending block ends."""

    segment: Segment
    weights: torch.Tensor
    """Frozen tensors in it may be read at once, trainable ones after `clean` or `perturb`."""
    position: int
    """Records of the journal that `weights` have absorbed."""
    writes_back: bool
    """They are stored at home after this visit, with every record absorbed."""
    materialize: Materialize
    fetch: Fetch | None = None
    write: Future | None = None

    @property
    def may_be_perturbed(self) -> bool:
        """Whether a probe may take their place: they are a copy that is not written back."""
        return self.fetch is not None and not self.writes_back

    def clean(self) -> torch.Tensor:
        """The weights, with every record absorbed."""
        self.materialize(self, (), True)
        return self.weights

    def perturb(self, probes: Sequence[Perturbed], *, is_last: bool) -> None:
        """Make up to two probes along one direction.

        With `is_last` nothing more is asked of this lease, and the last probe may go into `weights` itself if they
        may be perturbed.
        """
        self.materialize(self, probes, self.writes_back or not is_last)
