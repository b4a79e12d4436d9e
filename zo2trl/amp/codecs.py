"""Codecs: the forms in which tiers store weights and links carry them, and how the bytes become weights again.

A tensor's stored form is the identity of a codec (`TensorSpec.stored`). Tiers, the ring, files and budgets count
stored bytes; a lease decodes them, on the execution device, into a buffer that the placement counts.

Does not: move bytes (tiers/), choose the form of a tensor (layout/), or know any model.
Invariant: what `decode` writes is a pure function of the stored bytes, on every device. Only frozen tensors may have
another form than `Plain`, so no codec ever comes between a weight and its updates.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["PLAIN", "Codec", "Plain", "codec_of", "is_known", "register"]


class Codec(Protocol):
    """One stored form of a tensor. All bytes are flat uint8 tensors without padding."""

    @property
    def identity(self) -> str:
        """The form's name in layout files and journals, with every parameter of it that bytes depend on."""
        ...

    def stored_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that a tensor of this shape and decoded dtype takes in this form."""
        ...

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The stored bytes of a tensor; lossy, if the form is, and on the tensor's device."""
        ...

    def decode(self, stored: torch.Tensor, into: torch.Tensor) -> None:
        """Write the values of stored bytes into a tensor of the decoded shape and dtype on the same device.

        Only enqueues work on a GPU's current stream: it neither allocates in proportion to the tensor nor waits.
        """
        ...


class Plain:
    """The elements as they are. Leases skip it: a plain segment is used where it is stored."""

    identity = "plain"

    def stored_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of the elements."""
        return torch.Size(shape).numel() * dtype.itemsize

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The same memory, if the tensor is contiguous."""
        return values.contiguous().view(-1).view(torch.uint8)

    def decode(self, stored: torch.Tensor, into: torch.Tensor) -> None:
        """Copy."""
        into.copy_(stored.view(into.dtype).view(into.shape))


PLAIN = Plain()

_CODECS: dict[str, Codec] = {PLAIN.identity: PLAIN}


def register(codec: Codec) -> None:
    """Make a form known by its identity, before any layout names it. A second one of the same identity replaces it."""
    _CODECS[codec.identity] = codec


def codec_of(identity: str) -> Codec:
    """The codec of a stored form. Raises `KeyError` for one that was never registered."""
    return _CODECS[identity]


def is_known(identity: str) -> bool:
    """Whether `codec_of` has it."""
    return identity in _CODECS
