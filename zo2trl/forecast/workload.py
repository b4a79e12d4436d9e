"""Count what one pass computes and holds, in the forward of a model whose tensors have no storage.

Does not: know a machine (planning/cost_model.py applies rates to counts), or need weights: tensors have shapes only.
Invariant: the operations counted are those that the model's own forward calls, whatever the architecture.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from zo2trl.layout.model_layout import find_stacks
from zo2trl.planning.rates import dtype_name
from zo2trl.planning.workload import Workload

__all__ = ["count_pass", "fake_tensors", "make_fake"]


def fake_tensors() -> FakeTensorMode:
    """A context in which tensors have shapes and no memory, and operations run as those of a CPU."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(model: nn.Module, *, mode: FakeTensorMode) -> None:
    """Replace the tensors of a model on the meta device by fake ones, which more of PyTorch accepts; ties are kept."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})  # type: ignore[arg-type]


def count_pass(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    mode: FakeTensorMode,
    autocast: torch.dtype | None = None,
    on_cpu: bool = True,
) -> Workload:
    """Run one pass and count its operations and bytes.

    Args:
        model: with fake tensors of `mode`.
        run: calls the model's loss once.
        autocast: the dtype of the trainer's autocast; None: it has none.
        on_cpu: memory counts from when it is written; on a GPU it counts from when it is allocated.

    Raises:
        Exception: whatever a forward raises that looks at values, because fake tensors have none.
    """
    counting = _Counting(on_cpu=on_cpu)
    handles = [
        block.register_forward_pre_hook(counting.between_blocks) for _, stack in find_stacks(model) for block in stack
    ]
    try:
        # Without its cache, as in training, where a Parameter holds many probes' weights.
        casting = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None, cache_enabled=False)
        with mode, torch.no_grad(), casting, counting, _Attention(counting):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return Workload(
        flops=counting.flops, moved_bytes=counting.moved_bytes, n_operations=counting.n_operations,
        held_bytes=counting.held_bytes, peak_bytes=counting.peak_bytes,
    )  # fmt: skip


class _Counting(TorchDispatchMode):
    """Adds up operations, and the bytes of tensors that are alive."""

    def __init__(self, *, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self.flops: Counter[str] = Counter()
        self.moved_bytes = self.n_operations = self.held_bytes = self.peak_bytes = self._alive_bytes = 0
        self._users: Counter[int] = Counter()  # storage -> tensors that share it
        self._sizes: dict[int, int] = {}  # storage -> bytes of it that were written

    def between_blocks(self, *_: Any) -> None:
        self.held_bytes = max(self.held_bytes, self._alive_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, *given: Any) -> Any:
        args, kwargs = _arguments(given)
        result = func(*args, **kwargs)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.n_operations += bool(made)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops[dtype_name(made[0].dtype)] += int(formula(*args, **kwargs, out_val=result))
        elif made and not (_is_view(func) or _is_empty(func)):  # fake tensors are also asked for their device
            self.moved_bytes += sum(map(_n_bytes, sources)) + sum(map(_n_bytes, made))
        known = {_storage(tensor) for tensor in sources}
        for tensor in made:
            is_written = not (_is_view(func) or (_is_empty(func) and self._on_cpu))
            self._note(tensor, is_new=_storage(tensor) not in known, is_written=is_written)
        return result

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        rows, width = math.prod(query.shape[:-1]), query.shape[-1] + value.shape[-1]
        self.flops[f"{dtype_name(query.dtype)} attention"] += 2 * rows * key.shape[-2] * width

    def _note(self, tensor: torch.Tensor, *, is_new: bool, is_written: bool) -> None:
        """Count memory from when it is written, and as much of it as is: what is only reserved takes no pages."""
        key = _storage(tensor)
        if not is_new and key not in self._users:
            return  # a weight, or a view of one
        before = self._sizes.setdefault(key, 0)
        if is_written:
            self._sizes[key] = after = max(before, _n_bytes(tensor))
            self._alive_bytes += after - before
            self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        self._users[key] += 1
        weakref.finalize(tensor, self._forget, key)

    def _forget(self, key: int) -> None:
        self._users[key] -= 1
        if self._users[key] <= 0:
            del self._users[key]
            self._alive_bytes -= self._sizes.pop(key)


class _Attention(TorchFunctionMode):
    """Counts fused attention without its scores, which only its decomposition for fake tensors would hold."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        args, kwargs = _arguments(given)
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given_three = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names))
        query, key, value = (_autocast(tensor) for tensor in given_three)
        self._counting.attend(query, key, value)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that fused attention works in."""
    is_cast = torch.is_autocast_enabled("cpu") and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return tensor.to(torch.get_autocast_dtype("cpu")) if is_cast else tensor


def _arguments(given: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An operation's arguments, as PyTorch passes them to modes: either may be left out."""
    return (given[0] if given else ()), (given[1] if len(given) > 1 and given[1] else {})


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _is_empty(func: Any) -> bool:
    return "empty" in func._schema.name


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _n_bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
