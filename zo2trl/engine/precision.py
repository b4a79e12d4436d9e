"""Losses in fp32 whatever the model's dtype: what heads return is widened before a loss is computed from it.

A 16-bit loss quantises the projected gradient in steps of 0.24 (fp16 at loss 0.5 and eps 1e-3) or 1.95 (bf16). Causal
losses of transformers widen by themselves; those of T5, BERT-like and sequence-classification models do not.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

__all__ = ["fp32_heads", "output_embeddings"]


def fp32_heads(model: nn.Module) -> list[RemovableHandle]:
    """Make every head of a transformers model return fp32 where it would return 16 bit; twice does no harm."""
    heads = [head for head in dict.fromkeys(_heads(model)) if _widen not in head._forward_hooks.values()]
    return [head.register_forward_hook(_widen) for head in heads]


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """What projects hidden states to logits over the vocabulary, of every transformers model in this one."""
    for module in _transformers_models(model):
        output = module.get_output_embeddings()
        if output is not None:
            yield output


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Output embeddings, and everything beside a base model."""
    yield from output_embeddings(model)
    for module in _transformers_models(model):
        prefix = module.base_model_prefix
        if hasattr(module, prefix):
            yield from (child for name, child in module.named_children() if name != prefix)


def _transformers_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    # By class: a PEFT wrapper answers for the attributes of what it wraps, and has children of its own beside it.
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _widen(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16):
        return output.float()
    return None
