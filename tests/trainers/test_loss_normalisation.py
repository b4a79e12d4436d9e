"""With gradient accumulation 4 micro-batches of 2 are one batch of 8, however a model's loss uses item counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from tests.support.models import NAMES, VOCABULARY, task_of, tiny_model, tiny_rows
from tests.support.runs import STREAMED_FROM_DISK, closing, sft_trainer, step_logs, zo_trainer

CAUSAL = [name for name in NAMES if task_of(name) == "causal"]
LOSS, GRAD = 1e-6, 2e-3

Row = dict[str, torch.Tensor]


def uneven_rows(name: str) -> list[Row]:
    """Make rows with 11, 9, 7, ... labelled tokens: the mean of their means is not their mean."""
    rows = tiny_rows(name, 8)
    for i, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 1 + (2 * i) % 9] = -100
    return rows


def first_step(
    folder: Path, name: str, rows: list[Row], *, accumulated: bool, extra: dict | None = None, **options: Any
) -> dict[str, float]:
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if not accumulated:
        shape = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    options = {"max_steps": 1, **shape, **options}
    with closing(zo_trainer(folder, tiny_model(name), rows, extra=extra, **options)) as trainer:
        trainer.train()
        return step_logs(trainer)[0]


def agree(one: dict[str, float], other: dict[str, float]) -> None:
    assert one["loss"] == pytest.approx(other["loss"], abs=LOSS, rel=LOSS)
    assert one["zo/projected_grad"] == pytest.approx(other["zo/projected_grad"], abs=GRAD, rel=GRAD)


@pytest.mark.parametrize("name", CAUSAL)
def test_four_micro_batches_are_one_batch_when_label_counts_differ(name: str, tmp_path: Path) -> None:
    rows = uneven_rows(name)
    whole = first_step(tmp_path / "whole", name, rows, accumulated=False)
    parts = first_step(tmp_path / "parts", name, rows, accumulated=True, **STREAMED_FROM_DISK)
    agree(parts, whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_not_multiplied_by_the_number_of_micro_batches(name: str, tmp_path: Path) -> None:
    rows = tiny_rows(name, 8)  # as many labels in every row
    whole = first_step(tmp_path / "whole", name, rows, accumulated=False)
    parts = first_step(tmp_path / "parts", name, rows, accumulated=True)
    agree(parts, whole)


@pytest.mark.parametrize("name", ["opt", "roberta-mlm", "t5"])
def test_label_smoothing_is_not_multiplied_by_the_number_of_micro_batches(name: str, tmp_path: Path) -> None:
    rows = tiny_rows(name, 8)
    for row in rows if name == "t5" else []:  # the Trainer removes labels, from which T5 would make its inputs
        row["decoder_input_ids"] = torch.cat([torch.tensor([1]), row["labels"][:-1]])
    whole = first_step(tmp_path / "whole", name, rows, accumulated=False, label_smoothing_factor=0.1)
    parts = first_step(tmp_path / "parts", name, rows, accumulated=True, label_smoothing_factor=0.1)
    plain = first_step(tmp_path / "plain", name, rows, accumulated=False)
    agree(parts, whole)
    assert whole["loss"] != plain["loss"]


def test_a_loss_function_of_the_user_gets_the_number_of_items_in_the_whole_step(tmp_path: Path) -> None:
    seen: set[int] = set()

    def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.add(int(num_items_in_batch))
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        return total / num_items_in_batch

    rows, extra = uneven_rows("opt"), {"compute_loss_func": summed, "data_collator": default_data_collator}
    whole = first_step(tmp_path / "whole", "opt", rows, accumulated=False, extra=extra)
    parts = first_step(tmp_path / "parts", "opt", rows, accumulated=True, extra=extra)
    agree(parts, whole)
    assert seen == {min(seen), 2 * min(seen)}  # twice as many once, to find how it uses them


def test_a_first_micro_batch_without_labels_does_not_mislead_the_rest_of_the_run(tmp_path: Path) -> None:
    rows = tiny_rows("opt", 8)
    masked = {**rows[0], "labels": torch.full_like(rows[0]["labels"], -100)}
    calls: list[int] = []

    def collator(_: Any) -> dict[str, torch.Tensor]:
        calls.append(0)  # call 0 only looks for labels
        first = len(calls) == 2
        return default_data_collator([masked, masked] if first else rows[2:4])

    extra = {"data_collator": collator}
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.0, "zo_eps": 1e-4}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), rows, extra=extra, **options)) as trainer:
        trainer.train()
        losses = [log["loss"] for log in step_logs(trainer)]
    with torch.no_grad():
        expected = tiny_model("opt")(**default_data_collator(rows[2:4])).loss.item()
    assert losses == pytest.approx([expected] * 3, abs=1e-3)


def test_the_last_short_accumulation_of_an_epoch_is_a_mean_too(tmp_path: Path) -> None:
    rows = tiny_rows("roberta-classes", 2) * 5
    options = {
        "max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0,
        "zo_eps": 1e-4,
    }  # fmt: skip
    extra = {"data_collator": lambda _: default_data_collator(rows[:2])}
    with closing(zo_trainer(tmp_path, tiny_model("roberta-classes"), rows, extra=extra, **options)) as trainer:
        trainer.train()
        losses = [log["loss"] for log in step_logs(trainer)]
    assert len(losses) == 2  # 4 micro-batches, then 1
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_losses_accumulate_as_one_batch(loss_type: str, tmp_path: Path) -> None:
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        with closing(
            sft_trainer(tmp_path / str(size), tiny_model("llama"), loss_type=loss_type, **options)
        ) as trainer:
            trainer.train()
            logs += step_logs(trainer)
    agree(logs[1], logs[0])


def test_split_traversals_change_nothing_but_the_number_of_visits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = first_step(tmp_path / "1", "opt", uneven_rows("opt"), accumulated=True, **STREAMED_FROM_DISK)
    monkeypatch.setattr("zo2trl.engine.device_fit.passes_per_traversal", lambda *_, **__: 2)
    apart = first_step(tmp_path / "2", "opt", uneven_rows("opt"), accumulated=True, **STREAMED_FROM_DISK)
    assert apart["zo/projected_grad"] == together["zo/projected_grad"]
    assert apart["zo/bytes_disk_read"] > together["zo/bytes_disk_read"]
