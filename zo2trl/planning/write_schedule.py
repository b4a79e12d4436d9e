"""WriteSchedule: how often units are written, and whose turn it is.

Does not: write anything, or know what a unit's bytes are.
Invariant: units take turns, so that every step writes about equally much.

On a machine whose rates are known the cost model chooses the intervals. On any other they follow fixed rules:
- On a CPU-only machine weights are stored every step, because absorbing a step later costs the cores as much.
- With a GPU, weights in host memory are stored every 4th step, which leaves nearly all of the link to uploads (of
  OPT-13B steps took 502, 473, 461 and 459 ms on an H200 with intervals of 1, 2, 4 and 8), and weights on disk every
  16th, which leaves nearly all of a drive's time to reads and wears it less.
- Replay is taken to bring 100 million weights a second over one step, which one slow core can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zo2trl.planning.budgets import TierName

__all__ = ["WriteSchedule", "unmeasured_intervals", "unmeasured_steps_replayed_in"]

UNMEASURED_GPU_INTERVALS: Mapping[TierName, int] = {"cpu": 4, "disk": 16}
UNMEASURED_REPLAYED_PER_S = 1e8  # weights


@dataclass(frozen=True, kw_only=True)
class WriteSchedule:
    """Steps between two writes of one unit."""

    write_back: Mapping[TierName, int]
    """To its home, by tier; a tier that is not named: every step."""
    snapshot: int
    """From memory to a file."""

    def store_every(self, tier: TierName) -> int:
        """Steps between two times that a unit's weights are stored at home with every record absorbed."""
        return self.write_back.get(tier, 1)

    def is_turn(self, turn: int, *, of: int, every: int, position: int) -> bool:
        """Whether unit `turn` of `of` that take turns is due after `position` records.

        Where there are fewer units than steps, the steps without a write lie between the units', not behind them all.
        """
        return (position + turn * every // of) % every == 0


def unmeasured_intervals(device_type: str) -> dict[TierName, int]:
    """Steps between write-backs, by tier, on a machine whose rates are not known."""
    return {"cpu": 1, "disk": 1} if device_type == "cpu" else dict(UNMEASURED_GPU_INTERVALS)


def unmeasured_steps_replayed_in(seconds: float, *, n_weights: int) -> int:
    """How many steps of so many weights are replayed in that time at most, where the rates are not known."""
    return int(seconds * UNMEASURED_REPLAYED_PER_S / max(n_weights, 1))
