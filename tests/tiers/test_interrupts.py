"""Ctrl-C while bytes and their position change."""

import os
import signal
import threading

import pytest

from zo2trl.tiers.interrupts import interrupts_held, uninterrupted


def test_ctrl_c_waits_until_the_section_has_ended() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the rest of the section")
    assert done == ["the rest of the section"]


def test_the_callers_own_handler_is_called_once_and_put_back() -> None:
    calls: list[int] = []
    mine = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        handler = signal.getsignal(signal.SIGINT)
        with interrupts_held(), interrupts_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, mine)


def test_other_threads_are_left_alone() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(uninterrupted(lambda: 7)()))
    thread.start()
    thread.join()
    assert results == [7]


def test_an_error_inside_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), interrupts_held():
        raise ValueError("mine")
