"""Promises of lockstep: passes that know nothing of each other, each exactly as if it had run alone."""

import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode

from zo2trl.engine.lockstep import Pass, PassAborted, current_pass, traverse
from zo2trl.zo.estimators import CLEAN

WORD = contextvars.ContextVar("word", default="nobody")


def wait(point=1):
    current_pass().wait_for(point)


def together(*runs, log=None, fail_at=None):
    """Traversal the runs; every point is served by resuming all who wait there."""

    def serve(point, waiting):
        if log is not None:
            log.append((point, len(waiting)))
        if point == fail_at:
            raise OSError("no weights")
        for one in waiting:
            one.resume()

    return traverse([Pass(run, CLEAN, first_point=0) for run in runs], serve)


def in_a_thread(check):
    """Modes belong to a thread: what leaks in a failing test dies with it."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check).result()


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_function_stack(),
        WORD.get(),
    )


class Doubling(TorchFunctionMode):
    """Doubles every `torch.add`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return torch.mul(result, 2) if func is torch.add else result


# ---------------------------------------------------------------------------------------------------------- traversing


def test_values_come_back_in_the_order_of_the_passes():
    assert together(lambda: "a", lambda: (wait(), "b")[1], lambda: "c") == ["a", "b", "c"]


def test_no_passes_make_an_empty_traversal():
    assert together() == []


def test_passes_that_wait_at_one_point_are_served_by_one_visit():
    log = []

    def run():
        for point in (1, 2, 3):
            wait(point)

    together(run, run, run, log=log)
    assert log == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_passes_of_different_lengths_all_reach_their_ends():
    log = []

    def run(n):
        for _ in range(n):
            for point in (1, 2):
                wait(point)
        return n

    assert together(lambda: run(1), lambda: run(4), lambda: run(0), log=log) == [1, 4, 0]
    assert log == [(0, 3), (1, 2), (2, 2), (1, 1), (2, 1), (1, 1), (2, 1), (1, 1), (2, 1)]


def test_a_pass_on_another_way_through_the_model_is_served_too():
    assert together(lambda: (wait(1), wait(3), "a")[2], lambda: (wait(2), wait(3), "b")[2]) == ["a", "b"]


def test_code_outside_any_traversal_is_in_no_pass():
    assert current_pass() is None
    seen = together(current_pass)
    assert isinstance(seen[0], Pass) and current_pass() is None


def test_each_pass_knows_itself():
    def run():
        before = current_pass()
        wait()
        return before is current_pass() and before

    assert len(set(together(run, run, run))) == 3


# ----------------------------------------------------------------------------------------------------- modes that leak


def enter_modes(kind):
    if kind == "grad":
        return torch.enable_grad()
    if kind == "no grad":
        return torch.no_grad()
    if kind == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    if kind == "autocast without cache":
        return torch.autocast("cpu", torch.float16, cache_enabled=False)
    if kind == "function mode":
        return Doubling()
    return torch.inference_mode()


KINDS = ["grad", "no grad", "autocast", "autocast without cache", "function mode", "inference"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", ["grad", "no grad"])
def test_modes_do_not_leak_between_passes_nor_to_the_caller(kind, outer):
    def with_mode():
        with enter_modes(kind):
            inside = modes()
            wait(1)
            assert modes() == inside
            wait(2)
            assert modes() == inside
        wait(3)
        return {modes()}

    def without():
        seen = {modes()}
        for point in (1, 2, 3):
            wait(point)
            seen.add(modes())
        return seen

    def check():
        with enter_modes(outer):
            before = modes()
            assert together(with_mode, without, with_mode, without) == [{before}] * 4
            assert modes() == before

    in_a_thread(check)


def test_modes_of_the_caller_reach_every_pass():
    with Doubling(), torch.autocast("cpu", torch.bfloat16):
        expected = modes()
        assert together(modes, lambda: (wait(), modes())[1]) == [expected, expected]
        assert modes() == expected


def test_function_modes_nest_in_their_own_order():
    class Plus(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return torch.sub(result, -1) if func is torch.add else result

    def run_now(outer, inner, before=lambda: None):
        with outer(), inner():
            before()
            return float(torch.add(torch.ones(()), torch.ones(())))

    def run(outer, inner):
        return run_now(outer, inner, before=wait)

    alone = [run_now(Doubling, Plus), run_now(Plus, Doubling)]
    assert alone[0] != alone[1]
    assert together(lambda: run(Doubling, Plus), lambda: run(Plus, Doubling)) == alone


def test_context_variables_belong_to_a_pass():
    def run(word):
        WORD.set(word)
        wait()
        mine = WORD.get()
        WORD.set(mine * 2)
        wait()
        return WORD.get()

    WORD.set("caller")
    assert together(lambda: run("a"), lambda: run("b"), lambda: WORD.get()) == ["aa", "bb", "caller"]
    assert WORD.get() == "caller"


def test_a_device_context_of_one_pass_is_not_seen_by_another():
    def on_meta():
        with torch.device("meta"):
            wait()
            return torch.empty(1).device.type

    assert together(on_meta, lambda: (wait(), torch.empty(1).device.type)[1]) == ["meta", "cpu"]


# -------------------------------------------------------------------------------------------------------------- errors


def forever(ended=None):
    try:
        while True:
            wait()
    finally:
        if ended is not None:
            ended.append(True)


def test_an_exception_in_one_pass_ends_all_and_reaches_the_caller():
    ended = []

    def failing():
        wait()
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        together(lambda: forever(ended), failing, lambda: forever(ended))
    assert ended == [True, True] and current_pass() is None


def test_a_failing_visit_ends_all_passes():
    ended = []
    with pytest.raises(OSError, match="no weights"):
        together(lambda: (wait(2), forever(ended)), lambda: forever(ended), fail_at=2)
    assert ended == [True]


def test_passes_that_never_started_are_left_alone():
    def failing():
        raise ValueError("at once")

    def never():
        raise AssertionError("this pass must not run")

    with pytest.raises(ValueError, match="at once"):
        together(failing, never)


def test_model_code_that_catches_exceptions_does_not_stop_the_abort():
    def stubborn():
        while True:
            try:
                wait()
            except Exception:
                continue

    def failing():
        wait()
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        together(stubborn, failing)
    assert not issubclass(PassAborted, Exception)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["the failing pass", "a suspended pass"])
@pytest.mark.parametrize("outer", [Doubling, torch.no_grad])
def test_modes_are_restored_after_an_error_inside_them(kind, who, outer):
    def in_mode():
        with enter_modes(kind):
            if who == "the failing pass":
                wait()
                raise ValueError("bad batch")
            forever()

    def other():
        wait()
        if who == "a suspended pass":
            raise ValueError("bad batch")
        forever()

    def check():
        with outer():
            before = modes()
            with pytest.raises(ValueError, match="bad batch"):
                together(in_mode, other, in_mode)
            assert modes() == before
        assert torch._C._len_torch_function_stack() == 0

    in_a_thread(check)


def test_a_traversal_can_follow_a_failed_one():
    with pytest.raises(ZeroDivisionError):
        together(forever, lambda: (wait(), 1 / 0))
    assert together(lambda: (wait(), 5)[1]) == [5]


# ------------------------------------------------------------------------------------------- what is a pass's own


class Switch:
    """Something about a model that passes switch off for a while."""

    def __init__(self):
        self.value, self.n_sets = "on", 0

    def get(self):
        return self.value

    def set(self, value):
        self.value, self.n_sets = value, self.n_sets + 1


def traversal_with(switch, *runs):
    def serve(point, waiting):
        for one in waiting:
            one.resume()

    return traverse(
        [Pass(run, CLEAN, first_point=0, pass_locals=[switch]) for run in runs], serve, pass_locals=[switch]
    )


def test_what_one_pass_switches_off_is_on_in_another_and_after_the_traversal():
    switch = Switch()

    def switching():
        seen = [switch.value]
        wait()
        switch.value = "off"
        wait()
        seen.append(switch.value)
        return seen

    def looking():
        seen = [switch.value]
        for _ in range(3):
            wait()
            seen.append(switch.value)
        return seen

    assert traversal_with(switch, switching, looking, switching) == [["on", "off"], ["on"] * 4, ["on", "off"]]
    assert switch.value == "on"


def test_a_pass_that_fails_leaves_nothing_switched_off():
    switch = Switch()

    def failing():
        switch.value = "off"
        wait()
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        traversal_with(switch, failing, wait)
    assert switch.value == "on"


def test_passes_that_switch_together_are_not_switched_back_and_forth():
    switch = Switch()

    def switching():
        wait()
        switch.value = "off"
        for _ in range(50):
            wait()

    traversal_with(switch, switching, switching)
    assert switch.n_sets < 6
