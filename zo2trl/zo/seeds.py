"""Seeds: how a run's seed and a step's number name each direction.

Does not: generate noise (noise.py).
"""

from zo2trl.zo.philox import LOW32, philox4x32_10
from zo2trl.zo.tiles import DOMAIN_SEED

__all__ = ["derive_seed", "direction_seed"]


def derive_seed(run_seed: int, step: int, index: int) -> int:
    """The seed (unsigned 64-bit) of direction `index` of `step`: two words of Philox in a domain of their own."""
    low, high, _, _ = philox4x32_10((step & LOW32, step >> 32, index, DOMAIN_SEED), run_seed)
    return int(low) | int(high) << 32


def direction_seed(step_seed: int, direction: int) -> int:
    """The seed that names one direction of a step; the first direction carries the step's own seed."""
    return step_seed if direction == 0 else derive_seed(step_seed, direction, 0)
