"""kill -9 while a trainer runs, at random moments, in real processes: it ends with the weights of a run left in peace.

A child dies in the middle of forwards, journal writes, write-backs, evaluations, checkpoints, their rotation, and of
bringing back what the one before it left. The next child gets no more than the folder, and resumes.
"""

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from tests.support.crashes import comparable
from tests.support.models import tiny_model
from tests.support.processes import Report, child, in_child, single_threaded
from tests.support.trainings import TRAININGS, Training, held_out, lora
from zo2trl.checkpoints.export import export_store
from zo2trl.files.fs import FS
from zo2trl.journal.journal import Journal

N_STEPS, N_KILLS = 100, 10  # at night
FEW_STEPS, FEW_KILLS = 40, 4  # in CI
PATIENCE_S = 600.0  # ends a hang only


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Children are forked from a process that is one thread: progress bars have one of their own."""
    if tqdm.monitor is not None:
        tqdm.monitor.exit()
        tqdm.monitor = None
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    with single_threaded():
        yield


class Telling(TrainerCallback):
    """Reports where new steps begin, and every step that is acknowledged."""

    def __init__(self, trainer: Any, report: Report) -> None:
        self.trainer, self.report, self.is_new = trainer, report, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_new and not self.trainer.is_replaying:
            self.is_new = True
            self.report({"begins": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_new:
            self.report({"done": state.global_step})


def life(training: Training, folder: Path, report: Report, **options: Any) -> None:
    """What a child does: begin or resume, train to the end, report logs and all."""
    trainer = training(folder, **options)
    trainer.add_callback(Telling(trainer, report))
    trainer.train(resume_from_checkpoint=(folder / "store" / "journal").exists() or None)
    state = trainer.state
    report({"logs": [comparable(entry) for entry in state.log_history], "best": state.best_global_step})
    trainer.close()


def unharmed(training: Training, folder: Path, **options: Any) -> dict[str, Any]:
    return in_child(partial(life_with, training, folder, options), timeout_s=PATIENCE_S)[-1]


def life_with(training: Training, folder: Path, options: dict[str, Any], report: Report) -> None:
    life(training, folder, report, **options)


def killed(
    training: Training, folder: Path, *, n_steps: int, n_kills: int, seed: int, lives: list[dict[str, Any]]
) -> dict[str, Any]:
    """The same with kills: most of them somewhere in or behind a step, some before the first new one."""
    draw = random.Random(seed)
    acknowledged = 0
    for kill, target in enumerate(sorted(draw.sample(range(1, n_steps), n_kills))):
        trial = f"seed {seed}, kill {kill} behind step {target}"
        started_s = time.perf_counter()
        with child(partial(life_with, training, folder, lives[kill % len(lives)])) as victim:
            if draw.random() < 0.2:
                time.sleep(draw.random() * 0.3)
            else:
                while acknowledged < target:
                    acknowledged = heard(victim.next(PATIENCE_S), acknowledged, trial)
                time.sleep(draw.random() * min(time.perf_counter() - started_s, 0.1))
            victim.kill()
            for word in victim.rest(PATIENCE_S):
                acknowledged = heard(word, acknowledged, trial)
            victim.wait()
    said = in_child(partial(life_with, training, folder, lives[-1]), timeout_s=PATIENCE_S)
    for word in said[:-1]:
        acknowledged = heard(word, acknowledged, f"seed {seed}, last life")
    assert acknowledged >= n_steps - 1  # a life may make the last step and not live to tell
    return said[-1]


def heard(word: Any, acknowledged: int, trial: str) -> int:
    """How many steps are acknowledged now; none may be lost, and one at most made again."""
    assert isinstance(word, dict) and "error" not in word, f"{trial}: {word}"
    if "begins" in word:
        assert acknowledged <= word["begins"] <= acknowledged + 1, f"{trial}: {acknowledged} were acknowledged, {word}"
        return acknowledged
    return word.get("done", acknowledged)


def exported(folder: Path, out: Path, **named: Any) -> dict[str, str]:
    """SHA-256 of the weights that a store gives."""
    in_child(lambda report: export_store(folder / "store", out, **named), timeout_s=PATIENCE_S)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*.safetensors")}
    assert found
    return found


def records_of(folder: Path) -> list[str]:
    journal = Journal.open(folder / "store" / "journal", read_only=True)
    try:
        return [repr(record) for record in journal.records]
    finally:
        journal.close()


# -- R1


def saved(folder: Path, dtype: torch.dtype) -> str:
    tiny_model("llama", dtype=dtype).save_pretrained(folder / "start")
    return str(folder / "start")


def long_training(kind: str, folder: Path) -> Training:
    options = {
        "max_steps": N_STEPS, "logging_steps": 7, "save_strategy": "steps", "save_steps": 30, "weight_decay": 0.01,
        "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 1, "save_total_limit": 2,
    }  # fmt: skip
    if kind == "lora":
        return Training(options, model=lora)
    path = saved(folder, torch.float32 if kind == "fp32" else torch.bfloat16)
    return Training(options, model=lambda: path)


def straight_or_killed(kind: str, folder: Path, *, seed: int, n_steps: int = N_STEPS, n_kills: int = N_KILLS) -> None:
    training = long_training(kind, folder).having(max_steps=n_steps)
    places = training.places(folder / "planned")
    wanted = unharmed(training, folder / "straight", **places[2])
    found = killed(training, folder / "killed", n_steps=n_steps, n_kills=n_kills, seed=seed, lives=places)
    assert found == wanted, f"seed {seed}"
    assert records_of(folder / "killed") == records_of(folder / "straight"), f"seed {seed}"
    weights = exported(folder / "straight", folder / "weights")
    assert exported(folder / "killed", folder / "others") == weights, f"seed {seed}"
    if kind == "lora":
        return
    # Elsewhere, with nothing but the journal and the checkpoint it all began with.
    shutil.copytree(folder / "killed", folder / "copied", ignore=shutil.ignore_patterns("units", "checkpoint-*"))
    (folder / "start").rename(folder / "base")
    assert exported(folder / "copied", folder / "rebuilt", base=folder / "base") == weights, f"seed {seed}"


@pytest.mark.parametrize(
    "kind", ["bf16", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("fp32", "lora"))]
)
def test_a_run_that_is_killed_again_and_again_gives_the_weights_of_one_that_is_not(kind: str, tmp_path: Path) -> None:
    straight_or_killed(kind, tmp_path, seed=random.randrange(2**32), n_steps=FEW_STEPS, n_kills=FEW_KILLS)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["fp32", "bf16", "lora"])
def test_a_hundred_steps_with_ten_kills_give_the_weights_of_a_hundred_steps(
    kind: str, seed: int, tmp_path: Path
) -> None:
    straight_or_killed(kind, tmp_path, seed=seed)


# -- C1

BUSY = Training(
    {
        "max_steps": 24, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss", "logging_steps": 3,
        "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "learning_rate": 1e-2,
    },
    extra=lambda: {"eval_dataset": held_out()},
)  # fmt: skip


def kill_a_busy_run(training: Training, folder: Path, *, seed: int, n_kills: int = N_KILLS) -> None:
    n_steps = training.options["max_steps"]
    places = training.places(folder / "planned")
    wanted = unharmed(training, folder / "straight")
    found = killed(training, folder / "killed", n_steps=n_steps, n_kills=n_kills, seed=seed, lives=places)
    assert found == wanted, f"seed {seed}"
    assert records_of(folder / "killed") == records_of(folder / "straight"), f"seed {seed}"
    weights = [exported(folder / name, folder / f"{name} weights") for name in ("straight", "killed")]
    assert weights[0] == weights[1], f"seed {seed}"


def test_kills_of_a_run_that_evaluates_and_saves_all_the_time_leave_no_trace(tmp_path: Path) -> None:
    kill_a_busy_run(BUSY, tmp_path, seed=random.randrange(2**32), n_kills=FEW_KILLS)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(30))
def test_three_hundred_kills_leave_no_trace(seed: int, tmp_path: Path) -> None:
    training = [BUSY, TRAININGS["masking"].having(max_steps=24), TRAININGS["sft"].having(max_steps=24)][seed % 3]
    kill_a_busy_run(training, tmp_path, seed=seed)


# -- C1, at every write

CHANGES = ("create", "write_some", "sync_data", "sync_folder", "rename", "unlink", "remove", "make_dir")
SHORT = TRAININGS["sft"].having(max_steps=5, eval_steps=2, save_steps=2, save_total_limit=1, logging_steps=2)
N_SAMPLED = 5


def life_of_so_many_changes(n_changes: int, folder: Path, report: Report) -> None:
    """Die before the change of a file, or of a folder, that comes after so many; report how many there were."""
    n_seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **named: Any) -> Any:
            nonlocal n_seen
            if n_seen == n_changes:
                os.kill(os.getpid(), signal.SIGKILL)
            n_seen += 1
            return real(*args, **named)

        return change

    for name in CHANGES:
        setattr(FS, name, counted(getattr(FS, name)))
    life(SHORT, folder, report)
    report({"n_changes": n_seen})


def kill_at(n_changes: list[int], folder: Path, wanted: Any) -> None:
    for n in n_changes:
        with child(partial(life_of_so_many_changes, n, folder / f"{n}")) as victim:
            victim.rest(PATIENCE_S)
            assert victim.wait() == -signal.SIGKILL, f"it did not come to change {n}"
        found = unharmed(SHORT, folder / f"{n}")
        assert found == wanted, f"killed before change {n}"
        assert records_of(folder / f"{n}") == records_of(folder / "straight"), f"killed before change {n}"


def test_a_kill_before_any_write_leaves_no_trace(tmp_path: Path) -> None:
    said = in_child(partial(life_of_so_many_changes, -1, tmp_path / "straight"), timeout_s=PATIENCE_S)
    wanted, total = said[-2], said[-1]["n_changes"]
    kill_at(sorted(random.sample(range(total - 5), N_SAMPLED)), tmp_path, wanted)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_a_kill_before_each_write_leaves_no_trace(part: int, tmp_path: Path) -> None:
    said = in_child(partial(life_of_so_many_changes, -1, tmp_path / "straight"), timeout_s=PATIENCE_S)
    wanted, total = said[-2], said[-1]["n_changes"]
    kill_at(list(range(total - 5))[part::10], tmp_path, wanted)
