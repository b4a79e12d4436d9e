"""Philox4x32-10, the counter-based generator every random number of a run comes from, on numpy arrays.

Does not: choose counters (noise.py does), hold state, touch any global generator.
Invariant: the words of one call depend on its counter and key alone, never on what else is computed beside it; they
are those of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), on every platform.
"""

import numpy as np
import numpy.typing as npt

from zo2trl.errors import ConfigError

UIntArray = npt.NDArray[np.uint64]
Counter = tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]
Words = tuple[UIntArray, UIntArray, UIntArray, UIntArray]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF

_SHIFT32 = np.uint64(32)
_MASK32 = np.uint64(LOW32)


def key_halves(seed: int) -> tuple[int, int]:
    """The key of a seed: its low and high 32 bits.

    Raises:
        ConfigError: the seed is no unsigned 64-bit number.
    """
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"A seed must lie in [0, 2**64), got {seed}. Pass a non-negative 64-bit integer.")
    return seed & LOW32, seed >> 32


def philox4x32_10(counter: Counter, seed: int) -> Words:
    """The four 32-bit output words of every counter, under the key `seed`.

    `counter` is four integer arrays (or numbers) below 2**32 that broadcast together to shape S; each word comes back
    as uint64 of shape S with a clear upper half. A block of about 16,000 counters keeps the 48 bytes of work space
    per counter inside a core's cache, which is where this runs fastest (12 ns per call against 100 for 512 counters).
    """
    shape = np.broadcast_shapes(*(np.shape(part) for part in counter))
    # x holds the two words that get multiplied, y the two that are only mixed in; uint64 keeps whole products. Both
    # halves of the state go through every operation together, to halve the number of numpy calls.
    x, y, product = (np.empty((2, *shape), dtype=np.uint64) for _ in range(3))
    x[0], y[0], x[1], y[1] = counter
    crossed = product[::-1]
    column = (2, *(1,) * len(shape))
    multipliers = np.array(MULTIPLIERS, dtype=np.uint64).reshape(column)
    for key in _round_keys(seed):
        np.multiply(x, multipliers, out=product)
        np.right_shift(crossed, _SHIFT32, out=x)
        np.bitwise_xor(x, y, out=x)
        np.bitwise_xor(x, key.reshape(column), out=x)
        np.bitwise_and(crossed, _MASK32, out=y)
    return x[0], y[0], x[1], y[1]


def _round_keys(seed: int) -> UIntArray:
    """The key of each round: uint64 [ROUNDS, 2]."""
    low, high = key_halves(seed)
    keys = [[(low + i * KEY_STEPS[0]) & LOW32, (high + i * KEY_STEPS[1]) & LOW32] for i in range(ROUNDS)]
    return np.array(keys, dtype=np.uint64)
