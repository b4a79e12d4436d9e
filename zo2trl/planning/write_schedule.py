"""WriteSchedule: whose turn it is to be written.

Does not: write anything, or know what a unit's bytes are.
Invariant: units take turns, so that every step writes about equally much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zo2trl.planning.budgets import TierName

__all__ = ["WriteSchedule"]


@dataclass(frozen=True, kw_only=True)
class WriteSchedule:
    """Steps between two writes of one unit."""

    write_back: Mapping[TierName, int]
    """To its home, by tier; a tier that is not named: every step."""
    snapshot: int
    """Of a unit in memory to a file."""

    def store_every(self, tier: TierName) -> int:
        """Steps between two times that a unit's weights are stored at home with every record absorbed."""
        return self.write_back.get(tier, 1)

    def is_turn(self, turn: int, *, of: int, every: int, position: int) -> bool:
        """Whether unit `turn` of `of` that take turns is due after `position` records.

        Where there are fewer units than steps, the steps without a write lie between the units', not behind them all.
        """
        return (position + turn * every // of) % every == 0
