"""This module times calls after a warm-up, and writes result files that name machine and command."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

__all__ = ["add_out", "command", "machine", "median_seconds", "save_report", "write_report"]


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the `--out` option for the JSON file."""
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")


def median_seconds(run: Callable[[], Any], *, repeats: int, warm_up: int = 1) -> float:
    """Measure the median wall time of `run` over `repeats` calls after `warm_up` unmeasured ones."""
    seconds: list[float] = []
    for _ in range(warm_up + repeats):
        started_s = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds[warm_up:])


def machine() -> dict[str, Any]:
    """Describe this machine and its software, so that a figure can be interpreted."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command(argv: list[str]) -> str:
    """Return the command line without the folders of this machine: an absolute path is cut to its name."""
    shown = []
    for argument in argv[1:]:
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return " ".join([f"python -m benchmarks.{Path(argv[0]).stem}", *shown])


def write_report(out: Path | None, **results: Any) -> None:
    """Print the results, and save them if `out` is given."""
    print(json.dumps(_report(results), indent=1))
    save_report(out, **results)


def save_report(out: Path | None, **results: Any) -> None:
    """Write the results with machine and command if `out` is given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_report(results), indent=1) + "\n")


def _report(results: dict[str, Any]) -> dict[str, Any]:
    return {"command": command(sys.argv), "machine": machine(), **results}
