"""SIGTERM and Ctrl-C while a trainer runs, sent to real processes: what they exit with, how soon, and what is left."""

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.models import tiny_model, tiny_rows
from tests.support.processes import Child, Report, child, running_cpu_s, single_threaded
from tests.support.runs import STREAMED_FROM_CPU, STREAMED_FROM_DISK, closing, differing, weights_of, zo_trainer
from zo2trl.engine.opening import has_run
from zo2trl.files.fs import FS
from zo2trl.trainers import mixin
from zo2trl.trainers.signals import stop_if_asked, stopping_on_signals

TERM, INT = signal.SIGTERM, signal.SIGINT
SIGNALS = (TERM, INT)
EXIT_CODES = {TERM: 143, INT: 130}
MAX_EXIT_CPU_S = 10.0
AT_ONCE_CPU_S = 1.0
HANG_S = 300.0
N_TRIALS, N_TRIALS_NIGHTLY = 20, 200


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def trainer_of(folder: Path, *, n_rows: int = 6, **options: Any) -> Any:
    named = {
        "max_steps": 10**6, "logging_strategy": "no", "learning_rate": 1e-5, "granularity": "block",
        "disable_tqdm": True, **options,
    }  # fmt: skip
    return zo_trainer(folder, tiny_model("opt"), tiny_rows("opt", n_rows), **{**STREAMED_FROM_DISK, **named})


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


def cpu_s_of_ended_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_for_exit(process: Child, used_cpu_s: float, within_cpu_s: float) -> int:
    """The exit code of a process that had used so much CPU time when the signal was sent."""
    code = process.wait(HANG_S)
    assert process.cpu_s() - used_cpu_s <= within_cpu_s, "it did too much before it ended"
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
        ending_like_a_script(lambda: trainer.train(resume_from_checkpoint=has_run(folder / "run" / "store")))

    n_steps = 0
    for trial in range(n_trials):
        number = dice.choice(SIGNALS)
        with child(work) as process:
            assert process.next(HANG_S) == "armed", f"seed {seed}, trial {trial}"
            if trial % 4:  # a quarter strikes while the run is brought back
                said = process.next(HANG_S)
                assert said.get("step", 0) > n_steps, f"seed {seed}, trial {trial}: {said}"
                n_steps = said["step"]
            time.sleep(dice.uniform(0, 0.15))
            used_cpu_s = process.cpu_s()
            process.kill(number)
            assert wait_for_exit(process, used_cpu_s, MAX_EXIT_CPU_S) == EXIT_CODES[number], (
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


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_a_script_exits_as_its_caller_expects_and_says_why(number: int, tmp_path: Path) -> None:
    """A real interpreter, from its start to its end: nothing of it is forked from this process."""
    script = (
        "import sys, pathlib\n"
        "from tests.faults.test_signals import Telling, trainer_of\n"
        "import logging; logging.basicConfig()\n"
        f"trainer = trainer_of(pathlib.Path({str(tmp_path / 'run')!r}))\n"
        "trainer.add_callback(Telling(trainer, lambda said: print(said, flush=True)))\n"
        "trainer.train()\n"
    )
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        used_cpu_s = running_cpu_s(process.pid) + cpu_s_of_ended_children()
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=HANG_S)
        finally:
            process.kill()  # the block would wait for one that does not listen
    assert line == "{'step': 1}\n", errors
    assert cpu_s_of_ended_children() - used_cpu_s <= MAX_EXIT_CPU_S
    assert process.returncode == (143 if number == TERM else -INT)  # a shell shows the latter as 130
    assert f"{signal.Signals(number).name}: training stops here" in errors
    assert errors.count("Traceback") == (0 if number == TERM else 1), errors


# -- a second signal


@pytest.mark.parametrize("second", SIGNALS, ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("first", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_the_first_signal_waits_for_a_change_of_bytes_and_the_second_one_does_not(
    first: int, second: int, tmp_path: Path
) -> None:
    def work(report: Report) -> None:
        def slow(self: FS, fd: int) -> None:
            if time.monotonic() > slow_from_s:
                report("in the middle of a change")
                time.sleep(10 * HANG_S)  # whatever waits for this change to end hangs
            os.fdatasync(fd)

        slow_from_s = float("inf")
        FS.sync_data = slow  # type: ignore[method-assign]

        class Slowing(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                nonlocal slow_from_s
                slow_from_s = 0.0

        trainer = trainer_of(tmp_path, **STREAMED_FROM_CPU)
        trainer.add_callback(Slowing())
        ending_like_a_script(trainer.train)

    with child(work) as process:
        assert process.next(HANG_S) == "in the middle of a change"
        process.kill(first)
        time.sleep(0.3)
        assert os.waitpid(process.pid, os.WNOHANG) == (0, 0), "the first signal did not wait"
        used_cpu_s = process.cpu_s()
        process.kill(second)
        assert wait_for_exit(process, used_cpu_s, AT_ONCE_CPU_S) == EXIT_CODES[second]
    with closing(trainer_of(tmp_path, **STREAMED_FROM_CPU, max_steps=4)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4


# -- other people's handlers, threads and processes


def test_a_sigterm_handler_of_the_users_own_is_called_and_stays(tmp_path: Path) -> None:
    """As a job launcher has it: note the signal, and stop the training when it suits."""

    def work(report: Report) -> None:
        trainer = trainer_of(tmp_path)

        def mine(number: int, frame: Any) -> None:
            report("mine")
            trainer.control.should_training_stop = True

        signal.signal(TERM, mine)
        trainer.add_callback(Telling(trainer, report))
        trainer.train()
        report({"kept": signal.getsignal(TERM) is mine})
        trainer.close()

    with child(work) as process:
        assert process.next(HANG_S) == {"step": 1}
        process.kill(TERM)
        assert process.rest() == ["mine", {"kept": True}]
        assert process.wait() == 0


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_ends_data_loader_workers_too(number: int, tmp_path: Path) -> None:
    def work(report: Report) -> None:
        os.setsid()
        trainer = trainer_of(tmp_path, n_rows=400, dataloader_num_workers=2)
        trainer.add_callback(Telling(trainer, report, after=2))
        ending_like_a_script(trainer.train)

    with child(work) as process:
        assert process.next(HANG_S) == {"step": 2}
        assert len(members_of(process.pid)) == 3
        used_cpu_s = process.cpu_s()
        os.killpg(process.pid, number)
        assert wait_for_exit(process, used_cpu_s, MAX_EXIT_CPU_S) == EXIT_CODES[number]
        deadline_s = time.monotonic() + HANG_S
        while members_of(process.pid) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert members_of(process.pid) == []


def members_of(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    during: list[Any] = []

    class Looking(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            during.append([signal.getsignal(number) for number in SIGNALS])

    with closing(trainer_of(tmp_path, max_steps=1)) as trainer:
        trainer.add_callback(Looking())
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
    assert during == [before]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_a_destructor_swallowed_takes_effect_at_the_next_step(tmp_path: Path) -> None:
    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(INT)

    class Dropping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                Swallows()

    with closing(trainer_of(tmp_path, max_steps=50)) as trainer:
        trainer.add_callback(Dropping())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(trainer.engine.store.records) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_such_a_stop_takes_effect_in_the_middle_of_an_evaluation(tmp_path: Path) -> None:
    n_taken = 0

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(TERM)

    class Dropping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = True

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            nonlocal n_taken
            n_taken += 1
            if n_taken == 2:
                Swallows()

    with closing(trainer_of(tmp_path, max_steps=2, per_device_eval_batch_size=1)) as trainer:
        trainer.eval_dataset = trainer.train_dataset
        trainer.add_callback(Dropping())
        with pytest.raises(SystemExit) as caught:
            trainer.train()
    assert (caught.value.code, n_taken) == (143, 2)


# -- the context manager by itself


@pytest.fixture
def usual_handlers() -> Iterator[None]:
    before = [signal.signal(INT, signal.default_int_handler), signal.signal(TERM, signal.SIG_DFL)]
    yield
    signal.signal(INT, before[0])
    signal.signal(TERM, before[1])


@pytest.mark.parametrize(
    ("number", "error"), [(TERM, SystemExit), (INT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_raises_and_the_handlers_are_put_back(
    number: int, error: type[BaseException], usual_handlers: None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(error) as caught, stopping_on_signals(), stopping_on_signals():
        signal.raise_signal(number)
    assert getattr(caught.value, "code", 143) == 143
    assert len(caplog.records) == 1 and "training stops here" in caplog.text
    assert [signal.getsignal(n) for n in (INT, TERM)] == [signal.default_int_handler, signal.SIG_DFL]
    stop_if_asked()  # nobody is asked any more


def test_an_error_on_the_way_out_does_not_hide_that_a_signal_was_the_reason(
    usual_handlers: None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught, stopping_on_signals():
        try:
            signal.raise_signal(TERM)
        finally:
            raise RuntimeError("DataLoader worker is killed by signal: Terminated.")
    assert caught.value.code == 143
    assert "worker is killed" in caplog.text


def test_an_error_without_a_signal_is_raised_as_it_is(usual_handlers: None) -> None:
    with pytest.raises(RuntimeError, match="mine"), stopping_on_signals():
        raise RuntimeError("mine")


def test_a_logger_that_fails_does_not_keep_the_training_from_stopping(usual_handlers: None) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    broken = Broken()
    logging.getLogger("zo2trl").addHandler(broken)
    try:
        with pytest.raises(KeyboardInterrupt), stopping_on_signals():
            signal.raise_signal(INT)
    finally:
        logging.getLogger("zo2trl").removeHandler(broken)


def test_a_forked_process_is_ended_by_sigterm_as_ever(usual_handlers: None) -> None:
    with stopping_on_signals(), child(lambda report: (report("up"), time.sleep(60))) as process:  # type: ignore[func-returns-value]
        assert process.next() == "up"
        process.kill(TERM)
        assert process.wait() == -TERM
