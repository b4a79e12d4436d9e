"""This module defines the optimizer that the Trainer expects: it holds learning rates and commits estimates."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

__all__ = ["ZOOptimizer"]


class ZOOptimizer(torch.optim.Optimizer):
    """A ZOOptimizer holds parameter groups without state. `step` writes the pending estimate into the journal."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        decay_names: Collection[str],
        commit: Callable[..., None],
    ) -> None:
        self._commit = commit
        decay = set(decay_names)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trainable if name in decay], "weight_decay": args.weight_decay},
            {"params": [p for name, p in trainable if name not in decay], "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": args.learning_rate})

    def step(self, closure: Any = None) -> None:
        """Commit the estimate of the last training step; it is applied to weights when they are next visited."""
        self._commit(learning_rate=self.param_groups[0]["lr"])
