"""Decode buffer: device memory that leased segments are decoded into when they are not stored plain.

The placement counts it (`Placement.decode_bytes`): the packed segments of the largest visit. Without any it is empty,
and plain segments are leased where they are.

Does not: decide when a segment is decoded (store.py does, once a lease), or know any form (amp/codecs.py does).
Invariant: a byte belongs to one lease at a time. Decoding and the kernels that read the result are enqueued on one
stream, so memory may be handed out again as soon as its lease has ended.
"""

from collections import Counter

import torch

from zo2trl.amp.codecs import codec_of
from zo2trl.errors import TraversalError
from zo2trl.layout.layout import Segment
from zo2trl.tiers.ring import Region
from zo2trl.tiers.tier import carve, stored_part

__all__ = ["DecodeBuffer"]


class DecodeBuffer:
    """The memory, which is allocated at the first use, and the regions of it that are lent."""

    _lent: dict[int, Region]  # segment index -> where it lies
    _leases: Counter[int]  # segment index -> leases that use it: a shared segment may be leased twice at a time

    def __init__(self, n_bytes: int, *, device: torch.device) -> None:
        self.n_bytes, self._device = n_bytes, device
        self._memory: torch.Tensor | None = None
        self._lent, self._leases = {}, Counter()

    def decoded(self, segment: Segment, stored: torch.Tensor) -> torch.Tensor:
        """A segment's decoded bytes, valid until `give_back`, from its stored ones on the device.

        Raises:
            TraversalError: what is lent already leaves no room for it.
        """
        if segment.is_plain:
            return stored
        if self._memory is None:
            self._memory = torch.empty(self.n_bytes, dtype=torch.uint8, device=self._device)
        region = self._lent.get(segment.index) or self._room_for(segment)
        decoded = self._memory[region.start : region.stop]
        for spec in segment.tensors:
            into = carve(decoded, spec, byte_start=segment.byte_start)
            codec_of(spec.stored).decode(stored_part(stored, spec, stored_start=segment.stored_start), into)
        self._lent[segment.index] = region
        self._leases[segment.index] += 1
        return decoded

    def give_back(self, segment: Segment) -> None:
        """End one lease's use of a segment's region, if it has one."""
        if segment.is_plain:
            return
        self._leases[segment.index] -= 1
        if not self._leases[segment.index]:
            del self._lent[segment.index]

    def _room_for(self, segment: Segment) -> Region:
        lent = list(self._lent.values())
        for start in (0, *sorted(region.stop for region in lent)):
            region = Region(start, start + segment.n_bytes)
            if region.stop <= self.n_bytes and not any(other.overlaps(region) for other in lent):
                return region
        raise TraversalError(
            f"Unit {segment.unit.name} is visited while other weights are lent that leave no room to decode it: its "
            f"{segment.n_bytes:,} bytes do not fit beside {sum(stop - start for start, stop in lent):,} bytes in a "
            f"buffer of {self.n_bytes:,}."
        )
