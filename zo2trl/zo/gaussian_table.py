"""The standard normal as 65,536 float32 quantiles: a 16-bit number is turned into a deviate by one lookup.

Does not: draw anything. Invariant: the table has the same bits on every machine. Its CRC32 is checked whenever it is
computed, because a journal replayed with another table would silently produce other weights.

Against the true normal: the deviates stop at 4.33 (a true one passes that once in 65,536), and neighbours in the last
tail step are 0.25 apart. The mean is exactly 0 and the mean square 1 to float32 rounding.
"""

import math
import zlib
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from zo2trl.errors import ZO2TRLError

N_QUANTILES = 65536
TABLE_CRC32 = 0x9A4E1B18


def exact_quantiles() -> list[float]:
    """The upper half of the table before rounding: float64, ascending, scaled to a mean square of 1.

    `fsum` has one right answer; `inv_cdf` takes logarithms from the C library, whose last bit may differ. No entry
    lies within 1e-12 (relative) of a float32 rounding boundary, so the rounded table does not.
    """
    normal = NormalDist()
    upper = [normal.inv_cdf((k + 0.5) / N_QUANTILES) for k in range(N_QUANTILES // 2, N_QUANTILES)]
    root_mean_square = math.sqrt(math.fsum(z * z for z in upper) / len(upper))
    return [z / root_mean_square for z in upper]


@cache
def gaussian_table() -> npt.NDArray[np.float32]:
    """The table: float32 [65536], ascending, antisymmetric, read-only. Computed at first use (some 10 ms).

    Raises:
        ZO2TRLError: this machine computes another table than the one the journals rely on.
    """
    upper = np.array(exact_quantiles(), dtype=np.float32)
    table = np.concatenate([-upper[::-1], upper])
    crc = zlib.crc32(table.astype("<f4").tobytes())
    if crc != TABLE_CRC32:
        raise ZO2TRLError(
            f"The Gaussian table computed on this machine has CRC32 {crc:08x}, expected {TABLE_CRC32:08x}: its math "
            "library rounds differently, so Gaussian directions would not match those of other machines. "
            'Use `direction="rademacher"`, or another build of Python.'
        )
    table.setflags(write=False)
    return table
