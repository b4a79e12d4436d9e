"""Quantised parameters: recognises weights in a form that only the module they are in can read.

bitsandbytes keeps blocks of bytes and a `quant_state`, torchao a tensor that is made of several. The store lends flat
bytes of one dtype, so these stay where they are: on the device, resident, frozen.

Does not: quantise, read such weights, or count what their modules keep beside them.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_quantised", "quantised_bytes", "quantised_digest", "quantised_parameters"]


def is_quantised(parameter: nn.Parameter) -> bool:
    """Whether a parameter is of a class of its own, and does not hold its values as floating-point numbers."""
    if type(parameter) is nn.Parameter:
        return False
    return is_traceable_wrapper_subclass(parameter) or not parameter.dtype.is_floating_point


def quantised_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The quantised parameters of a model by name."""
    return {name: parameter for name, parameter in model.named_parameters() if is_quantised(parameter)}


def quantised_bytes(parameter: nn.Parameter) -> int:
    """Bytes that one takes on the device."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in _plain_tensors(parameter))


def quantised_digest(model: nn.Module) -> str | None:
    """SHA-256 of the names of all quantised parameters; None if there are none.

    Their bytes are no identity: bitsandbytes packs them anew in the first forward.
    """
    names = list(quantised_parameters(model))
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest() if names else None


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach().as_subclass(torch.Tensor)
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        inner = getattr(tensor, name)
        if isinstance(inner, torch.Tensor):
            yield from _plain_tensors(inner)
