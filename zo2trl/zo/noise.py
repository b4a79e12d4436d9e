"""Directions and rounding bits as pure functions of (seed, tensor id, element index).

Does not: choose seeds, scale or apply a direction, keep state. The reference stream `"mezo"` lives in zo/mezo.py.
Invariant: an element's value never depends on which other elements are made with it, on the device, on the order of
calls or on threads. Changing any bit of this stream needs a new `identity`, because journals are replayed through it.

The stream. A tensor is cut into tiles of `TILE` elements; a tile takes a fixed number of Philox calls, numbered
through the tensor: counter = (call low, call high, tensor id, domain), key = (seed low, seed high). A direction of
signs takes one bit per element, everything else one 16-bit field. The bits of one call are spread over the tile so
that a GPU warp, one call per thread, writes neighbouring elements, and so that the CPU writes whole rows:

- signs, 32 calls a tile: bit 8j + k of call c decides element 256j + 8c + k (1 is +1, 0 is -1);
- fields, 512 calls a tile: field i of call c (word i // 2, low half first) decides element 512i + c.
"""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.zo.gaussian import gaussian_table
from zo2trl.zo.philox import LOW32, Words, philox4x32_10
from zo2trl.zo.tiles import (
    DOMAIN_GAUSSIAN,
    DOMAIN_RADEMACHER,
    DOMAIN_ROUNDING,
    FIELD_CALLS,
    SIGN_CALLS,
    TILE,
    TileMap,
)  # fmt: skip

DIRECTIONS = ("rademacher", "gaussian", "mezo")
# Tiles per inner step on the CPU, so that the Philox state and the table indices stay in a core's cache.
_SIGN_BLOCK, _FIELD_BLOCK = 256, 32


class Direction(Protocol):
    """A direction z as a function of a seed."""

    identity: str
    """The stream's name, down to its last bit; part of `Method.identity`."""

    def fill(self, out: torch.Tensor, seed: int, tiles: TileMap, *, weights: torch.Tensor | None = None) -> None:
        """Overwrite `out`, contiguous fp32 [len(tiles) * TILE] on CPU or CUDA, with z; exactly 0.0 on padding.

        `seed` is in [0, 2**64). May be called from several threads on different `out`. On the CPU it works in the
        calling thread and holds the interpreter lock only between numpy calls; on CUDA it uses the current stream.

        Args:
            weights: the clean weights of the tiles, for directions that depend on them (masks by magnitude).
        """
        ...


class Rademacher:
    """Every element +1 or -1 with equal probability."""

    identity: str = "philox4x32-10/rademacher-1"

    def fill(self, out: torch.Tensor, seed: int, tiles: TileMap, *, weights: torch.Tensor | None = None) -> None:
        """See `Direction.fill`; the weights do not matter."""
        if _on_cuda(out, torch.float32, tiles):
            from zo2trl.zo.kernels import noise_triton

            return noise_triton.fill_rademacher(out, seed, tiles)
        for rows, block in _blocks(out, tiles, _SIGN_BLOCK):
            np.take(_signs_of_byte(), _sign_bytes(seed, block), axis=0, out=rows.reshape(-1, 16, 32, 8), mode="wrap")
            _clear_padding(rows, block)


class Gaussian:
    """Standard normal deviates of 16 random bits each (gaussian.py): computed on CUDA, looked up on the CPU."""

    identity: str = "philox4x32-10/gaussian-2"

    def fill(self, out: torch.Tensor, seed: int, tiles: TileMap, *, weights: torch.Tensor | None = None) -> None:
        """See `Direction.fill`; the weights do not matter."""
        if _on_cuda(out, torch.float32, tiles):
            from zo2trl.zo.kernels import noise_triton

            return noise_triton.fill_gaussian(out, seed, tiles)
        for rows, block in _blocks(out, tiles, _FIELD_BLOCK):
            # The indices are in range; "wrap" only keeps numpy from filling a hidden buffer first.
            np.take(gaussian_table(), _fields(DOMAIN_GAUSSIAN, seed, block), out=rows.reshape(-1, 8, 512), mode="wrap")
            _clear_padding(rows, block)


def make_direction(direction: str) -> Direction:
    """Make the direction called `direction`: "rademacher" or "gaussian".

    Raises:
        ConfigError: there is no such direction, or it is "mezo", whose stream is no function of the element index.
    """
    if direction == "rademacher":
        return Rademacher()
    if direction == "gaussian":
        return Gaussian()
    if direction == "mezo":
        raise ConfigError(
            '`direction="mezo"` follows one generator through all tensors in order, so it is not made tile by tile. '
            "Make it with `zo2trl.zo.mezo`."
        )
    near = difflib.get_close_matches(direction, DIRECTIONS, n=1, cutoff=0.0)[0]
    names = ", ".join(f'"{name}"' for name in DIRECTIONS)
    raise ConfigError(f'Unknown `direction` "{direction}"; the nearest is "{near}". Valid directions: {names}.')


def rounding_bits(out: torch.Tensor, seed: int, tiles: TileMap) -> None:
    """Overwrite `out`, contiguous int32 [len(tiles) * TILE], with 16 random bits per element (padding included).

    These are the bits of stochastic rounding; their Philox domain is their own, so `seed` may be a direction's seed.
    """
    if _on_cuda(out, torch.int32, tiles):
        from zo2trl.zo.kernels import noise_triton

        return noise_triton.fill_rounding_bits(out, seed, tiles)
    for rows, block in _blocks(out, tiles, _FIELD_BLOCK):
        np.copyto(rows.reshape(-1, 8, 512), _fields(DOMAIN_ROUNDING, seed, block), casting="same_kind")


def _on_cuda(out: torch.Tensor, dtype: torch.dtype, tiles: TileMap) -> bool:
    assert out.dtype == dtype and out.is_contiguous(), f"need a contiguous {dtype} buffer, got {out.dtype}"
    assert out.numel() == len(tiles) * TILE, f"{out.numel()} elements for {len(tiles)} tiles of {TILE}"
    if out.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"Directions can be made on CPU and CUDA devices, not on {out.device}.")
    return out.is_cuda


def _blocks(out: torch.Tensor, tiles: TileMap, block_tiles: int) -> Iterator[tuple[npt.NDArray[np.generic], TileMap]]:
    """`out` as rows of one tile each, `block_tiles` at a time, with the part of the map that describes them."""
    rows = out.numpy().reshape(-1, TILE)
    for start in range(0, len(tiles), block_tiles):
        yield rows[start : start + block_tiles], tiles.slice(start, start + block_tiles)


def _call_words(domain: int, seed: int, tiles: TileMap, *, calls_per_tile: int) -> Words:
    """The words of all calls of `tiles`: four uint64 [n_tiles, calls_per_tile]."""
    first_calls = tiles.tile_indices.astype(np.uint64)[:, None] * calls_per_tile
    calls = first_calls + np.arange(calls_per_tile, dtype=np.uint64)
    return philox4x32_10((calls & LOW32, calls >> 32, tiles.tensor_ids[:, None], domain), seed)


def _sign_bytes(seed: int, tiles: TileMap) -> npt.NDArray[np.intp]:
    """Byte j of call c, which holds the signs of 8 neighbours: [n_tiles, 16 (j), 32 (c)]."""
    words = _call_words(DOMAIN_RADEMACHER, seed, tiles, calls_per_tile=SIGN_CALLS)
    taken = np.empty((len(tiles), 16, SIGN_CALLS), dtype=np.uint64)
    for j in range(16):
        np.right_shift(words[j // 4], np.uint64(j % 4 * 8), out=taken[:, j])
    np.bitwise_and(taken, np.uint64(0xFF), out=taken)
    return taken.view(np.intp)


def _fields(domain: int, seed: int, tiles: TileMap) -> npt.NDArray[np.intp]:
    """Field i of call c, in [0, 65536): [n_tiles, 8 (i), 512 (c)]."""
    taken = np.empty((len(tiles), 8, FIELD_CALLS), dtype=np.uint64)
    for i, word in enumerate(_call_words(domain, seed, tiles, calls_per_tile=FIELD_CALLS)):
        np.bitwise_and(word, np.uint64(0xFFFF), out=taken[:, 2 * i])
        np.right_shift(word, np.uint64(16), out=taken[:, 2 * i + 1])
    return taken.view(np.intp)


@cache
def _signs_of_byte() -> npt.NDArray[np.float32]:
    """The 8 signs a byte stands for: float32 [256, 8]. One lookup writes 32 bytes."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


def _clear_padding(rows: npt.NDArray[np.generic], tiles: TileMap) -> None:
    """Set the padding to +0.0 (a multiplication by 0 would leave -0.0)."""
    n_valid = tiles.n_valid
    for row in np.flatnonzero(n_valid < TILE):  # one tile a tensor at most
        rows[row, n_valid[row] :] = 0.0
