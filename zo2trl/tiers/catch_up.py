"""Catching up: a segment absorbs the records from its position to the end of the journal.

Does not: decide when, or move bytes between tiers.
Invariant: replaying records one call at a time or all in one call gives the same bits (`Method.replay` rounds
after every step), so how lazily a unit catches up never shows in the weights.
"""

from collections.abc import Sequence

import torch

from zo2trl.layout.layout import Segment
from zo2trl.zo.method import Method
from zo2trl.zo.records import Record
from zo2trl.zo.tiles import Perturbed

__all__ = ["catch_up", "catch_up_unit"]


def catch_up(
    weights: torch.Tensor,
    segment: Segment,
    records: Sequence[Record],
    *,
    position: int,
    method: Method,
    probes: Sequence[Perturbed] = (),
    keep: bool = True,
) -> bool:
    """Replay `records[position:]` on a segment's bytes (uint8, on the device). True if they have absorbed them now.

    `probes` and `keep`: see `Method.visit`, which makes them in the same pass.
    """
    if not segment.is_trainable:
        return False
    pending = records[position:]
    return method.visit(weights, segment.spans, pending, probes=probes, keep=keep) and bool(pending)


def catch_up_unit(
    weights: torch.Tensor, segments: Sequence[Segment], records: Sequence[Record], *, position: int, method: Method
) -> None:
    """Replay `records[position:]` on all of a trained unit's bytes, given with its trainable segments."""
    for segment in segments:
        part = weights[segment.stored_start : segment.stored_start + segment.stored_bytes]
        catch_up(part, segment, records, position=position, method=method)
