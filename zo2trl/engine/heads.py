"""Heads whose losses are computed a few rows of logits at a time, and in fp32.

The logits of 2,048 tokens of OPT are 393 MiB in fp32, and their log-softmax as much again: more than a streamed model
needs for anything else. So inside `deferring_logits` a head gets a stand-in for its hidden states (deferred.py), and
the model's own forward and loss function, unchanged, meet a stand-in for the logits.

Does not: know a model class or a loss function, or change what is computed; nor defer anything under autograd.

Invariant: a stand-in is real or garbage when the weights it needs may change. Logits that were kept are made when
the `deferring_logits` block ends; a block never outlives the pass it was entered in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zo2trl.engine.deferred import Deferral, defer
from zo2trl.engine.lockstep import Pass, current_pass
from zo2trl.engine.precision import fp32_heads, output_embeddings

__all__ = ["deferring_logits", "hook_heads"]


def hook_heads(model: nn.Module) -> list[RemovableHandle]:
    """Make a transformers model's heads return fp32, and defer where that is wanted; twice does no harm."""
    heads = [head for head in dict.fromkeys(output_embeddings(model)) if not _is_hooked(head)]
    return [*fp32_heads(model), *(head.register_forward_pre_hook(_defer) for head in heads)]


@contextmanager
def deferring_logits(wanted: bool = True) -> Iterator[None]:
    """Inside, losses are computed without whole logits by every model that went through `hook_heads`.

    The outermost block of a pass decides.

    Args:
        wanted: False where the logits are needed anyway: they are made once, at once.
    """
    if _current() is not None:
        yield
        return
    deferral = Deferral()
    token = _deferring.set((current_pass(), deferral if wanted else None))
    try:
        yield
        deferral.settle()
    finally:
        deferral.is_over = True
        _deferring.reset(token)


_Block = tuple[Pass | None, Deferral | None]
_deferring: ContextVar[_Block | None] = ContextVar("zo2trl_deferring", default=None)


def _current() -> _Block | None:
    block = _deferring.get()  # a pass begins with a copy of the context it was made in, but has weights of its own
    return block if block is not None and block[0] is current_pass() else None


def _defer(head: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Forward pre-hook of a head. As a function of this module it survives copies and pickles of the head."""
    block = _current()
    if block is None or block[1] is None or torch.is_grad_enabled() or len(inputs) != 1:
        return None
    return defer(inputs[0], block[1])


def _is_hooked(head: nn.Module) -> bool:
    return _defer in head._forward_pre_hooks.values()
