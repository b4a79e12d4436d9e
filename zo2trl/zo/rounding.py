"""Stochastic rounding of fp32 results to 16-bit weights, with bits from the counter-based generator.

Updates far below an ulp of a 16-bit weight then still count on average, and replay stays exact.
"""

from typing import Literal

import torch

from zo2trl.zo.chunks import in_threads
from zo2trl.zo.noise import rounding_bits
from zo2trl.zo.tiles import TileMap

__all__ = ["Rounding", "round_stochastically"]

Rounding = Literal["nearest", "stochastic"]


def round_stochastically(exact: torch.Tensor, dtype: torch.dtype, tiles: TileMap, *, seed: int) -> torch.Tensor:
    """fp32 -> a neighbour on the 16-bit grid, the nearer one more often; values already on the grid stay."""
    bits = torch.empty(exact.shape, dtype=torch.int32, device=exact.device)
    if exact.device.type != "cpu":
        rounding_bits(bits, seed, tiles)
    else:
        in_threads(lambda part, run: rounding_bits(bits[run], seed, part), tiles)
    if dtype == torch.bfloat16:
        # Adding 0..65535 below the kept half of the word carries into it with the right probability, for either sign.
        return bits.add_(exact.view(torch.int32)).bitwise_and_(-65536).view(torch.float32).to(dtype)
    return _round_to_half(exact, bits)


def _round_to_half(exact: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    chance = bits.float().mul_(2.0**-16)
    normal = bits.bitwise_right_shift_(3).add_(exact.view(torch.int32)).bitwise_and_(-8192).view(torch.float32)
    # Below 2^-14 fp16 is a fixed-point grid of 2^-24; every operation here is exact.
    scaled = exact * 2.0**24
    floor = scaled.floor()
    subnormal = (floor + (scaled - floor > chance)).mul_(2.0**-24)
    return torch.where(exact.abs() < 2.0**-14, subnormal, normal).clamp_(-65504.0, 65504.0).to(torch.float16)
