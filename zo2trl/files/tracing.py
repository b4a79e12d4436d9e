"""This module measures spans, which are the times of traced calls in their threads, and passes them to listeners.

Does not: store spans, or trace GPUs, whose kernels and copies are recorded by engine/trace.py.

An ordinary run has no listener; a traced call then costs one comparison.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

__all__ = ["Kind", "TracedInterval", "listening", "traced"]

Kind = Literal["traversal", "visit", "fetch", "write back", "disk read", "disk write"]

P = ParamSpec("P")
T = TypeVar("T")


class TracedInterval(NamedTuple):
    """A TracedInterval is one traced call in one thread."""

    kind: Kind
    name: str
    start_ns: int
    """It is in nanoseconds since 1970, as `time.time_ns` returns them, which is the clock of torch's profiler."""
    end_ns: int
    thread_id: int
    """This is the operating system's number of the thread."""
    pthread_id: int
    """This is the pthread number of the same thread; CUDA identifies threads by its lower half."""


_listeners: list[Callable[[TracedInterval], None]] = []


@contextmanager
def listening(listener: Callable[[TracedInterval], None]) -> Iterator[None]:
    """Call `listener` with every span that ends inside the block, in the thread of the span."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def traced(kind: Kind, name: Callable[..., Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that every call is a span; `name` makes the span's name from the call's arguments."""

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
                span = TracedInterval(kind, what, start_ns, end_ns, threading.get_native_id(), threading.get_ident())
                for listener in tuple(_listeners):
                    listener(span)

        return inner

    return decorate
