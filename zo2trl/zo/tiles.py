"""Tiles: how flat buffers of weights are cut for generating noise, and which tensor and elements each tile holds.

Does not: generate noise (noise.py) or change weights (updates.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

TILE = 4096
SIGN_CALLS, FIELD_CALLS = 32, 512
DOMAIN_RADEMACHER, DOMAIN_GAUSSIAN, DOMAIN_ROUNDING, DOMAIN_SEED = range(4)


class _Runs(NamedTuple):
    """Consecutive tiles of one tensor each: arrays [n_runs]."""

    first_tiles: npt.NDArray[np.int64]
    """Where a run begins in the map; ascending."""
    tensor_ids: npt.NDArray[np.uint32]
    first_indices: npt.NDArray[np.int64]
    """Position inside the tensor of the run's first tile."""
    numels: npt.NDArray[np.int64]
    """Elements of the tensor from there on."""

    def table(self) -> npt.NDArray[np.int32]:
        """See `TileMap.on_device`."""
        n_tiles: npt.NDArray[np.int64] = -(-self.numels // TILE)
        end = int(n_tiles.sum())
        assert end < 1 << 31, f"no device holds {end} tiles"
        rows = np.zeros((len(n_tiles) + 1, 4), np.int32)
        rows[:, 0] = [*self.first_tiles, end]
        rows[:-1, 1] = self.tensor_ids.view(np.int32)
        rows[:-1, 2] = self.first_indices.astype(np.uint32).view(np.int32)
        rows[:-1, 3] = self.numels - (n_tiles - 1) * TILE
        return rows


@dataclass(frozen=True, eq=False)
class TileMap:
    """What each tile of a flat run of whole tiles holds: the tiles from `start` to `stop` (exclusive) of some tensors.

    A map takes memory per tensor; the facts of a tile are computed on demand, mostly for a small slice.
    """

    _runs: _Runs = field(repr=False)
    start: int
    stop: int
    _copies: dict[torch.device, torch.Tensor] = field(default_factory=dict[torch.device, torch.Tensor], repr=False)

    @classmethod
    def for_tensors(cls, tensors: Sequence[tuple[int, int]]) -> "TileMap":
        """The map of a buffer that holds `tensors`, pairs (tensor id, number of elements), each from a new tile on."""
        held = [pair for pair in tensors if pair[1]]
        ids = np.array([tensor_id for tensor_id, _ in held], dtype=np.uint32)
        numels = np.array([numel for _, numel in held], dtype=np.int64)
        n_tiles: npt.NDArray[np.int64] = -(-numels // TILE)
        return cls(_Runs(np.cumsum(n_tiles) - n_tiles, ids, np.zeros_like(numels), numels), 0, int(n_tiles.sum()))

    @classmethod
    def of_rows(
        cls, tensor_ids: npt.NDArray[np.uint32], tile_indices: npt.NDArray[np.uint32], n_valid: npt.NDArray[np.int32]
    ) -> "TileMap":
        """Any tiles at all, given one by one."""
        runs = _Runs(np.arange(len(tensor_ids)), tensor_ids, tile_indices.astype(np.int64), n_valid.astype(np.int64))
        return cls(runs, 0, len(tensor_ids))

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tensor_ids(self) -> npt.NDArray[np.uint32]:
        """uint32 [n_tiles], the tensor a tile belongs to."""
        return self._rows[0]

    @property
    def tile_indices(self) -> npt.NDArray[np.uint32]:
        """uint32 [n_tiles], the tile's position inside that tensor."""
        return self._rows[1]

    @property
    def n_valid(self) -> npt.NDArray[np.int32]:
        """int32 [n_tiles], how many of its elements are the tensor's; the rest of the tile is padding."""
        return self._rows[2]

    @cached_property  # kept by the few tiles that are drawn at a time; a map of many is sliced first
    def _rows(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
        tiles = np.arange(self.start, self.stop)
        run = np.searchsorted(self._runs.first_tiles, tiles, side="right") - 1
        within = tiles - self._runs.first_tiles[run]
        n_valid = np.minimum(self._runs.numels[run] - within * TILE, TILE)
        indices = self._runs.first_indices[run] + within
        return self._runs.tensor_ids[run], indices.astype(np.uint32), n_valid.astype(np.int32)

    def slice(self, start: int, stop: int) -> "TileMap":
        """Tiles `start` to `stop` (exclusive) of this map, which share its device copies."""
        first, last, _ = slice(start, stop).indices(len(self))
        if first == 0 and last == len(self):
            return self
        return replace(self, start=self.start + first, stop=self.start + max(first, last))

    def on_device(self, device: torch.device) -> tuple[torch.Tensor, int, int]:
        """What kernels find a tile with (`noise_triton.find_tile`): the runs, how many there are, and `start`.

        The runs are int32 [n_runs + 1, 4], 16 bytes a tensor, copied once per map: (first tile, tensor id, index of
        the first tile, elements of the last tile), uint32 as its bits; the last row starts where the map ends.
        """
        copy = self._copies.get(device)
        if copy is None:
            # This copy blocks, so any stream may read it at once. Two threads may both make one: either will do, but
            # only the one kept in the dict is handed out, or a stream could outlive the memory it reads.
            copy = self._copies.setdefault(device, torch.as_tensor(self._runs.table()).to(device))
        return copy, len(copy) - 1, self.start


@dataclass(frozen=True, eq=False)
class Span:
    """A run of whole tiles in a byte buffer: trainable tensors of one dtype that share one decay flag.

    `byte_start` counts from the start of the buffer that the calls below are given.
    """

    dtype: torch.dtype
    byte_start: int
    tiles: TileMap
    decays: bool

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The span's elements, flat, in its dtype; `buffer` is uint8."""
        n_bytes = len(self.tiles) * TILE * self.dtype.itemsize
        return buffer[self.byte_start : self.byte_start + n_bytes].view(self.dtype)


class Perturbed(NamedTuple):
    """Weights to make: clean + coefficient * z(seed)."""

    seed: int
    coefficient: float
    into: torch.Tensor
    """uint8, laid out like the clean ones."""
