"""A visit made by one kernel gives the bits of the CPU's arithmetic, whatever is asked of it at once."""

import itertools
from dataclasses import replace

import pytest
import torch

from zo2trl.zo.method import make_method
from zo2trl.zo.records import SkipRecord, StepRecord
from zo2trl.zo.tiles import TILE, Perturbed, Span, TileMap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TENSORS = [(3, 2 * TILE + 17), (9, 5), (0xFFFFFFF0, 300), (12, TILE)]


def step(number: int, *, n_directions: int = 1, rate: float = 1e-2, decay: float = 0.0) -> StepRecord:
    return StepRecord(
        step=number, seed=(1 << 63) + 77 * number, learning_rate=rate, weight_decay=decay, zo_eps=1e-2,
        coefficients=tuple(0.37 * d - 0.71 + number for d in range(n_directions)),
        losses=(0.0, 0.0), scalars=(0.0,),
    )  # fmt: skip


def some_weights(span: Span, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(len(span.tiles) * TILE, generator=generator) * scale
    flat[(torch.arange(TILE) >= torch.tensor(span.tiles.n_valid)[:, None]).flatten()] = 0  # as layouts promise
    return flat.to(span.dtype).view(torch.uint8)


def a_span(dtype: torch.dtype, *, decays: bool = False) -> Span:
    return Span(dtype=dtype, byte_start=0, tiles=TileMap.for_tensors(TENSORS), decays=decays)


def visited(method, span, weights, records, *, coefficients=(), device, keep=True):
    """The weights and the probes of one visit, on the CPU."""
    weights = weights.to(device, copy=True)
    probes = [Perturbed(99, coefficient, torch.zeros_like(weights)) for coefficient in coefficients]
    method.visit(weights, [span], records, probes=probes, keep=keep)
    return [weights.cpu()] * keep + [probe.into.cpu() for probe in probes]


def assert_same(method, span, weights, records, **named):
    wanted = visited(method, span, weights, records, device="cpu", **named)
    got = visited(method, span, weights, records, device="cuda", **named)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("n_directions", [1, 3])
def test_catching_up_and_both_probes_at_once(dtype, kind, n_directions):
    # Each combination is a kernel to compile: the choices that do not meet in the arithmetic vary together.
    for rounding, decays, coefficients in [("nearest", True, (1e-2, -1e-2)), ("stochastic", False, (1e-2,))]:
        method = make_method(kind, rounding=rounding)
        records = [step(i, n_directions=n_directions, decay=0.1 * (i % 2)) for i in range(3)]
        span = a_span(dtype, decays=decays)
        for scale in (1.0, 1e-6):
            assert_same(method, span, some_weights(span, scale), records, coefficients=coefficients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_without_anything_to_catch_up_with(dtype):
    for kind in ("rademacher", "gaussian"):
        method = make_method(kind, rounding="stochastic")
        span = a_span(dtype)
        weights = some_weights(span)
        assert_same(method, span, weights, [], coefficients=(1e-3, -1e-3))
        assert torch.equal(visited(method, span, weights, [], coefficients=(1e-3,), device="cuda")[0], weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_probe_may_take_the_place_of_the_clean_weights(dtype):
    span = a_span(dtype, decays=True)
    method = make_method("rademacher", rounding="stochastic")
    records = [step(1, decay=0.01), step(2)]
    weights = some_weights(span).cuda()
    plus = torch.zeros_like(weights)
    wanted = visited(method, span, weights, records, coefficients=(1e-2, -1e-2), device="cpu")
    method.visit(
        weights, [span], records, probes=[Perturbed(99, 1e-2, plus), Perturbed(99, -1e-2, weights)], keep=False
    )
    assert torch.equal(plus.cpu(), wanted[1]) and torch.equal(weights.cpu(), wanted[2])


def test_a_long_history_with_skips_and_changing_directions():
    span = a_span(torch.bfloat16)
    method = make_method("rademacher", rounding="stochastic")
    records = [step(i, n_directions=1 + i // 200, rate=1e-4) for i in range(600)]
    records.insert(7, SkipRecord(step=1000, seed=3, losses=(0.0, 0.0)))
    assert_same(method, span, some_weights(span), records, coefficients=(1e-2, -1e-2))


def test_any_slice_of_a_span_gives_the_same_bits():
    whole = a_span(torch.bfloat16)
    method = make_method("gaussian", rounding="stochastic")
    weights, records = some_weights(whole), [step(1), step(2)]
    wanted = visited(method, whole, weights, records, coefficients=(1e-2,), device="cuda")
    cuts = [0, 1, 3, len(whole.tiles)]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        span = Span(dtype=whole.dtype, byte_start=0, tiles=whole.tiles.slice(start, stop), decays=False)
        part = weights[start * TILE * 2 : stop * TILE * 2]
        parts.append(visited(method, span, part, records, coefficients=(1e-2,), device="cuda"))
    assert all(torch.equal(torch.cat(have), want) for have, want in zip(zip(*parts, strict=True), wanted, strict=True))


def test_tiny_steps_and_the_edges_of_half_precision():
    values = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, -6.1e-5, 65504.0, -65504.0, 1e-20, 1e-38, 1.0, -1.0])
    for dtype, rounding in itertools.product(DTYPES, ["nearest", "stochastic"]):
        span = Span(dtype=dtype, byte_start=0, tiles=TileMap.for_tensors([(1, TILE)]), decays=False)
        method = make_method("gaussian", rounding=rounding)
        weights = values.repeat(TILE)[:TILE].to(dtype).view(torch.uint8)
        for rate in (1e-3, 1e-9, 1e-40):
            assert_same(method, span, weights, [step(1, rate=rate), step(2, rate=rate)], coefficients=(1e-3, -1e-3))


def test_nothing_outside_the_spans_is_touched():
    span = Span(dtype=torch.bfloat16, byte_start=2 * TILE, tiles=TileMap.for_tensors([(1, TILE + 9)]), decays=False)
    method = make_method("rademacher", rounding="stochastic")
    before = torch.randint(0, 255, (8 * TILE,), dtype=torch.uint8)
    weights, into = before.cuda(), torch.zeros(8 * TILE, dtype=torch.uint8, device="cuda")
    method.visit(weights, [span], [step(1)], probes=[Perturbed(99, 1e-2, into)])
    outside = torch.ones(8 * TILE, dtype=torch.bool)
    outside[2 * TILE : 6 * TILE] = False
    assert torch.equal(weights.cpu()[outside], before[outside]) and not into.cpu()[outside].any()


def test_neither_seeds_nor_numbers_of_steps_compile_new_kernels():
    from zo2trl.zo.kernels import visit_triton

    span = a_span(torch.bfloat16)
    method = make_method("rademacher", rounding="nearest")

    def n_kernels() -> int:
        return sum(len(entry[0]) for entry in visit_triton._visit_kernel.device_caches.values())

    visited(method, span, some_weights(span), [step(1)], coefficients=(1e-3, -1e-3), device="cuda")
    before = n_kernels()
    for n_steps in (1, 2, 16, 17):
        records = [step(i, rate=1.0 if i == 1 else 1e-3) for i in range(n_steps)]
        visited(method, span, some_weights(span), records, coefficients=(1.0, -1e-3), device="cuda")
    assert n_kernels() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_generic_path_gives_the_bits_of_the_kernel_on_a_gpu(dtype, kind, rounding):
    """What has no kernel of its own runs on torch operations alone."""
    fused = make_method(kind, rounding=rounding)
    generic = replace(fused, is_fused=False)
    assert generic.identity == fused.identity
    span, records = a_span(dtype, decays=True), [step(i, n_directions=2, decay=0.1) for i in range(3)]
    weights = some_weights(span)
    named = {"coefficients": (1e-2, -1e-2), "device": "cuda"}
    wanted = visited(fused, span, weights, records, **named)
    for a, b in zip(wanted, visited(generic, span, weights, records, **named), strict=True):
        assert torch.equal(a, b)
