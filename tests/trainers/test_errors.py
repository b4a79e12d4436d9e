"""Bad input gives one clear error with fact and cure before anything is moved; losses may be no numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from tests.support.covering import every_value
from tests.support.models import FAMILIES, VOCABULARY, tiny_batch, tiny_model, tiny_rows
from tests.support.plain import PlainZO
from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_DISK,
    closing,
    differing,
    prompts,
    sft_trainer,
    step_logs,
    weights_of,
    zo_trainer,
)
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import MAX_SKIPS_IN_A_ROW
from zo2trl.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    LossPrecisionError,
    StoreError,
    StoreForeign,
    StoreLocked,
    TrainingDiverged,
)
from zo2trl.files.fs import FS
from zo2trl.planning.budgets import Budgets
from zo2trl.zo.records import SkipRecord


def make(folder: Path, rows: Any = None, *, name: str = "opt", **options: Any) -> Any:
    return zo_trainer(folder, tiny_model(name), tiny_rows(name, 6) if rows is None else rows, **options)


# -- budgets


@pytest.mark.parametrize("granularity", ["auto", "block", "leaf"])
def test_too_small_a_budget_names_the_smallest_that_works(granularity: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as error:
        make(tmp_path, device_memory="1kB", cpu_memory="0", granularity=granularity)
    message = str(error.value)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?= bytes)", message)]
    plan = make(tmp_path / "plan").engine.store.layout
    rest = sum(unit.n_bytes for unit in plan.units if unit.kind == "root")
    block = max(unit.n_bytes for unit in plan.units if unit.kind == "block")
    assert {1000, rest, block} <= set(numbers)
    smallest = int(re.search(r"that works is ([\d,]+) bytes", message)[1].replace(",", ""))
    assert not (tmp_path / "store").exists()
    with pytest.raises(BudgetError):
        make(tmp_path / "less", device_memory=smallest - 1, cpu_memory="0", granularity=granularity)
    options = {"device_memory": smallest, "cpu_memory": "0", "granularity": granularity}
    with closing(make(tmp_path / "enough", **options)) as trainer:
        assert trainer.train().global_step == 3


def test_min_for_host_memory_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='`cpu_memory="min"`'):
        make(tmp_path, cpu_memory="min")


# -- the store's folder


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_bytes(b"meow")
    with pytest.raises(StoreForeign, match=f"{foreign}.*Choose"), closing(make(tmp_path, store_dir=str(foreign))) as t:
        t.train()
    assert [path.name for path in foreign.iterdir()] == ["cat.png"]
    assert (foreign / "cat.png").read_bytes() == b"meow"


def test_the_store_of_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    with closing(make(tmp_path, name="llama", **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    with pytest.raises(StoreForeign, match="another model"), closing(make(tmp_path, **STREAMED_FROM_DISK)) as trainer:
        trainer.train()
    after = {path.name: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert {name: data for name, data in after.items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }


def test_a_store_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with (
        pytest.raises(StoreError, match=str(in_the_way)),
        closing(make(tmp_path, store_dir=str(in_the_way / "s"))) as t,
    ):
        t.train()
    assert in_the_way.read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_folder_is_refused_by_name(tmp_path: Path) -> None:
    locked = tmp_path / "read-only"
    locked.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=str(locked)), closing(make(tmp_path, store_dir=str(locked / "s"))) as t:
        t.train()


def test_a_store_in_use_by_another_process_is_refused_by_name(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    hold = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "file.write(f'{os.getpid()} host'); file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(store / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreLocked, match=f"{other.pid}"), closing(make(tmp_path)) as trainer:
            trainer.train()
        other.communicate()
    assert not (store / "journal").exists()


@pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK], ids=["device", "disk"])
def test_a_trainer_whose_store_was_taken_over_still_evaluates_and_saves(place: dict, tmp_path: Path) -> None:
    rows = tiny_rows("opt", 4, seed=1)
    with closing(make(tmp_path, **place)) as first, closing(make(tmp_path, seed=7, **place)) as second:
        first.train()
        loss, found = first.evaluate(rows)["eval_loss"], weights_of(first.model)
        second.train()
        assert differing(weights_of(first.model), found) == []
        assert first.evaluate(rows)["eval_loss"] == loss
        first.save_model(str(tmp_path / "saved"))
    assert differing(weights_of(type(first.model).from_pretrained(tmp_path / "saved")), found) == []


def test_a_finished_trainer_gives_its_folder_free(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(make(tmp_path, **STREAMED_FROM_DISK)) as trainer:
            trainer.train()
    assert len(list((tmp_path / "store").glob("journal*"))) == 2  # the steps of the earlier run are kept


def test_after_a_failed_start_the_folder_is_free_again(tmp_path: Path) -> None:
    class FullDisk(FS):
        def create(self, path: Path, n_bytes: int) -> int:
            if "@" in path.name:
                raise StoreError(f"No space left for {path}.")
            return super().create(path, n_bytes)

    options = EngineOptions(
        budgets=Budgets(device="min", cpu=0), device=torch.device("cpu"), store_dir=tmp_path, seed=0
    )  # fmt: skip
    with pytest.raises(StoreError, match="No space left"):
        open_engine(tiny_model("opt"), options, fs=FullDisk())
    open_engine(tiny_model("opt"), options).shutdown()


# -- data


@pytest.mark.parametrize("rows", [[], Dataset.from_list([])], ids=["list", "dataset"])
def test_an_empty_dataset_is_refused(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`train_dataset` is empty"):
        make(tmp_path, rows)
    assert not (tmp_path / "store").exists()


def test_an_empty_dataset_is_refused_by_the_sft_trainer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`train_dataset` is empty"):
        sft_trainer(tmp_path, tiny_model("opt"), prompts(0))


def test_a_dataset_whose_every_example_is_cut_off_is_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "the film was verdict : the film", "completion": " good"}] * 4)
    with pytest.raises(ConfigError, match="`max_length`"):
        sft_trainer(tmp_path, tiny_model("opt"), rows, max_length=4)


def test_a_dataset_without_labels_is_refused_with_the_columns_it_has(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in tiny_rows("opt", 4)]
    with pytest.raises(ConfigError, match=r"without labels.*input_ids"):
        make(tmp_path, rows)
    assert not (tmp_path / "store").exists()


def test_no_dataset_at_all_is_no_error_until_training(tmp_path: Path) -> None:
    with closing(zo_trainer(tmp_path, tiny_model("opt"), None)) as trainer:
        assert trainer.evaluate(tiny_rows("opt", 2))["eval_loss"] > 0
        with pytest.raises(ValueError, match="train_dataset"):
            trainer.train()


# -- models


def test_a_model_without_a_trainable_parameter_is_refused(tmp_path: Path) -> None:
    model = tiny_model("opt").requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad"):
        zo_trainer(tmp_path, model, tiny_rows("opt", 4))


def test_a_model_without_weights_is_refused_before_any_work(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = FAMILIES["opt"].make()
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight.*meta"):
        zo_trainer(tmp_path, model, tiny_rows("opt", 4))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("make_one", [zo_trainer, sft_trainer], ids=["trainer", "sft"])
def test_a_folder_that_is_no_model_is_refused_by_name(make_one: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rows = tiny_rows("opt", 4) if make_one is zo_trainer else prompts()
    with pytest.raises(CheckpointError, match=str(tmp_path / "empty")):
        make_one(tmp_path / "run", str(tmp_path / "empty"), rows)


# -- losses that are not numbers


class Poisoned:
    """This loss function returns NaN (or infinity) in the given steps, counted by its own calls of two a step."""

    def __init__(self, steps: set[int], value: float = float("nan")) -> None:
        self.steps, self.value, self.n_calls = steps, value, 0

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        step, self.n_calls = self.n_calls // 2, self.n_calls + 1
        logits, wanted = outputs.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
        return loss * self.value if step in self.steps else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, {**STREAMED_FROM_DISK, "granularity": "block"}])
def test_a_step_with_a_loss_that_is_no_number_changes_no_weight(value: float, place: dict, tmp_path: Path) -> None:
    poisoned = {1, 2}
    extra = {"compute_loss_func": Poisoned(poisoned, value), "data_collator": lambda _: tiny_batch("opt")}
    with closing(make(tmp_path, extra=extra, max_steps=5, **place)) as trainer:
        assert trainer.train().global_step == 5  # a skipped step consumes a step
        records, found = list(trainer.engine.store.journal.records), weights_of(trainer.model)
    assert [isinstance(record, SkipRecord) for record in records] == [False, True, True, False, False]
    model, batch = tiny_model("opt"), tiny_batch("opt")
    algorithm, loss = PlainZO(model), Poisoned(set())
    for step in {0, 1, 2, 3, 4} - poisoned:
        run = [lambda: loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])]
        algorithm.step(run, step=step, learning_rate=1e-3)
    assert differing(found, weights_of(model)) == []


@pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, {**STREAMED_FROM_DISK, "granularity": "block"}])
def test_ten_such_steps_in_a_row_stop_the_run(place: dict, tmp_path: Path) -> None:
    assert MAX_SKIPS_IN_A_ROW == 10
    extra = {"compute_loss_func": Poisoned(set(range(2, 100)))}
    model = tiny_model("opt")
    with closing(make(tmp_path, extra=extra, max_steps=40, **place)) as trainer:
        with pytest.raises(TrainingDiverged, match="10 steps in a row"):
            trainer.train()
        assert trainer.state.global_step == 11
        found = weights_of(trainer.model)
        model = trainer.model
        trainer.save_model(str(tmp_path / "saved"))
    assert all(torch.isfinite(p).all() for p in found.values())
    assert differing(weights_of(type(model).from_pretrained(tmp_path / "saved")), found) == []


def test_nine_such_steps_in_a_row_do_not_stop_the_run(tmp_path: Path) -> None:
    poisoned = {*range(9), *range(10, 19)}
    with closing(make(tmp_path, extra={"compute_loss_func": Poisoned(poisoned)}, max_steps=20)) as trainer:
        assert trainer.train().global_step == 20
        assert [r.step for r in trainer.engine.store.journal.records if not isinstance(r, SkipRecord)] == [9, 19]


def test_a_loss_function_that_raises_leaves_the_trainer_usable(tmp_path: Path) -> None:
    loss = Poisoned(set())
    failing = {"now": True}

    def raising(*args: Any, **kwargs: Any) -> torch.Tensor:
        if failing["now"] and loss.n_calls == 3:
            raise RuntimeError("the user's own bug")
        return loss(*args, **kwargs)

    options = {**STREAMED_FROM_DISK, "granularity": "block"}
    with closing(make(tmp_path, extra={"compute_loss_func": raising}, **options)) as trainer:
        with pytest.raises(RuntimeError, match="the user's own bug"):
            trainer.train()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        failing["now"] = False
        assert trainer.train().global_step == 3


# -- precision of the loss


@pytest.mark.parametrize(
    ("name", "dtype", "place"),
    every_value(
        ["opt", "llama", "t5", "roberta-classes", "roberta-mlm", "mixtral"],
        [torch.bfloat16, torch.float16],
        [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK],
    ),
)
def test_16_bit_models_get_a_loss_in_fp32(name: str, dtype: torch.dtype, place: dict, tmp_path: Path) -> None:
    model = tiny_model(name, dtype=dtype)
    with closing(zo_trainer(tmp_path, model, tiny_rows(name, 6), zo_eps=1e-2, **place)) as trainer:
        trainer.train()
        losses = [log["zo/loss_plus"] for log in step_logs(trainer)]
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
    # A loss computed in 16 bit would be a 16-bit number.
    assert any(torch.tensor(loss).to(dtype).item() != loss for loss in losses)
    assert len(set(losses)) == 3


def test_a_16_bit_loss_of_the_users_own_is_refused_with_the_cure(tmp_path: Path) -> None:
    def halved(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return Poisoned(set())(outputs, labels).to(torch.bfloat16)

    extra = {"compute_loss_func": halved, "data_collator": default_data_collator}
    with closing(make(tmp_path, extra=extra)) as trainer:
        with pytest.raises(LossPrecisionError, match=r"torch.bfloat16.*float32"):
            trainer.train()
        assert differing(weights_of(trainer.model), weights_of(tiny_model("opt"))) == []
