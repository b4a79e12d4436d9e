"""One visit of a span on a CUDA device as one kernel: catch up with pending steps, then write up to two probes.

Does not: define streams (noise.py) or arithmetic (updates.py): it repeats what `Method` does on the CPU, bit for
bit, reading and writing each weight once. Does not choose seeds, buffers or streams.
Invariant: every multiplication and addition is rounded by itself, as on the CPU, unless one of them is exact; fused
multiply-adds are switched off at the launch. How many steps one launch catches up with never shows in the weights.

A program takes a tile of 4,096 elements as 8 chunks of 512, and a thread takes ROWS neighbours of each chunk: element
512 i + ROWS m + r is row r of thread m in chunk i. Chunks 2q and 2q + 1 take word q of their calls: two fields, or two
bytes of a sign call. Threads are columns, because Triton then computes in the layout it loads in; as rows it would
move every word through shared memory.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, islice

import numpy as np
import torch
import triton
import triton.language as tl

from zo2trl.zo import tiles as tiling
from zo2trl.zo.kernels.noise_triton import find_tile, gaussian_of_field, signed_key, tile_words
from zo2trl.zo.records import StepRecord
from zo2trl.zo.seeds import direction_seed
from zo2trl.zo.tiles import Perturbed, Span

__all__ = ["visit"]

_TILE = tl.constexpr(tiling.TILE)
_SIGN_CALLS, _FIELD_CALLS = tl.constexpr(tiling.SIGN_CALLS), tl.constexpr(tiling.FIELD_CALLS)
_RADEMACHER, _GAUSSIAN = tl.constexpr(tiling.DOMAIN_RADEMACHER), tl.constexpr(tiling.DOMAIN_GAUSSIAN)
_ROUNDING = tl.constexpr(tiling.DOMAIN_ROUNDING)
_HEAD_WORDS, _DIRECTION_WORDS = 2, 3  # words in a row of the table of steps
_HEAD, _PER_DIRECTION = tl.constexpr(_HEAD_WORDS), tl.constexpr(_DIRECTION_WORDS)

_MAX_STEPS = 256  # per launch: a longer history is replayed in several, and the table stays small
_WARPS = {tiling.DOMAIN_RADEMACHER: 4, tiling.DOMAIN_GAUSSIAN: 4}  # a tile; rates: docs/performance.md
_PLAIN = ["n_runs", "first_tile", "n_steps", "key_low", "key_high", "first_bits", "second_bits"]


def visit(
    weights: torch.Tensor,
    spans: Sequence[Span],
    steps: Sequence[StepRecord],
    *,
    domain: int,
    is_stochastic: bool,
    probes: Sequence[Perturbed],
    keep: bool,
    in_place: bool,
) -> bool:
    """`Method.visit` for a CUDA buffer and one of Philox's streams; `in_place`: a probe takes its place."""
    *earlier, last = _batches(steps) or [()]
    # One pass over the weights need not store them.
    keep = keep or bool(earlier and not in_place)
    for span in spans if steps or probes else ():
        for batch in earlier:
            _launch(
                weights,
                span,
                batch,
                domain=domain,
                is_stochastic=is_stochastic,
                probes=(),
                keep=True,
            )
        _launch(
            weights,
            span,
            last,
            domain=domain,
            is_stochastic=is_stochastic,
            probes=probes,
            keep=keep and bool(last),
        )
    return keep


def _batches(steps: Sequence[StepRecord]) -> list[tuple[StepRecord, ...]]:
    """What one launch each catches up with: steps with as many directions, and not too many of them."""
    found: list[tuple[StepRecord, ...]] = []
    for _, run in groupby(steps, lambda step: len(step.coefficients)):
        while batch := tuple(islice(run, _MAX_STEPS)):
            found.append(batch)
    return found


def _launch(
    weights: torch.Tensor,
    span: Span,
    steps: tuple[StepRecord, ...],
    *,
    domain: int,
    is_stochastic: bool,
    probes: Sequence[Perturbed],
    keep: bool,
) -> None:
    flat, device, tiles = span.view(weights), weights.device, span.tiles
    if not len(tiles):
        return
    outs = [span.view(probe.into) for probe in probes] + [flat, flat]
    coefficients = [probe.coefficient for probe in probes] + [0.0, 0.0]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _visit_kernel[(len(tiles),)](
            flat, outs[0], outs[1],
            *tiles.on_device(device),
            _table_on(device, stream, steps) if steps else flat, len(steps),
            *signed_key(probes[0].seed if probes else 0), *_bits_of(coefficients[:2]),
            DOMAIN=domain,
            N_DIRECTIONS=len(steps[0].coefficients) if steps else 0,
            STOCHASTIC=is_stochastic and flat.dtype != torch.float32,
            DECAYS=span.decays and any(step.weight_decay != 0.0 for step in steps),
            KEEP=keep,
            N_PROBES=len(probes),
            ROWS=tiling.FIELD_CALLS // (32 * _WARPS[domain]),
            num_warps=_WARPS[domain],
            enable_fp_fusion=False,
        )  # fmt: skip


def _bits_of(values: Sequence[float]) -> tuple[int, ...]:
    """Float32 numbers as int32: Triton would compile a kernel of its own for some values of a float argument."""
    return struct.unpack(f"{len(values)}i", struct.pack(f"{len(values)}f", *values))


@lru_cache(maxsize=128)
def _table_on(device: torch.device, stream: int, steps: tuple[StepRecord, ...]) -> torch.Tensor:
    """Steps as rows of 32-bit words: int32 [n_steps, 2 + 3 * n_directions]. Kept, because units share their history.

    A table is used on the stream it was copied on only, so no other stream can read it too early.
    """
    n_directions = len(steps[0].coefficients)
    ints = np.empty((len(steps), _HEAD_WORDS + _DIRECTION_WORDS * n_directions), np.int32)
    floats = ints.view(np.float32)
    for row, step in enumerate(steps):
        floats[row, 0:_HEAD_WORDS] = step.learning_rate, step.weight_decay
        for direction, coefficient in enumerate(step.coefficients):
            at = _HEAD_WORDS + _DIRECTION_WORDS * direction
            ints[row, at : at + 2] = signed_key(direction_seed(step.seed, direction))
            floats[row, at + 2] = coefficient / n_directions
    return torch.from_numpy(ints).pin_memory().to(device, non_blocking=True)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=["steps"])
def _visit_kernel(
    weights, first_out, second_out, runs, n_runs, first_tile, steps, n_steps, key_low, key_high,
    first_bits, second_bits,
    DOMAIN: tl.constexpr, N_DIRECTIONS: tl.constexpr, STOCHASTIC: tl.constexpr, DECAYS: tl.constexpr,
    KEEP: tl.constexpr, N_PROBES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column, r = tl.arange(0, _FIELD_CALLS // ROWS)[None, :], tl.arange(0, ROWS)[:, None]
    call = ROWS * column + r
    first = tile.to(tl.int64) * _TILE  # 64-bit: a large unit has more than 2**31 elements
    at = weights + first + call
    a0, b0 = _take(at, 0)
    a1, b1 = _take(at, 1)
    a2, b2 = _take(at, 2)
    a3, b3 = _take(at, 3)
    tensor_id, tile_index, valid = find_tile(runs, n_runs, first_tile + tile)
    dt: tl.constexpr = weights.dtype.element_ty
    # z is +1 or -1 and its factor a scalar, so z * factor is exact.
    SIGNED: tl.constexpr = DOMAIN == _RADEMACHER and N_DIRECTIONS == 1 and not DECAYS
    if N_DIRECTIONS > 0:
        for s in range(n_steps):
            row = steps + s * (_HEAD + _PER_DIRECTION * N_DIRECTIONS)
            # The first direction's key is the step's.
            r0, r1, r2, r3 = _rounding_words(row + _HEAD, call, tensor_id, tile_index, STOCHASTIC)
            p0, q0, p1, q1, p2, q2, p3, q3 = a0, b0, a1, b1, a2, b2, a3, b3
            for d in tl.static_range(N_DIRECTIONS):
                key = row + _HEAD + _PER_DIRECTION * d
                low, high, grad = tl.load(key), tl.load(key + 1), tl.load(key + 2).to(tl.float32, bitcast=True)
                w0, w1, w2, w3 = _direction(column, call, tensor_id, tile_index, low, high, DOMAIN, ROWS)
                p0, q0 = _summed(p0, q0, a0, b0, w0, grad, row, r, d, SIGNED, DOMAIN)
                p1, q1 = _summed(p1, q1, a1, b1, w1, grad, row, r, d, SIGNED, DOMAIN)
                p2, q2 = _summed(p2, q2, a2, b2, w2, grad, row, r, d, SIGNED, DOMAIN)
                p3, q3 = _summed(p3, q3, a3, b3, w3, grad, row, r, d, SIGNED, DOMAIN)
            a0, b0 = _stepped(a0, b0, p0, q0, r0, row, dt, SIGNED, DECAYS, STOCHASTIC)
            a1, b1 = _stepped(a1, b1, p1, q1, r1, row, dt, SIGNED, DECAYS, STOCHASTIC)
            a2, b2 = _stepped(a2, b2, p2, q2, r2, row, dt, SIGNED, DECAYS, STOCHASTIC)
            a3, b3 = _stepped(a3, b3, p3, q3, r3, row, dt, SIGNED, DECAYS, STOCHASTIC)
    if KEEP:
        _put(at, a0, b0, call, valid, 0)
        _put(at, a1, b1, call, valid, 1)
        _put(at, a2, b2, call, valid, 2)
        _put(at, a3, b3, call, valid, 3)
    if N_PROBES > 0:
        outs = first + call
        w0, w1, w2, w3 = _direction(column, call, tensor_id, tile_index, key_low, key_high, DOMAIN, ROWS)
        first_at, second_at = first_out + outs, second_out + outs
        c1, c2 = first_bits.to(tl.float32, bitcast=True), second_bits.to(tl.float32, bitcast=True)
        _probe(first_at, second_at, a0, b0, w0, c1, c2, call, r, valid, 0, DOMAIN, N_PROBES)
        _probe(first_at, second_at, a1, b1, w1, c1, c2, call, r, valid, 1, DOMAIN, N_PROBES)
        _probe(first_at, second_at, a2, b2, w2, c1, c2, call, r, valid, 2, DOMAIN, N_PROBES)
        _probe(first_at, second_at, a3, b3, w3, c1, c2, call, r, valid, 3, DOMAIN, N_PROBES)


@triton.jit
def _take(at, Q: tl.constexpr):
    """Chunks 2Q and 2Q + 1 of the tile whose chunk 0 is at `at`, as fp32."""
    a, b = tl.load(at + 1024 * Q, cache_modifier=".cg"), tl.load(at + (1024 * Q + 512), cache_modifier=".cg")
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _direction(column, call, tensor_id, tile_index, key_low, key_high, DOMAIN: tl.constexpr, ROWS: tl.constexpr):
    """The four words of a direction: uint32 [1, columns] of sign calls, or [ROWS, columns] of field calls."""
    if DOMAIN == _RADEMACHER:
        # A chunk takes two bytes of a sign call, 32 calls the lower one and then 32 calls the upper one.
        first = ROWS * column
        sign_call = first // 8 % _SIGN_CALLS
        w0, w1, w2, w3 = tile_words(sign_call, tensor_id, tile_index, key_low, key_high, DOMAIN, _SIGN_CALLS)
        bit = (first // (8 * _SIGN_CALLS) * 8 + first % 8).to(tl.uint32)
        return w0 >> bit, w1 >> bit, w2 >> bit, w3 >> bit
    else:
        return tile_words(call, tensor_id, tile_index, key_low, key_high, DOMAIN, _FIELD_CALLS)


@triton.jit
def _rounding_words(key, call, tensor_id, tile_index, STOCHASTIC: tl.constexpr):
    """Words of the fields of stochastic rounding; nothing in particular if rounding is to nearest."""
    if STOCHASTIC:
        return tile_words(call, tensor_id, tile_index, tl.load(key), tl.load(key + 1), _ROUNDING, _FIELD_CALLS)
    else:
        return call, call, call, call


@triton.jit
def _deviates(word, r, DOMAIN: tl.constexpr):
    """z of the two chunks that take `word`."""
    if DOMAIN == _RADEMACHER:
        signs = ~word.to(tl.int32, bitcast=True)
        a, b = (signs << (31 - r)) & -2147483648, (signs << (15 - r)) & -2147483648
        return (a | 0x3F800000).to(tl.float32, bitcast=True), (b | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        return gaussian_of_field((word & 0xFFFF).to(tl.int32)), gaussian_of_field((word >> 16).to(tl.int32))


@triton.jit
def _summed(
    sum_a, sum_b, a, b, word, grad, row, r,
    D: tl.constexpr, SIGNED: tl.constexpr, DOMAIN: tl.constexpr,
):  # fmt: skip
    """Sums over directions, with direction D's share added (or begun by it)."""
    if SIGNED:
        # Tests of constant bits: one instruction makes predicates of a byte of them.
        change = grad * tl.load(row).to(tl.float32, bitcast=True)
        za = tl.where((word & (1 << r)) != 0, change, -change)
        zb = tl.where((word & (65536 << r)) != 0, change, -change)
        return a - za, b - zb
    za, zb = _deviates(word, r, DOMAIN)
    if D == 0:
        return za * grad, zb * grad
    else:
        return sum_a + za * grad, sum_b + zb * grad


@triton.jit
def _stepped(
    a, b, sum_a, sum_b, word, row, dt: tl.constexpr,
    SIGNED: tl.constexpr, DECAYS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Two chunks after one step, rounded to storage and back."""
    if SIGNED:
        a, b = sum_a, sum_b
    else:
        rate, decay = tl.load(row).to(tl.float32, bitcast=True), tl.load(row + 1).to(tl.float32, bitcast=True)
        if DECAYS:
            sum_a = tl.where(decay != 0.0, sum_a + a * decay, sum_a)
            sum_b = tl.where(decay != 0.0, sum_b + b * decay, sum_b)
        a, b = a - sum_a * rate, b - sum_b * rate
    if STOCHASTIC:
        return _to_a_neighbour(a, (word & 0xFFFF).to(tl.int32), dt), _to_a_neighbour(b, (word >> 16).to(tl.int32), dt)
    else:
        return a.to(dt).to(tl.float32), b.to(dt).to(tl.float32)


@triton.jit
def _to_a_neighbour(exact, field, dt: tl.constexpr):
    """See `rounding.round_stochastically`; `field` is int32 in [0, 65536)."""
    bits = exact.to(tl.int32, bitcast=True)
    if dt == tl.bfloat16:
        return (tl.add(bits, field, sanitize_overflow=False) & -65536).to(tl.float32, bitcast=True)
    else:
        chance = field.to(tl.float32) * 0.0000152587890625
        normal = (tl.add(bits, field >> 3, sanitize_overflow=False) & -8192).to(tl.float32, bitcast=True)
        scaled = exact * 16777216.0
        floor = tl.floor(scaled)
        subnormal = (floor + tl.where(scaled - floor > chance, 1.0, 0.0)) * 5.9604644775390625e-08
        chosen = tl.where(tl.abs(exact) < 0.00006103515625, subnormal, normal)
        return tl.minimum(tl.maximum(chosen, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _probe(
    first_at, second_at, a, b, word, first_coefficient, second_coefficient, call, r, valid,
    Q: tl.constexpr, DOMAIN: tl.constexpr, N_PROBES: tl.constexpr,
):  # fmt: skip
    za, zb = _deviates(word, r, DOMAIN)
    first_a, first_b = _perturbed(a, za, first_coefficient, DOMAIN), _perturbed(b, zb, first_coefficient, DOMAIN)
    _put(first_at, first_a, first_b, call, valid, Q)
    if N_PROBES > 1:
        second_a, second_b = (
            _perturbed(a, za, second_coefficient, DOMAIN),
            _perturbed(b, zb, second_coefficient, DOMAIN),
        )
        _put(second_at, second_a, second_b, call, valid, Q)


@triton.jit
def _perturbed(clean, z, coefficient, DOMAIN: tl.constexpr):
    if DOMAIN == _RADEMACHER:
        return tl.fma(z, coefficient, clean)  # z is +1 or -1: the product is exact
    else:
        return clean + z * coefficient


@triton.jit
def _put(at, a, b, call, valid, Q: tl.constexpr):
    """Store chunks 2Q and 2Q + 1 of the tile whose chunk 0 is at `at`, rounded to nearest; padding is left alone."""
    dt: tl.constexpr = at.dtype.scalar.element_ty
    if valid == _TILE:  # a branch of the whole program: masks would cost every tile its wide stores
        tl.store(at + 1024 * Q, a.to(dt), cache_modifier=".cs")
        tl.store(at + (1024 * Q + 512), b.to(dt), cache_modifier=".cs")
    else:
        tl.store(at + 1024 * Q, a.to(dt), mask=1024 * Q + call < valid)
        tl.store(at + (1024 * Q + 512), b.to(dt), mask=1024 * Q + 512 + call < valid)
