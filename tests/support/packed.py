"""A stored form for tests: bfloat16 values of few bits in half of their bytes, exactly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zo2trl.amp import codecs

__all__ = ["HIGH_BYTE", "HighByte", "coarse", "known"]


class HighByte:
    """The upper byte of each bfloat16. Values whose lower byte is zero, as `coarse` makes them, come back exactly."""

    identity = "high-byte"

    def __init__(self) -> None:
        self.n_decoded = 0

    def stored_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """One byte an element."""
        assert dtype == torch.bfloat16
        return torch.Size(shape).numel()

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Upper bytes of little-endian elements."""
        return values.contiguous().view(-1).view(torch.uint8)[1::2].contiguous()

    def decode(self, stored: torch.Tensor, into: torch.Tensor) -> None:
        """Upper bytes, and zeros below them."""
        self.n_decoded += 1
        as_bytes = into.view(-1).view(torch.uint8)
        as_bytes[0::2] = 0
        as_bytes[1::2] = stored


HIGH_BYTE = HighByte()


def coarse(values: torch.Tensor) -> torch.Tensor:
    """The values rounded to what the form holds."""
    bits = values.to(torch.bfloat16).view(torch.int16) & -256
    return bits.view(torch.bfloat16)


@contextmanager
def known(monkeypatch) -> Iterator[None]:
    """Inside, layouts may name the form."""
    with monkeypatch.context() as patch:
        patch.setitem(codecs._CODECS, HIGH_BYTE.identity, HIGH_BYTE)
        yield
