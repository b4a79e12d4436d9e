"""Holding signals back while bytes and the position they have absorbed change together.

Does not: decide what a signal does (trainers/signals.py, for the time of a training), or hold back any but SIGINT and
SIGTERM, and those only if Python code handles them.
Invariant: a handler acts before or after a held section, never inside it, and every handler is put back, whatever it
raises and wherever it strikes. (Python runs handlers after calls, at the start of functions and in loops, so a section
counts before handlers change.)
"""

import signal
import threading

# The functions in `signal` wrap these with conversions to enums: 40 times the time, and moments to strike in between.
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

_depth = 0  # of held sections; only the main thread has any
_caught: list[tuple[Act, int, FrameType | None]] = []


class Holding:
    """A signal handler that acts at once, or at the end of the held section that it strikes."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal `number` has come."""
        if not _depth:
            self.act(number, frame)
        elif all(number != other for _, other, _ in _caught):  # a section's second Ctrl-C says what the first said
            _caught.append((self.act, number, frame))


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Inside, a signal waits; it takes effect at the end. Only the main thread gets signals: no-op in others."""
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
                if callable(handler) and not isinstance(handler, Holding):  # during a training they hold by themselves
                    before[number] = handler
                    set_handler(number, Holding(handler))
        yield
    finally:
        try:
            for number in before:
                set_handler(number, before[number])
        except BaseException:  # what was put back has struck: put back all the same what was not
            for number in before:
                set_handler(number, before[number])
            raise
        finally:
            _depth -= 1
            if not _depth and _caught:
                _act_on_caught()


def let_interrupts_in() -> None:
    """A moment inside a long held section at which a signal may take effect, unless a section round it waits, too."""
    if _caught and _depth == 1 and threading.current_thread() is threading.main_thread():
        _act_on_caught()


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one held section."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        global _depth
        if not _depth or threading.current_thread() is not threading.main_thread():
            with interrupts_held():
                return function(*args, **kwargs)
        _depth += 1  # inside another section, whose end is where signals take effect: a visit has many of these
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
