"""Promises of the write schedule: every unit is written once an interval, and steps write about equally much."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zo2trl.planning.write_schedule import WriteSchedule, unmeasured_intervals, unmeasured_steps_replayed_in

WRITE_SCHEDULE = WriteSchedule(write_back={}, snapshot=1)


def due_after(position: int, *, of: int, every: int) -> list[int]:
    return [turn for turn in range(of) if WRITE_SCHEDULE.is_turn(turn, of=of, every=every, position=position)]


@given(of=st.integers(1, 100), every=st.integers(1, 64), start=st.integers(0, 1000))
def test_every_unit_is_due_once_in_its_interval(of: int, every: int, start: int) -> None:
    due = Counter(turn for position in range(start, start + every) for turn in due_after(position, of=of, every=every))
    assert due == Counter(range(of))


@given(of=st.integers(1, 100), every=st.integers(1, 64), start=st.integers(0, 1000), n_steps=st.integers(1, 200))
def test_any_stretch_of_steps_writes_its_share_to_within_one_unit(
    of: int, every: int, start: int, n_steps: int
) -> None:
    written = sum(len(due_after(position, of=of, every=every)) for position in range(start, start + n_steps))
    assert abs(written - of * n_steps / every) <= 1


def test_a_machine_that_was_not_measured_writes_by_fixed_rules() -> None:
    assert unmeasured_intervals("cpu") == {"cpu": 1, "disk": 1}
    assert unmeasured_intervals("cuda") == {"cpu": 4, "disk": 16}
    assert unmeasured_steps_replayed_in(600.0, n_weights=10**9) == 60
