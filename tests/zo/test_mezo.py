"""Promises of the reference stream: MeZO's own numbers, whatever order tensors are visited in, and no side effects."""

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo2trl.zo.mezo import MezoNoise, MezoSeeds
from zo2trl.zo.tiles import TILE, TileMap

TENSORS = [(0, 10), (3, TILE + 7), (4, 3 * TILE), (9, 1)]  # trainable ones: ids have gaps where tensors are frozen


def reference(seed: int) -> dict[int, torch.Tensor]:
    """MeZO, algorithm 1: reset one generator, draw tensor after tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.normal(0, 1, (numel,), generator=generator, dtype=torch.float32) for key, numel in TENSORS}


def filled(noise: MezoNoise, seed: int, tiles: TileMap) -> torch.Tensor:
    out = torch.full((len(tiles) * TILE,), float("nan"))
    noise.fill(out, seed, tiles)
    return out


def test_step_seeds_are_the_draws_of_numpys_legacy_generator():
    state = np.random.RandomState(42)
    expected = [int(state.randint(1_000_000_000)) for _ in range(6)]
    assert [MezoSeeds(42)(step) for step in range(6)] == expected


def test_step_seeds_can_be_asked_for_in_any_order():
    seeds = MezoSeeds(3)
    late, early = seeds(5), seeds(1)
    assert (early, late) == (MezoSeeds(3)(1), MezoSeeds(3)(5))


@pytest.mark.parametrize("seed", [0, 123_456_789, 2**64 - 1])
def test_the_stream_is_one_sequence_of_normal_draws_over_the_trainable_tensors(seed):
    noise, expected = MezoNoise(TENSORS), reference(seed)
    for key, numel in TENSORS:
        z = filled(noise, seed, TileMap.for_tensors([(key, numel)]))
        assert torch.equal(z[:numel], expected[key])
        assert torch.count_nonzero(z[numel:]) == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_neither_visiting_order_nor_chunks_nor_other_seeds_in_between_change_it(data):
    noise = MezoNoise(TENSORS)
    tiles = TileMap.for_tensors(TENSORS)
    whole = {seed: filled(MezoNoise(TENSORS), seed, tiles) for seed in (5, 6)}
    for _ in range(data.draw(st.integers(1, 6))):
        seed = data.draw(st.sampled_from([5, 6]))
        start = data.draw(st.integers(0, len(tiles) - 1))
        stop = data.draw(st.integers(start + 1, len(tiles)))
        part = filled(noise, seed, tiles.slice(start, stop))
        assert torch.equal(part, whole[seed][start * TILE : stop * TILE])


def test_many_pending_steps_at_once_still_get_their_own_streams():
    noise = MezoNoise(TENSORS)
    for seed in [*range(8), *range(8)]:
        assert torch.equal(filled(noise, seed, TileMap.for_tensors([(9, 1)]))[:1], reference(seed)[9])


def test_threads_that_fill_at_once_get_the_same_numbers():
    noise, results = MezoNoise(TENSORS), {}

    def fill(key: int, numel: int) -> None:
        results[key] = filled(noise, 11, TileMap.for_tensors([(key, numel)]))[:numel]

    threads = [threading.Thread(target=fill, args=tensor) for tensor in TENSORS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, expected in reference(11).items():
        assert torch.equal(results[key], expected)


def test_no_global_generator_is_touched():
    torch_before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    filled(MezoNoise(TENSORS), MezoSeeds(1)(3), TileMap.for_tensors(TENSORS))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_before, strict=True))
    assert random.getstate() == python_before
