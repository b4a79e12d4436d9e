"""Audit: by which the processes of a training find out that their weights or journals differ.

With a step's losses goes round what the journal's last records are called, and a sum over the weights of one unit, in
turn. A wrong bit is found when it is its unit's turn, before the step is made.

Does not: look at a unit that a traversal does not visit as a whole, or repair anything.
Invariant: the sum does not depend on where a unit lives, nor on how it is cut into segments.
"""

import struct
from collections.abc import Sequence

import torch

from zo2trl.errors import RanksDiverged
from zo2trl.layout.layout import Layout, Segment
from zo2trl.parallel.ranks import Ranks
from zo2trl.tiers.leases import Lease
from zo2trl.tiers.store import TieredStore

__all__ = ["Audit", "exchange_losses"]

_STATE = struct.Struct("<QIQ")  # records, their name, sum of a unit
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Audit:
    """Reads the clean weights of one unit while a traversal passes over it.

    Args:
        layout: what the units are.
        turn: which unit's turn it is, modulo their number; a step's number.
    """

    def __init__(self, layout: Layout, *, turn: int) -> None:
        self.unit = layout.units[turn % len(layout.units)]
        self._left = {segment.index for segment in layout.segments if segment.unit is self.unit}
        self._sums: list[torch.Tensor] = []

    def see(self, leases: Sequence[Lease]) -> None:
        """A traversal has borrowed these segments; none of them is perturbed yet."""
        for lease in leases:
            if lease.segment.index in self._left:
                self._left.remove(lease.segment.index)
                self._sums += _sums_of(lease.clean(), lease.segment)

    @property
    def result(self) -> int:
        """64 bits; 0 if the traversal did not visit the whole unit."""
        return 0 if self._left or not self._sums else int(torch.stack(self._sums).sum()) % 2**64


def _sums_of(weights: torch.Tensor, segment: Segment) -> list[torch.Tensor]:
    """One a tensor, without the padding between them; on the device, so that a traversal does not wait for it."""
    starts = [(spec, spec.byte_offset - segment.byte_start) for spec in segment.tensors]
    return [
        weights[start : start + spec.n_bytes].view(_INTEGERS[spec.dtype.itemsize]).sum(dtype=torch.int64)
        for spec, start in starts
    ]


def exchange_losses(
    ranks: Ranks, losses: Sequence[float], *, step: int, store: TieredStore, audit: Audit
) -> list[Sequence[float]]:
    """Every rank's losses (float64), in rank order, from processes that hold the same records and weights.

    Raises:
        RanksDiverged: they do not; the text names what differs, where, and the way out.
        RankLost: see `Ranks.exchange`.
    """
    n_records = len(store.records)
    state = _STATE.pack(n_records, int(store.journal.fingerprint(n_records), 16), audit.result)
    said = ranks.exchange(f"losses of step {step}", state + struct.pack(f"<{len(losses)}d", *losses))
    states = [_STATE.unpack_from(message) for message in said]
    folder = store.journal.path.parent
    for rank, (n_there, name, total) in enumerate(states):
        if (n_there, name) != states[0][:2]:
            raise RanksDiverged(
                f"At step {step} the journals differ: rank 0 has {states[0][0]} records, the last ones named "
                f"{states[0][1]:08x}, and rank {rank} has {n_there}, named {name:08x}. Steps were made with different "
                f"arguments (`learning_rate`, `weight_decay`, `max_grad_norm`), or a store was changed. Replace the "
                f"folder of the wrong rank by a copy of another one's ({folder} is rank {ranks.rank}'s) and resume."
            )
        if total and states[0][2] and total != states[0][2]:
            raise RanksDiverged(
                f"At step {step} the weights of {audit.unit.name} differ between rank 0 and rank {rank}, though both "
                f"have made the same {n_records} steps: memory or a file was damaged, or code changed weights in one "
                "process only. The step was not made. Resume, which rebuilds weights from disk; if it happens again, "
                f"`zo2trl verify` finds the damaged store ({folder} is rank {ranks.rank}'s), which a copy of another "
                "rank's replaces."
            )
    return [struct.unpack(f"<{(len(message) - _STATE.size) // 8}d", message[_STATE.size :]) for message in said]
