"""Promises about spans: who listens hears what was done, in which thread and for how long; nobody else pays for it."""

import threading
import time

import pytest

from zo2trl.files.tracing import listening, traced


class Worker:
    """Does things that are spans."""

    @traced("fetch", lambda worker, unit, **_: unit)
    def fetch(self, unit, *, fail=False):
        """Fetch."""
        self.visit(unit)
        if fail:
            raise OSError("gone")
        return unit.upper()

    @traced("visit", lambda worker, unit: f"unit {unit}")
    def visit(self, unit):
        time.sleep(0.001)


def test_a_span_is_heard_when_it_ends_with_its_name_thread_and_time():
    heard, before_ns = [], time.time_ns()
    with listening(heard.append):
        assert Worker().fetch("a") == "A"
    inner, outer = heard
    assert (inner.kind, inner.name) == ("visit", "unit a") and (outer.kind, outer.name) == ("fetch", "a")
    assert before_ns <= outer.start_ns <= inner.start_ns < inner.end_ns <= outer.end_ns <= time.time_ns()
    assert outer.thread_id == threading.get_native_id() and outer.pthread_id == threading.get_ident()


def test_a_span_that_fails_is_heard_and_its_error_goes_on():
    heard = []
    with listening(heard.append), pytest.raises(OSError, match="gone"):
        Worker().fetch("a", fail=True)
    assert [span.kind for span in heard] == ["visit", "fetch"]


def test_spans_of_other_threads_are_heard():
    heard = []
    with listening(heard.append):
        thread = threading.Thread(target=Worker().visit, args=["a"])
        thread.start()
        thread.join()
    assert heard[0].thread_id == thread.native_id != threading.get_native_id()


def test_who_does_not_listen_any_more_hears_nothing():
    heard, others = [], []
    with listening(others.append):
        with listening(heard.append):
            Worker().visit("a")
        Worker().visit("b")
    Worker().visit("c")
    assert [span.name for span in heard] == ["unit a"]
    assert [span.name for span in others] == ["unit a", "unit b"]


def test_without_a_listener_no_clock_is_read_and_no_name_made(monkeypatch):
    monkeypatch.setattr(time, "time_ns", None)

    @traced("fetch", lambda *_: 1 / 0)
    def quick():
        return 7

    assert quick() == 7


def test_the_function_is_still_itself():
    assert Worker.fetch.__name__ == "fetch" and Worker.fetch.__doc__ == "Fetch."
