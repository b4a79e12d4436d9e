"""Checksums in pieces: the same number however the bytes were cut, in whatever order and by however many threads."""

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo2trl.layout.layout import TensorSpec
from zo2trl.tiers.checksums import TensorSums, combine_crcs
from zo2trl.tiers.unit_files import padded_crc
from zo2trl.zo.tiles import TILE


def tensors(*numels: int, dtype: torch.dtype = torch.uint8) -> list[TensorSpec]:
    """Consecutive tensors of a unit."""
    specs, offset = [], 0
    for number, numel in enumerate(numels):
        specs.append(TensorSpec(name=f"t{number}", tensor_id=10 + number, shape=(numel,), dtype=dtype,
                                byte_offset=offset, stored_offset=offset, trainable=True, decays=False))  # fmt: skip
        offset += specs[-1].n_padded_bytes
    return specs


def unit_bytes(specs: list[TensorSpec], seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return b"".join(draw.randbytes(spec.n_bytes).ljust(spec.n_padded_bytes, b"\0") for spec in specs)


def sums_of(specs: list[TensorSpec], data: bytes) -> dict[int, int]:
    return {
        spec.tensor_id: zlib.crc32(data[spec.byte_offset : spec.byte_offset + spec.n_padded_bytes]) for spec in specs
    }


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_two_checksums_combine_to_that_of_the_whole(first: bytes, second: bytes) -> None:
    combined = combine_crcs(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


@pytest.mark.parametrize("n_bytes", [1, 4096, (8 << 20) - 1, 8 << 20, (1 << 24) + 17])
def test_long_parts_combine_too(n_bytes: int) -> None:
    head, tail = b"the head", bytes(range(256)) * (n_bytes // 256) + bytes(n_bytes % 256)
    assert combine_crcs(zlib.crc32(head), zlib.crc32(tail), n_bytes) == zlib.crc32(head + tail)


@settings(max_examples=60, deadline=None)
@given(
    numels=st.lists(st.integers(1, 3 * TILE), min_size=1, max_size=5),
    n_cuts=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_where_the_bytes_were_cut_and_in_which_order_they_came_does_not_show(
    numels: list[int], n_cuts: int, seed: int
) -> None:
    specs, draw = tensors(*numels), random.Random(seed)
    data = unit_bytes(specs, seed)
    borders = sorted({0, len(data), *(draw.randrange(len(data)) for _ in range(n_cuts))})
    pieces = list(pairwise(borders))
    draw.shuffle(pieces)
    sums = TensorSums(specs)
    for first, last in pieces:
        sums.add(memoryview(data)[first:last], first)
    assert sums.crcs() == sums_of(specs, data)


def test_only_the_tensors_asked_for_are_summed() -> None:
    specs = tensors(100, 5000, 4096, 9000)
    data = unit_bytes(specs)
    chosen = [specs[1], specs[3]]
    sums = TensorSums(chosen)
    for first in range(0, len(data), 3000):
        sums.add(memoryview(data)[first : first + 3000], first)
    assert sums.crcs() == sums_of(chosen, data)
    assert TensorSums([]).crcs() == {}


def test_threads_may_add_at_once() -> None:
    specs = tensors(*[40 * TILE] * 4)
    data = memoryview(unit_bytes(specs))
    sums = TensorSums(specs)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda first: sums.add(data[first : first + 10_000], first), range(0, len(data), 10_000)))
    assert sums.crcs() == sums_of(specs, bytes(data))


def test_the_padding_that_never_came_counts_as_zeros() -> None:
    (spec,) = tensors(TILE + 5)
    data = unit_bytes([spec])[: spec.n_bytes]
    sums = TensorSums([spec])
    sums.add(memoryview(data), 0)
    assert sums.crcs() == {spec.tensor_id: padded_crc(spec, memoryview(data))}


def test_bytes_that_never_came_from_the_middle_are_our_own_mistake() -> None:
    (spec,) = tensors(3 * TILE)
    sums = TensorSums([spec])
    sums.add(memoryview(bytes(TILE)), 0)
    sums.add(memoryview(bytes(TILE)), 2 * TILE)
    with pytest.raises(AssertionError, match=f"bytes {TILE} to {2 * TILE} of the unit never came"):
        sums.crcs()
