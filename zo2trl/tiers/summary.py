"""One line on where the weights of a store live.

Does not: decide it.
"""

from zo2trl.tiers.layout import Layout
from zo2trl.tiers.placement import Placement, format_bytes

__all__ = ["summary_of"]


def summary_of(layout: Layout, placement: Placement) -> str:
    """Units and bytes of each tier, the ring, the device memory in all, and how blocks are visited."""
    parts = []
    for tier in ("gpu", "cpu", "disk"):
        units = [layout.units[index] for index in placement.units_in(tier)]
        if units:
            parts.append(f"{tier}: {len(units)} units, {format_bytes(sum(unit.n_bytes for unit in units))}")
    ring = format_bytes(placement.ring_bytes)
    visits = "leaf by leaf" if layout.leaf_blocks else "block by block"
    return f"{'; '.join(parts)}; ring: {ring}; {format_bytes(placement.device_bytes)} on the device, {visits}"
