"""Device tier: units live on the execution device ("gpu" also names the main memory of a CPU-only machine).

Invariant: a unit's buffer keeps its address as long as the unit lives here.
"""

from collections.abc import Callable, Sequence

import torch

from zo2trl.layout.layout import Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.tiers.tier import Source, put_tensor, tensor_views

__all__ = ["DeviceTier"]


class DeviceTier:
    """One buffer per unit on the execution device; those of units that never leave, `permanent`, in one arena.

    An allocator gives memory back segment by segment, and small buffers that stay lie in the segments of large ones:
    each adapter of OPT-13B kept a whole block's memory from other uses.
    """

    name: TierName = "gpu"

    _buffers: dict[int, torch.Tensor]
    _permanent: dict[int, torch.Tensor]

    def __init__(self, device: torch.device, permanent: Sequence[Unit] = ()) -> None:
        self._device = device
        self._buffers = {}
        arena = torch.zeros(sum(unit.stored_bytes for unit in permanent), dtype=torch.uint8, device=device)
        parts = arena.split([unit.stored_bytes for unit in permanent])
        self._permanent = {unit.index: part for unit, part in zip(permanent, parts, strict=True)}

    def add(self, unit: Unit, source: Source) -> None:
        """Allocate and fill."""
        buffer = self.reserve(unit)
        for spec in unit.tensors:
            put_tensor(buffer, spec, source(spec))

    def reserve(self, unit: Unit) -> torch.Tensor:
        """Allocate; a permanent unit has its part of the arena."""
        if unit.index not in self._buffers:
            permanent = self._permanent.get(unit.index)
            new = (
                torch.zeros(unit.stored_bytes, dtype=torch.uint8, device=self._device)
                if permanent is None
                else permanent
            )
            self._buffers[unit.index] = new
        return self._buffers[unit.index]

    def weights(self, segment: Segment) -> torch.Tensor:
        """The segment's bytes in place: leasing a resident unit moves nothing."""
        return self._buffers[segment.unit.index][segment.stored_start : segment.stored_start + segment.stored_bytes]

    def write(self, segment: Segment, data: torch.Tensor, *, version: int) -> bool:
        """Overwrite in place."""
        self.weights(segment).copy_(data)
        return True

    def publish(self, unit: Unit) -> Callable[[], None]:
        """Written in place: nothing is left to do."""
        return _nothing

    def abandon(self, unit: Unit) -> None:
        """Nothing is ever half written here."""

    def view(self, unit: Unit) -> torch.Tensor:
        """The buffer itself, on the device."""
        return self._buffers[unit.index]

    def tensors(self, unit: Unit) -> list[torch.Tensor]:
        """Views of the buffer."""
        return tensor_views(self.view(unit), unit)

    def drop(self, unit: Unit) -> None:
        """Free the unit's buffer, as soon as no view of it is left."""
        self._buffers.pop(unit.index, None)

    def close(self) -> None:
        """Drop the buffers."""
        self._buffers.clear()
        self._permanent.clear()


def _nothing() -> None:
    pass
