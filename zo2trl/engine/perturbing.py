"""Perturber: which memory each probe of a visit gets, and both probes of a direction in one pass over the weights.

Does not: choose probes, bind parameters, or run a model.
Invariant: memory is handed out again only when the round that used it is over.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from zo2trl.tiers.leases import Lease
from zo2trl.tiers.store import TieredStore
from zo2trl.zo.estimators import Probe
from zo2trl.zo.seeds import direction_seed
from zo2trl.zo.tiles import Perturbed

__all__ = ["Perturber", "Round"]

Round = list[tuple[Probe, list[torch.Tensor | None]]]
"""Probes that are ready at once, each with what its trainable segments are bound to (None: the clean weights)."""


class Perturber:
    """Owns the scratch memory of one engine; it is allocated at the first step."""

    def __init__(self, store: TieredStore) -> None:
        self._store = store
        self._copies: list[torch.Tensor] = []

    def rounds(self, leases: Sequence[Lease], probes: Sequence[Probe], *, seed: int) -> Iterator[Round]:
        """Make the weights of every probe of one visit, as many at a time as there is memory for.

        The probe at the clean weights comes first, if it is there; then directions in order. The last probe of all
        takes the place of the clean weights where these are not kept.
        """
        moving = [probe for probe in probes if probe.coefficient != 0.0]
        if still := [probe for probe in probes if probe.coefficient == 0.0]:
            for lease in leases:
                lease.clean()
            yield [(probe, [None] * len(leases)) for probe in still]
        groups = self._groups(leases, moving)
        for number, group in enumerate(groups, start=1):
            yield self._perturbed(leases, group, seed=seed, is_last=number == len(groups))

    def free(self) -> None:
        """Let go of the memory."""
        self._copies = []

    def _groups(self, leases: Sequence[Lease], probes: Sequence[Probe]) -> list[list[Probe]]:
        """Probes to make together: those of a direction if there is memory for two, else one by one."""
        directions = [list(group) for _, group in groupby(probes, key=lambda probe: probe.direction)]
        two_copies = self._store.placement.scratch_copies > 1
        in_place = all(lease.may_be_perturbed for lease in leases if lease.segment.is_trainable)
        groups: list[list[Probe]] = []
        for number, group in enumerate(directions, start=1):
            fits = len(group) == 2 and (two_copies or (in_place and number == len(directions)))
            groups += [group] if fits else [[probe] for probe in group]
        return groups

    def _perturbed(self, leases: Sequence[Lease], group: Sequence[Probe], *, seed: int, is_last: bool) -> Round:
        round_: Round = [(probe, []) for probe in group]
        seed = direction_seed(seed, group[0].direction)
        start = 0
        for lease in leases:
            n_bytes = lease.segment.n_bytes
            if lease.segment.is_trainable:
                targets = self._targets(lease, start, n=len(group))
                start += n_bytes
                perturbed = [Perturbed(seed, p.coefficient, into) for p, into in zip(group, targets, strict=True)]
                lease.perturb(perturbed, is_last=is_last)
            else:
                targets = [None] * len(group)
            for (_, bound), target in zip(round_, targets, strict=True):
                bound.append(target)
        return round_

    def _targets(self, lease: Lease, start: int, *, n: int) -> Sequence[torch.Tensor]:
        stop = start + lease.segment.n_bytes
        scratch = [copy[start:stop] for copy in self._scratch()[:n]]
        return scratch if len(scratch) == n else [*scratch, lease.weights]

    def _scratch(self) -> list[torch.Tensor]:
        """The memory itself: as many copies as the placement counts."""
        placement = self._store.placement
        while len(self._copies) < placement.scratch_copies:
            self._copies.append(torch.empty(placement.scratch_bytes, dtype=torch.uint8, device=self._store.device))
        return self._copies
