"""A loss that is not a number moves no weight: the step is skipped, and after ten in a row the training stops."""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, default_data_collator

from tests.support.covering import every_value, few_in_ci
from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import QUIET, STREAMED_FROM_DISK, closing, differing, weights_of
from zo2trl import ZOConfig, ZOTrainer
from zo2trl.engine.step import MAX_SKIPS_IN_A_ROW
from zo2trl.errors import TrainingDiverged
from zo2trl.zo.records import SkipRecord, StepRecord

BAD_STEP = 1
FAULTS: dict[str, tuple[float | None, float | None]] = {  # what the plus and the minus probe return, if not the loss
    "loss plus": (math.nan, None),
    "loss minus": (None, math.inf),
    "both": (-math.inf, math.nan),
    "overflow": (1.7e308, -1.7e308),  # finite, but their difference is not
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Faulty(ZOTrainer):
    """Its loss is at fault in some steps. A step asks for the loss of the plus probe, then of the minus probe."""

    def __init__(self, *args: Any, fault: str, steps: range, **named: Any) -> None:
        super().__init__(*args, **named)
        self._fault, self._steps, self._probe = FAULTS[fault], steps, 0

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        loss = super().compute_loss(*args, **named)
        probe, self._probe = self._probe % 2, self._probe + 1
        value = self._fault[probe] if self.state.global_step in self._steps else None
        return loss if value is None else torch.full_like(loss, value, dtype=torch.float64)


class Witness(TrainerCallback):
    """Keeps the weights before each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.trainer.engine.flush()
        self.weights.append(weights_of(self.trainer.model))


def model_of(kind: str, dtype: torch.dtype) -> nn.Module:
    model = tiny_model("opt", dtype=dtype)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    return model


def faulty_trainer(folder: Path, model: nn.Module, *, fault: str, steps: range, **options: Any) -> Faulty:
    named = {"data_collator": default_data_collator, "train_dataset": tiny_rows("opt", 40)}
    config = ZOConfig(**{"output_dir": str(folder), **QUIET, **STREAMED_FROM_DISK, **options})
    return Faulty(model, config, fault=fault, steps=steps, **named)


@pytest.mark.parametrize(("kind", "dtype", "fault"), every_value(["full", "lora"], DTYPES, FAULTS))
def test_a_step_without_a_finite_loss_changes_nothing(fault: str, dtype: str, kind: str, tmp_path: Path) -> None:
    witness = Witness()
    model = model_of(kind, DTYPES[dtype])
    with closing(faulty_trainer(tmp_path, model, fault=fault, steps=range(BAD_STEP, BAD_STEP + 1))) as trainer:
        witness.trainer = trainer
        trainer.add_callback(witness)
        trainer.train()
        records = list(trainer.engine.store.journal.records)
        witness.on_step_begin(None, None, None)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [type(record) for record in records] == [StepRecord, SkipRecord, StepRecord]
    skip = records[BAD_STEP]
    for value, wanted in zip((skip.loss_plus, skip.loss_minus), FAULTS[fault], strict=True):
        assert math.isfinite(value) == (wanted is None or math.isfinite(wanted))
    assert differing(witness.weights[BAD_STEP], witness.weights[BAD_STEP + 1]) == []
    assert differing(witness.weights[BAD_STEP - 1], witness.weights[BAD_STEP]) != []  # the others do
    assert differing(witness.weights[BAD_STEP + 1], witness.weights[BAD_STEP + 2]) != []
    assert all(weight.isfinite().all() for weights in witness.weights for weight in weights.values())
    assert_finite([record for record in records if isinstance(record, StepRecord)])
    assert len(logs) == 3


def assert_finite(records: list[StepRecord]) -> None:
    for record in records:
        numbers = (*record.coefficients, *(value for value in record if isinstance(value, float)))
        assert all(map(math.isfinite, numbers)), record


@pytest.mark.parametrize("fault", few_in_ci("both", next(iter(FAULTS))))
def test_ten_skips_in_a_row_end_the_training_at_the_last_good_step(fault: str, tmp_path: Path) -> None:
    model = tiny_model("opt")
    last_good = 3
    with closing(faulty_trainer(tmp_path, model, fault=fault, steps=range(last_good, 99), max_steps=30)) as trainer:
        with pytest.raises(TrainingDiverged, match=rf"last good step .*\b{last_good}\b") as stopped:
            trainer.train()
        records = list(trainer.engine.store.journal.records)
        found = weights_of(trainer.model)
    assert [type(record) for record in records] == [StepRecord] * last_good + [SkipRecord] * MAX_SKIPS_IN_A_ROW
    assert "learning_rate" in str(stopped.value)  # and says what to try
    with closing(
        faulty_trainer(tmp_path / "good", tiny_model("opt"), fault=fault, steps=range(0), max_steps=3)
    ) as one:
        one.train()
        assert differing(found, weights_of(one.model)) == []


def test_nine_skips_in_a_row_do_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(
        faulty_trainer(tmp_path, tiny_model("opt"), fault="both", steps=range(1, MAX_SKIPS_IN_A_ROW), max_steps=12)
    ) as trainer:
        with caplog.at_level(logging.WARNING):
            trainer.train()
        records = trainer.engine.store.journal.records
    assert [isinstance(record, SkipRecord) for record in records] == [False] + [True] * 9 + [False] * 2
    assert sum("is skipped" in line for line in caplog.messages) == 9


@pytest.mark.parametrize("is_cured", [True, False])
def test_skips_before_a_crash_count_after_it(is_cured: bool, tmp_path: Path) -> None:
    """A run that stopped for ten skips stops again at the next one, and goes on if that is none."""
    make = partial(faulty_trainer, tmp_path, fault="both", max_steps=15)
    with closing(make(tiny_model("opt"), steps=range(2, 99))) as trainer, pytest.raises(TrainingDiverged):
        trainer.train()
    with closing(make(tiny_model("opt"), steps=range(0) if is_cured else range(2, 99))) as trainer:
        if is_cured:
            trainer.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(TrainingDiverged):
                trainer.train(resume_from_checkpoint=True)
        assert len(trainer.engine.store.journal.records) == (15 if is_cured else 13)
