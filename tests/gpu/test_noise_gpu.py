"""Directions and rounding bits made on a CUDA device are those made on the CPU, bit for bit."""

import itertools
import threading

import pytest
import torch

from zo2trl.zo.noise import make_direction, rounding_bits
from zo2trl.zo.tiles import TILE, TileMap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SEEDS = [0, 1, 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 63, 0xFEDC_BA98_7654_3210, (1 << 64) - 1]
SHAPES = [
    [(0, 1)],
    [(0, TILE)],
    [(3, TILE - 1), (9, TILE + 1)],
    [(0xFFFFFFFF, 5 * TILE + 17), (0x80000000, 255), (5, 0), (6, 256), (7, 4 * TILE)],
    [(1, 300 * TILE + 1)],
    [(i, 1 + 37 * i) for i in range(200)],
    [(7 * i, 1 + 3 * i) for i in range(1500)],  # finding a tile takes a third look
]


def filled(kind: str, seed: int, tiles: TileMap, device: str) -> torch.Tensor:
    n_elements = len(tiles) * TILE
    if kind == "rounding":
        out = torch.full((n_elements,), -1, dtype=torch.int32, device=device)
        rounding_bits(out, seed, tiles)
    else:
        out = torch.full((n_elements,), float("nan"), device=device)
        make_direction(kind).fill(out, seed, tiles)
    return out.view(torch.int32).cpu()  # bits: tells -0.0 from 0.0


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "rounding"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_gpu_bits_equal_cpu_bits(kind, shape, seed):
    tiles = TileMap.for_tensors(shape)
    assert torch.equal(filled(kind, seed, tiles, "cuda"), filled(kind, seed, tiles, "cpu"))


def test_all_65536_deviates_are_met_and_equal():
    tiles = TileMap.for_tensors([(2, 512 * TILE)])
    computed = filled("gaussian", 21, tiles, "cuda")
    assert torch.equal(computed, filled("gaussian", 21, tiles, "cpu"))
    assert len(computed.unique()) == 65536


def test_debug_mode_and_other_numbers_of_warps_change_no_deviate():
    from zo2trl.zo.kernels import noise_triton

    tiles = TileMap.for_tensors([(5, 3 * TILE)])
    wanted = filled("gaussian", 4, tiles, "cpu")
    for options in ({"num_warps": 1}, {"num_warps": 16}, {"debug": True}, {"enable_fp_fusion": False}):
        out = torch.full((len(tiles) * TILE,), float("nan"), device="cuda")
        runs, key = tiles.on_device(out.device), noise_triton.signed_key(4)
        noise_triton._gaussian_kernel[(len(tiles),)](out, *runs, *key, **options)
        assert torch.equal(out.view(torch.int32).cpu(), wanted)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "rounding"])
def test_tiles_far_inside_a_huge_tensor_match_the_cpu(kind):
    one = TileMap.for_tensors([(4, 6 * TILE)])
    # Call numbers here need more than 32 bits, and the last tile index there is.
    far = one.tile_indices + (1 << 27) - 3
    far[-1] = 0xFFFFFFFF
    tiles = TileMap.of_rows(one.tensor_ids, far, one.n_valid)
    assert torch.equal(filled(kind, 11, tiles, "cuda"), filled(kind, 11, tiles, "cpu"))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "rounding"])
def test_chunks_cut_anywhere_give_the_same_bits_on_the_gpu(kind):
    tiles = TileMap.for_tensors([(1, 10 * TILE + 5), (2, 7), (3, 3 * TILE)])
    whole = filled(kind, 99, tiles, "cuda")
    cuts = [0, 1, 4, 11, 12, len(tiles)]
    parts = [filled(kind, 99, tiles.slice(a, b), "cuda") for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)


def test_nothing_is_written_outside_the_buffer():
    tiles = TileMap.for_tensors([(1, 5 * TILE + 5)])
    guarded = torch.full((len(tiles) * TILE + 2 * TILE,), float("nan"), device="cuda")
    for kind in ("rademacher", "gaussian"):
        make_direction(kind).fill(guarded[TILE:-TILE], 5, tiles)
        assert guarded[:TILE].isnan().all() and guarded[-TILE:].isnan().all()


def test_buffers_beyond_two_billion_elements_are_filled_to_the_end():
    n_tiles = (1 << 31) // TILE + 3
    if torch.cuda.mem_get_info()[0] < n_tiles * TILE * 4 + (1 << 30):
        pytest.skip("needs 9 GB of free GPU memory")
    tiles = TileMap.for_tensors([(1, n_tiles * TILE)])
    out = torch.empty(n_tiles * TILE, device="cuda")
    for kind in ("rademacher", "gaussian"):
        make_direction(kind).fill(out, 5, tiles)
        last = filled(kind, 5, tiles.slice(n_tiles - 2, n_tiles), "cpu")
        assert torch.equal(out[-2 * TILE :].view(torch.int32).cpu(), last)


def test_seeds_do_not_compile_new_kernels():
    from zo2trl.zo.kernels import noise_triton

    tiles = TileMap.for_tensors([(1, 2 * TILE)])
    filled("gaussian", 3, tiles, "cuda")
    caches = noise_triton._gaussian_kernel.device_caches
    before = sum(len(entry[0]) for entry in caches.values())
    for seed in SEEDS:
        filled("gaussian", seed, tiles, "cuda")
    assert sum(len(entry[0]) for entry in caches.values()) == before


def test_threads_with_their_own_streams_get_the_right_bits():
    tiles = TileMap.for_tensors([(1, 64 * TILE + 3)])
    wanted = [filled("gaussian", seed, tiles, "cpu") for seed in range(4)]
    got: list[torch.Tensor | None] = [None] * 4

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            got[seed] = filled("gaussian", seed, tiles, "cuda")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(have is not None and torch.equal(have, want) for have, want in zip(got, wanted, strict=True))


def test_gpu_noise_leaves_torchs_generators_alone():
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    for kind in ("rademacher", "gaussian", "rounding"):
        filled(kind, 1, TileMap.for_tensors([(1, TILE)]), "cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])
