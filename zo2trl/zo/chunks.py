"""Chunks: long runs of tiles are worked on in pieces that fit the caches, and drawn by several threads on a CPU.

Does not: know what is drawn. Invariant: chunking never shows in the bits.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from zo2trl.zo.noise import Direction
from zo2trl.zo.tiles import TILE, TileMap

__all__ = ["chunks", "draw", "in_threads"]

CPU_CHUNK_TILES = 256  # 4 MiB of fp32: noise, weights and result stay in the last-level cache
CPU_FILL_TILES = 64  # what one thread draws at a time
CUDA_CHUNK_TILES = 2048  # 32 MiB of fp32 temporaries, enough to fill any GPU


def chunks(tiles: TileMap, device: torch.device) -> Iterator[tuple[TileMap, slice]]:
    """Cut a map into parts, each with the slice of elements it covers."""
    step = CPU_CHUNK_TILES if device.type == "cpu" else CUDA_CHUNK_TILES
    return _cut(tiles, step)


def _cut(tiles: TileMap, step: int) -> Iterator[tuple[TileMap, slice]]:
    for start in range(0, len(tiles), step):
        stop = min(start + step, len(tiles))
        yield tiles.slice(start, stop), slice(start * TILE, stop * TILE)


@cache
def _drawing_threads(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="zo2trl-noise")


def in_threads(fill: Callable[[TileMap, slice], None], tiles: TileMap) -> None:
    """Call `fill` for all parts of a map, in as many threads as torch computes with."""
    # numpy draws on one core and releases the GIL; torch's own operations around it are already parallel.
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(tiles) <= CPU_FILL_TILES:
        for part, run in _cut(tiles, CPU_FILL_TILES):
            fill(part, run)
        return
    pool = _drawing_threads(n_threads)
    for job in [pool.submit(fill, part, run) for part, run in _cut(tiles, CPU_FILL_TILES)]:
        job.result()


def draw(direction: Direction, seed: int, tiles: TileMap, *, device: torch.device) -> torch.Tensor:
    """Return z of the tiles: fp32 [len(tiles) * TILE] on the device."""
    z = torch.empty(len(tiles) * TILE, dtype=torch.float32, device=device)
    if device.type != "cpu":
        direction.fill(z, seed, tiles)
    else:
        in_threads(lambda part, run: direction.fill(z[run], seed, part), tiles)
    return z
