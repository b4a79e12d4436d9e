"""Two GPUs, one process each, started by torchrun with NCCL: the steps of one process, and an end when one dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.parallel import free_port
from tests.support.parallel_worker import outcome, trainer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

ROOT = Path(__file__).resolve().parents[2]
ON_GPU: dict[str, Any] = {"use_cpu": False, "bf16": False}
STREAMED: dict[str, Any] = {"device_memory": "min", "cpu_memory": "2GB"}


def torchrun(folder: Path, **options: Any) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
            "--master_port", str(free_port()), "-m", "tests.support.parallel_worker", str(folder), json.dumps(options),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stderr


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("parallelism", ["data", "directions"])
@pytest.mark.parametrize("place", [{}, STREAMED], ids=["on the device", "from host memory"])
def test_two_gpus_make_the_steps_of_one(tmp_path: Path, place: dict[str, Any], parallelism: str) -> None:
    shares = 2 if parallelism == "data" else 1
    options: dict[str, Any] = {"kind": "sft", "num_directions": 2, **ON_GPU, **place}
    one = trainer_of(tmp_path / "one", gradient_accumulation_steps=4, **options)
    one.train()
    alone = outcome(one)
    one.close()
    steps = {"gradient_accumulation_steps": 4 // shares, "parallelism": parallelism}
    code, said = torchrun(tmp_path / "two", **steps, **options)
    assert code == 0, said[-3000:]
    two = reports(tmp_path / "two")
    assert two[0]["weights"] == two[1]["weights"] == alone["weights"]
    assert two[0]["losses"] == pytest.approx(alone["losses"], abs=1e-6)


def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "sft", "gradient_accumulation_steps": 2, "save_strategy": "steps", **ON_GPU}
    options |= {"save_steps": 2, "max_steps": 6, **STREAMED}
    assert torchrun(tmp_path / "whole", **options)[0] == 0
    started_s = time.monotonic()
    code, said = torchrun(tmp_path / "cut", dies_at=3, **options)
    assert code != 0 and "SIGKILL" in said, said[-3000:]
    print(f"ended {time.monotonic() - started_s:.1f} s after it was launched")
    code, said = torchrun(tmp_path / "cut", **options)
    assert code == 0, said[-3000:]
    assert [found["weights"] for found in reports(tmp_path / "cut")] == [
        found["weights"] for found in reports(tmp_path / "whole")
    ]
