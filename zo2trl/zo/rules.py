"""How directions and records change weights: perturbing into scratch, and replaying steps in place.

Works on flat byte buffers, so that one call covers a whole unit. Does not know what a model, a tier or a file is.

Invariant: every result depends only on (clean weights, record, tensor id, element index). Multiplications and
additions are separate, correctly rounded operations (no fused multiply-add, no `alpha=`), so CPU and GPU give the same
bits, and so does any chunking.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from zo2trl.zo.noise import PHILOX_DOMAINS, Noise, rounding_bits
from zo2trl.zo.records import Record, StepRecord
from zo2trl.zo.seeds import direction_seed
from zo2trl.zo.tiles import TILE, Perturbed, Span, TileMap

__all__ = ["Perturbed", "Rounding", "Span", "UpdateAlong", "UpdateRule"]

Rounding = Literal["nearest", "stochastic"]
UpdateAlong = Literal["drawn", "applied"]
"""Which vector a step moves along: z as drawn, or (W+ - W-) / (2 eps) as 16-bit weights really felt it."""

_CPU_CHUNK_TILES = 256  # 4 MiB of fp32: noise, weights and result stay in the last-level cache
_CPU_FILL_TILES = 64  # what one thread draws at a time
_CUDA_CHUNK_TILES = 2048  # 32 MiB of fp32 temporaries, enough to fill any GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRule:
    """SGD on projected gradients: w <- w - lr (mean_d g_d z_d + weight_decay w).

    The sum runs in fp32 in direction order and is rounded to the storage dtype once per step: to nearest, or
    stochastically with bits from the noise generator's own domain, so that updates far below an ulp of a 16-bit weight
    still count on average and replay stays exact.
    """

    noise: Noise
    rounding: Rounding
    update_along: UpdateAlong = "drawn"

    @property
    def identity(self) -> str:
        """Name of the arithmetic, part of the journal's header."""
        return f"sgd-1/{self.update_along}/{self.rounding}"

    def visit(
        self,
        weights: torch.Tensor,
        spans: Sequence[Span],
        records: Sequence[Record],
        *,
        probes: Sequence[Perturbed] = (),
        keep: bool = True,
    ) -> bool:
        """Bring clean weights forward over `records`, rounding after each step, and make up to two probes of them.

        All buffers are uint8 on one device; bytes outside the spans (frozen tensors) are neither read nor written.
        How many records one call brings them over never shows in the bits, so lazy equals eager.

        Args:
            weights: clean bytes.
            probes: along one direction; the last may write into `weights` itself, which leaves no clean ones.
            keep: whether `weights` must hold the clean result afterwards. If not, storing it may be saved.

        Returns:
            Whether `weights` hold the clean result; if not, they are unchanged, or perturbed by the last probe.
        """
        assert len({probe.seed for probe in probes}) <= 1, "probes of one call share their direction"
        steps = [record for record in records if isinstance(record, StepRecord)]
        in_place = any(probe.into.data_ptr() == weights.data_ptr() for probe in probes)
        if weights.is_cuda and self.noise.identity in PHILOX_DOMAINS:
            from zo2trl.zo.kernels import visit_triton

            return visit_triton.visit(
                weights, spans, steps, domain=PHILOX_DOMAINS[self.noise.identity],
                is_stochastic=self.rounding == "stochastic", along_applied=self.update_along == "applied",
                probes=probes, keep=keep, in_place=in_place,
            )  # fmt: skip
        for span in spans if steps or probes else ():
            self._visit_span(weights, span, steps, probes=probes)
        return keep or not in_place

    def _visit_span(
        self, weights: torch.Tensor, span: Span, steps: Sequence[StepRecord], *, probes: Sequence[Perturbed]
    ) -> None:
        flat = span.view(weights)
        for tiles, run in _chunks(span.tiles, weights.device):
            for record in steps:
                self._step(flat[run], tiles, record, decays=span.decays)
            self._perturb(flat[run], tiles, [(probe, span.view(probe.into)[run]) for probe in probes])

    def replay(self, weights: torch.Tensor, spans: Sequence[Span], records: Sequence[Record]) -> None:
        """Bring clean weights forward over `records`, in place."""
        self.visit(weights, spans, records)

    def draw_everything(self, span: Span, *, seed: int, device: torch.device) -> None:
        """Draw a span's noise as `visit` does and throw it away: what the noise alone costs."""
        for tiles, _ in _chunks(span.tiles, device):
            self._draw(seed, tiles, device)

    def _perturb(self, clean: torch.Tensor, tiles: TileMap, targets: Sequence[tuple[Perturbed, torch.Tensor]]) -> None:
        if not targets:
            return
        z = self._draw(targets[0][0].seed, tiles, clean.device)
        step = torch.empty_like(z) if len(targets) > 1 else z
        for probe, target in targets:
            torch.mul(z, probe.coefficient, out=step)
            if clean.dtype == torch.float32:
                torch.add(clean, step, out=target)
            else:
                target.copy_(torch.add(clean, step, out=step))

    def _step(self, weights: torch.Tensor, tiles: TileMap, record: StepRecord, *, decays: bool) -> None:
        grads = record.projected_grads
        total: torch.Tensor | None = None
        for direction, grad in enumerate(grads):
            z = self._draw(direction_seed(record.seed, direction), tiles, weights.device)
            if self.update_along == "applied":
                z = _applied(z, weights, zo_eps=record.zo_eps)
            z.mul_(grad / len(grads))
            total = z if total is None else total.add_(z)
        assert total is not None
        exact = weights.float()
        if decays and record.weight_decay != 0.0:
            total.add_(exact * record.weight_decay)
        exact = torch.sub(exact, total.mul_(record.learning_rate), out=total)
        if weights.dtype == torch.float32 or self.rounding == "nearest":
            weights.copy_(exact)
        else:
            weights.copy_(_round_stochastically(exact, weights.dtype, tiles, seed=record.seed))

    def _draw(self, seed: int, tiles: TileMap, device: torch.device) -> torch.Tensor:
        z = torch.empty(len(tiles) * TILE, dtype=torch.float32, device=device)
        if device.type != "cpu":
            self.noise.fill(z, seed, tiles)
        else:
            _in_threads(lambda part, run: self.noise.fill(z[run], seed, part), tiles)
        return z


def _chunks(tiles: TileMap, device: torch.device) -> Iterator[tuple[TileMap, slice]]:
    step = _CPU_CHUNK_TILES if device.type == "cpu" else _CUDA_CHUNK_TILES
    return _cut(tiles, step)


def _cut(tiles: TileMap, step: int) -> Iterator[tuple[TileMap, slice]]:
    for start in range(0, len(tiles), step):
        stop = min(start + step, len(tiles))
        yield tiles.slice(start, stop), slice(start * TILE, stop * TILE)


@cache
def _drawing_threads(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="zo2trl-noise")


def _in_threads(fill: Callable[[TileMap, slice], None], tiles: TileMap) -> None:
    # numpy draws on one core and releases the GIL; torch's own operations around it are already parallel.
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(tiles) <= _CPU_FILL_TILES:
        for part, run in _cut(tiles, _CPU_FILL_TILES):
            fill(part, run)
        return
    pool = _drawing_threads(n_threads)
    for job in [pool.submit(fill, part, run) for part, run in _cut(tiles, _CPU_FILL_TILES)]:
        job.result()


def _applied(z: torch.Tensor, weights: torch.Tensor, *, zo_eps: float) -> torch.Tensor:
    """What is left of a direction once both probes were rounded to the weights' dtype; overwrites z."""
    exact = weights.float()  # for fp32 weights this is their own memory: only read it
    step = z.mul_(zo_eps)
    plus = torch.add(exact, step).to(weights.dtype).float()
    minus = torch.sub(exact, step).to(weights.dtype).float()
    return torch.sub(plus, minus, out=step).mul_(0.5 / zo_eps)


def _round_stochastically(exact: torch.Tensor, dtype: torch.dtype, tiles: TileMap, *, seed: int) -> torch.Tensor:
    """fp32 -> a neighbour on the 16-bit grid, the nearer one more often; values already on the grid stay."""
    bits = torch.empty(exact.shape, dtype=torch.int32, device=exact.device)
    if exact.device.type != "cpu":
        rounding_bits(bits, seed, tiles)
    else:
        _in_threads(lambda part, run: rounding_bits(bits[run], seed, part), tiles)
    if dtype == torch.bfloat16:
        # Adding 0..65535 below the kept half of the word carries into it with the right probability, for either sign.
        return bits.add_(exact.view(torch.int32)).bitwise_and_(-65536).view(torch.float32).to(dtype)
    return _round_to_half(exact, bits)


def _round_to_half(exact: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    chance = bits.float().mul_(2.0**-16)
    normal = bits.bitwise_right_shift_(3).add_(exact.view(torch.int32)).bitwise_and_(-8192).view(torch.float32)
    # Below 2^-14 fp16 is a fixed-point grid of 2^-24; every operation here is exact.
    scaled = exact * 2.0**24
    floor = scaled.floor()
    subnormal = (floor + (scaled - floor > chance)).mul_(2.0**-24)
    return torch.where(exact.abs() < 2.0**-14, subnormal, normal).clamp_(-65504.0, 65504.0).to(torch.float16)
