"""Several processes train one model: all have the same bits, the losses of one process, and lose nothing if one dies.

Does not: need a launcher, except for the tests of one (`torchrun`): the other tests fork their processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.support.crashes import comparable
from tests.support.parallel import RankWork, Sleeping, Telling, Waiting, free_port, in_ranks, ranks
from tests.support.parallel_worker import KINDS, outcome, trainer_of
from tests.support.processes import Report, single_threaded
from tests.support.trainings import TRAININGS
from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.parallel.ranks import Ranks
from zo2trl.trainers.parallel import refuse_other_world_size

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Children are forked, and sums depend on the number of threads."""
    with single_threaded():
        yield


def training(folder: Path, *, on_start: Callable[[int, Any], None] | None = None, **options: Any) -> RankWork:
    """Begin or resume a training in one process, train to the end, and report the result."""

    def work(rank: int, report: Report) -> None:
        trainer = trainer_of(folder, **options)
        trainer.add_callback(Telling(report))
        if on_start is not None:
            on_start(rank, trainer)
        trainer.train(resume_from_checkpoint=(folder / "store" / "rank-0" / "journal").exists() or None)
        report(outcome(trainer))
        trainer.close()

    return work


def in_one_process(folder: Path, **options: Any) -> dict[str, Any]:
    trainer = trainer_of(folder, **options)
    trainer.train()
    found = json.loads(json.dumps(outcome(trainer)))
    trainer.close()
    return found


def in_processes(n_ranks: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    return [said[-1] for said in in_ranks(n_ranks, training(folder, **options))]


def alike(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that all processes have the same outcome, and return it."""
    assert len({found["weights"] for found in outcomes}) == 1, "weights differ between processes"
    assert all(found["losses"] == outcomes[0]["losses"] for found in outcomes)
    return outcomes[0]


def torchrun(n_ranks: int, folder: Path, **options: Any) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n_ranks), "--master_addr",
            "127.0.0.1", "--master_port", str(free_port()), "-m", "tests.support.parallel_worker", str(folder),
            json.dumps(options),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def reports(n_ranks: int, folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(n_ranks)]


# -- the same steps as one process


def test_two_processes_under_torchrun_make_the_steps_of_one_process(tmp_path: Path) -> None:
    sft: dict[str, Any] = {"kind": "sft", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    one = in_one_process(tmp_path / "one", gradient_accumulation_steps=4, **sft)
    launched = torchrun(2, tmp_path / "two", gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, **sft)
    assert launched.returncode == 0, launched.stderr[-3000:]
    two = alike(reports(2, tmp_path / "two"))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert two["eval_losses"] == pytest.approx(one["eval_losses"], abs=1e-6)
    assert [entry.get("num_tokens") for entry in two["logs"]] == [entry.get("num_tokens") for entry in one["logs"]]
    journals = [(tmp_path / "two" / "store" / f"rank-{rank}" / "journal").read_bytes() for rank in range(2)]
    assert journals[0] == journals[1], "every process keeps the same records"
    assert {path.name for path in (tmp_path / "two").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.nightly
@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"masking"}))
def test_weights_do_not_depend_on_how_many_processes_share_the_micro_batches(
    tmp_path: Path, kind: str, n_ranks: int
) -> None:
    one = in_one_process(tmp_path / "one", kind=kind, gradient_accumulation_steps=4)
    many = in_processes(n_ranks, tmp_path / "many", kind=kind, gradient_accumulation_steps=4 // n_ranks)
    assert alike(many)["weights"] == one["weights"]


@pytest.mark.nightly
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_losses_of_larger_micro_batches_are_those_of_one_process(tmp_path: Path, n_ranks: int) -> None:
    one = in_one_process(tmp_path / "one", per_device_train_batch_size=8)
    many = alike(in_processes(n_ranks, tmp_path / "many", per_device_train_batch_size=8 // n_ranks))
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_processes_that_share_the_directions_make_the_steps_of_one_process(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "num_directions": 4, "gradient_accumulation_steps": 2}
    options["include_num_input_tokens_seen"] = "all"
    one = in_one_process(tmp_path / "one", **options)
    many = in_processes(2, tmp_path / "many", parallelism="directions", **options)
    assert alike(many)["weights"] == one["weights"]
    counted = ("num_tokens", "num_input_tokens_seen", "total_flos")
    pick = [[entry.get(name) for name in counted] for entry in one["logs"]]
    assert [[entry.get(name) for name in counted] for entry in many[0]["logs"]] == pick


@pytest.mark.nightly
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_torchrun_makes_the_steps_of_one_process(tmp_path: Path, n_ranks: int) -> None:
    one = in_one_process(tmp_path / "one", gradient_accumulation_steps=4)
    launched = torchrun(n_ranks, tmp_path / "many", gradient_accumulation_steps=4 // n_ranks)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert alike(reports(n_ranks, tmp_path / "many"))["weights"] == one["weights"]


@pytest.mark.nightly
def test_accelerate_launches_a_training_with_the_recipe_for_cpus(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "accelerate" / "cpu.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(recipe)]
    worker = ["-m", "tests.support.parallel_worker", str(tmp_path), json.dumps({"max_steps": 2})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *worker], cwd=ROOT, check=True, timeout=1200, env=environment)
    assert reports(1, tmp_path)[0]["weights"] == in_one_process(tmp_path / "plain", max_steps=2)["weights"]


# -- a process dies

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


def test_a_killed_process_ends_the_others_and_the_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    one = in_one_process(tmp_path / "one", gradient_accumulation_steps=2, **SAVING)
    work = training(tmp_path / "two", **SAVING)
    with ranks(2, work) as processes:
        while processes[1].next() != {"step": 5}:
            pass
        processes[1].kill()
        said = processes[0].rest()  # which ends, although the other process never answers
        processes[0].wait()
    assert said[-1]["error"] == "RankLost" and "resume_from_checkpoint=True" in said[-1]["message"]
    assert alike([values[-1] for values in in_ranks(2, work)])["weights"] == one["weights"]


@pytest.mark.nightly
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_torchrun_ends_when_a_process_is_killed_and_the_next_launch_goes_on(tmp_path: Path, n_ranks: int) -> None:
    options: dict[str, Any] = {"kind": "sft", "eval_strategy": "steps", "eval_steps": 4, **SAVING}
    one = in_one_process(tmp_path / "one", gradient_accumulation_steps=4, **options)
    options["gradient_accumulation_steps"] = 4 // n_ranks
    broken = torchrun(n_ranks, tmp_path / "many", dies_at=5, **options)
    assert broken.returncode != 0
    assert "SIGKILL" in broken.stderr
    resumed = torchrun(n_ranks, tmp_path / "many", **options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert alike(reports(n_ranks, tmp_path / "many"))["weights"] == one["weights"]


@pytest.mark.nightly
def test_a_process_that_missed_steps_copies_them_from_another(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": "sft", "gradient_accumulation_steps": 2, "max_steps": 8}
    one = in_one_process(tmp_path / "one", **{**options, "gradient_accumulation_steps": 4})
    stores = tmp_path / "two" / "store"

    def stopping_at(step: int) -> Callable[[int, Any], None]:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    raise KeyboardInterrupt

        return lambda rank, trainer: trainer.add_callback(Stop())

    for step in (3, 6):
        with ranks(2, training(tmp_path / "two", on_start=stopping_at(step), **options)) as processes:
            assert [process.rest(60.0)[-1]["error"] for process in processes] == ["KeyboardInterrupt"] * 2
        if step == 3:
            shutil.copytree(stores / "rank-0", tmp_path / "older")
    shutil.rmtree(stores / "rank-0")
    shutil.copytree(tmp_path / "older", stores / "rank-0")
    said = [values[-1] for values in in_ranks(2, training(tmp_path / "two", **options))]
    assert alike(said)["weights"] == one["weights"]
    entropies = [[log["entropy"] for log in found["logs"] if "entropy" in log] for found in (said[0], one)]
    assert entropies[0] == pytest.approx(entropies[1]), "metrics of copied steps are copied, too"


@pytest.mark.nightly
def test_random_collators_go_on_in_every_process_as_if_nothing_had_happened(tmp_path: Path) -> None:
    work = training(tmp_path / "two", kind="masking", **SAVING)
    whole = alike(in_processes(2, tmp_path / "whole", kind="masking", **SAVING))
    with ranks(2, work) as processes:
        while processes[0].next() != {"step": 5}:
            pass
        for process in processes:
            process.kill()
    assert alike([values[-1] for values in in_ranks(2, work)])["weights"] == whole["weights"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRAININGS)
def test_every_kind_of_training_resumes_bit_for_bit_in_two_processes(tmp_path: Path, name: str) -> None:
    def work_in(folder: Path) -> RankWork:
        def work(rank: int, report: Report) -> None:
            trainer = TRAININGS[name](folder)
            trainer.add_callback(Telling(report))
            trainer.train(resume_from_checkpoint=(folder / "store" / "rank-0" / "journal").exists() or None)
            logs = [comparable(entry) for entry in trainer.state.log_history]
            report(outcome(trainer) | {"logs": logs, "best": trainer.state.best_global_step})
            trainer.close()

        return work

    whole = [values[-1] for values in in_ranks(2, work_in(tmp_path / "whole"))]
    with ranks(2, work_in(tmp_path / "cut")) as processes:
        while processes[1].next() != {"step": 3}:
            pass
        processes[1].kill()
        processes[0].rest(60.0)
    resumed = [values[-1] for values in in_ranks(2, work_in(tmp_path / "cut"))]
    assert alike(resumed)["weights"] == alike(whole)["weights"]
    assert (resumed[0]["logs"], resumed[0]["best"]) == (whole[0]["logs"], whole[0]["best"])


# -- processes that differ


def flip_a_bit(unit_name: str, after_step: int) -> Callable[[int, Any], None]:
    """Flip a bit in the memory of rank 1's store, where no version counter of the model records it."""

    class Flip(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == after_step:
                store = self.trainer.engine.store
                unit = next(unit for unit in store.layout.units if unit_name in unit.name)
                weights = store.view(unit)[0].numpy()  # a write through numpy does not change torch's version counter
                weights[2] ^= 1

    return lambda rank, trainer: trainer.add_callback(Flip(trainer)) if rank == 1 else None


@pytest.mark.nightly
@pytest.mark.parametrize("unit_name", ["root", "layers.1"])
def test_a_weight_that_differs_in_one_process_stops_all_of_them(tmp_path: Path, unit_name: str) -> None:
    work = training(tmp_path, on_start=flip_a_bit(unit_name, after_step=2), max_steps=20)
    with ranks(2, work) as processes:
        said = [process.rest(60.0) for process in processes]
    for values in said:
        assert values[-1]["error"] == "RanksDiverged"
        assert unit_name in values[-1]["message"] and "rank 1" in values[-1]["message"]
        assert len(values) - 1 < 10, "it was found within a few steps"


@pytest.mark.nightly
def test_models_that_are_not_alike_are_refused_before_the_first_step(tmp_path: Path) -> None:
    def work(rank: int, report: Report) -> None:
        trainer = trainer_of(tmp_path)
        with torch.no_grad():
            next(trainer.model.parameters()).add_(float(rank))
        trainer.train()

    assert errors_of(work) == ["ConfigError"] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("option", ["seed", "zo_eps", "learning_rate", "max_steps"])
def test_arguments_that_are_not_alike_stop_the_run(tmp_path: Path, option: str) -> None:
    values: dict[str, Any] = {"seed": 7, "zo_eps": 2e-3, "learning_rate": 2e-3, "max_steps": 4}

    def work(rank: int, report: Report) -> None:
        trainer_of(tmp_path, **{option: values[option]} if rank else {}).train()

    errors = errors_of(work)
    assert set(errors) <= {"ConfigError", "RanksDiverged", "RankLost", None} and any(errors)


def errors_of(work: RankWork) -> list[str | None]:
    with ranks(2, work) as processes:
        said = [process.rest(60.0) for process in processes]
    return [values[-1]["error"] if values else None for values in said]


@pytest.mark.nightly
def test_resuming_with_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    in_processes(2, tmp_path, max_steps=2)
    with ranks(4, training(tmp_path, max_steps=4)) as processes:
        said = [process.rest(60.0)[-1] for process in processes]
    assert all(values["error"] == "ConfigError" and "launch so many" in values["message"] for values in said)
    alone = trainer_of(tmp_path, max_steps=4)
    with pytest.raises(ConfigError, match="run made by 2 processes"):
        alone.train(resume_from_checkpoint=True)


def test_a_folder_is_of_as_many_processes_as_have_begun_a_run_in_it(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(ConfigError, match="made by 1 process,"):
        refuse_other_world_size(tmp_path, Ranks(size=2))
    refuse_other_world_size(tmp_path, Ranks())


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"parallelism": "directions", "num_directions": 3}, ConfigError, "multiple of 2"),
        ({"auto_find_batch_size": True}, UnsupportedError, "auto_find_batch_size"),
        ({"accelerator_config": {"even_batches": False}}, UnsupportedError, "even_batches"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with ranks(2, lambda rank, report: report(str(trainer_of(tmp_path, **options)))) as processes:
        said = [process.rest(60.0)[-1] for process in processes]
    assert all(values["error"] == error.__name__ and says in values["message"] for values in said)


# -- signals


@pytest.mark.nightly
def test_sigterm_ends_a_process_that_waits_for_another_in_a_library(tmp_path: Path) -> None:
    ended_s = 3.0

    def work(rank: int, report: Report) -> None:
        from zo2trl.trainers import mixin, signals

        mixin.ending_in_time = partial(signals.ending_in_time, ended_s)  # type: ignore[assignment]
        trainer = trainer_of(tmp_path)
        if rank == 0:
            trainer.add_callback(Waiting(report))
        else:
            trainer.add_callback(Sleeping())
        trainer.train()

    with ranks(2, work) as processes:
        assert processes[0].next() == "waits"
        time.sleep(0.5)
        processes[0].kill(signal.SIGTERM)
        assert processes[0].wait() == 128 + signal.SIGTERM
