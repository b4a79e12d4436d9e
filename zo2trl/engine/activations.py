"""What passes hold in device memory beside weights, bounded by shapes: before anything was measured.

Does not: measure (device_fit.py does). A suspended pass holds its hidden states, masks and position embeddings; the
block that runs holds its own intermediates, but only one pass runs at a time.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from zo2trl.engine.deferred import CHUNK_ROWS
from zo2trl.planning.budgets import free_device_bytes

__all__ = ["activation_bytes", "n_tokens", "passes_per_traversal", "workspace_bytes"]

HELD_STATES = 6  # hidden states, residual, masks and what generic code keeps, in units of one hidden state
BLOCK_STATES = 16  # of the running block: projections, attention, both sides of the feed-forward and its activation
LOGIT_BYTES = 12  # a logit in 16 bit, in fp32, and as a log-probability
ATTENTION_BYTES = 8  # an attention score in 16 bit, and in fp32 for the softmax
WORKSPACE_BYTES, HOPPER_WORKSPACE_BYTES = 9 << 20, 32 << 20
FREE_SHARE = 0.5  # of the free memory: the running block and the head need the rest
MAX_PASSES = 256


class OnDevice(Protocol):
    """What determines where forwards run: a store, or the options that one is opened with."""

    @property
    def device(self) -> torch.device:
        """Where."""
        ...


def passes_per_traversal(
    place: OnDevice, model: nn.Module, inputs: Mapping[str, Any], *, room: int | None = None
) -> int:
    """An upper bound on passes for one traversal, from the shape of one micro-batch; at least 1.

    `room`: bytes of the device that weights can leave to activations, if they are fewer than are free.
    """
    free = free_device_bytes(place.device)
    room = free if room is None else min(room, free)
    held = HELD_STATES * _state_bytes(model, inputs)
    return min(max(int(room * FREE_SHARE) // max(held, 1), 1), MAX_PASSES)


def activation_bytes(model: nn.Module, inputs: Mapping[str, Any], *, n_passes: int, whole_logits: bool = False) -> int:
    """More than so many passes over one micro-batch hold in memory, most likely."""
    tokens, text, state = n_tokens(inputs), _text_config(model), _state_bytes(model, inputs)
    held = n_passes * HELD_STATES * state
    running = BLOCK_STATES * state
    vocabulary = getattr(text, "vocab_size", None) or 1
    logits = LOGIT_BYTES * vocabulary * (n_passes * tokens if whole_logits else min(tokens, CHUNK_ROWS))
    scores = 0
    if getattr(text, "_attn_implementation", None) == "eager":
        heads = getattr(text, "num_attention_heads", None) or 1
        scores = ATTENTION_BYTES * heads * tokens * _length(inputs)
    return held + max(running + scores, logits)


def workspace_bytes(device: torch.device) -> int:
    """Bytes that cuBLAS keeps of the device from its first product on: PyTorch allots 32 MiB from Hopper on."""
    if device.type != "cuda":
        return 0
    return HOPPER_WORKSPACE_BYTES if torch.cuda.get_device_capability(device)[0] >= 9 else WORKSPACE_BYTES


def n_tokens(inputs: Mapping[str, Any]) -> int:
    """Elements of the largest tensor of a micro-batch: its tokens, padding included."""
    return max((value.numel() for value in inputs.values() if isinstance(value, torch.Tensor)), default=1)


def _state_bytes(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """One hidden state, as wide as the model's weights."""
    itemsize = next((p.dtype.itemsize for p in model.parameters() if p.dtype.is_floating_point), 4)
    return max(itemsize, 2) * n_tokens(inputs) * _hidden_size(model)


def _length(inputs: Mapping[str, Any]) -> int:
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim]
    return max((tensor.shape[-1] for tensor in tensors), default=1)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(model: nn.Module) -> int:
    text = _text_config(model)
    return getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 4096
