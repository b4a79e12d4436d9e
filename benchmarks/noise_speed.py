"""Measure how many signs, normal deviates and rounding bits one core draws per second.

    python benchmarks/noise_speed.py --out noise_speed.json

The benchmark prints M elements/s (median and best of the repeats) for several chunk sizes and writes them as JSON. On
a CUDA device (`--device cuda`) it times the GPU kernels instead.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from zo2trl.zo.noise import make_direction, rounding_bits
from zo2trl.zo.tiles import TILE, TileMap

Fill = Callable[[torch.Tensor, int, TileMap], None]


def rates(fill: Fill, out: torch.Tensor, *, chunk_tiles: int, repeats: int) -> list[float]:
    """Measure M elements/s of each repeat of filling `out` chunk by chunk."""
    n_tiles = out.numel() // TILE
    tiles = TileMap.for_tensors([(7, out.numel())])
    chunks = [(i * TILE, tiles.slice(i, i + chunk_tiles)) for i in range(0, n_tiles, chunk_tiles)]
    measured: list[float] = []
    for repeat in range(repeats + 1):
        started_s = time.perf_counter()
        for first, part in chunks:
            fill(out[first : first + len(part) * TILE], repeat, part)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        measured.append(out.numel() / (time.perf_counter() - started_s) / 1e6)
    return measured[1:]  # the first round touches the pages and builds the tables


def main() -> None:
    """Time every kind of noise at every chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n-tiles", type=int, default=4096)
    parser.add_argument("--chunk-tiles", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    fills: dict[str, tuple[Fill, torch.dtype]] = {
        "rademacher": (make_direction("rademacher").fill, torch.float32),
        "gaussian": (make_direction("gaussian").fill, torch.float32),
        "rounding_bits": (rounding_bits, torch.int32),
    }
    rows: list[dict[str, str | int | float]] = []
    for name, (fill, dtype) in fills.items():
        out = torch.empty(arguments.n_tiles * TILE, dtype=dtype, device=arguments.device)
        for chunk_tiles in arguments.chunk_tiles:
            measured = rates(fill, out, chunk_tiles=chunk_tiles, repeats=arguments.repeats)
            median, best = statistics.median(measured), max(measured)
            rows.append({"noise": name, "chunk_tiles": chunk_tiles, "median_M_per_s": median, "best_M_per_s": best})
            print(f"{name:>14} {chunk_tiles:>6} tiles a chunk: {median:8.0f} M elements/s (best {best:.0f})")
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor()
    arguments.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "results": rows}, indent=2))


if __name__ == "__main__":
    main()
