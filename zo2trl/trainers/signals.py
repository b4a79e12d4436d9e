"""What SIGINT and SIGTERM do while a training runs.

The first one drops the step that is being made, or lets a change of bytes end first (files/interrupts.py), and raises:
the journal holds every step before it, so nothing has to be saved. A second one, of either kind, ends the process at
once, also inside a held section, which loses nothing either.

Does not: replace a handler that somebody else has installed (a notebook, a job launcher that saves and requeues): that
one is called as ever, or at the end of a held section. To stop the training it may raise, or set
`trainer.control.should_training_stop`.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from zo2trl.files.interrupts import HELD, Holding

__all__ = ["ending_in_time", "stop_if_asked", "stopping_on_signals"]

logger = logging.getLogger(__name__)

MAX_WAIT_S = 15.0  # of a process that others may have left alone; launchers end it after 30

_DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Stop(Holding):
    """Handler of both signals during one training."""

    def __init__(self) -> None:
        super().__init__(_raise)
        self._process = os.getpid()
        self.is_over = False
        self.asked: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal `number` has come."""
        if (
            self.is_over or os.getpid() != self._process
        ):  # forked workers inherit it, and SIGTERM is how they are ended
            return _act_by_default(number)
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = number
        with suppress(Exception):  # the signal may have struck inside of a write to the very same stream
            logger.warning(
                "%s: training stops here, and every step in the journal is kept. Send it again (Ctrl-C) to exit at "
                "once.",
                signal.Signals(number).name,
            )
        super().__call__(number, frame)


_running: _Stop | None = None


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM SystemExit(143), and a second one of either exits at once.

    Only in the main thread, and only for signals that nobody else handles.
    """
    global _running
    if threading.current_thread() is not threading.main_thread() or _running is not None:
        yield
        return
    stop = _Stop()
    try:
        _running = stop
        for number in HELD:
            if signal.getsignal(number) is _DEFAULT_HANDLERS[number]:
                signal.signal(number, stop)
        yield
    except Exception as error:
        # A launcher that signals the whole group also kills data loader workers, and their death is an error here.
        if stop.asked is None:
            raise
        logger.warning("While stopping: %s: %s", type(error).__name__, error)
        _raise(stop.asked, None)
    finally:
        _running, stop.is_over = None, True
        for number in reversed(HELD):  # Ctrl-C last: what it raises once it is back has nothing to skip
            if signal.getsignal(number) is stop:
                signal.signal(number, _DEFAULT_HANDLERS[number])


@contextmanager
def ending_in_time(after_s: float = MAX_WAIT_S) -> Iterator[None]:
    """Inside, a process that SIGTERM has not ended after so long ends at once: it waits in a library for others.

    Python runs a handler when the library returns, which may wait for a process that has died (NCCL: 10 minutes). To
    be entered in `stopping_on_signals`; nothing happens if somebody else handles SIGTERM.
    """
    stop = _running
    if stop is None or signal.getsignal(signal.SIGTERM) is not stop:
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=_exit_after_sigterm, args=(receiver, after_s), name="zo2trl-signals", daemon=True)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)  # the system's own handler writes to it
    _wakeup_fds.add(sender.fileno())
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _wakeup_fds.discard(sender.fileno())
        sender.send(_OVER)  # closing it would not do: workers that were forked meanwhile have it open, too
        thread.join()
        sender.close()
        receiver.close()


def _exit_after_sigterm(receiver: socket.socket, after_s: float) -> None:
    try:
        while _OVER not in (numbers := receiver.recv(64)):
            if signal.SIGTERM in numbers and receiver.gettimeout() is None:
                receiver.settimeout(after_s)
    except TimeoutError:
        os._exit(128 + signal.SIGTERM)


_OVER = b"\0"  # no signal has this number
_wakeup_fds: set[int] = set()


def _clear_wakeup_fd() -> None:
    if _wakeup_fds:  # a forked worker that is sender to end must not tell its parent
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_clear_wakeup_fd)


def stop_if_asked() -> None:
    """Stop again if the first time had no effect: what a handler raises inside of a `__del__` is swallowed."""
    if _running is not None and _running.asked is not None:
        _raise(_running.asked, None)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _act_by_default(number: int) -> None:
    signal.signal(number, _DEFAULT_HANDLERS[number])
    signal.raise_signal(number)
