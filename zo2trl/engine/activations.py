"""How many passes may be alive at once: what suspended passes hold in memory, bounded by shapes.

Does not: measure. A suspended pass holds its hidden states, masks and position embeddings; the block that runs holds
its own intermediates, but only one pass runs at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zo2trl.tiers.machine import free_device_bytes
from zo2trl.tiers.store import TieredStore

__all__ = ["passes_per_march"]

HELD_STATES = 6  # hidden states, residual, masks and what generic code keeps, in units of one hidden state in fp32
FREE_SHARE = 0.5  # of the free memory: the running block and the head need the rest
MAX_PASSES = 256


def passes_per_march(store: TieredStore, model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """An upper bound on passes for one march, from the shape of one micro-batch; at least 1."""
    held = HELD_STATES * 4 * _tokens(inputs) * _hidden_size(model)
    return min(max(int(free_device_bytes(store.device) * FREE_SHARE) // max(held, 1), 1), MAX_PASSES)


def _tokens(inputs: Mapping[str, Any]) -> int:
    return max((value.numel() for value in inputs.values() if isinstance(value, torch.Tensor)), default=1)


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 4096
