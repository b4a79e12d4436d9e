"""Lockstep: many passes through one model, each an ordinary call, suspended wherever they need weights.

Does not: lease, perturb or bind anything; `serve` does, once for all passes that wait at the same point.

A pass runs in a greenlet. Thread-local state of torch (grad mode, autocast, function modes) would leak from one pass
into the next at a hand-over, so each pass carries its own. Autocast's weight cache is emptied at every hand-over: it
is keyed by Parameter, and the next pass sees other values in the same Parameter.

Invariant: when `traversal` returns or raises, no pass is suspended and the caller's modes are what they were.
"""

import contextvars
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.overrides import TorchFunctionMode

from zo2trl.zo.estimators import Probe

__all__ = ["Pass", "PassAborted", "PassLocal", "current_pass", "traverse"]


class PassAborted(BaseException):
    """Thrown into suspended passes when another one failed; not an Exception, so that model code lets it through."""


class PassLocal(Protocol):
    """Something about a model that code in a pass may change for a while, and that other passes must not see changed.

    Which adapters are switched on, say: a loss that switches them off is suspended many times before it switches them
    on again.
    """

    def get(self) -> Any:
        """What it is now; cheap, and comparable with `==`."""
        ...

    def set(self, value: Any) -> None:
        """Make it what `get` returned."""
        ...


class _Modes:
    """Torch's thread-local modes: taken from a pass when it is suspended, put back when it goes on."""

    __slots__ = ("flags", "functions", "inference")

    def __init__(self) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.flags = (
            torch.is_grad_enabled(), torch.is_autocast_cache_enabled(),
            *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS],
        )  # fmt: skip
        self.functions = _pop_function_modes()

    def replace(self, now: "_Modes | None") -> None:
        """`now`: what they are at this moment, if known: to set what is set already takes longer than to look."""
        if now is None or self.flags != now.flags:
            grad, cache, *autocast = self.flags
            torch.set_grad_enabled(grad)
            torch.set_autocast_cache_enabled(cache)
            for kind, (enabled, dtype) in zip(_KINDS, autocast, strict=True):
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
        for mode in self.functions:
            torch._C._push_on_torch_function_stack(mode)


_KINDS = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _pop_function_modes() -> list[TorchFunctionMode]:
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    return modes[::-1]


class Pass(greenlet):
    """One probe on one micro-batch: `run` is called in a greenlet and may call `wait_for` at any depth.

    Attributes:
        probe: which weights it sees.
        awaiting: the point it is suspended at; None once it has ended.
        visits: how many points it has been served; the pass that is furthest behind is served first.
        value: what `run` returned.
    """

    def __init__(
        self, run: Callable[[], Any], probe: Probe, *, first_point: int, pass_locals: Sequence[PassLocal] = ()
    ) -> None:
        super().__init__(self._finish)
        self.gr_context = contextvars.copy_context()  # libraries record outputs through context variables
        self.probe = probe
        self.awaiting: int | None = first_point
        self.visits = 0
        self.value: Any = None
        self._run = run
        self._modes: _Modes | None = None
        self._locals = [(local, local.get()) for local in pass_locals]
        self._outside: Any = None  # guard that suspends an inference mode the pass is in

    def wait_for(self, point: int) -> None:
        """Called from inside the pass: suspend until the point's weights are bound for this pass's probe."""
        self.awaiting = point
        assert self.parent is not None
        self.parent.switch()

    def resume(self) -> None:
        """Called by `serve`: run on until the next point or the end."""
        self.visits += 1
        self.awaiting = None
        outer = _Modes()
        self._enter(outer)
        try:
            self.parent = getcurrent()
            self.switch()
        finally:
            self._leave(outer)

    def _enter(self, outer: _Modes) -> None:
        torch.clear_autocast_cache()
        outside, self._outside = self._outside, None
        if outside is not None:
            _exit_inference_mode(outside)  # which sets grad mode, too
        (self._modes or outer).replace(outer if outside is None else None)
        for local, value in self._locals:
            if local.get() != value:
                local.set(value)

    def _leave(self, outer: _Modes) -> None:
        self._modes = inner = _Modes()
        self._locals = [(local, local.get()) for local, _ in self._locals]
        torch.clear_autocast_cache()  # also when autocast is off by now: its own exit only clears the outermost level
        if inner.inference != outer.inference:
            self._outside = _enter_inference_mode(outer.inference)
        outer.replace(inner if self._outside is None else None)

    def _finish(self) -> None:
        self.value = self._run()


def current_pass() -> Pass | None:
    """The pass this code runs in, or None outside any traversal."""
    here = getcurrent()
    while here is not None and not isinstance(here, Pass):
        here = here.parent
    return here


def traverse(
    passes: Sequence[Pass], serve: Callable[[int, list[Pass]], None], *, pass_locals: Sequence[PassLocal] = ()
) -> list[Any]:
    """Run passes to their ends; values in order.

    `serve(point, waiting)` must resume every pass in `waiting` once. It is called with the point awaited by the pass
    with the fewest visits, so passes of different lengths (generation, say) are all served.
    """
    before = [local.get() for local in pass_locals]
    try:
        while live := [p for p in passes if p.awaiting is not None]:
            point = min(live, key=lambda p: p.visits).awaiting
            assert point is not None
            serve(point, [p for p in live if p.awaiting == point])
    finally:
        for p in passes:
            _abort(p)
        for local, value in zip(pass_locals, before, strict=True):
            if local.get() != value:
                local.set(value)
    return [p.value for p in passes]


def _abort(p: Pass) -> None:
    if p.dead or not p:
        return
    outer = _Modes()
    p._enter(outer)
    # Whatever its clean-up code raises in turn: the error that ended the traversal is the one to be told.
    with suppress(BaseException):
        p.parent = getcurrent()
        p.throw(PassAborted)
    p._leave(outer)
