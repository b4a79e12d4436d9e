"""The streams of noise.py on CUDA devices, as Triton kernels that write the same bits.

Does not: define the streams (noise.py's docstring does), check arguments, choose devices or streams.
Invariant: only integer operations, comparisons, table lookups and changes of sign happen here, nothing that rounds, so
equality with the CPU is a matter of the same integers.

One thread makes one Philox call and writes its elements in as many strides as the tile layout has: neighbouring
threads always write neighbouring elements. `philox4x32_10` is there for fused kernels to use as well.
"""

# Triton comes with torch's CUDA builds only, and its kernels are launched by subscript, which no stub describes.
# pyright: reportMissingImports=false, reportIndexIssue=false

from functools import cache

import torch
import triton
import triton.language as tl

from zo2trl.zo import noise, philox
from zo2trl.zo.gaussian_table import N_QUANTILES, gaussian_table

_M0, _M1 = (tl.constexpr(multiplier) for multiplier in philox.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(step) for step in philox.KEY_STEPS)
_ROUNDS = tl.constexpr(philox.ROUNDS)
_TILE = tl.constexpr(noise.TILE)
_SIGN_CALLS, _FIELD_CALLS = tl.constexpr(noise.SIGN_CALLS), tl.constexpr(noise.FIELD_CALLS)
_RADEMACHER, _GAUSSIAN = tl.constexpr(noise.DOMAIN_RADEMACHER), tl.constexpr(noise.DOMAIN_GAUSSIAN)
_ROUNDING = tl.constexpr(noise.DOMAIN_ROUNDING)

_TILES_PER_SIGN_PROGRAM = 4  # 128 calls, one per thread of four warps
# A key half of 1, or a multiple of 16, must not become a compiled-in constant: every seed would be a new kernel.
# Chunks of a map start at any tile, so alignment of the map's rows is not worth a variant either.
_PLAIN = ["n_tiles", "key_low", "key_high"]
_ROWS = ["tensor_ids", "tile_indices", "n_valid"]


def fill_rademacher(out: torch.Tensor, seed: int, tile_rows: torch.Tensor) -> None:
    """`Rademacher.fill` for a CUDA `out`; `tile_rows` is `TileMap.on_device`: int32 [3, n_tiles]."""
    n_tiles = tile_rows.shape[1]
    if n_tiles == 0:
        return
    grid = (triton.cdiv(n_tiles, _TILES_PER_SIGN_PROGRAM),)
    with torch.cuda.device(out.device):
        _rademacher_kernel[grid](out, *tile_rows, n_tiles, *_signed_key(seed), TILES=_TILES_PER_SIGN_PROGRAM)


def fill_gaussian(out: torch.Tensor, seed: int, tile_rows: torch.Tensor) -> None:
    """`Gaussian.fill` for a CUDA `out`; `tile_rows` is `TileMap.on_device`: int32 [3, n_tiles]."""
    n_tiles = tile_rows.shape[1]
    if n_tiles == 0:
        return
    table = device_table(out.device)
    with torch.cuda.device(out.device):
        # 16 warps hide the lookups best: 640 G elements/s on an H200, where 4 warps make 480.
        _gaussian_kernel[(n_tiles,)](out, table, *tile_rows, *_signed_key(seed), num_warps=16)


def fill_rounding_bits(out: torch.Tensor, seed: int, tile_rows: torch.Tensor) -> None:
    """`rounding_bits` for a CUDA `out` of int32; `tile_rows` is `TileMap.on_device`: int32 [3, n_tiles]."""
    n_tiles = tile_rows.shape[1]
    if n_tiles == 0:
        return
    tensor_ids, tile_indices, _ = tile_rows
    with torch.cuda.device(out.device):
        _rounding_kernel[(n_tiles,)](out, tensor_ids, tile_indices, *_signed_key(seed))


@cache
def device_table(device: torch.device) -> torch.Tensor:
    """The upper half of the Gaussian table on `device`: float32 [32768], kept for the life of the process.

    The lower half is its mirror image. The whole, 256 KiB, does not fit a multiprocessor's L1 cache: looking it up
    from there was three times slower on an H200 (165 G elements/s).
    """
    return torch.from_numpy(gaussian_table()[N_QUANTILES // 2 :].copy()).to(device)


def _signed_key(seed: int) -> tuple[int, int]:
    """The key as two int32 with the same bits: Triton types an integer argument by its value, so uint32 would vary."""
    low, high = philox.key_halves(seed)
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, key_low, key_high):
    """The four output words, uint32, of counters (c0, c1, c2, c3); all arguments uint32 of shapes that broadcast."""
    for _ in tl.static_range(_ROUNDS):
        # Wrapping is meant: without the flag Triton's debug mode reports it as an overflow.
        low0 = tl.mul(c0, _M0, sanitize_overflow=False)
        low1 = tl.mul(c2, _M1, sanitize_overflow=False)
        high0 = tl.umulhi(c0, _M0)
        high1 = tl.umulhi(c2, _M1)
        c0 = high1 ^ c1 ^ key_low
        c1 = low1
        c2 = high0 ^ c3 ^ key_high
        c3 = low0
        key_low = tl.add(key_low, _W0, sanitize_overflow=False)
        key_high = tl.add(key_high, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def tile_words(call, tensor_id, tile_index, key_low, key_high, DOMAIN: tl.constexpr, CALLS: tl.constexpr):
    """The words of call `call` (int32, in [0, CALLS)) of a tile; ids and key are int32 that hold uint32 bits.

    CALLS, a power of two, is how many calls a tile takes.
    """
    index = tile_index.to(tl.uint32, bitcast=True)
    # tile_index * CALLS + call, in 64 bits, without 64-bit arithmetic: the upper half is what the multiply drops.
    call_low = tl.mul(index, CALLS, sanitize_overflow=False) | call.to(tl.uint32)
    call_high = tl.umulhi(index, tl.full(index.shape, CALLS, tl.uint32)) + tl.zeros_like(call_low)
    ids = tensor_id.to(tl.uint32, bitcast=True) + tl.zeros_like(call_low)
    domains = tl.full(call_low.shape, DOMAIN, tl.uint32)
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    return philox4x32_10(call_low, call_high, ids, domains, low, high)


@triton.jit
def field_of_words(w0, w1, w2, w3, FIELD: tl.constexpr):
    """Field FIELD (0..7) of a call, as int32 in [0, 65536)."""
    if FIELD // 2 == 0:
        word = w0
    elif FIELD // 2 == 1:
        word = w1
    elif FIELD // 2 == 2:
        word = w2
    else:
        word = w3
    return ((word >> (16 * (FIELD % 2))) & 0xFFFF).to(tl.int32)


@triton.jit
def gaussian_of_field(field, table):
    """Entry `field` of the whole table, from its upper half: entry 32767 - m is minus entry 32768 + m."""
    is_upper = field >= 32768
    magnitude = tl.load(table + tl.where(is_upper, field - 32768, 32767 - field))
    return tl.where(is_upper, magnitude, -magnitude)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ROWS)
def _rademacher_kernel(out, tensor_ids, tile_indices, n_valid, n_tiles, key_low, key_high, TILES: tl.constexpr):
    lane = tl.arange(0, TILES * _SIGN_CALLS)
    call = lane % _SIGN_CALLS
    tile = tl.program_id(0) * TILES + lane // _SIGN_CALLS
    is_live = tile < n_tiles
    tensor_id = tl.load(tensor_ids + tile, mask=is_live, other=0)
    tile_index = tl.load(tile_indices + tile, mask=is_live, other=0)
    valid = tl.load(n_valid + tile, mask=is_live, other=0)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _RADEMACHER, _SIGN_CALLS)
    k = tl.arange(0, 8)
    # 64-bit: a large unit has more than 2**31 elements.
    first = tile.to(tl.int64) * _TILE
    for j in tl.static_range(16):
        word = w0 if j < 4 else (w1 if j < 8 else (w2 if j < 12 else w3))
        element = (256 * j + 8 * call)[:, None] + k[None, :]
        bit = (word[:, None] >> (8 * (j % 4) + k).to(tl.uint32)[None, :]) & 1
        z = tl.where(element < valid[:, None], tl.where(bit == 1, 1.0, -1.0), 0.0)
        tl.store(out + first[:, None] + element, z, mask=is_live[:, None])


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ROWS)
def _gaussian_kernel(out, table, tensor_ids, tile_indices, n_valid, key_low, key_high):
    tile = tl.program_id(0)
    call = tl.arange(0, _FIELD_CALLS)
    tensor_id, tile_index = tl.load(tensor_ids + tile), tl.load(tile_indices + tile)
    valid = tl.load(n_valid + tile)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _GAUSSIAN, _FIELD_CALLS)
    first = tile.to(tl.int64) * _TILE
    for i in tl.static_range(8):
        element = i * _FIELD_CALLS + call
        z = gaussian_of_field(field_of_words(w0, w1, w2, w3, i), table)
        tl.store(out + first + element, tl.where(element < valid, z, 0.0))


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_ROWS)
def _rounding_kernel(out, tensor_ids, tile_indices, key_low, key_high):
    tile = tl.program_id(0)
    call = tl.arange(0, _FIELD_CALLS)
    tensor_id, tile_index = tl.load(tensor_ids + tile), tl.load(tile_indices + tile)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _ROUNDING, _FIELD_CALLS)
    first = tile.to(tl.int64) * _TILE
    for i in tl.static_range(8):
        tl.store(out + first + i * _FIELD_CALLS + call, field_of_words(w0, w1, w2, w3, i))
