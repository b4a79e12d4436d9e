"""Updates: how a step's record changes the weights of some tiles.

Does not: choose directions or coefficients, or know which buffer the tiles are in (method.py).

Invariant: every result depends only on (clean weights, record, tensor id, element index). Multiplications and
additions are separate, correctly rounded operations (no fused multiply-add, no `alpha=`), so CPU and GPU give the same
bits, and so does any chunking.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from zo2trl.zo.chunks import draw
from zo2trl.zo.noise import Direction
from zo2trl.zo.records import StepRecord
from zo2trl.zo.rounding import Rounding, round_stochastically
from zo2trl.zo.seeds import direction_seed
from zo2trl.zo.tiles import TileMap

__all__ = ["SGD", "Update"]


class Update(Protocol):
    """Brings clean weights from one record to the next."""

    @property
    def identity(self) -> str:
        """The name of the arithmetic, down to its last bit; part of `Method.identity`."""
        ...

    @property
    def rounding(self) -> Rounding:
        """How results are rounded to 16-bit weights."""
        ...

    def apply(
        self,
        weights: torch.Tensor,
        tiles: TileMap,
        record: StepRecord,
        *,
        direction: Direction,
        decays: bool,
        state: torch.Tensor | None = None,
    ) -> None:
        """Change `weights`, and `state` where the update keeps any, in place by one step.

        Args:
            weights: the clean weights of `tiles`, flat [len(tiles) * TILE], in their storage dtype.
            direction: draws the step's directions.
            decays: weight decay applies to these tiles.
            state: what the update keeps for each weight (momentum, say), laid out like the weights.
        """
        ...


@dataclass(frozen=True, slots=True)
class SGD:
    """w <- w - lr (mean_d c_d z_d + weight_decay w), with the record's coefficients c.

    The sum runs in fp32 in direction order and is rounded to the storage dtype once per step.
    """

    rounding: Rounding

    @property
    def identity(self) -> str:
        """See `Update.identity`."""
        return f"sgd-1/{self.rounding}"

    def apply(
        self,
        weights: torch.Tensor,
        tiles: TileMap,
        record: StepRecord,
        *,
        direction: Direction,
        decays: bool,
        state: torch.Tensor | None = None,
    ) -> None:
        """See `Update.apply`; keeps no state."""
        total = _mean_direction(tiles, record, direction=direction, device=weights.device)
        exact = weights.float()
        if decays and record.weight_decay != 0.0:
            total.add_(exact * record.weight_decay)
        exact = torch.sub(exact, total.mul_(record.learning_rate), out=total)
        if weights.dtype == torch.float32 or self.rounding == "nearest":
            weights.copy_(exact)
        else:
            weights.copy_(round_stochastically(exact, weights.dtype, tiles, seed=record.seed))


def _mean_direction(tiles: TileMap, record: StepRecord, *, direction: Direction, device: torch.device) -> torch.Tensor:
    """The mean over the directions of coefficient * z, summed in direction order: fp32 [len(tiles) * TILE]."""
    total: torch.Tensor | None = None
    for number, coefficient in enumerate(record.coefficients):
        z = draw(direction, direction_seed(record.seed, number), tiles, device=device)
        z.mul_(coefficient / len(record.coefficients))
        total = z if total is None else total.add_(z)
    assert total is not None, "a record has at least one coefficient"
    return total
