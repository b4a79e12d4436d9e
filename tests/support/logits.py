"""This module counts the rows of logits that exist at once, at the operations that make them."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import VOCABULARY
from zo2trl.engine.precision import output_embeddings

_VIEWS = {torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.detach.default}


class LogitRows(TorchDispatchMode):
    """Inside, `n_rows` is the most rows as wide as the vocabulary that an operation made in or after a head.

    Weights and their views have that shape, too, and blocks may have as wide intermediates: only what is made between
    a head's call and the next block's counts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.n_rows = 0
        self._model, self._is_on, self._handles = model, False, []

    def __enter__(self) -> "LogitRows":
        heads = list(output_embeddings(self._model))
        others = [module for module in self._model.modules() if isinstance(module, nn.Embedding)]
        self._handles = [head.register_forward_pre_hook(self._begin) for head in heads]
        self._handles += [module.register_forward_pre_hook(self._end) for module in others]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _begin(self, *_: Any) -> None:
        self._is_on = True

    def _end(self, *_: Any) -> None:
        self._is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_real = isinstance(result, torch.Tensor) and result.device.type != "meta"
        if self._is_on and is_real and result.ndim > 1 and result.shape[-1] == VOCABULARY and func not in _VIEWS:
            self.n_rows = max(self.n_rows, result[..., 0].numel())
        return result
