"""Promises of the ring: where a segment lies never changes, and nobody is overwritten who may still be read."""

import itertools
from collections import defaultdict
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import CPU, synthetic_layout
from zo2trl.errors import BudgetError
from zo2trl.layout.layout import ALIGNMENT_BYTES
from zo2trl.tiers.ring import Region, Ring, makespan, plan_regions, plan_ring

sizes_of_leaves = st.lists(st.integers(1, 12), min_size=1, max_size=30).map(
    lambda ns: [n * ALIGNMENT_BYTES for n in ns]
)
regions = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda ends: Region(*sorted(ends)))


def plan(sizes, n_bytes):
    starts = plan_ring(sizes, n_bytes)
    return [Region(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def one_behind_the_other(sizes, n_bytes):
    starts, stop = [], 0
    for size in sizes:
        starts.append(stop if stop + size <= n_bytes else 0)
        stop = starts[-1] + size
    return starts


def opt_block(hidden):
    """Bytes of the leaves of one OPT block in bf16, as a forward visits them."""
    square, wide = hidden * hidden * 2 + 2 * ALIGNMENT_BYTES, 4 * hidden * hidden * 2 + 2 * ALIGNMENT_BYTES
    return [4 * ALIGNMENT_BYTES, square, square, square, square, 4 * ALIGNMENT_BYTES, wide, wide]


# --------------------------------------------------------------------------------------------------------- the plan


@settings(max_examples=200, deadline=None)
@given(sizes=sizes_of_leaves, spare_bytes=st.integers(0, 40 * ALIGNMENT_BYTES))
def test_every_segment_lies_inside_the_ring_on_an_aligned_address(sizes, spare_bytes):
    n_bytes = max(sizes) + spare_bytes
    for region in plan(sizes, n_bytes):
        assert region.start % ALIGNMENT_BYTES == 0 and region.start >= 0 and region.stop <= n_bytes
    assert plan_ring(sizes, n_bytes)[0] == 0
    assert plan_ring(sizes, n_bytes) == plan_ring(list(sizes), n_bytes), "the same order, the same addresses"


@given(sizes=sizes_of_leaves)
def test_what_fits_at_once_never_shares_a_byte(sizes):
    for one, other in itertools.combinations(plan(sizes, sum(sizes)), 2):
        assert not one.overlaps(other)


@given(count=st.integers(3, 60), n_slots=st.integers(3, 6))
def test_equal_segments_never_lie_where_their_neighbours_lie_not_even_across_the_seam_of_two_rounds(count, n_slots):
    planned = plan([ALIGNMENT_BYTES] * count, n_slots * ALIGNMENT_BYTES)
    for one, other in itertools.pairwise([*planned, planned[0]]):
        assert not one.overlaps(other)


@settings(max_examples=200, deadline=None)
@given(sizes=sizes_of_leaves, spare=st.integers(0, 40))
def test_no_traversal_takes_longer_than_with_one_simply_behind_the_other(sizes, spare):
    n_bytes = 2 * max(sizes) + spare * ALIGNMENT_BYTES
    simple = one_behind_the_other(sizes, n_bytes)
    rounds = 1 + 200 // len(sizes)
    assert (
        makespan(sizes * rounds, plan_ring(sizes, n_bytes) * rounds)
        <= makespan(sizes * rounds, simple * rounds) * 1.02
    )


@pytest.mark.parametrize("hidden", [2048, 4096, 5120])
@pytest.mark.parametrize("share", [2.1, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0])
def test_a_link_that_is_the_bottleneck_never_waits_for_room_in_a_ring_of_a_little_more_than_two_leaves(hidden, share):
    """Computing takes 0.4 of copying, as with OPT-13B and 2,048 tokens."""
    sizes = opt_block(hidden) * 40
    planned = plan(sizes, int(share * max(sizes)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
    copied, computed = 0.0, 0.0
    ends: list[tuple[Region, float]] = []
    for region in planned * 2:
        wait = max((end for other, end in ends if other.overlaps(region)), default=0.0)
        size = region.stop - region.start
        copied = max(copied, wait) + size
        computed = max(computed, copied) + 0.4 * size
        ends = [*ends[-40:], (region, computed)]
    assert copied <= 2 * sum(sizes) * 1.01


def test_a_segment_that_an_order_names_twice_has_one_address():
    segments = synthetic_layout([[1, 3], [2, 3], [3, 1]]).segments[1:]
    order = [*segments, *segments[1:4], segments[0]]
    n_bytes = 2 * max(segment.n_bytes for segment in segments)
    assert plan_regions(order, n_bytes) == plan_regions(segments, n_bytes)


def test_a_segment_that_is_larger_than_the_ring_is_refused_with_both_sizes():
    segments = synthetic_layout([[1], [4]]).segments[1:]
    n_bytes = segments[1].n_bytes - ALIGNMENT_BYTES
    with pytest.raises(BudgetError, match=rf"unit block2 needs {segments[1].n_bytes:,} bytes .* has {n_bytes:,}"):
        plan_regions(segments, n_bytes)


def test_nothing_to_stream_needs_no_ring():
    assert plan_regions([], 0) == {} and plan_ring([], 0) == []


@given(regions, regions)
def test_what_is_left_of_a_region_are_its_bytes_that_the_other_does_not_have(one, other):
    left = [byte for part in one.without(other) for byte in range(*part)]
    assert sorted(left) == sorted(set(range(*one)) - set(range(*other)))
    assert one.overlaps(other) == bool(set(range(*one)) & set(range(*other))) or 0 in (
        one.stop - one.start, other.stop - other.start,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- who waits for whom


class Marks:
    """Stands in for events; any object will do."""


def test_the_next_user_of_any_byte_waits_for_all_who_used_one_of_its_bytes_last():
    ring = Ring(10, device=CPU)
    one, two, three = Marks(), Marks(), Marks()
    ring.leave(ring.slot(Region(0, 4)), released=[one], busy=[])
    ring.leave(ring.slot(Region(4, 8)), released=[two], busy=[])
    assert ring.slot(Region(2, 6)).released == (one, two)
    ring.leave(ring.slot(Region(2, 6)), released=[three], busy=[])
    assert ring.slot(Region(3, 5)).released == (three,)
    assert set(ring.slot(Region(0, 10)).released) == {one, two, three}
    assert ring.slot(Region(8, 10)).released == ()


def test_jobs_that_have_ended_are_not_waited_for():
    ring = Ring(10, device=CPU)
    job: Future = Future()
    ring.leave(ring.slot(Region(0, 4)), released=[], busy=[job])
    assert ring.slot(Region(3, 5)).busy == (job,)
    job.set_result(None)
    assert ring.slot(Region(3, 5)).busy == ()


@settings(max_examples=100)
@given(st.lists(regions, max_size=40))
def test_of_every_byte_the_ring_knows_its_last_user_and_nobody_else(used):
    ring = Ring(20, device=CPU)
    last: dict[int, Marks] = {}
    for region in used:
        mark = Marks()
        ring.leave(ring.slot(region), released=[mark], busy=[])
        last.update(dict.fromkeys(range(*region), mark))
    told = defaultdict(set)
    for byte in range(20):
        told[byte] = set(ring.slot(Region(byte, byte + 1)).released)
        assert told[byte] == ({last[byte]} if byte in last else set())
    assert len(ring._uses) <= 21, "what nobody remembers is forgotten"


def test_slots_are_views_of_one_memory():
    ring = Ring(3 * ALIGNMENT_BYTES, device=CPU)
    whole = ring.slot(Region(0, 3 * ALIGNMENT_BYTES)).buffer
    part = ring.slot(Region(ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES)).buffer
    assert whole.data_ptr() % ALIGNMENT_BYTES == 0 and part.data_ptr() == whole.data_ptr() + ALIGNMENT_BYTES
    ring.close()
    ring.close()
    assert whole.numel() == 3 * ALIGNMENT_BYTES, "a view outlives the ring"
