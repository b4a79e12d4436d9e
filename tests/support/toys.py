"""Small models with everything a store has to cope with, and the plain loop that a streamed run must equal.

The models are ordinary modules whose blocks are transformers' `GradientCheckpointingLayer`, so they are found and
hooked like real ones; widths are chosen so that tensors fill, overflow and underfill noise tiles.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import Engine
from zo2trl.planning.budgets import Budgets
from zo2trl.zo.noise import make_direction
from zo2trl.zo.seeds import derive_seed
from zo2trl.zo.tiles import TILE, TileMap

WIDTH = 48
VOCABULARY = 32
PLENTY = 10**9
TIERS = ("gpu", "cpu", "disk")


class Block(GradientCheckpointingLayer):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Toy(nn.Module):
    """A residual stack between an embedding and a head; `toy(ids)` is a scalar loss."""

    def __init__(self, blocks: Sequence[nn.Module], *, tied: bool = False, projected: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.embed.weight.data.mul_(0.2)  # a tied head must not be certain of everything
        self.project = nn.Linear(WIDTH, WIDTH) if projected else nn.Identity()
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.project(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(ids).float().flatten(0, 1), ids.roll(1, 1).flatten())


def toy(*, n_blocks: int = 3, seed: int = 0, block: Callable[[], nn.Module] = Block, **kinds: bool) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy([block() for _ in range(n_blocks)], **kinds)


def batch(seed: int = 0, *, rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class Bowl(GradientCheckpointingLayer):
    """Adds 0.5 * ||w - c||^2 to what comes in; every number is a multiple of 1/8, so fp32 sums are exact."""

    def __init__(self, numel: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randint(-16, 17, (numel,), generator=draw) / 8)
        self.register_buffer("c", torch.randint(-16, 17, (numel,), generator=draw) / 8)

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        return total + 0.5 * (self.w - self.c).square().sum()


class Quadratic(nn.Module):
    """The analytic model: the gradient is w - c."""

    def __init__(self, numels: Sequence[int] = (100, 70, 130)) -> None:
        super().__init__()
        self.first = Bowl(50, seed=99)
        self.layers = nn.ModuleList(Bowl(numel, seed=i) for i, numel in enumerate(numels))

    def forward(self) -> torch.Tensor:
        total = self.first(torch.zeros(()))
        for layer in self.layers:
            total = layer(total)
        return total

    def gradients(self) -> dict[str, torch.Tensor]:
        return {f"{name}.w": m.w.detach() - m.c for name, m in self.named_modules() if isinstance(m, Bowl)}


def options(folder: Path, *, tier: str = "disk", **choices) -> EngineOptions:
    """Everything outside the rest in one tier, visited block by block unless said otherwise."""
    budgets = Budgets(device=PLENTY if tier == "gpu" else "min", cpu=PLENTY if tier == "cpu" else 0)
    settled = {"budgets": budgets, "granularity": "block", "seed": 7, "write_back_every": 1} | choices
    return EngineOptions(device=torch.device("cpu"), store_dir=folder, **settled)


@contextmanager
def opened(model: nn.Module, folder: Path, *, tier: str = "disk", **choices) -> Iterator[Engine]:
    """An engine over a model, shut down at the end."""
    chosen = options(folder, tier=tier, **choices)
    engine = open_engine(model, chosen)
    try:
        yield engine
    finally:
        engine.shutdown()


def train(engine: Engine, model: nn.Module, *, steps: int = 3, start: int = 0, lr: float = 0.005, wd: float = 0.0):
    """A few whole steps; the estimates."""
    estimates = []
    for step in range(start, start + steps):
        ids = batch(step)
        estimates.append(engine.step([lambda ids=ids: model(ids)], step=step))
        engine.commit(learning_rate=lr, weight_decay=wd)
    return estimates


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), expected[name]), name


def direction(tensor_id: int, shape: torch.Size, *, seed: int, kind: str = "rademacher") -> torch.Tensor:
    numel = shape.numel()
    tiles = TileMap.for_tensors([(tensor_id, numel)])
    z = torch.empty(len(tiles) * TILE)
    make_direction(kind).fill(z, seed, tiles)
    return z[:numel].view(shape)


@torch.no_grad()
def plain_run(model: nn.Module, *, steps: int, lr: float = 0.005, seed: int = 7, eps: float = 1e-3, around=None):
    """(losses, weights) of the loop a textbook would write, on a copy: perturb all, forward, restore, update all."""
    model = copy.deepcopy(model)
    trainable = [(i, p) for i, (_, p) in enumerate(model.named_parameters()) if p.requires_grad]
    losses = []
    for step in range(steps):
        step_seed = derive_seed(seed, step, 0)
        z = {i: direction(i, p.shape, seed=step_seed) for i, p in trainable}
        pair = []
        for sign in (eps, -eps):
            clean = [p.detach().clone() for _, p in trainable]
            for i, p in trainable:
                p.copy_(p.float() + z[i] * sign)
            with around() if around else torch.no_grad():
                pair.append(float(model(batch(step))))
            for (_, p), before in zip(trainable, clean, strict=True):
                p.copy_(before)
        losses.append(tuple(pair))
        grad = (pair[0] - pair[1]) / (2 * eps)
        for i, p in trainable:
            p.copy_(p - z[i] * grad * lr)
    return losses, weights_of(model)
