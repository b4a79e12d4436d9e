"""Promises of perturbing and replaying: clean bytes stay clean, rounding is fair, laziness never shows in a bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import method, record
from zo2trl.zo import chunks
from zo2trl.zo.method import make_method
from zo2trl.zo.noise import make_direction
from zo2trl.zo.records import SkipRecord
from zo2trl.zo.seeds import derive_seed, direction_seed
from zo2trl.zo.tiles import TILE, Perturbed, Span, TileMap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
numels = st.lists(st.integers(1, 2 * TILE + 5), min_size=1, max_size=4)


def span_of(numels, dtype, *, byte_start=0, decays=False, first_id=0):
    tiles = TileMap.for_tensors([(first_id + i, numel) for i, numel in enumerate(numels)])
    return Span(dtype=dtype, byte_start=byte_start, tiles=tiles, decays=decays)


def random_buffer(span, *, seed=0, scale=0.02):
    """A byte buffer that holds the span, with zeros on padding as the layout promises."""
    flat = torch.randn(len(span.tiles) * TILE, generator=torch.Generator().manual_seed(seed)) * scale
    flat[is_padding(span)] = 0
    return flat.to(span.dtype).view(torch.uint8)


def is_padding(span):
    return (torch.arange(TILE) >= torch.tensor(span.tiles.n_valid)[:, None]).flatten()


def noise_of(span, seed, kind="rademacher"):
    z = torch.empty(len(span.tiles) * TILE)
    make_direction(kind).fill(z, seed, span.tiles)
    return z


def perturb(clean, into, spans, *, by, seed, coefficient):
    by.visit(clean, spans, (), probes=[Perturbed(seed, coefficient, into)])


def replayed(buffer, span, records, *, rounding="stochastic"):
    result = buffer.clone()
    method(rounding).replay(result, [span], records)
    return result


# ------------------------------------------------------------------------------------------------------- perturbing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_probe_sees_clean_weights_plus_the_scaled_direction(dtype, kind):
    span = span_of([100, TILE + 3], dtype)
    clean = random_buffer(span)
    scratch = torch.full_like(clean, 255)
    perturb(clean, scratch, [span], by=method(direction=kind), seed=5, coefficient=-1e-3)
    expected = (span.view(clean).float() + noise_of(span, 5, kind) * -1e-3).to(dtype)
    assert torch.equal(span.view(scratch), expected)


@settings(max_examples=30, deadline=None)
@given(numels=numels, dtype=st.sampled_from(DTYPES), coefficient=st.floats(-1, 1), seed=st.integers(0, 2**64 - 1))
def test_perturbing_reads_clean_bytes_only_and_leaves_padding_zero(numels, dtype, coefficient, seed):
    span = span_of(numels, dtype)
    clean = random_buffer(span)
    before, scratch = clean.clone(), torch.empty_like(clean)
    perturb(clean, scratch, [span], by=method(), seed=seed, coefficient=coefficient)
    assert torch.equal(clean, before)
    assert torch.count_nonzero(span.view(scratch)[is_padding(span)]) == 0


@settings(max_examples=30, deadline=None)
@given(numels=numels, dtype=st.sampled_from(DTYPES), rounding=st.sampled_from(["nearest", "stochastic"]),
       n_records=st.integers(0, 3), in_place=st.booleans())  # fmt: skip
def test_one_visit_does_what_replaying_and_perturbing_twice_do(numels, dtype, rounding, n_records, in_place):
    span = span_of(numels, dtype)
    records = [record(i) for i in range(n_records)]
    clean = replayed(random_buffer(span), span, records, rounding=rounding)
    wanted = [torch.zeros_like(clean) for _ in range(2)]
    for into, coefficient in zip(wanted, (1e-2, -1e-2), strict=True):
        perturb(clean, into, [span], by=method(rounding), seed=5, coefficient=coefficient)
    weights = random_buffer(span)
    plus, minus = torch.zeros_like(weights), weights if in_place else torch.zeros_like(weights)
    probes = [Perturbed(5, 1e-2, plus), Perturbed(5, -1e-2, minus)]
    method(rounding).visit(weights, [span], records, probes=probes, keep=not in_place)
    assert torch.equal(plus, wanted[0]) and torch.equal(minus, wanted[1])
    assert in_place or torch.equal(weights, clean)


def test_frozen_tensors_between_spans_are_neither_perturbed_nor_updated():
    low, frozen, high = span_of([10], torch.float32), TILE * 4, TILE * 4
    last = span_of([10], torch.float32, byte_start=len(low.tiles) * TILE * 4 + frozen, first_id=7)
    buffer = torch.randint(256, (frozen * 3,), dtype=torch.uint8)
    scratch, middle = torch.full_like(buffer, 77), slice(high, high + frozen)
    perturb(buffer, scratch, [low, last], by=method(), seed=1, coefficient=1.0)
    assert torch.all(scratch[middle] == 77)
    kept = buffer[middle].clone()
    method().replay(buffer, [low, last], [record(1)])
    assert torch.equal(buffer[middle], kept)


def test_the_first_direction_carries_the_steps_own_seed_and_the_others_differ():
    assert direction_seed(5, 0) == 5
    assert len({direction_seed(5, i) for i in range(50)} | {direction_seed(6, i) for i in range(50)}) == 100


# -------------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("decays", [True, False])
def test_a_step_is_sgd_on_the_mean_of_its_directions_plus_decay(wd, decays):
    span = span_of([300, 5], torch.float32, decays=decays)
    buffer = random_buffer(span)
    step = record(1, seed=9, lr=0.25, wd=wd)._replace(coefficients=(0.5, -2.0))
    w = span.view(buffer).clone()
    slope = noise_of(span, 9) * 0.25 + noise_of(span, derive_seed(9, 1, 0)) * -1.0
    if decays and wd:
        slope = slope + w * wd
    assert torch.equal(span.view(replayed(buffer, span, [step])), w - slope * 0.25)


def test_a_skipped_step_changes_nothing():
    span = span_of([100], torch.bfloat16)
    buffer = random_buffer(span)
    skip = SkipRecord(step=1, seed=3, losses=(math.nan, 1.0))
    assert torch.equal(replayed(buffer, span, [skip]), buffer)
    assert torch.equal(replayed(buffer, span, [skip, record(2)]), replayed(buffer, span, [record(2)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_learning_rate_of_zero_changes_nothing(dtype, rounding):
    span = span_of([1000], dtype)
    buffer = random_buffer(span)
    after = replayed(buffer, span, [record(i, lr=0.0) for i in range(5)], rounding=rounding)
    assert torch.equal(span.view(after), span.view(buffer))


@settings(max_examples=25, deadline=None)
@given(
    numels=numels,
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    cuts=st.lists(st.integers(0, 5), max_size=3),
    chunk=st.integers(1, 5),
)
def test_lazy_equals_eager_bit_for_bit_in_any_chunks(numels, dtype, rounding, cuts, chunk):
    span = span_of(numels, dtype, decays=True)
    buffer = random_buffer(span)
    steps = [record(i, lr=1e-2, wd=0.01) for i in range(5)]
    at_once = replayed(buffer, span, steps, rounding=rounding)
    in_parts = buffer
    bounds = [0, *sorted(cuts), len(steps)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_CHUNK_TILES", chunk)
        for start, stop in itertools.pairwise(bounds):
            in_parts = replayed(in_parts, span, steps[start:stop], rounding=rounding)
    assert torch.equal(at_once, in_parts)
    assert torch.count_nonzero(span.view(at_once)[is_padding(span)]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_gets_the_same_bits_alone_and_among_others(dtype):
    together = span_of([70, TILE + 1, 3], dtype)
    buffer = random_buffer(together)
    steps = [record(i) for i in range(3)]
    alone = span_of([TILE + 1], dtype, first_id=1)
    part = slice(TILE * dtype.itemsize, 3 * TILE * dtype.itemsize)
    assert torch.equal(replayed(buffer[part], alone, steps), replayed(buffer, together, steps)[part])


def test_more_threads_give_the_same_bits():
    span = span_of([400 * TILE], torch.bfloat16)
    buffer, before = random_buffer(span), torch.get_num_threads()
    results = []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        results.append(replayed(buffer, span, [record(1)]))
    torch.set_num_threads(before)
    assert torch.equal(*results)


# ---------------------------------------------------------------------------------------------------------- rounding


def grid_of(dtype):
    """Every finite value of a 16-bit dtype, in order, without the second zero."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return torch.unique(values[values.isfinite()])


def moved(start, dtype, *, delta, seed=1):
    """(exact fp32 results, stored results) of one step of size delta from weights that all equal `start`."""
    span = span_of([96 * TILE], dtype)
    buffer = torch.full((96 * TILE,), start, dtype=dtype).view(torch.uint8)
    exact = span.view(buffer).float() - noise_of(span, seed) * torch.tensor(delta)
    after = replayed(buffer, span, [record(1, seed=seed, grad=1.0, lr=delta)])
    return exact.double(), span.view(after).double()


POINTS = [(1.0, 1e-5), (1.0, 3.3e-3), (-0.7, 1e-4), (0.02, 1e-6), (-3e-5, 1e-8), (1e-7, 2e-8), (0.0, 1e-6)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("start", "delta"), POINTS)
def test_stochastic_rounding_gives_neighbours_only_and_no_bias(dtype, start, delta):
    exact, stored = moved(start, dtype, delta=delta)
    grid = grid_of(dtype)
    below = grid[torch.searchsorted(grid, exact, right=True) - 1]
    above = grid[torch.searchsorted(grid, exact)]
    assert torch.all((stored == below) | (stored == above))
    gap = above - below
    on_grid = gap == 0
    assert torch.equal(stored[on_grid], exact[on_grid])
    share = (exact - below)[~on_grid] / gap[~on_grid]
    went_up = (stored == above)[~on_grid].double()
    # 16 random bits resolve a share to 2^-16, so that much bias is allowed.
    tolerance = 5 * math.sqrt(float((share * (1 - share)).sum())) + 2.0**-16 * share.numel()
    assert abs(float((went_up - share).sum())) <= tolerance


@pytest.mark.parametrize("dtype", HALVES)
def test_values_on_the_grid_stay_exactly(dtype):
    grid = grid_of(dtype).to(dtype)
    n_tiles = -(-len(grid) // TILE)
    span = span_of([n_tiles * TILE], dtype)
    flat = torch.zeros(n_tiles * TILE, dtype=dtype)
    flat[: len(grid)] = grid
    after = replayed(flat.view(torch.uint8), span, [record(i, grad=0.0) for i in range(3)])
    assert torch.equal(span.view(after), flat)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_decided_by_the_steps_seed(dtype):
    span = span_of([2 * TILE], dtype)
    buffer = random_buffer(span)
    one = replayed(buffer, span, [record(1, seed=1, lr=1e-6)])
    assert torch.equal(one, replayed(buffer, span, [record(9, seed=1, lr=1e-6)]))
    assert not torch.equal(one, replayed(buffer, span, [record(1, seed=2, lr=1e-6)]))


@pytest.mark.parametrize("dtype", HALVES)
def test_updates_far_below_an_ulp_vanish_to_nearest_and_count_on_average_stochastically(dtype):
    span = span_of([50 * TILE], dtype)
    buffer = torch.full((50 * TILE,), 1.0, dtype=dtype).view(torch.uint8)
    tiny = record(1, grad=1.0, lr=1e-5)
    assert torch.equal(replayed(buffer, span, [tiny], rounding="nearest"), buffer)
    drift = (span.view(replayed(buffer, span, [tiny])).double() - 1.0) * -noise_of(span, tiny.seed).double()
    ulp = torch.finfo(dtype).eps
    assert float(drift.mean()) == pytest.approx(1e-5, abs=5 * math.sqrt(1e-5 * ulp / drift.numel()))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_nearest_is_the_ieee_one(dtype):
    span = span_of([5000], dtype)
    buffer = random_buffer(span, scale=1.0)
    step = record(4, lr=0.01)
    exact = span.view(buffer).float() - noise_of(span, step.seed) * 0.25 * 0.01
    assert torch.equal(span.view(replayed(buffer, span, [step], rounding="nearest")), exact.to(dtype))


def test_fp32_weights_are_never_rounded_stochastically():
    span = span_of([5000], torch.float32)
    buffer = random_buffer(span)
    assert torch.equal(replayed(buffer, span, [record(1)]), replayed(buffer, span, [record(1)], rounding="nearest"))


def test_fp16_weights_stop_at_the_largest_number_instead_of_overflowing():
    _, stored = moved(65504.0, torch.float16, delta=100.0)
    assert bool(stored.isfinite().all()) and float(stored.max()) == 65504.0


def test_each_arithmetic_has_a_name_of_its_own():
    identities = {
        make_method(direction, rounding=rounding).identity
        for direction in ("rademacher", "gaussian")
        for rounding in ("nearest", "stochastic")
    }
    assert len(identities) == 4
