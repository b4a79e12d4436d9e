"""Promises of the noise streams: published Philox words, position-only dependence, statistics, no side effects."""

import itertools
import math
import threading
import zlib
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo2trl.errors import ConfigError
from zo2trl.zo.gaussian import N_FIELDS, gaussian_table
from zo2trl.zo.noise import make_direction, rounding_bits
from zo2trl.zo.philox import philox4x32_10
from zo2trl.zo.seeds import derive_seed
from zo2trl.zo.tiles import TILE, TileMap

KINDS = ["rademacher", "gaussian", "rounding"]
seeds = st.one_of(st.sampled_from([0, 1, 1 << 63, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))
numels = st.one_of(st.sampled_from([1, TILE - 1, TILE, TILE + 1]), st.integers(0, 5 * TILE))


def filled(kind, seed, tiles):
    """What a fresh buffer full of NaN (or -1) holds after a fill, as a numpy array."""
    n_elements = len(tiles) * TILE
    if kind == "rounding":
        out = torch.full((n_elements,), -1, dtype=torch.int32)
        rounding_bits(out, seed, tiles)
    else:
        out = torch.full((n_elements,), float("nan"))
        make_direction(kind).fill(out, seed, tiles)
    return out.numpy()


def tensor_values(kind, seed, tensor_id, numel):
    return filled(kind, seed, TileMap.for_tensors([(tensor_id, numel)]))[:numel]


# ---------------------------------------------------------------------------------------------------------- Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_words_published_with_random123(counter, key, expected):
    seed = key[0] | key[1] << 32
    assert tuple(int(word) for word in philox4x32_10(counter, seed)) == expected
    row = tuple(np.full(1000, part, dtype=np.uint64) for part in counter)
    assert all((word == want).all() for word, want in zip(philox4x32_10(row, seed), expected, strict=True))


def philox_one(counter, seed):
    """Philox4x32-10 once more, on Python integers, one call at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


words32 = st.integers(0, (1 << 32) - 1)


@given(counter=st.tuples(words32, words32, words32, words32), seed=seeds)
def test_philox_on_arrays_equals_philox_on_python_integers(counter, seed):
    assert tuple(int(word) for word in philox4x32_10(counter, seed)) == philox_one(counter, seed)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_no_u64_is_refused_with_its_value(seed):
    with pytest.raises(ConfigError, match=str(seed)):
        filled("rademacher", seed, TileMap.for_tensors([(0, 1)]))


# ------------------------------------------------------------------------------------------------------ the streams


def element_by_definition(kind, seed, tensor_id, element):
    """One value straight from the definition of the streams: no arrays, no tiles in common with the code."""
    tile, inside = divmod(element, TILE)
    if kind == "rademacher":
        j, rest = divmod(inside, 256)
        c, k = divmod(rest, 8)
        call, bit, domain = tile * 32 + c, j * 8 + k, 0
        word = philox_one((call & 0xFFFFFFFF, call >> 32, tensor_id, domain), seed)[bit // 32]
        return 1.0 if word >> bit % 32 & 1 else -1.0
    i, c = divmod(inside, 512)
    call, domain = tile * 512 + c, {"gaussian": 1, "rounding": 2}[kind]
    word = philox_one((call & 0xFFFFFFFF, call >> 32, tensor_id, domain), seed)[i // 2]
    drawn = word >> 16 * (i % 2) & 0xFFFF
    return float(gaussian_table()[drawn]) if kind == "gaussian" else drawn


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, tensor_id=words32, elements=st.lists(st.integers(0, 3 * TILE - 1), min_size=20, max_size=20))
def test_every_element_is_the_one_the_stream_defines(kind, seed, tensor_id, elements):
    values = tensor_values(kind, seed, tensor_id, 3 * TILE)
    assert [values[e] for e in elements] == [element_by_definition(kind, seed, tensor_id, e) for e in elements]


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_past_four_billion_calls_are_numbered_in_64_bits(kind):
    first_tile = (1 << 27) - 1
    tiles = TileMap.of_rows(np.uint32([5, 5]), np.uint32([first_tile, first_tile + 1]), np.int32([TILE, TILE]))
    values = filled(kind, 3, tiles)
    for element in range(0, 2 * TILE, 601):
        assert values[element] == element_by_definition(kind, 3, 5, first_tile * TILE + element)


@pytest.mark.parametrize(
    ("kind", "crc"), [("rademacher", 5382793), ("gaussian", 4046697989), ("rounding", 2116321827)]
)
def test_the_streams_never_change_under_their_identity(kind, crc):
    values = tensor_values(kind, 0x0123_4567_89AB_CDEF, 42, 2 * TILE)
    assert zlib.crc32(values.astype(values.dtype.newbyteorder("<")).tobytes()) == crc
    assert make_direction("rademacher").identity == "philox4x32-10/rademacher-1"
    assert make_direction("gaussian").identity == "philox4x32-10/gaussian-2"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, sizes=st.lists(numels, min_size=1, max_size=5), data=st.data())
def test_any_chunking_in_any_order_gives_the_same_values(kind, seed, sizes, data):
    tiles = TileMap.for_tensors(list(enumerate(sizes)))
    whole = filled(kind, seed, tiles)
    cuts = sorted({0, len(tiles), *data.draw(st.lists(st.integers(0, len(tiles)), max_size=6))})
    spans = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    for start, stop in spans:
        part = filled(kind, seed, tiles.slice(start, stop))
        assert part.tobytes() == whole[start * TILE : stop * TILE].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_longer_than_an_inner_block_equal_their_single_tiles(kind):
    tiles = TileMap.for_tensors([(1, 300 * TILE + 3), (2, 9)])
    whole = filled(kind, 8, tiles)
    for i in (0, 31, 32, 255, 256, 299, 300, 301):
        assert filled(kind, 8, tiles.slice(i, i + 1)).tobytes() == whole[i * TILE : (i + 1) * TILE].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensors_values_do_not_depend_on_its_neighbours_or_place(kind):
    alone = tensor_values(kind, 77, 5, 6000)
    tiles = TileMap.for_tensors([(1, 3), (2, 9000), (5, 6000), (3, 1)])
    assert np.array_equal(filled(kind, 77, tiles)[4 * TILE :][:6000], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_tensor_starts_with_the_shorter_ones_values(kind):
    assert np.array_equal(tensor_values(kind, 7, 5, 9000)[:123], tensor_values(kind, 7, 5, 123))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@given(sizes=st.lists(numels, min_size=1, max_size=6), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_padding_is_positive_zero_and_only_padding_is_zero(kind, sizes, seed):
    tiles = TileMap.for_tensors(list(enumerate(sizes)))
    rows = filled(kind, seed, tiles).reshape(-1, TILE)
    for row, n_valid in zip(rows, tiles.n_valid, strict=True):
        assert (row[n_valid:].view(np.uint32) == 0).all()  # the bits of +0.0
        assert np.count_nonzero(row) == n_valid


def correlation(a, b):
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    return float((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_tensors_and_neighbouring_elements_are_uncorrelated(kind):
    n = 1 << 18
    base = tensor_values(kind, 1, 1, n).astype(np.float64)
    others = [(2, 1), (1, 2), (1 + (1 << 32), 1), (1, 1 + (1 << 31)), ((1 << 63) + 1, 1)]
    for seed, tensor_id in others:
        assert abs(correlation(base, tensor_values(kind, seed, tensor_id, n))) < 5 / math.sqrt(n)
    for lag in (1, 2, 8, 32, 256, 512, TILE):
        assert abs(correlation(base[:-lag], base[lag:])) < 5 / math.sqrt(n - lag)


def test_domains_are_independent_of_each_other():
    n = 1 << 18
    rademacher, gaussian, rounding = (tensor_values(kind, 9, 4, n).astype(np.float64) for kind in KINDS)
    for a, b in ((rademacher, gaussian), (gaussian, rounding), (rademacher, rounding)):
        assert abs(correlation(a, b)) < 5 / math.sqrt(n)


# ------------------------------------------------------------------------------------------------------- statistics


def test_rademacher_is_plus_or_minus_one_and_balanced_in_every_position_of_a_tile():
    z = tensor_values("rademacher", 123, 1, 2048 * TILE)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean(dtype=np.float64)) < 5 / math.sqrt(z.size)
    per_position = z.reshape(-1, TILE).mean(axis=0, dtype=np.float64)
    assert abs(per_position).max() < 5.5 / math.sqrt(2048)


def test_gaussian_has_the_moments_distribution_and_tails_of_a_normal():
    z = tensor_values("gaussian", 321, 1, 1 << 22).astype(np.float64)
    n = z.size
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n) + 0.01  # the deviates stop at 4.3
    normal = NormalDist()
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = 2 * (1 - normal.cdf(bound))
        assert abs((abs(z) > bound).mean() - expected) < 5 * math.sqrt(expected / n) + 2 / N_FIELDS


def test_gaussian_passes_kolmogorov_smirnov():
    z = np.sort(tensor_values("gaussian", 5, 2, 100_000))
    cdf = np.array([NormalDist().cdf(float(x)) for x in z])
    ranks = np.arange(z.size)
    distance = max((cdf - ranks / z.size).max(), ((ranks + 1) / z.size - cdf).max())
    assert distance < 1.95 / math.sqrt(z.size)  # one good generator in 1000 fails this; the seed is fixed


def test_rounding_bits_are_uniform_over_16_bits_with_every_bit_balanced():
    drawn = tensor_values("rounding", 6, 1, 1 << 20)
    assert drawn.min() >= 0 and drawn.max() < 65536
    counts = np.bincount(drawn >> 8, minlength=256)
    expected = drawn.size / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    for bit in range(16):
        assert abs((drawn >> bit & 1).mean() - 0.5) < 2.5 / math.sqrt(drawn.size)


# ----------------------------------------------------------------------------------------------------- tile map, API


def test_tile_map_starts_every_tensor_on_a_tile_and_skips_empty_ones():
    tiles = TileMap.for_tensors([(7, TILE + 1), (8, 0), (9, 3)])
    assert tiles.tensor_ids.tolist() == [7, 7, 9]
    assert tiles.tile_indices.tolist() == [0, 1, 0]
    assert tiles.n_valid.tolist() == [TILE, 1, 3]
    assert (tiles.tensor_ids.dtype, tiles.tile_indices.dtype, tiles.n_valid.dtype) == (np.uint32, np.uint32, np.int32)


def test_empty_tile_map_fills_nothing():
    tiles = TileMap.for_tensors([])
    assert len(tiles) == 0
    for kind in KINDS:
        assert filled(kind, 1, tiles).size == 0


def found_by_runs(runs, first_tile, n_tiles):
    """Tiles from `first_tile` on as `noise_triton.find_tile` finds them: [n_tiles, (tensor id, index, valid)]."""
    found = []
    for tile in range(first_tile, first_tile + n_tiles):
        run = int((runs[:-1, 0] <= tile).sum()) - 1
        start, tensor_id, index, last = (int(word) for word in runs[run])
        found.append((tensor_id, index + tile - start, last if tile + 1 == runs[run + 1, 0] else TILE))
    return (np.array(found, np.int64).reshape(-1, 3) & 0xFFFFFFFF).astype(np.uint32)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(numels, max_size=6), first_id=words32, data=st.data())
def test_kernels_find_in_a_row_per_tensor_what_the_map_says_of_each_tile(sizes, first_id, data):
    tiles = TileMap.for_tensors([(first_id ^ i, size) for i, size in enumerate(sizes)])
    start = data.draw(st.integers(0, len(tiles)))
    part = tiles.slice(start, data.draw(st.integers(start, len(tiles))))
    runs, n_runs, first_tile = part.on_device(torch.device("cpu"))
    assert n_runs == len(runs) - 1 == sum(size > 0 for size in sizes)
    wanted = np.stack([part.tensor_ids, part.tile_indices, part.n_valid.astype(np.uint32)], axis=1)
    assert np.array_equal(found_by_runs(runs.numpy(), first_tile, len(part)), wanted)


def test_kernels_find_tiles_that_were_given_one_by_one():
    tiles = TileMap.of_rows(np.uint32([5, 9, 5]), np.uint32([0xFFFFFFFF, 3, 0]), np.int32([TILE, 7, 1]))
    runs, _, first_tile = tiles.on_device(torch.device("cpu"))
    assert found_by_runs(runs.numpy(), first_tile, 3).tolist() == [[5, 0xFFFFFFFF, TILE], [9, 3, 7], [5, 0, 1]]


def test_slices_of_slices_share_device_copies_with_the_whole_map():
    tiles = TileMap.for_tensors([(1, 5 * TILE), (2, 2 * TILE + 7)])
    part = tiles.slice(2, 99).slice(1, 4)
    assert part.tensor_ids.tolist() == tiles.tensor_ids[3:6].tolist()
    (copy, n_runs, start), (whole, n_whole, first) = (t.on_device(torch.device("cpu")) for t in (part, tiles))
    assert copy is whole and (n_runs, start, n_whole, first) == (2, 3, 2, 0)


def test_what_a_device_keeps_of_a_map_is_16_bytes_a_tensor_however_large_they_are():
    block = [(i, 20_480 * 5_120) for i in range(16)]
    runs, _, _ = TileMap.for_tensors(block).on_device(torch.device("cpu"))
    assert runs.untyped_storage().nbytes() == 16 * (len(block) + 1)


def test_a_map_takes_memory_per_tensor_however_large_it_is():
    tiles = TileMap.for_tensors([(3, 1 << 50), (4, 0), (5, 9)])
    assert len(tiles) == (1 << 50) // TILE + 1
    last = tiles.slice(len(tiles) - 2, len(tiles))
    assert (last.tensor_ids.tolist(), last.n_valid.tolist()) == ([3, 5], [TILE, 9])


def test_unknown_direction_names_the_nearest_valid_one():
    with pytest.raises(ConfigError, match=r'"gausian"; the nearest is "gaussian".*"rademacher", "gaussian", "mezo"'):
        make_direction("gausian")


def test_mezo_is_pointed_to_its_own_module():
    with pytest.raises(ConfigError, match=r"zo2trl\.zo\.mezo"):
        make_direction("mezo")


def test_derived_seeds_are_words_of_philox_and_do_not_collide():
    run_seed, step = 0xFFFF_0000_1234_5678, (1 << 35) + 9
    w0, w1, _, _ = philox_one((step & 0xFFFFFFFF, step >> 32, 3, 3), run_seed)
    assert derive_seed(run_seed, step, 3) == w0 | w1 << 32
    derived = {derive_seed(run, step, index) for run in range(4) for step in range(50) for index in range(5)}
    assert len(derived) == 4 * 50 * 5


# ------------------------------------------------------------------------------------------------------ side effects


def test_global_random_states_of_numpy_and_torch_are_left_alone():
    numpy_before, torch_before = np.random.get_state(), torch.get_rng_state()
    for kind in KINDS:
        filled(kind, 1, TileMap.for_tensors([(1, 3 * TILE)]))
    derive_seed(1, 2, 3)
    numpy_after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after, strict=True))
    assert torch.equal(torch_before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_threads_filling_different_buffers_get_what_one_thread_gets(kind):
    tiles = TileMap.for_tensors([(1, 70 * TILE + 5), (2, 11)])
    wanted = [filled(kind, seed, tiles) for seed in range(6)]
    got = [None] * 6
    start = threading.Barrier(6)

    def work(seed):
        start.wait()
        for _ in range(3):
            got[seed] = filled(kind, seed, tiles)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(have, want) for have, want in zip(got, wanted, strict=True))
