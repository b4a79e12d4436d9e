"""What every benchmark here shares: timing with a warm-up, and a result file that names machine and command."""

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

__all__ = ["add_out", "machine", "median_seconds", "write_report"]


def add_out(parser: argparse.ArgumentParser) -> None:
    """The `--out` option: where the JSON goes."""
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")


def median_seconds(run: Callable[[], Any], *, repeats: int, warm_up: int = 1) -> float:
    """Median wall time of `run` over `repeats` calls after `warm_up` unmeasured ones."""
    seconds: list[float] = []
    for _ in range(warm_up + repeats):
        started_s = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds[warm_up:])


def machine() -> dict[str, Any]:
    """Enough about this machine and its software to read a figure by."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_report(out: Path | None, **results: Any) -> None:
    """Print the results, and write them with machine and command if a file was asked for."""
    script = Path(sys.argv[0]).stem
    report = {
        "command": f"python -m benchmarks.{script} {' '.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        **results,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
