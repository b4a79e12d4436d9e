"""Deferred rows: a stand-in for a tensor, made from known rows by operations that act on each row alone.

A stand-in collects projection, widening, scaling, softcapping and reshaping. When it meets `cross_entropy`, that is
computed for 256 rows after the other. Any other operation gets the real tensor, made as if nothing had been put off.

Does not: know what a model is, or when to put things off (heads.py).

Invariants:
- No operation sees other values than without us: what is not known to act on each row alone gets real tensors. A
  loss differs only by what a matrix multiplication of fewer rows does.
- Per-token losses are reduced by the operation that would have reduced them, all at once.
- When a tensor becomes real, so does all that was derived from it: it may be written into next.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from zo2trl.errors import TraversalError

__all__ = ["CHUNK_ROWS", "Deferral", "DeferredRows", "defer"]

CHUNK_ROWS = 256
"""Rows of logits that exist at once: enough to keep a GPU's matrix multiplication bound by arithmetic (OPT-13B, 2,048
tokens: 98 MiB and 2.40 ms instead of 785 MiB and 2.05 ms). A constant, so that no two runs differ in it."""

Rowwise = Callable[[torch.Tensor], torch.Tensor]
Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""An operation, and its arguments after the first."""


class Deferral:
    """The stand-ins made in some stretch of code; after it the weights they need are gone."""

    def __init__(self) -> None:
        self.is_over = False
        self._made: list[weakref.ref[_Node]] = []

    def add(self, node: "_Node") -> None:
        """Note a stand-in; it is not kept alive."""
        self._made.append(weakref.ref(node))

    def settle(self) -> None:
        """Make the deferred tensors real that are still referenced."""
        for node in _alive(self._made):
            node.settle()


def defer(rows: Any, deferral: Deferral) -> "DeferredRows | None":
    """A stand-in for what is made of the last dimensions (rows) of a tensor; None for what cannot have one."""
    if type(rows) is not torch.Tensor or rows.ndim < 2 or rows.numel() == 0 or rows.is_inference():
        return None
    return DeferredRows(_Origin(rows, deferral))


# ------------------------------------------------------------------------------------------ what stands for one tensor


class _Node:
    """One tensor that is not there yet.

    Attributes:
        shape: of the tensor.
        sample: no row of it: a tensor of shape [0, width] that tells dtype, device and width.
        real: the tensor, once it is there.
    """

    def __init__(self, deferral: Deferral, *, shape: torch.Size, sample: torch.Tensor) -> None:
        self.deferral, self.shape, self.sample = deferral, shape, sample
        self.real: torch.Tensor | None = None
        self.derived: list[weakref.ref[_Derived]] = []
        deferral.add(self)

    def settle(self) -> torch.Tensor:
        """Make it real."""
        if self.real is None:
            if self.deferral.is_over:
                raise TraversalError(
                    "Logits were asked for after the pass they belong to had ended in an error: they were never made, "
                    "and the weights they need are gone."
                )
            self._settle_source()
        if self.real is None:  # else the source has made it, too
            self.real = self._make()
            for node in _alive(self.derived):
                node.settle()
        return self.real

    def origin(self) -> torch.Tensor:
        """The known rows it all comes from, as [rows, width]."""
        raise NotImplementedError

    def of_rows(self) -> Rowwise:
        """What makes rows of this tensor from as many known ones."""
        raise NotImplementedError

    def _settle_source(self) -> None:
        """Make real what it comes from."""

    def _make(self) -> torch.Tensor:
        raise NotImplementedError


class _Origin(_Node):
    """The known rows."""

    def __init__(self, rows: torch.Tensor, deferral: Deferral) -> None:
        self._rows, self._version = rows, rows._version
        super().__init__(deferral, shape=rows.shape, sample=rows.reshape(-1, rows.shape[-1])[:0])

    def origin(self) -> torch.Tensor:
        return self._make().reshape(-1, self.shape[-1])

    def of_rows(self) -> Rowwise:
        return lambda rows: rows

    def _make(self) -> torch.Tensor:
        if self._rows._version != self._version:
            raise TraversalError(
                "The hidden states were changed in place after the head had got them and before its logits were made: "
                "clone them before changing them."
            )
        return self._rows


class _Derived(_Node):
    """What an operation makes of another one, under the autocast of the moment it was asked for."""

    def __init__(self, source: _Node, call: Call, *, shape: torch.Size, sample: torch.Tensor) -> None:
        super().__init__(source.deferral, shape=shape, sample=sample)
        self._source: _Node | None = source
        self._func, self._rest = call
        self._autocast = _autocast(sample.device.type)
        source.derived.append(weakref.ref(self))

    def origin(self) -> torch.Tensor:
        assert self._source is not None
        return self._source.origin()

    def of_rows(self) -> Rowwise:
        assert self._source is not None
        before = self._source.of_rows()
        if self._func in _VIEWS:
            return before
        operation = self._prepared()
        return lambda rows: operation(before(rows))

    def _settle_source(self) -> None:
        assert self._source is not None
        self._source.settle()

    def _make(self) -> torch.Tensor:
        assert self._source is not None
        source, self._source = self._source.settle(), None  # it may be half of the memory
        return self._prepared()(source)

    def _prepared(self) -> Rowwise:
        enabled, dtype = self._autocast
        if self._func is F.linear and enabled and all(t is None or t.dtype in _CAST for t in self._rest):
            # Autocast would cast the weights again for every chunk: they are cast here, as it would have.
            cast = tuple(None if t is None else t.to(dtype) for t in self._rest)
            return lambda x: self._call(x.to(dtype), cast, autocast=(False, dtype))
        return lambda x: self._call(x, self._rest, autocast=self._autocast)

    def _call(self, x: torch.Tensor, rest: tuple[Any, ...], *, autocast: tuple[bool, torch.dtype]) -> torch.Tensor:
        with _under(x.device.type, autocast):
            return self._func(x, *rest)


_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


def _autocast(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _under(kind: str, autocast: tuple[bool, torch.dtype]) -> AbstractContextManager[Any]:
    if _autocast(kind) == autocast:
        return nullcontext()
    return torch.autocast(kind, enabled=autocast[0], dtype=autocast[1], cache_enabled=False)


def _alive(references: list[Any]) -> list[Any]:
    return [node for reference in references if (node := reference()) is not None]


# ------------------------------------------------------------------------------------------------- the stand-in itself


class DeferredRows(torch.Tensor):
    """A tensor without storage. It keeps standing in when it has become real: operations get the real tensor."""

    node: _Node

    @staticmethod
    def __new__(cls, node: _Node) -> "DeferredRows":  # noqa: D102
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, node.shape, dtype=node.sample.dtype, device=node.sample.device
        )
        self.node = node
        return self

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, *given: Any) -> Any:
        """Put off what can be put off, and do everything else with real tensors."""
        args, kwargs = _arguments(*given)
        x, rest = (args[0], args[1:]) if args else (None, ())
        is_alone = not any(isinstance(other, DeferredRows) for other in tree_leaves((rest, kwargs)))
        if isinstance(x, DeferredRows) and x.node.real is None and is_alone:
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is F.cross_entropy and _is_of_rows(x.node, *rest, **kwargs):
                return _cross_entropy(x.node, *rest, **kwargs)
            if func in _RULES and not kwargs:
                deferred = _RULES[func](x, (func, rest))
                if deferred is not None:
                    return deferred
        return _with_real_tensors(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., Any], types: Any, *given: Any) -> Any:
        """Where `__torch_function__` was passed over."""
        return _with_real_tensors(func, *_arguments(*given))


def _arguments(args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    return args, kwargs or {}


def _with_real_tensors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(DeferredRows, lambda deferred: deferred.node.settle(), (args, kwargs))
    return func(*args, **kwargs)


Rule = Callable[[DeferredRows, Call], DeferredRows | None]
"""Gets a stand-in and what is asked of it; returns a stand-in for the result, or None if there can be none."""


def _elementwise(x: DeferredRows, call: Call) -> DeferredRows | None:
    """Operations with numbers, dtypes and devices."""
    func, rest = call
    if not all(isinstance(other, (int, float, torch.dtype, torch.device)) for other in rest):
        return None
    sample = func(x.node.sample, *rest)
    if sample is x.node.sample:
        return x  # as the real tensor would be returned itself
    if sample.device != x.node.sample.device:
        return None
    return DeferredRows(_Derived(x.node, call, shape=x.node.shape, sample=sample))


def _linear(x: DeferredRows, call: Call) -> DeferredRows | None:
    """A projection by plain weights."""
    func, rest = call
    weight = rest[0]
    if weight.ndim != 2 or not all(t is None or type(t) in (torch.Tensor, nn.Parameter) for t in rest):
        return None
    without_output = (None if t is None else t[:0] for t in rest)  # the dtype of nothing costs nothing
    sample = weight.new_empty((0, len(weight)), dtype=func(x.node.sample, *without_output).dtype)
    shape = torch.Size((*x.node.shape[:-1], len(weight)))
    return DeferredRows(_Derived(x.node, call, shape=shape, sample=sample))


def _view(x: DeferredRows, call: Call) -> DeferredRows | None:
    """Any reshaping that keeps the last dimension leaves rows whole and in order."""
    func, rest = call
    try:
        shape = func(torch.empty(x.node.shape, device="meta"), *rest).shape
    except (RuntimeError, TypeError):
        return None  # the real tensor says what is wrong
    if len(shape) < 2 or shape[-1] != x.node.shape[-1]:
        return None
    return DeferredRows(_Derived(x.node, call, shape=shape, sample=x.node.sample))


_T: Any = torch.Tensor
_VIEWS = {_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten}
_ELEMENTWISE = {
    _T.float, _T.to, _T.contiguous, _T.mul, _T.__mul__, _T.__rmul__, torch.mul, _T.div, _T.__truediv__, torch.div,
    _T.tanh, torch.tanh,
}  # fmt: skip
_RULES: dict[Any, Rule] = {
    F.linear: _linear, **dict.fromkeys(_ELEMENTWISE, _elementwise), **dict.fromkeys(_VIEWS, _view)
}  # fmt: skip
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
_METADATA = {
    *(getattr(_T, name).__get__ for name in _PROPERTIES),
    _T.size, _T.dim, _T.numel, _T.is_floating_point, _T.__len__,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- the loss in chunks

_ORDINARY = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}


def _is_of_rows(logits: _Node, target: torch.Tensor, **options: Any) -> bool:
    """Whether `F.cross_entropy` is asked for losses of rows that belong to one class each."""
    return (
        len(logits.shape) == 2
        and target.shape == logits.shape[:1]
        and not target.is_floating_point()
        and all(options.get(name, value) == value for name, value in _ORDINARY.items())
    )


def _cross_entropy(
    logits: _Node, target: torch.Tensor, *, ignore_index: int = -100, reduction: str = "mean", **ordinary: Any
) -> torch.Tensor:
    rows, project = logits.origin(), logits.of_rows()
    pieces = zip(rows.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True)
    losses = torch.cat(
        [F.cross_entropy(project(x), y, ignore_index=ignore_index, reduction="none") for x, y in pieces]
    )
    if reduction == "none":
        return losses
    # What reduces the losses of whole logits, given a single class: the same sums in the same order.
    only_class = torch.zeros_like(target).masked_fill_(target == ignore_index, -100)
    return F.nll_loss(-losses[:, None], only_class, ignore_index=-100, reduction=reduction)
