"""This module defines what SIGINT and SIGTERM do while a training runs.

The first signal drops the step in progress, or waits until a change of bytes has ended (files/interrupts.py), and
raises: the journal holds every step before it, so nothing has to be saved. A second one, of either kind, ends the
process at once, also inside a held section, and that loses nothing either.

Does not: replace a handler that a user has installed (a notebook, a job launcher that saves and requeues): that one is
called as before, or at the end of a held section. To stop the training it may raise, or set
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

MAX_WAIT_S = 15.0  # launchers kill a process 30 s after SIGTERM; this one may wait for processes that have ended

_DEFAULT_HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class _Stop(Holding):
    """A _Stop is the handler of both signals during one training."""

    def __init__(self) -> None:
        super().__init__(_raise)
        self._process = os.getpid()
        self.is_over = False
        self.received: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal `number`."""
        # Forked workers inherit the handler, and SIGTERM is how they are ended.
        if self.is_over or os.getpid() != self._process:
            return _act_by_default(number)
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        with suppress(Exception):  # the signal may have interrupted a write to the same stream
            logger.warning(
                "%s: training stops here, and every step in the journal is kept. Send it again (Ctrl-C) to exit at "
                "once.",
                signal.Signals(number).name,
            )
        super().__call__(number, frame)


_running: _Stop | None = None


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt and SIGTERM raise SystemExit(143); a second signal exits at once.

    This holds only in the main thread, and only for signals that have their default handlers.
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
        # A launcher that signals the whole group also kills data loader workers, which raises an error here.
        if stop.received is None:
            raise
        logger.warning("While stopping: %s: %s", type(error).__name__, error)
        _raise(stop.received, None)
    finally:
        _running, stop.is_over = None, True
        for number in reversed(HELD):  # Ctrl-C last: once restored it may raise, and then nothing is left to restore
            if signal.getsignal(number) is stop:
                signal.signal(number, _DEFAULT_HANDLERS[number])


@contextmanager
def ending_in_time(after_s: float = MAX_WAIT_S) -> Iterator[None]:
    """End the process if it still runs `after_s` seconds after SIGTERM, because a library waits for other processes.

    Python runs a handler when the library returns, which may wait for a process that has died (NCCL: 10 minutes). This
    must be entered inside `stopping_on_signals`; it does nothing if the user's own code handles SIGTERM.
    """
    stop = _running
    if stop is None or signal.getsignal(signal.SIGTERM) is not stop:
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=_exit_after_sigterm, args=(receiver, after_s), name="zo2trl-signals", daemon=True)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)  # the C-level handler writes to it
    _wakeup_fds.add(sender.fileno())
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _wakeup_fds.discard(sender.fileno())
        sender.send(_OVER)  # closing it is not enough: workers that were forked meanwhile hold it open
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
    if _wakeup_fds:  # a SIGTERM to a forked worker must not reach its parent's socket
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_clear_wakeup_fd)


def stop_if_asked() -> None:
    """Raise again if the first exception had no effect: Python swallows one that is raised inside `__del__`."""
    if _running is not None and _running.received is not None:
        _raise(_running.received, None)


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _act_by_default(number: int) -> None:
    signal.signal(number, _DEFAULT_HANDLERS[number])
    signal.raise_signal(number)
