"""This module defers signals while weights and the position they have absorbed change together.

Does not: decide what a signal does (trainers/signals.py decides it for the time of a training), or defer any but
SIGINT and SIGTERM, and those only if Python code handles them.
Invariant: a handler runs before or after a held section, never inside it, and every handler is restored, whatever it
raises and wherever it runs. (Python runs handlers after calls, at the start of functions and in loops, so the depth
is incremented before handlers change.)
"""

import signal
import threading

# The functions in `signal` wrap these with conversions to enums, which take 40 times as long and let handlers run.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler  # type: ignore[import-not-found]
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

__all__ = ["HELD", "Holding", "interrupts_held", "let_interrupts_in", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")
Act = Callable[[int, FrameType | None], Any]

HELD = (int(signal.SIGINT), int(signal.SIGTERM))

_depth = 0  # number of held sections that are open; only the main thread has any
_caught: list[tuple[Act, int, FrameType | None]] = []


class Holding:
    """A Holding is a signal handler that acts at once, or at the end of the held section in which a signal arrives."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal `number` now, or record it for the end of the held section."""
        if not _depth:
            self.act(number, frame)
        elif all(number != other for _, other, _ in _caught):  # a second Ctrl-C in a section adds nothing to the first
            _caught.append((self.act, number, frame))


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Defer signals to the end of the block. In other threads this does nothing: only the main one gets signals."""
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Act] = {}
    _depth += 1
    try:
        if _depth == 1:
            for number in HELD:
                handler = getsignal(number)
                if callable(handler) and not isinstance(handler, Holding):  # a training's own handlers defer already
                    before[number] = handler
                    set_handler(number, Holding(handler))
        yield
    finally:
        try:
            for number in before:
                set_handler(number, before[number])
        except BaseException:  # a restored handler raised: restore the others all the same
            for number in before:
                set_handler(number, before[number])
            raise
        finally:
            _depth -= 1
            if not _depth and _caught:
                _act_on_caught()


def let_interrupts_in() -> None:
    """Run the deferred handlers now, inside a long held section, unless another section encloses it."""
    if _caught and _depth == 1 and threading.current_thread() is threading.main_thread():
        _act_on_caught()


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that each call is one held section."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        global _depth
        if not _depth or threading.current_thread() is not threading.main_thread():
            with interrupts_held():
                return function(*args, **kwargs)
        _depth += 1  # the enclosing section runs the handlers at its end: a visit has many of these
        try:
            return function(*args, **kwargs)
        finally:
            _depth -= 1

    return held


def _act_on_caught() -> None:
    while _caught:
        act, number, frame = _caught.pop(0)
        try:
            act(number, frame)
        finally:
            _act_on_caught()
