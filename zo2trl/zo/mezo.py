"""MeZO's own noise stream, so that its published trajectories can be checked step by step.

One sequential generator per direction draws every trainable tensor in `named_parameters()` order (Malladi et al. 2023,
algorithm 1; step seeds come from a legacy numpy generator). Values depend on the kind of device, and visiting tensors
out of order means drawing the stream once to note where each tensor starts: use it for parity, not for speed.

Invariant: torch's and numpy's global generators are never touched.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch

from zo2trl.zo.tiles import TILE, TileMap

__all__ = ["MezoNoise", "MezoSeeds", "device_kind"]


def device_kind(device: torch.device) -> str:
    """What values of torch's generators depend on: on CUDA also on how many threads the GPU runs at once."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"cuda/{found.multi_processor_count}x{found.max_threads_per_multi_processor}"


class MezoSeeds:
    """Step t's seed is draw t of `RandomState(run_seed).randint(1_000_000_000)`."""

    def __init__(self, run_seed: int) -> None:
        self._state = np.random.RandomState(run_seed)
        self._seeds: list[int] = []

    def __call__(self, step: int) -> int:
        """Seed of a step, 0-based."""
        while len(self._seeds) <= step:
            self._seeds.append(int(self._state.randint(1_000_000_000)))
        return self._seeds[step]


class MezoNoise:
    """z of each trainable tensor as MeZO draws it: `torch.normal` from one generator, tensor after tensor."""

    identity: str
    """Names the kind of device as well: torch's generators give other values on each."""

    _lock: threading.Lock
    _shapes: list[tuple[int, int]]  # (tensor id, elements) in drawing order
    _starts: dict[tuple[int, str], dict[int, torch.Tensor]]  # (seed, device) -> tensor id -> generator state
    _last: tuple[tuple[int, str, int], torch.Tensor] | None  # the tensor drawn last: chunks of one tensor come in turn

    def __init__(self, trainable: Sequence[tuple[int, int]], *, device_kind: str = "cpu") -> None:
        self.identity = f"mezo/torch-normal-1/{device_kind}"
        self._lock = threading.Lock()
        self._shapes = list(trainable)
        self._starts = {}
        self._last = None

    def fill(self, out: torch.Tensor, seed: int, tiles: TileMap, *, weights: torch.Tensor | None = None) -> None:
        """Write z of each tile; fp32, zero on padding. See `Direction.fill`; the weights do not matter."""
        with self._lock:
            out.zero_()
            rows = zip(tiles.tensor_ids.tolist(), tiles.tile_indices.tolist(), tiles.n_valid.tolist(), strict=True)
            for row, (tensor_id, tile, n_valid) in enumerate(rows):
                z = self._tensor(seed, tensor_id, out.device)
                out[row * TILE : row * TILE + n_valid] = z[tile * TILE : tile * TILE + n_valid]

    def _tensor(self, seed: int, tensor_id: int, device: torch.device) -> torch.Tensor:
        key = (seed, str(device), tensor_id)
        if self._last is None or self._last[0] != key:
            generator = torch.Generator(device=device)
            generator.set_state(self._generator_states(seed, device)[tensor_id])
            self._last = (key, _draw(dict(self._shapes)[tensor_id], generator))
        return self._last[1]

    def _generator_states(self, seed: int, device: torch.device) -> dict[int, torch.Tensor]:
        key = (seed, str(device))
        if key not in self._starts:
            generator = torch.Generator(device=device).manual_seed(seed)
            states: dict[int, torch.Tensor] = {}
            for tensor_id, numel in self._shapes:
                states[tensor_id] = generator.get_state()
                _draw(numel, generator)
            if len(self._starts) >= 4:  # the step's own seed and a few pending ones
                self._starts.pop(next(iter(self._starts)))
            self._starts[key] = states
        return self._starts[key]


def _draw(numel: int, generator: torch.Generator) -> torch.Tensor:
    # The values do not depend on the shape, only on the number of elements.
    return torch.normal(0.0, 1.0, (numel,), generator=generator, device=generator.device, dtype=torch.float32)
