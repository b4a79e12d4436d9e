"""Ctrl-C and SIGTERM while bytes and their position change."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from zo2trl.files.interrupts import HELD, interrupts_held, let_interrupts_in, uninterrupted


@pytest.fixture(autouse=True)
def handlers_kept() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HELD]
    yield
    for number, handler in zip(HELD, before, strict=True):
        signal.signal(number, handler)


class Struck(Exception):
    """What the tests' own handlers raise."""


def test_ctrl_c_waits_until_the_section_has_ended() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the rest of the section")
    assert done == ["the rest of the section"]


@pytest.mark.parametrize("number", HELD)
def test_the_callers_own_handler_is_called_once_and_put_back(number: int) -> None:
    calls: list[int] = []
    signal.signal(number, lambda number, frame: calls.append(number))
    handler = signal.getsignal(number)
    with interrupts_held(), interrupts_held():
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert calls == []
    assert calls == [number]
    assert signal.getsignal(number) is handler


def test_both_signals_act_even_if_the_first_raises() -> None:
    calls: list[int] = []

    def mine(number: int, frame: object) -> None:
        calls.append(number)
        raise Struck(number)

    for number in HELD:
        signal.signal(number, mine)
    with pytest.raises(Struck), interrupts_held():
        for number in HELD:
            signal.raise_signal(number)
    assert calls == list(HELD)
    assert [signal.getsignal(number) for number in HELD] == [mine, mine]


def test_a_signal_that_python_does_not_handle_is_left_to_the_system() -> None:
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGTERM, handler)
        with interrupts_held():
            assert signal.getsignal(signal.SIGTERM) is handler


def test_a_long_section_can_let_a_signal_in_and_is_a_section_again_while_it_unwinds() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        try:
            let_interrupts_in()  # nothing has come yet
            signal.raise_signal(signal.SIGINT)
            done.append("until then")
            let_interrupts_in()
            done.append("never")
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned up")
    assert done == ["until then", "cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_section_inside_another_lets_nothing_in_before_that_one_does() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            let_interrupts_in()
            done.append("inner")
        let_interrupts_in()
        done.append("never")
    assert done == ["inner"]


def test_outside_of_any_section_there_is_nothing_to_let_in() -> None:
    let_interrupts_in()


def test_other_threads_are_left_alone() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(uninterrupted(lambda: 7)()))
    thread.start()
    thread.join()
    assert results == [7]


def test_an_error_inside_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), interrupts_held():
        raise ValueError("mine")


def test_hundreds_of_signals_at_random_moments_never_strike_inside_and_never_leave_handlers_behind() -> None:
    seed = random.randrange(2**32)
    state = {"armed": False, "began": 0, "ended": 0, "sent": 0, "struck": 0}
    main, over = threading.main_thread().ident, threading.Event()
    assert main is not None

    def strike(number: int, frame: object) -> None:
        if state["armed"]:
            state["armed"] = False
            raise Struck

    def send() -> None:
        dice = random.Random(seed)
        while not over.is_set():
            signal.pthread_kill(main, dice.choice(HELD))
            state["sent"] += 1
            time.sleep(dice.uniform(0, 5e-4))

    @uninterrupted
    def section() -> None:
        state["began"] += 1
        with interrupts_held():
            sum(range(50))
        state["ended"] += 1

    def struck_once() -> None:
        state["armed"] = True
        while True:
            section()

    for number in HELD:
        signal.signal(number, strike)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        while state["sent"] < 400:
            try:
                struck_once()
            except Struck:
                state["struck"] += 1
            assert state["began"] == state["ended"], f"seed {seed}"
            assert [signal.getsignal(number) for number in HELD] == [strike, strike], f"seed {seed}"
    finally:
        over.set()
        sender.join()
    assert state["struck"] > 40
