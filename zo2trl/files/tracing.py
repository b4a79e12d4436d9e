"""Spans: which thread did what from when to when, told to whoever listens.

Does not: keep anything, or know of GPUs, whose own record of kernels and copies has other sources (engine/trace.py).

Nobody listens in an ordinary run; a span then costs one comparison.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

__all__ = ["Kind", "Span", "listening", "traced"]

Kind = Literal["traversal", "visit", "fetch", "write back", "disk read", "disk write"]

P = ParamSpec("P")
T = TypeVar("T")


class Span(NamedTuple):
    """One thing that one thread did."""

    kind: Kind
    name: str
    start_ns: int
    """Nanoseconds since 1970, as `time.time_ns` gives them: the clock of torch's profiler."""
    end_ns: int
    thread_id: int
    """The operating system's."""
    pthread_id: int
    """Of the same thread. CUDA knows threads by the lower half of it."""


_listeners: list[Callable[[Span], None]] = []


@contextmanager
def listening(listener: Callable[[Span], None]) -> Iterator[None]:
    """Inside, every span that ends is told to `listener`, in the thread that it was in."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def traced(kind: Kind, name: Callable[..., Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make every call of a function a span. `name` gets the call's arguments and says what the span is about."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> T:
            if not _listeners:
                return function(*args, **kwargs)
            start_ns = time.time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                end_ns, what = time.time_ns(), str(name(*args, **kwargs))
                span = Span(kind, what, start_ns, end_ns, threading.get_native_id(), threading.get_ident())
                for listener in tuple(_listeners):
                    listener(span)

        return inner

    return decorate
