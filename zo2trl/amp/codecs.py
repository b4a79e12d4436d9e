"""Transfer codecs: how a segment's bytes travel from its home to the execution device.

Does not: move bytes (tiers/prefetch.py) or change what is stored (tiers/store.py).
Invariant: a trainable segment decodes to exactly the bytes that were stored; only frozen ones may be lossy.
"""

from typing import Protocol

import torch

__all__ = ["PLAIN", "Codec", "Plain"]


class Codec(Protocol):
    """Sizes a ring slot and turns what arrived in it into weights."""

    identity: str

    def wire_bytes(self, n_bytes: int) -> int:
        """Bytes on the wire for `n_bytes` of storage."""
        ...

    def decode(self, wire: torch.Tensor) -> torch.Tensor:
        """uint8 wire bytes on the device -> uint8 storage bytes on the device (may be the same memory)."""
        ...


class Plain:
    """Storage bytes as they are: nothing to encode, nothing to decode."""

    identity = "plain"

    def wire_bytes(self, n_bytes: int) -> int:
        """Same number."""
        return n_bytes

    def decode(self, wire: torch.Tensor) -> torch.Tensor:
        """Same memory."""
        return wire


PLAIN = Plain()
