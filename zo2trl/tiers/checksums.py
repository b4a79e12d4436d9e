"""Checksums of tensors whose bytes arrive in pieces: CRC32 in any order, from several threads at once.

Does not: read anything, or know what a tensor's checksum should be.
Invariant: the sum of a tensor does not depend on where its bytes were cut, or on the order of the pieces.

CRC32 is linear over GF(2): that of A followed by B is crc(A) * x^(8 len(B)) mod P, xor crc(B). Polynomials are ints
here, the way zlib has them: the bit of x^0 is the highest of 32.
"""

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from zo2trl.layout.layout import TensorSpec

__all__ = ["TensorSums", "combine_crcs"]

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X8 = 1 << 23  # x^8: one byte further on


class TensorSums:
    """CRC32 of tensors with the zeros that pad them. `tensors` are of one unit and in the order of their offsets."""

    _parts: dict[int, list[tuple[int, int, int]]]  # tensor id -> (byte offset in the unit, bytes, their CRC32)

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._starts = [spec.stored_offset for spec in tensors]
        self._parts = {spec.tensor_id: [] for spec in tensors}

    def add(self, data: memoryview, start: int) -> None:
        """Take in bytes that lie at byte `start` of the unit; those of other tensors are passed over.

        Long pieces are summed without the interpreter's lock.
        """
        stop = start + len(data)
        for spec in self._tensors[max(bisect_right(self._starts, start) - 1, 0) :]:
            if spec.stored_offset >= stop:
                return
            first, last = max(start, spec.stored_offset), min(stop, spec.stored_offset + spec.stored_padded_bytes)
            if first < last:
                crc = zlib.crc32(data[first - start : last - start])
                self._parts[spec.tensor_id].append((first, last - first, crc))

    def crcs(self) -> dict[int, int]:
        """Tensor id -> CRC32. What never came of a tensor's end counts as zeros, which is what its padding is."""
        return {spec.tensor_id: self._sum(spec) for spec in self._tensors}

    def _sum(self, spec: TensorSpec) -> int:
        crc, position = 0, spec.stored_offset
        for start, n_bytes, part in sorted(self._parts[spec.tensor_id]):
            assert start == position, f"bytes {position} to {start} of the unit never came, or came twice"
            crc, position = combine_crcs(crc, part, n_bytes), start + n_bytes
        n_missing = spec.stored_offset + spec.stored_padded_bytes - position
        return zlib.crc32(bytes(n_missing), crc)


def combine_crcs(first: int, second: int, n_bytes: int) -> int:
    """CRC32 of A followed by B, from that of A, that of B, and the length of B in bytes."""
    return _times(_shift(n_bytes), first) ^ second


@lru_cache(maxsize=256)
def _shift(n_bytes: int) -> int:
    """x^(8 n_bytes) mod P, by squaring."""
    power, square = _ONE, _X8
    while n_bytes:
        if n_bytes & 1:
            power = _times(power, square)
        square = _times(square, square)
        n_bytes >>= 1
    return power


def _times(a: int, b: int) -> int:
    """The product of two polynomials mod P."""
    product = 0
    for i in range(31, -1, -1):
        if a >> i & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
