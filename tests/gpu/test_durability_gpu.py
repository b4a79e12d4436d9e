"""Runs on a real GPU survive: continued with the same bits, exported on another kind of device with the same bits."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_batch, tiny_model
from zo2trl.checkpoints.export import export_store
from zo2trl.engine.open_store import Mode
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.precision import fp32_heads
from zo2trl.errors import StoreForeign
from zo2trl.journal.journal import Journal
from zo2trl.planning.budgets import Budgets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RESIDENT = Budgets(device=1 << 34, cpu=0)
FROM_CPU, FROM_DISK = Budgets(device="min", cpu=1 << 34), Budgets(device="min", cpu=0)


def train(
    folder: Path,
    steps: range,
    *,
    budgets: Budgets,
    mode: Mode = "begin",
    dtype: torch.dtype = torch.float32,
    fails_at: int | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Make steps in a store, flush, and return the weights. With `fails_at` that step is never committed."""
    model = tiny_model("opt", dtype=dtype)
    fp32_heads(model)
    batch = {key: value.to("cuda") for key, value in tiny_batch("opt").items()}
    chosen = EngineOptions(budgets=budgets, device=torch.device("cuda"), store_dir=folder, seed=3, **options)
    engine = open_engine(model, chosen, mode=mode)
    try:
        for step in steps:
            engine.step([lambda: model(**batch).loss], step=step)
            if step == fails_at:
                raise InterruptedError("the power goes")
            engine.commit(learning_rate=1e-2, weight_decay=0.1)
        engine.flush()
        return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    finally:
        engine.shutdown(flush=False)


def sha256(folder: Path) -> str:
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_that_is_continued_equals_one_that_was_not_interrupted(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = train(tmp_path / "straight", range(9), budgets=RESIDENT, dtype=dtype)
    folder = tmp_path / "store"
    for steps, budgets, mode in (
        (range(4), FROM_DISK, "begin"), (range(3, 8), FROM_CPU, "continue"), (range(7, 9), RESIDENT, "continue"),
    ):  # fmt: skip
        fails_at = None if steps[-1] == 8 else steps[-1]
        try:
            found = train(folder, steps, budgets=budgets, mode=mode, dtype=dtype, fails_at=fails_at,
                          write_back_every=3, max_replay_s=0.0)  # fmt: skip
        except InterruptedError:
            continue
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_gpu_recorded_is_exported_on_a_cpu_with_the_same_bits(
    direction: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = train(tmp_path / "store", range(6), budgets=FROM_CPU, dtype=dtype, direction=direction)
    hashes = set()
    for device in ("cpu", "cuda"):
        export_store(tmp_path / "store", tmp_path / device, device=device)
        hashes.add(sha256(tmp_path / device))
    live = tiny_model("opt", dtype=dtype)
    live.load_state_dict(weights)
    live.save_pretrained(tmp_path / "live")
    assert hashes == {sha256(tmp_path / "live")}
    export_store(tmp_path / "store", tmp_path / "early", step=3)
    assert sha256(tmp_path / "early") not in hashes


def test_the_reference_stream_of_a_gpu_is_not_repeated_on_a_cpu(tmp_path: Path) -> None:
    train(tmp_path / "store", range(2), budgets=FROM_CPU, direction="mezo")
    with pytest.raises(StoreForeign, match="mezo"):
        export_store(tmp_path / "store", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["forward", "perturb", "replay"])
@pytest.mark.parametrize("budgets", [RESIDENT, FROM_CPU, FROM_DISK], ids=["gpu", "cpu", "disk"])
def test_running_out_of_gpu_memory_says_so_and_leaves_a_sound_run(
    what: str, budgets: Budgets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(tmp_path / "straight", range(5), budgets=RESIDENT)
    train(tmp_path / "store", range(3), budgets=budgets)

    def fail(*_: Any, **__: Any) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with monkeypatch.context() as patch:
        if what == "forward":
            patch.setattr("torch.nn.functional.linear", fail)
        else:
            patch.setattr("zo2trl.zo.method.Method.visit", failing_visit(fail, what=what))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            train(tmp_path / "store", range(3, 5), budgets=budgets, mode="continue")
    assert "device_memory" in " ".join(caught.value.__notes__)
    with Journal.open(tmp_path / "store" / "journal", read_only=True) as journal:
        n_done = len(journal.records)
    assert n_done >= 3
    found = train(tmp_path / "store", range(n_done, 5), budgets=budgets, mode="continue")
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def failing_visit(fail: Callable[[], None], *, what: str) -> Any:
    """`Method.visit` that fails where it makes probes, or where it catches up with a step of this process."""
    from zo2trl.zo.method import Method

    real, n_caught_up = Method.visit, itertools.count(1)

    def visit(self: Method, weights: Any, spans: Any, records: Any, **named: Any) -> None:
        if (what == "perturb" and named.get("probes")) or (what == "replay" and records and next(n_caught_up) > 1):
            fail()
        real(self, weights, spans, records, **named)

    return visit


CHILD = """
import sys
from collections.abc import Callable
from pathlib import Path
from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import zo_trainer
folder = Path(sys.argv[1])
trainer = zo_trainer(folder, tiny_model("opt"), tiny_rows("opt", 40), use_cpu=False, max_steps=60,
                     save_strategy="steps", save_steps=20, device_memory="min", cpu_memory=sys.argv[2],
                     max_replay_s=0.0)
print("ready", flush=True)
trainer.train(resume_from_checkpoint=any((folder / "store" / name).exists() for name in ("journal", "earlier")))
trainer.close()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("cpu_memory", ["0", "8GB"])
def test_a_gpu_run_killed_again_and_again_ends_with_the_straight_runs_weights(cpu_memory: str, tmp_path: Path) -> None:
    chance = random.Random(1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), cpu_memory], env=environment, stdout=subprocess.PIPE, text=True
        )

    assert start(tmp_path / "straight").wait(timeout=120) == 0
    n_killed = 0
    for _ in range(3):
        child = start(tmp_path / "killed")
        assert child.stdout is not None and "ready" in child.stdout.readline()
        time.sleep(chance.uniform(0.5, 4.0))
        child.send_signal(signal.SIGKILL)
        n_killed += child.wait(timeout=60) != 0
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    assert n_killed, "no kill came before the end: nothing was shown"
    for run in ("straight", "killed"):
        export_store(tmp_path / run / "store", tmp_path / run / "out")
    assert sha256(tmp_path / "straight" / "out") == sha256(tmp_path / "killed" / "out")
