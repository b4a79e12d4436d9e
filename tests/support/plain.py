"""What a ZO run must equal: MeZO's algorithm on an ordinary model in memory, perturbed and updated as a whole.

Does not: know units, tiers, passes or journals. It shares the noise function with the package, and nothing else.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from zo2trl.zo.noise import make_direction
from zo2trl.zo.seeds import derive_seed
from zo2trl.zo.tiles import TILE, TileMap

Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class PlainStep:
    """One step's figures."""

    loss_plus: float
    loss_minus: float
    projected_grad: float


class PlainZO:
    """Two-sided SPSA with one direction and SGD, fp32, on the parameters of `model` that require gradients."""

    def __init__(self, model: nn.Module, *, direction: str = "rademacher", seed: int = 42, eps: float = 1e-3) -> None:
        named = enumerate(model.named_parameters())
        self._parameters = [(i, name, p) for i, (name, p) in named if p.requires_grad]
        self._noise, self._seed, self._eps = make_direction(direction), seed, eps

    def step(
        self,
        losses: Sequence[Loss],
        *,
        step: int,
        learning_rate: float = 0.0,
        decay: tuple[float, Collection[str]] = (0.0, ()),
    ) -> PlainStep:
        """Sum the losses at both probes, then move the weights."""
        seed = derive_seed(self._seed, step, 0)
        plus, minus = [self._at(losses, seed, sign) for sign in (self._eps, -self._eps)]
        slope = (plus - minus) / (2 * self._eps)
        for tensor_id, name, parameter in self._parameters:
            total = self._direction(seed, tensor_id, parameter) * slope
            if decay[0] and name in decay[1]:
                total = total + parameter.data * decay[0]
            parameter.data = parameter.data - total * learning_rate
        return PlainStep(plus, minus, slope)

    def _at(self, losses: Sequence[Loss], seed: int, coefficient: float) -> float:
        with self._moved(seed, coefficient), torch.no_grad():
            return sum(loss().double().item() for loss in losses)

    @contextmanager
    def _moved(self, seed: int, coefficient: float) -> Iterator[None]:
        clean = [p.data for _, _, p in self._parameters]
        for tensor_id, _, parameter in self._parameters:
            parameter.data = parameter.data + self._direction(seed, tensor_id, parameter) * coefficient
        try:
            yield
        finally:
            for (_, _, parameter), data in zip(self._parameters, clean, strict=True):
                parameter.data = data

    def _direction(self, seed: int, tensor_id: int, parameter: torch.Tensor) -> torch.Tensor:
        tiles = TileMap.for_tensors([(tensor_id, parameter.numel())])
        z = torch.empty(len(tiles) * TILE)
        self._noise.fill(z, seed, tiles)
        return z[: parameter.numel()].view(parameter.shape)
