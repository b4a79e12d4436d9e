"""SIGTERM and Ctrl-C while a trainer runs, sent to real processes: what they exit with, how soon, and what is left."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.models import tiny_model, tiny_rows
from tests.support.processes import Child, Report, child, single_threaded
from tests.support.runs import STREAMED_FROM_DISK, closing, differing, weights_of, zo_trainer
from zo2trl.trainers import mixin

TERM, INT = signal.SIGTERM, signal.SIGINT
SIGNALS = (TERM, INT)
EXIT_CODES = {TERM: 143, INT: 130}
MAX_EXIT_S = 10.0
AT_ONCE_S = 1.0
N_TRIALS, N_TRIALS_NIGHTLY = 20, 200


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def trainer_of(folder: Path, **options: Any) -> Any:
    named = {
        "max_steps": 10**6, "logging_strategy": "no", "learning_rate": 1e-5, "granularity": "block",
        "disable_tqdm": True, **options,
    }  # fmt: skip
    return zo_trainer(folder, tiny_model("opt"), tiny_rows("opt", 6), **{**STREAMED_FROM_DISK, **named})


class Telling(TrainerCallback):
    """Says when the first new step has been made."""

    def __init__(self, trainer: Any, report: Report, after: int = 1) -> None:
        self.trainer, self.report, self.left, self.is_new = trainer, report, after, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_new = not self.trainer.is_replaying

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_new:
            self.left -= 1
            if self.left == 0:
                self.report({"step": state.global_step})


def ending_like_a_script(train: Callable[[], Any]) -> None:
    """Run `train`; exit as an interpreter would that ran nothing else."""
    try:
        train()
    except KeyboardInterrupt:
        os._exit(130)
    except SystemExit as stop:
        os._exit(stop.code)  # type: ignore[arg-type]


def tell_when_armed(report: Report) -> None:
    """In this process from now on: say so when a trainer's handlers are in place."""
    real = mixin.stopping_on_signals

    @contextmanager
    def telling() -> Iterator[None]:
        with real():
            report("armed")
            yield

    mixin.stopping_on_signals = telling  # type: ignore[assignment]


def wait_for_exit(process: Child, within_s: float) -> int:
    started_s = time.perf_counter()
    code = process.wait(within_s + 5)
    assert time.perf_counter() - started_s <= within_s, "it took too long to end"
    return code


# -- one signal


def test_twenty_signals_at_random_times_lose_nothing(tmp_path: Path) -> None:
    signals_at_random_times(tmp_path, N_TRIALS)


@pytest.mark.nightly
@pytest.mark.parametrize("round_", range(10))
def test_two_hundred_signals_at_random_times_lose_nothing(round_: int, tmp_path: Path) -> None:
    signals_at_random_times(tmp_path, N_TRIALS_NIGHTLY // 10)


def signals_at_random_times(folder: Path, n_trials: int) -> None:
    """One run, stopped again and again, some trials before its first new step; it must end as a run left in peace."""
    seed = random.randrange(2**32)
    dice = random.Random(seed)

    def work(report: Report) -> None:
        tell_when_armed(report)
        trainer = trainer_of(folder / "run")
        trainer.add_callback(Telling(trainer, report))
        ending_like_a_script(lambda: trainer.train(resume_from_checkpoint=(folder / "run" / "store").exists()))

    n_steps = 0
    for trial in range(n_trials):
        number = dice.choice(SIGNALS)
        with child(work) as process:
            assert process.next(60) == "armed", f"seed {seed}, trial {trial}"
            if trial % 4:  # a quarter strikes while the run is brought back
                said = process.next(60)
                assert said.get("step", 0) > n_steps, f"seed {seed}, trial {trial}: {said}"
                n_steps = said["step"]
            time.sleep(dice.uniform(0, 0.15))
            process.kill(number)
            assert wait_for_exit(process, MAX_EXIT_S) == EXIT_CODES[number], (
                f"seed {seed}, trial {trial}: {process.rest()}"
            )

    trainer = trainer_of(folder / "run", max_steps=n_steps + 5)
    with closing(trainer):
        trainer.train(resume_from_checkpoint=True)
        stopped = weights_of(trainer.model)
    trainer = trainer_of(folder / "straight", max_steps=n_steps + 5)
    with closing(trainer):
        trainer.train()
        assert differing(stopped, weights_of(trainer.model)) == [], f"seed {seed}"
