"""The standard normal as a formula of twelve operations on a 16-bit field, and as the table of its 65,536 values.

Does not: draw anything. Invariant: every operation of the formula is exact or correctly rounded (IEEE 754 float32), so
a GPU that computes a deviate (noise_triton.py) and a CPU that looks it up have the same bits. The table's CRC32 is
checked whenever it is computed, because a journal replayed with other deviates would silently produce other weights.

The formula, for a field f in [0, 65536); fma is a multiplication and an addition with one rounding:

    u = fma(f, 2/65536, -65535/65536)    exact: the middle of the field's share of (-1, 1); f and 65535 - f mirror
    v = fma(u, u, -POLE)                 nearly u*u - 1, never 0
    w = v to the eighth power            three multiplications
    y = bits of w, shifted right by 7, plus the bits of 1.0: read as a float32, 1 + (biased exponent + fraction) / 128
    z = u * (c0 + y (c1 + y (c2 + y (c3 + y c4))))    four fma and a multiplication

With a logarithm in place of y this is Giles' inverse error function ("Approximating the erfinv function", 2010). y
follows the logarithm of w as a chain of chords, one for each power of two; for log(v) = log(w) / 8 they lie an eighth
as far off. The coefficients make the mean square error least while the largest stays at 1.9e-3 and the deviates' mean
square at 1, for which their last bits were picked.

Against the quantiles of the true normal at (f + 0.5) / 65536: the largest error is 1.9e-3, its root mean square
7.5e-4. The deviates ascend with f and stop at 4.33 (a true one passes that once in 65,536), neighbours in the last
tail step are 0.25 apart, the mean is exactly 0, the mean square 1 to 3e-10, the fourth moment 3.0009. Their
distribution function is within 6e-4 of the normal's. Its slope shows the chords: it may be a third off over a tenth
of a unit in the tails.
"""

import zlib
from functools import cache

import numpy as np
import numpy.typing as npt

from zo2trl.errors import ZO2TRLError

N_FIELDS = 65536
STEP, FIRST = 2 / N_FIELDS, (1 - N_FIELDS) / N_FIELDS
POLE = 1 + 3 / 2**18
_HEX = ("0x1.32b31cp+4", "-0x1.1e4fbep+5", "0x1.0f4336p+5", "-0x1.e3af8ap+3", "0x1.3758eap+1")
COEFFICIENTS = tuple(map(float.fromhex, _HEX))
"""c0 to c4."""

TABLE_CRC32 = 0x3CA03CBE

FloatArray = npt.NDArray[np.float32]


@cache
def gaussian_table() -> FloatArray:
    """The deviate of every field: float32 [65536], ascending, antisymmetric, read-only. Computed at first use (10 ms).

    Raises:
        ZO2TRLError: this machine computes other deviates than those the journals rely on.
    """
    upper = _deviates(np.arange(N_FIELDS // 2, N_FIELDS))
    table = np.concatenate([-upper[::-1], upper])
    crc = zlib.crc32(table.astype("<f4").tobytes())
    if crc != TABLE_CRC32:
        raise ZO2TRLError(
            f"The Gaussian table computed on this machine has CRC32 {crc:08x}, expected {TABLE_CRC32:08x}: its "
            "floating-point arithmetic does not round as IEEE 754 says, so no run would be that of other machines. "
            "Use another build of Python and numpy."
        )
    table.setflags(write=False)
    return table


def _deviates(fields: npt.NDArray[np.int64]) -> FloatArray:
    u = fused_multiply_add(fields.astype(np.float32), STEP, FIRST)
    v = fused_multiply_add(u, u, -POLE)
    for _ in range(3):
        v = v * v
    y = ((v.view(np.int32) >> 7) + np.float32(1).view(np.int32)).view(np.float32)
    *lower, highest = COEFFICIENTS
    p = np.full_like(y, highest)
    for coefficient in reversed(lower):
        p = fused_multiply_add(y, p, coefficient)
    return u * p


def fused_multiply_add(a: FloatArray, b: FloatArray | float, c: FloatArray | float) -> FloatArray:
    """a * b + c for finite float32 values that broadcast together, rounded once, as the instruction of that name does.

    In float64 the product is exact, and the sum with its rounding error is as well. The sum is then rounded to odd (an
    inexact one gets a last bit of 1), which keeps it off the boundaries of float32: the second rounding is the right
    one (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = product + addend
    kept = total - product
    error = (product - (total - kept)) + (addend - kept)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & (bits & 1 == 0), bits + step, bits).view(np.float64).astype(np.float32)
