"""The streams of noise.py on CUDA devices, as Triton kernels that write the same bits.

Does not: define the streams (noise.py's docstring does), check arguments, choose devices or streams.
Invariant: integers aside, only the operations of gaussian.py happen here, each exact or rounded once and none left for
a compiler to fuse (no plain product meets an addition), so equality with the CPU is a matter of the same integers.

One thread makes one Philox call and writes its elements in as many strides as the tile layout has: neighbouring
threads always write neighbouring elements. `philox4x32_10` is there for fused kernels to use as well.
"""

# Triton comes with torch's CUDA builds only, and its kernels are launched by subscript, which no stub describes.
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from zo2trl.zo import gaussian, philox
from zo2trl.zo import tiles as tiling

_M0, _M1 = (tl.constexpr(multiplier) for multiplier in philox.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(step) for step in philox.KEY_STEPS)
_ROUNDS = tl.constexpr(philox.ROUNDS)
_TILE = tl.constexpr(tiling.TILE)
_SIGN_CALLS, _FIELD_CALLS = tl.constexpr(tiling.SIGN_CALLS), tl.constexpr(tiling.FIELD_CALLS)
_RADEMACHER, _GAUSSIAN = tl.constexpr(tiling.DOMAIN_RADEMACHER), tl.constexpr(tiling.DOMAIN_GAUSSIAN)
_ROUNDING = tl.constexpr(tiling.DOMAIN_ROUNDING)
_STEP, _FIRST, _POLE = tl.constexpr(gaussian.STEP), tl.constexpr(gaussian.FIRST), tl.constexpr(gaussian.POLE)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(coefficient) for coefficient in gaussian.COEFFICIENTS)

# A key half of 1, or a multiple of 16, must not become a compiled-in constant: every seed would be a new kernel.
_PLAIN = ["n_runs", "first_tile", "key_low", "key_high"]


def fill_rademacher(out: torch.Tensor, seed: int, tiles: tiling.TileMap) -> None:
    """`Rademacher.fill` for a CUDA `out`."""
    if not len(tiles):
        return
    with torch.cuda.device(out.device):
        # A call a thread.
        _rademacher_kernel[(len(tiles),)](out, *tiles.on_device(out.device), *signed_key(seed), num_warps=1)


def fill_gaussian(out: torch.Tensor, seed: int, tiles: tiling.TileMap) -> None:
    """`Gaussian.fill` for a CUDA `out`."""
    if not len(tiles):
        return
    with torch.cuda.device(out.device):
        _gaussian_kernel[(len(tiles),)](out, *tiles.on_device(out.device), *signed_key(seed))


def fill_rounding_bits(out: torch.Tensor, seed: int, tiles: tiling.TileMap) -> None:
    """`rounding_bits` for a CUDA `out` of int32."""
    if not len(tiles):
        return
    with torch.cuda.device(out.device):
        _rounding_kernel[(len(tiles),)](out, *tiles.on_device(out.device), *signed_key(seed))


def signed_key(seed: int) -> tuple[int, int]:
    """A seed's key as two int32 with the same bits: Triton types an integer by its value, so uint32 would vary."""
    low, high = philox.key_halves(seed)
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit
def find_tile(runs, n_runs, tile):
    """(tensor id, index in the tensor, valid elements) of one tile of a map; `runs` is `TileMap.on_device`'s."""
    stride = 1
    while 32 * stride < n_runs:
        stride *= 32
    run = 0
    while stride > 0:
        # A warp looks at 32 runs at once; the row after the last one begins past every tile.
        ahead = tl.minimum(run + stride * tl.arange(0, 32), n_runs)
        run += stride * (tl.sum((tl.load(runs + 4 * ahead) <= tile).to(tl.int32), 0) - 1)
        stride = stride // 32
    row = runs + 4 * run
    index = tl.add(tl.load(row + 2), tile - tl.load(row), sanitize_overflow=False)
    return tl.load(row + 1), index, tl.where(tile + 1 == tl.load(row + 4), tl.load(row + 3), _TILE)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, key_low, key_high):
    """The four output words, uint32, of counters (c0, c1, c2, c3); all arguments uint32 of shapes that broadcast."""
    for _ in tl.static_range(_ROUNDS):
        # A product of 64 bits is one instruction, its two halves on their own are two.
        product0, product1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ key_low
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ key_high
        c3 = product0.to(tl.uint32)
        # Wrapping is meant: without the flag Triton's debug mode reports it as an overflow.
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
def gaussian_of_field(field):
    """The deviate, float32, of `field`, int32 in [0, 65536): the formula of gaussian.py, 12 instructions on a GPU.

    The last one is a plain multiplication: a kernel that adds to it is launched with `enable_fp_fusion=False`.
    """
    # A 16-bit half of a register is converted by one instruction; the shift and the addition are another.
    u = tl.fma(field.to(tl.float32), _STEP, _FIRST)
    v = tl.fma(u, u, -_POLE)
    v = v * v
    v = v * v
    v = v * v
    y = ((v.to(tl.int32, bitcast=True) >> 7) + 0x3F800000).to(tl.float32, bitcast=True)
    p = tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, _C4, _C3), _C2), _C1), _C0)
    return u * p


@triton.jit(do_not_specialize=_PLAIN)
def _rademacher_kernel(out, runs, n_runs, first_tile, key_low, key_high):
    tile = tl.program_id(0)
    call, k = tl.arange(0, _SIGN_CALLS), tl.arange(0, 8)
    tensor_id, tile_index, valid = find_tile(runs, n_runs, first_tile + tile)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _RADEMACHER, _SIGN_CALLS)
    # 64-bit: a large unit has more than 2**31 elements.
    first = tile.to(tl.int64) * _TILE
    for j in tl.static_range(16):
        word = w0 if j < 4 else (w1 if j < 8 else (w2 if j < 12 else w3))
        element = (256 * j + 8 * call)[:, None] + k[None, :]
        bit = (word[:, None] >> (8 * (j % 4) + k).to(tl.uint32)[None, :]) & 1
        tl.store(out + first + element, tl.where(element < valid, tl.where(bit == 1, 1.0, -1.0), 0.0))


@triton.jit(do_not_specialize=_PLAIN)
def _gaussian_kernel(out, runs, n_runs, first_tile, key_low, key_high):
    tile = tl.program_id(0)
    call = tl.arange(0, _FIELD_CALLS)
    tensor_id, tile_index, valid = find_tile(runs, n_runs, first_tile + tile)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _GAUSSIAN, _FIELD_CALLS)
    first = tile.to(tl.int64) * _TILE
    for i in tl.static_range(8):
        element = i * _FIELD_CALLS + call
        z = gaussian_of_field(field_of_words(w0, w1, w2, w3, i))
        tl.store(out + first + element, tl.where(element < valid, z, 0.0))


@triton.jit(do_not_specialize=_PLAIN)
def _rounding_kernel(out, runs, n_runs, first_tile, key_low, key_high):
    tile = tl.program_id(0)
    call = tl.arange(0, _FIELD_CALLS)
    tensor_id, tile_index, _ = find_tile(runs, n_runs, first_tile + tile)
    w0, w1, w2, w3 = tile_words(call, tensor_id, tile_index, key_low, key_high, _ROUNDING, _FIELD_CALLS)
    first = tile.to(tl.int64) * _TILE
    for i in tl.static_range(8):
        tl.store(out + first + i * _FIELD_CALLS + call, field_of_words(w0, w1, w2, w3, i))
