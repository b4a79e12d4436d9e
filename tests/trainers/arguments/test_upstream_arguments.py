"""Arguments that docs/support.md calls supported do what they do in transformers' own Trainer.

Each row trains twice: with the plain Trainer and with ZOTrainer, both at learning rate 0. Batches, losses,
evaluations, the steps of log entries, and the checkpoints that exist must be the same.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Trainer, TrainingArguments

from tests.support.models import tiny_rows
from tests.support.runs import QUIET, STREAMED_FROM_DISK, closing, differing, weights_of, zo_trainer
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl import ZOConfig, ZOTrainer
from zo2trl.errors import CheckpointError, ConfigError

N_ROWS = 11


def rows() -> Dataset:
    """Make rows of different lengths, with a length column and one that no model accepts."""
    found = []
    for i, row in enumerate(tiny_rows("opt", N_ROWS)):
        n = 6 + i % 4
        lists = {name: row[name][:n].tolist() for name in ("input_ids", "attention_mask", "labels")}
        found.append({**lists, "length": n, "size": n, "note": "unknown"})
    return Dataset.from_list(found)


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad the rows; columns that are no numbers are dropped."""
    known = [{k: v for k, v in row.items() if k in ("input_ids", "attention_mask", "labels")} for row in features]
    return dict(DataCollatorForSeq2Seq(tiny_tokenizer())(known))


def measured(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
    """Compute a number from each input that a metric may request."""
    parts = {"logits": prediction.predictions, "labels": prediction.label_ids}
    parts |= {"inputs": prediction.inputs, "losses": prediction.losses}
    return {name: _total(part) for name, part in parts.items() if part is not None} if compute_result else {}


def _total(part: Any) -> float:
    if isinstance(part, list | tuple):
        return sum(_total(one) for one in part)
    return float(torch.as_tensor(part).double().nan_to_num().sum())


def recording(trainer_class: Any, seen: list[dict[str, Any]]) -> Any:
    """Return a subclass that records the batches of its steps."""

    class Recording(trainer_class):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append({name: value.tolist() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    return Recording


def trained(folder: Path, trainer_class: Any, config_class: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    named = {**QUIET, "max_steps": 4, **options, "output_dir": str(folder), "learning_rate": 0.0}
    trainer = recording(trainer_class, seen)(
        model=small_model(), args=config_class(**named), train_dataset=rows(), eval_dataset=rows().select(range(5)),
        data_collator=collate, compute_metrics=measured,
    )  # fmt: skip
    trainer.train()
    return trainer, seen


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
WORKERS = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_multiprocessing_context": "fork"}
CHOICES = {"split_batches": True, "even_batches": False, "use_seedable_sampler": False}

ROWS: dict[str, dict[str, Any]] = {
    "epochs and rates": {
        "num_train_epochs": 2, "max_steps": -1, "logging_strategy": "epoch", "dataloader_drop_last": True,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.5},
    },
    "sums over micro-batches": {
        "gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "label_smoothing_factor": 0.2,
        "include_num_input_tokens_seen": "non_padding", "logging_first_step": True, "logging_steps": 3,
    },
    "logs and memory": {
        "logging_steps": 0.5, "log_on_each_node": False, "log_level": "error", "log_level_replica": "error",
        "use_cache": True, "torch_empty_cache_steps": 1, "skip_memory_metrics": False,
    },
    "evaluated at the start, then late": {
        **EVALUATING, "eval_steps": 1, "eval_delay": 3, "eval_on_start": True, "per_device_eval_batch_size": 3,
        "eval_accumulation_steps": 1, "eval_use_gather_object": True, "include_for_metrics": ["inputs", "loss"],
    },
    "losses only": {**EVALUATING, "prediction_loss_only": True},
    "predictions apart": {**EVALUATING, "eval_do_concat_batches": False},
    "metrics batch by batch": {**EVALUATING, "batch_eval_metrics": True},
    "in order": {"train_sampling_strategy": "sequential", "debug": "underflow_overflow"},
    "grouped by length": {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
    "a loader with choices": {"accelerator_config": CHOICES, "dataloader_pin_memory": False, "data_seed": 7},
    "workers": {**WORKERS, "dataloader_persistent_workers": True, "dataloader_in_order": False, "data_seed": 7},
    "columns kept": {"remove_unused_columns": False, "label_names": ["labels"], **EVALUATING},
    "saved": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "save_on_each_node": True},
    "best saved": {**EVALUATING, "save_strategy": "best", "metric_for_best_model": "loss"},
    "half precision": {"fp16": True},
}  # fmt: skip

NOT_COMPARED = ("runtime", "per_second", "mem_", "zo/", "grad_norm", "total_flos")


def comparable(trainer: Any) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


@pytest.fixture
def deterministic_algorithms_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.mark.parametrize("options", ROWS.values(), ids=list(ROWS))
def test_an_argument_does_what_it_does_upstream(options: dict[str, Any], tmp_path: Path) -> None:
    plain, theirs = trained(tmp_path / "plain", Trainer, TrainingArguments, **options)
    options = {**options, **STREAMED_FROM_DISK, "zo_eps": 1e-5}
    trainer, ours = trained(tmp_path / "zo", ZOTrainer, ZOConfig, **options)
    with closing(trainer):
        assert ours == theirs
        for found, expected in zip(comparable(trainer), comparable(plain), strict=True):
            rough = 1e-2 if options.get("fp16") else 1e-4
            assert found == pytest.approx(expected, rel=rough, abs=rough)
        kept = {path.name for path in (tmp_path / "plain").glob("checkpoint-*")}
        assert {path.name for path in (tmp_path / "zo").glob("checkpoint-*")} == kept


@pytest.mark.usefixtures("deterministic_algorithms_put_back")
def test_full_determinism_is_as_upstream(tmp_path: Path) -> None:
    test_an_argument_does_what_it_does_upstream({"full_determinism": True}, tmp_path)
    assert torch.are_deterministic_algorithms_enabled()


# -- batches that do not fit


def failing(model: Any, *, above: int, after: int) -> Any:
    """Make a model that runs out of memory for batches of more than `above` rows, after `after` forwards."""
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def limited(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > above and len(calls) > after:
            raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
        return forward(*args, **kwargs)

    model.forward, model.n_rows = limited, calls
    return model


FINDING: dict[str, Any] = {
    "auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 5, **STREAMED_FROM_DISK,
}  # fmt: skip


@pytest.mark.parametrize("after", [0, 7], ids=["at once", "after some steps"])
def test_a_batch_size_that_fits_is_found_and_every_step_made_stays_in_the_journal(after: int, tmp_path: Path) -> None:
    model = failing(small_model(), above=2, after=after)
    with closing(zo_trainer(tmp_path, model, tiny_rows("opt", 16), **FINDING)) as trainer:
        assert trainer.train().global_step == 5
        assert set(model.n_rows[-10:]) == {2}
        steps = [record.step for record in trainer.engine.store.records]
        assert steps == list(range(len(steps)))
        assert (len(steps) > 5) == (after > 0)


def test_a_run_whose_batch_size_was_found_resumes_with_that_one_only(tmp_path: Path) -> None:
    def make(**options: Any) -> Any:
        model = failing(small_model(), above=2, after=7)
        return zo_trainer(tmp_path, model, tiny_rows("opt", 16), **{**FINDING, **options})

    with closing(make()) as trainer:
        trainer.train()
        n_records = len(trainer.engine.store.records)
    with closing(make(max_steps=7)) as trainer, pytest.raises(ConfigError, match=r"batch_size` was 2 .* is 4 now"):
        trainer.train(resume_from_checkpoint=True)
    with closing(make(max_steps=7, per_device_train_batch_size=2)) as trainer:
        assert trainer.train(resume_from_checkpoint=True).global_step == 7
        assert len(trainer.engine.store.records) == n_records + 2


# -- checkpoints


def test_checkpoints_of_the_model_only_hold_weights_and_are_no_place_to_resume_from(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_only_model": True}
    with closing(zo_trainer(tmp_path, small_model(), tiny_rows("opt", 16), **options)) as trainer:
        trainer.train()
        found = weights_of(trainer.model)
    folder = tmp_path / "checkpoint-4"
    assert differing(weights_of(type(small_model()).from_pretrained(folder)), found) == []
    with closing(zo_trainer(tmp_path, small_model(), tiny_rows("opt", 16), **{**options, "max_steps": 6})) as trainer:
        with pytest.raises(CheckpointError, match="no state to resume from"):
            trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.train(resume_from_checkpoint=True).global_step == 6  # restored from the journal
        assert len(trainer.engine.store.records) == 6


@pytest.mark.parametrize("name", ["ignore_data_skip", "restore_callback_states_from_checkpoint"])
def test_ways_of_resuming_that_upstream_has_make_the_steps_that_are_left(name: str, tmp_path: Path) -> None:
    options = {name: True, "save_strategy": "steps", "save_steps": 2}
    for n_steps in (5, 7):
        options["max_steps"] = n_steps
        with closing(zo_trainer(tmp_path, small_model(), tiny_rows("opt", 16), **options)) as trainer:
            assert trainer.train(resume_from_checkpoint=n_steps > 5 or None).global_step == n_steps
            assert len(trainer.engine.store.records) == n_steps
