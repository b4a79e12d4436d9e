"""Promises of fetching ahead: right bytes whatever was guessed, errors reach the waiter, slots are never shared."""

import threading
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import CPU, streamed_segments, synthetic_layout
from zo2trl.errors import BudgetError, TraversalError
from zo2trl.tiers.prefetch import Prefetcher

SEGMENTS = streamed_segments(6)


class Residency:
    """Fills a slot with its segment's number, remembers the order, and can be held up or broken per segment."""

    def __init__(self):
        self.begun, self.loaded, self.gates, self.errors = [], [], {}, {}

    def __call__(self, segment, slot):
        self.begun.append(segment.index)
        gate = self.gates.get(segment.index)
        if gate is not None:
            assert gate.wait(300)
        self.loaded.append(segment.index)
        if segment.index in self.errors:
            raise self.errors[segment.index]
        slot.buffer.fill_(segment.index)
        return 100 + segment.index


class Ring:
    """A ring that holds `n_slots` of the order's largest segments."""

    def __init__(self, n_slots, order=SEGMENTS, *, on_disk=lambda segment: False):
        self.residency = Residency()
        ring_bytes = int(n_slots * max(segment.n_bytes for segment in order))
        self.fetcher = Prefetcher(order, self.residency, ring_bytes=ring_bytes, device=CPU, on_disk=on_disk)

    def visit(self, segment, *, after=None):
        fetch, position = self.fetcher.take(segment)
        assert position == 100 + segment.index
        assert bool((fetch.stored == segment.index).all())
        self.fetcher.give_back(fetch, after=after)

    def settle(self):
        """Let everything that has been submitted finish."""
        for fetch in list(self.fetcher._ahead):
            fetch.job.exception()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.fetcher.close()


@pytest.fixture(params=[1, 2, 3, 6, 9])
def ring(request):
    with Ring(request.param) as ring:
        yield ring


def test_expected_segments_come_in_order_round_after_round(ring):
    for _ in range(4):
        for segment in SEGMENTS:
            ring.visit(segment)


def test_fetching_runs_on_across_the_end_of_a_round():
    with Ring(3) as ring:
        for segment in SEGMENTS:
            ring.visit(segment)
        ring.settle()
        assert ring.residency.loaded == [1, 2, 3, 4, 5, 6, 1, 2, 3]


def test_nothing_is_fetched_twice_when_the_order_is_as_expected():
    with Ring(2) as ring:
        for _ in range(5):
            for segment in SEGMENTS:
                ring.visit(segment)
        ring.settle()
        assert ring.residency.loaded[:30] == [1, 2, 3, 4, 5, 6] * 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=25), st.integers(1, 4))
def test_any_other_order_gets_the_right_bytes_too(visits, n_slots):
    with Ring(n_slots) as ring:
        for i in visits:
            ring.visit(SEGMENTS[i])


def test_a_segment_nobody_expected_is_served():
    with Ring(2, order=SEGMENTS[:3]) as ring:
        for i in (0, 5, 1, 5, 2, 0):
            ring.visit(SEGMENTS[i])


def test_a_new_expectation_replaces_the_old_one(ring):
    ring.visit(SEGMENTS[0])
    ring.fetcher.expect(SEGMENTS[::-1])
    for _ in range(2):
        for segment in SEGMENTS[::-1]:
            ring.visit(segment)


def test_the_same_segment_may_be_expected_several_times_in_a_row():
    order = [SEGMENTS[i] for i in (0, 0, 1, 0, 1)]
    for n_slots in (1, 2, 3):
        with Ring(n_slots, order=order) as ring:
            for segment in order * 3:
                ring.visit(segment)


def test_two_segments_may_be_held_at_once():
    with Ring(3) as ring:
        one, _ = ring.fetcher.take(SEGMENTS[0])
        two, _ = ring.fetcher.take(SEGMENTS[1])
        assert bool((one.stored == 1).all()) and bool((two.stored == 2).all())
        ring.fetcher.give_back(one)
        ring.fetcher.give_back(two)
        ring.visit(SEGMENTS[2])


def test_what_was_fetched_before_a_drop_is_fetched_again(ring):
    ring.visit(SEGMENTS[0])
    ring.settle()
    ring.fetcher.drop()
    before = ring.residency.loaded.count(2)
    fetch, _ = ring.fetcher.take(SEGMENTS[1])
    assert ring.residency.loaded.count(2) == before + 1
    ring.fetcher.give_back(fetch)


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_failing_load_reaches_whoever_waits_for_it(ring):
    ring.residency.errors[3] = OSError("the drive is gone")
    ring.visit(SEGMENTS[0])
    ring.visit(SEGMENTS[1])
    with pytest.raises(OSError, match="the drive is gone"):
        ring.fetcher.take(SEGMENTS[2])


def test_failing_ahead_disturbs_nobody_who_does_not_ask():
    with Ring(3) as ring:
        ring.residency.errors[2] = OSError("the drive is gone")
        ring.visit(SEGMENTS[0])
        ring.settle()
        for i in (2, 3, 4):
            ring.visit(SEGMENTS[i])


def test_after_a_failure_the_ring_goes_on(ring):
    for _ in range(12):
        ring.residency.errors[1] = OSError("for a moment")
        ring.settle()
        ring.fetcher.drop()
        with pytest.raises(OSError, match="for a moment"):
            ring.fetcher.take(SEGMENTS[0])
        del ring.residency.errors[1]
        ring.fetcher.drop()
        for segment in SEGMENTS:
            ring.visit(segment)


def test_closing_in_the_middle_ends_every_thread():
    ring = Ring(3)
    ring.residency.gates[2] = threading.Event()
    fetch, _ = ring.fetcher.take(SEGMENTS[0])
    threading.Timer(0.05, ring.residency.gates[2].set).start()
    ring.fetcher.close()
    ring.fetcher.close()
    del fetch


# ------------------------------------------------------------------------------------------------------------- slots


def test_a_slot_is_not_reused_while_a_write_back_still_reads_it():
    for n_slots in (1, 2):
        with Ring(n_slots) as ring:
            fetch, _ = ring.fetcher.take(SEGMENTS[0])
            written: Future = Future()
            ring.fetcher.give_back(fetch, after=written)
            for segment in SEGMENTS[1:n_slots]:
                ring.visit(segment)
            time.sleep(0.05)
            assert bool((fetch.stored == 1).all()), "the write-back still reads these bytes"
            written.set_result(None)
            for segment in SEGMENTS[n_slots:]:
                ring.visit(segment)


def test_a_failed_write_back_frees_its_slot():
    with Ring(1) as ring:
        failed: Future = Future()
        failed.set_exception(OSError("disk full"))
        ring.visit(SEGMENTS[0], after=failed)
        ring.visit(SEGMENTS[1])


def test_a_slot_under_the_models_hands_is_never_overwritten():
    with Ring(2) as ring:
        held, _ = ring.fetcher.take(SEGMENTS[0])
        time.sleep(0.05)
        assert bool((held.stored == 1).all())
        ring.visit(SEGMENTS[1])
        ring.visit(SEGMENTS[4])
        assert bool((held.stored == 1).all())
        ring.fetcher.give_back(held)


def test_a_discarded_load_that_is_still_running_cannot_reach_the_next_tenant():
    with Ring(2) as ring:
        ring.residency.gates[2] = threading.Event()
        ring.visit(SEGMENTS[0])  # number 2 is on its way and stuck
        threading.Timer(0.05, ring.residency.gates[2].set).start()
        for i in (4, 5, 3, 2):
            ring.visit(SEGMENTS[i])
        for segment in SEGMENTS:
            ring.visit(segment)


# ------------------------------------------------------------------------------------------------ segments of any size

LEAVES = synthetic_layout([[1, 4, 4, 2], [1, 6, 1, 3], [2, 2, 5]]).segments[1:]


def address(fetch):
    return fetch.stored.data_ptr()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(LEAVES) - 1), max_size=25), st.sampled_from([1, 1.5, 2, 2.5, 3, 20]))
def test_leaves_of_any_size_come_with_the_right_bytes_in_any_order(visits, size):
    with Ring(size, order=LEAVES) as ring:
        for i in visits:
            ring.visit(LEAVES[i])
        for segment in LEAVES * 2:
            ring.visit(segment)


@pytest.mark.parametrize("size", [1, 2, 2.5, 3])
def test_a_segment_has_the_same_address_in_every_round_whatever_was_asked_for_in_between(size):
    with Ring(size, order=LEAVES) as ring:
        addresses: dict[int, set[int]] = {segment.index: set() for segment in LEAVES}
        for detour in ([], LEAVES[3:7], [], LEAVES[::-2], []):
            for segment in [*LEAVES, *detour]:
                fetch, _ = ring.fetcher.take(segment)
                assert fetch.stored.numel() == segment.n_bytes
                addresses[segment.index].add(address(fetch))
                ring.fetcher.give_back(fetch)
        assert {len(seen) for seen in addresses.values()} == {1}


def test_small_segments_take_little_room_so_many_are_fetched_ahead():
    order = synthetic_layout([[1] * 8 + [8]]).segments[1:]
    with Ring(2, order=order) as ring:
        fetch, _ = ring.fetcher.take(order[0])
        assert [ahead.segment for ahead in ring.fetcher._ahead] == order[1:], "a ring of two slots would hold one"
        ring.fetcher.give_back(fetch)


def test_a_new_order_of_a_traversal_is_fetched_before_anybody_asks():
    with Ring(2) as ring:
        ring.visit(SEGMENTS[0])
        ring.fetcher.expect(SEGMENTS[::-1])
        assert [fetch.segment for fetch in ring.fetcher._ahead] == [SEGMENTS[5], SEGMENTS[4]]
        for segment in SEGMENTS[::-1]:
            ring.visit(segment)


def test_a_segment_that_is_larger_than_the_ring_is_an_error_at_once():
    with pytest.raises(BudgetError, match="Raise `device_memory`"):
        Ring(0.5, order=LEAVES)
    with Ring(1, order=SEGMENTS) as ring:
        ring.visit(SEGMENTS[0])
        with pytest.raises(BudgetError, match="Raise `device_memory`"):
            ring.fetcher.take(LEAVES[5])
        with pytest.raises(BudgetError, match="Raise `device_memory`"):
            ring.fetcher.expect(LEAVES)
        ring.visit(SEGMENTS[1])


def test_more_lent_at_once_than_the_ring_holds_is_an_error_and_not_a_wait():
    with Ring(2) as ring:
        held = [ring.fetcher.take(segment)[0] for segment in SEGMENTS[:2]]
        with pytest.raises(TraversalError, match="leave no room"):
            ring.fetcher.take(SEGMENTS[2])
        assert all(bool((fetch.stored == i).all()) for i, fetch in enumerate(held, start=1))
        for fetch in held:
            ring.fetcher.give_back(fetch)
        ring.visit(SEGMENTS[2])
