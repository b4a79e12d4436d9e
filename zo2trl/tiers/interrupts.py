"""Holding Ctrl-C back while bytes and the position they have absorbed change together.

Does not: handle signals for good, or hold back anything but SIGINT.
Invariant: a KeyboardInterrupt is raised before or after a held section, never inside it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

__all__ = ["interrupts_held", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Inside, a Ctrl-C waits; it takes effect at the end. Only the main thread gets signals: no-op in others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    before: Any = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one held section."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        with interrupts_held():
            return function(*args, **kwargs)

    return held
