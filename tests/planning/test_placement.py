"""Promises of the planner: never over budget, as much resident as fits, refusals with both numbers and a way out."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.stores import synthetic_layout
from zo2trl.errors import BudgetError, ConfigError
from zo2trl.files.sizes import format_bytes, parse_size
from zo2trl.layout.layout import ALIGNMENT_BYTES
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place, place_again, scratch_bytes, smallest_device_budget, spread

PLENTY = 1 << 40
leaves = st.lists(st.integers(1, 6), min_size=1, max_size=4)
layouts = st.builds(
    synthetic_layout, st.lists(leaves, min_size=1, max_size=8), root_tiles=st.integers(1, 5), trainable=st.booleans()
)
twins = st.builds(lambda block, n: synthetic_layout([block] * n), leaves, st.integers(1, 12))  # equal blocks


def bytes_needed(layout, placement):
    """Device bytes of a placement, counted anew from its parts."""
    resident = sum(unit.n_bytes for unit in layout.units if placement.tier_of[unit.index] == "gpu")
    scratch = max(scratch_bytes(point) for point in layout.points)
    return resident + placement.ring_bytes + placement.scratch_copies * scratch


def passing(layout, placement):
    """Bytes of the segments that are streamed."""
    return [s.n_bytes for s in layout.segments if placement.tier_of[s.unit.index] != "gpu"]


@settings(max_examples=150, deadline=None)
@given(layout=layouts, share=st.floats(0, 2), cpu_share=st.floats(0, 1.5))
def test_a_placement_never_exceeds_its_budgets(layout, share, cpu_share):
    everything = sum(unit.n_bytes for unit in layout.units)
    device = smallest_device_budget(layout) + int(share * everything)
    cpu = int(cpu_share * everything)
    try:
        placement = place(layout, Budgets(device=device, cpu=cpu))
    except BudgetError:
        pytest.fail("a budget above the smallest was refused")
    assert placement.device_bytes <= device
    assert bytes_needed(layout, placement) == placement.device_bytes
    in_cpu = sum(unit.n_bytes for unit in layout.units if placement.tier_of[unit.index] == "cpu")
    assert in_cpu == placement.cpu_bytes <= cpu
    assert set(placement.tier_of) == {unit.index for unit in layout.units}
    assert placement.tier_of[0] == "gpu", "what is outside the blocks stays on the device"


@settings(max_examples=60, deadline=None)
@given(layout=layouts)
def test_everything_is_resident_when_it_fits(layout):
    fits = sum(unit.n_bytes for unit in layout.units) + max(map(scratch_bytes, layout.points))
    placement = place(layout, Budgets(device=fits, cpu=0))
    assert set(placement.tier_of.values()) == {"gpu"} and placement.ring_bytes == 0
    assert placement.device_bytes == fits


@settings(max_examples=100, deadline=None)
@given(layout=layouts)
def test_the_smallest_budget_works_and_one_byte_less_is_refused_with_both_numbers(layout):
    smallest = smallest_device_budget(layout)
    assert place(layout, Budgets(device=smallest, cpu=0)).device_bytes <= smallest
    with pytest.raises(BudgetError) as refusal:
        place(layout, Budgets(device=smallest - 1, cpu=0))
    assert f"{smallest - 1:,} bytes" in str(refusal.value)
    assert f"works is {smallest:,} bytes" in str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(layout=layouts)
def test_min_asks_for_the_smallest_budget(layout):
    assert place(layout, Budgets(device="min", cpu=0)).device_bytes == smallest_device_budget(layout)


def test_min_works_for_a_model_without_blocks():
    layout = synthetic_layout([])
    assert place(layout, Budgets(device="min", cpu=0)).device_bytes == smallest_device_budget(layout)


def test_a_model_without_blocks_that_does_not_fit_is_refused_with_both_numbers():
    layout = synthetic_layout([], root_tiles=3)
    smallest = smallest_device_budget(layout)
    with pytest.raises(BudgetError, match=f"{smallest - 1:,} bytes.* {smallest:,} bytes"):
        place(layout, Budgets(device=smallest - 1, cpu=0))


@settings(max_examples=80, deadline=None)
@given(layout=twins, low=st.floats(0, 1.2), extra=st.floats(0, 1))
def test_more_device_memory_never_means_fewer_resident_blocks(layout, low, extra):
    everything = sum(unit.n_bytes for unit in layout.units) * 2
    small = smallest_device_budget(layout) + int(low * everything)
    counts = [
        len(place(layout, Budgets(device=budget, cpu=0)).units_in("gpu"))
        for budget in (small, small + int(extra * everything))
    ]
    assert counts[0] <= counts[1]


@settings(max_examples=80, deadline=None)
@given(layout=layouts, low=st.floats(0, 1.2), extra=st.floats(0, 1))
def test_more_host_memory_never_means_more_blocks_on_disk(layout, low, extra):
    everything = sum(unit.n_bytes for unit in layout.units)
    budgets = [Budgets(device="min", cpu=int(share * everything)) for share in (low, low + extra)]
    on_disk = [len(place(layout, budget).units_in("disk")) for budget in budgets]
    assert on_disk[0] >= on_disk[1]


@given(layout=layouts)
@settings(max_examples=30, deadline=None)
def test_nothing_is_on_disk_when_host_memory_holds_the_rest(layout):
    assert place(layout, Budgets(device="min", cpu=PLENTY)).units_in("disk") == []


@given(st.integers(0, 200), st.integers(1, 200))
def test_chosen_positions_are_spread_evenly(count, total):
    assume(count <= total)
    chosen = spread(count, total)
    assert len(chosen) == len(set(chosen)) == count and all(0 <= i < total for i in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@settings(max_examples=60, deadline=None)
@given(layout=twins, share=st.floats(0, 1))
def test_resident_blocks_lie_evenly_between_streamed_ones(layout, share):
    device = smallest_device_budget(layout) + int(share * sum(unit.n_bytes for unit in layout.units))
    tiers = place(layout, Budgets(device=device, cpu=0)).tier_of
    resident = [unit.index for unit in layout.units[1:] if tiers[unit.index] == "gpu"]
    gaps = [b - a for a, b in itertools.pairwise(resident)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_longer_ring_is_taken_where_there_is_room():
    layout = synthetic_layout([[4]] * 6)
    smallest = smallest_device_budget(layout)
    block = layout.segments[1].n_bytes
    for spare, ring_bytes in [(0, 2 * block), (ALIGNMENT_BYTES + 1, 2 * block + ALIGNMENT_BYTES), (block, 3 * block)]:
        assert place(layout, Budgets(device=smallest + spare, cpu=0)).ring_bytes == ring_bytes


@settings(max_examples=150, deadline=None)
@given(layout=layouts, share=st.floats(0, 1.2))
def test_a_ring_holds_two_of_the_largest_streamed_segments_and_three_where_blocks_are_resident(layout, share):
    device = smallest_device_budget(layout) + int(share * sum(unit.n_bytes for unit in layout.units))
    placement = place(layout, Budgets(device=device, cpu=0))
    streamed = passing(layout, placement)
    assert placement.largest_segment_bytes == max(streamed, default=0)
    assert min(2 * placement.largest_segment_bytes, sum(streamed)) <= placement.ring_bytes <= sum(streamed)
    if streamed and any(placement.tier_of[unit.index] == "gpu" for unit in layout.units[1:]):
        assert placement.ring_bytes >= min(3 * placement.largest_segment_bytes, sum(streamed))
    assert placement.ring_bytes % ALIGNMENT_BYTES == 0


@settings(max_examples=150, deadline=None)
@given(layout=twins, share=st.floats(0, 1.5))
def test_a_second_copy_of_the_scratch_is_kept_where_no_further_block_fits(layout, share):
    device = smallest_device_budget(layout) + int(share * sum(unit.n_bytes for unit in layout.units))
    placement = place(layout, Budgets(device=device, cpu=0))
    assert placement.scratch_copies in (1, 2)
    spare = device - placement.device_bytes
    if placement.scratch_copies == 1 and placement.ring_bytes >= 3 * placement.largest_segment_bytes:
        assert spare < placement.scratch_bytes
    one_copy = placement.device_bytes - (placement.scratch_copies - 1) * placement.scratch_bytes
    growth = max(placement.ring_bytes - 3 * placement.largest_segment_bytes, 0)
    if placement.units_in("disk"):
        block = layout.units[1].n_bytes
        assert device - (one_copy - growth) < block, "residency comes first"


def test_frozen_models_need_no_scratch_and_no_second_copy():
    layout = synthetic_layout([[4]] * 6, trainable=False)
    placement = place(layout, Budgets(device=PLENTY, cpu=0))
    assert placement.scratch_bytes == 0 and placement.scratch_copies == 1


def test_min_asks_for_one_copy_and_the_shortest_ring():
    layout = synthetic_layout([[4, 1]] * 6)
    placement = place(layout, Budgets(device="min", cpu=0))
    assert placement.scratch_copies == 1 and placement.ring_bytes == 2 * placement.largest_segment_bytes


@settings(max_examples=100, deadline=None)
@given(layout=layouts, share=st.floats(0, 1.2), reserve=st.integers(0, 10**6))
def test_a_reserve_is_left_free_whatever_is_placed(layout, share, reserve):
    device = smallest_device_budget(layout, reserve=reserve) + int(share * sum(u.n_bytes for u in layout.units))
    budgets = Budgets(device=device, cpu=0, reserve=reserve)
    placement = place(layout, budgets)
    assert placement.device_bytes <= device - reserve
    assert placement == place(layout, Budgets(device=device - reserve, cpu=0))
    assert place_again(layout, placement, budgets) == placement


def test_a_reserve_that_makes_it_too_much_is_named_with_the_way_out():
    layout = synthetic_layout([[4]] * 6)
    smallest = smallest_device_budget(layout)
    place(layout, Budgets(device=smallest + 999, cpu=0, reserve=999))
    wanted = rf"1,000 bytes of it are kept free for activations\. Without them .*works is {smallest + 1000:,} bytes"
    with pytest.raises(BudgetError, match=wanted):
        place(layout, Budgets(device=smallest + 999, cpu=0, reserve=1000))
    with pytest.raises(BudgetError, match=r"kept free for activations\. The smallest"):
        place(layout, Budgets(device=smallest - 1, cpu=0, reserve=1000))
    residency = place(layout, Budgets(device=smallest, cpu=0))
    with pytest.raises(BudgetError, match="1,000 bytes of it are kept free for activations"):
        place_again(layout, residency, Budgets(device=smallest + 999, cpu=0, reserve=1000))


def whole(layout):
    """The same units with every block visited at once."""
    points = []
    for unit in layout.units:
        segment = replace(layout.segments[0], index=unit.index, unit=unit, byte_start=0, n_bytes=unit.n_bytes)
        points.append(replace(layout.points[0], index=unit.index, segments=(segment,)))
    return replace(layout, points=tuple(points))


@settings(max_examples=80, deadline=None)
@given(layout=layouts, share=st.floats(0, 1.2), cpu_share=st.floats(0, 1))
def test_another_granularity_moves_no_unit_and_keeps_to_the_budget(layout, share, cpu_share):
    everything = sum(unit.n_bytes for unit in layout.units)
    device = smallest_device_budget(layout) + int(share * everything)
    budgets = Budgets(device=device, cpu=int(cpu_share * everything))
    residency = place(layout, budgets)
    assert place_again(layout, residency, budgets) == residency
    try:
        again = place_again(whole(layout), residency, budgets)
    except BudgetError:
        return
    assert again.tier_of == residency.tier_of and again.cpu_bytes == residency.cpu_bytes
    assert bytes_needed(whole(layout), again) <= again.device_bytes <= device


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 8 << 30),
        ("512MB", 512_000_000),
        ("1.5 GiB", 3 << 29),
        ("  2 tb ", 2_000_000_000_000),
        ("64kB", 64_000),
        ("64KiB", 64 << 10),
        ("8G", 8_000_000_000),
        ("123456", 123_456),
        ("0", 0),
        ("7B", 7),
        (0, 0),
        (8_000_000_000, 8_000_000_000),
        (8e9, 8_000_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, n_bytes):
    assert parse_size(text, argument="device_memory") == n_bytes


@pytest.mark.parametrize("word", ["auto", "AUTO", "min", "Min"])
def test_auto_and_min_are_passed_through(word):
    assert parse_size(word, argument="device_memory") == word.lower()


@pytest.mark.parametrize(
    "wrong", ["8 gigs", "", "-1GB", "GB", "1,000", "8GBB", "0x10", -1, 1.5, True, float("nan"), float("inf"), None, []]
)
def test_anything_else_is_refused_by_the_arguments_name(wrong):
    with pytest.raises(ConfigError, match=r"`cpu_memory` is .*not a size"):
        parse_size(wrong, argument="cpu_memory")


@given(st.integers(0, 10**6), st.sampled_from("KMGT"), st.booleans())
def test_decimal_and_binary_prefixes_mean_what_they_say(count, prefix, binary):
    base, power = (1024 if binary else 1000), "KMGT".index(prefix) + 1
    assert parse_size(f"{count}{prefix}{'i' if binary else ''}B", argument="x") == count * base**power


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1_234_567, "1.23 MB"), (8e9, "8 GB"), (5e15, "5e+03 TB")]
)
def test_sizes_are_written_short(n_bytes, text):
    assert format_bytes(n_bytes) == text
