"""Objectives instead of losses, such as accuracy, F1 and rewards, are optimised as in MeZO, in any tier."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import default_data_collator

from tests.support.crashes import Crash, resumed, straight
from tests.support.models import tiny_model, tiny_rows
from tests.support.plain import PlainZO
from tests.support.preferences import dpo_trainer, lora
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
from tests.support.tokenizer import tiny_tokenizer, words
from tests.support.trainings import small_model
from zo2trl import OutputObjective, TextObjective
from zo2trl.errors import ConfigError, LossPrecisionError, UnsupportedError
from zo2trl.trainers.objective.scores import exact_match, squad_f1

WORDY = {"answers": " ".join(words())}  # every generation shares a word with this answer


def with_column(rows: Dataset, name: str, values: Sequence[Any]) -> Dataset:
    return rows.add_column(name, list(values))


def answered(n_rows: int = 8) -> Dataset:
    return with_column(prompts(n_rows), "answers", [WORDY["answers"]] * n_rows)


def wordiness(completions: list[str]) -> list[float]:
    """Compute a reward that most changes of a completion change."""
    return [sum(hash_of(word) for word in text.split()) / 97 for text in completions]


def hash_of(word: str) -> int:
    return sum(map(ord, word)) % 97


def test_the_pages_examples_are_objectives() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "objectives.md"
    for block, kind in zip(
        re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S), (OutputObjective, TextObjective), strict=True
    ):
        defined: dict[str, Any] = {}
        exec(block, defined)
        assert isinstance(defined["objective"], kind)


# -- built-in scores


def test_f1_is_that_of_squads_evaluation_script() -> None:
    golds = [["the Denver Broncos"], ["Paris, France", "paris"], ["no answer"], ["a b"]]
    found = squad_f1(["Denver Broncos!", "In Paris", "no answer", ""], None, golds)
    assert found == pytest.approx([1.0, 2 / 3, 1.0, 0.0])
    assert exact_match(["Denver Broncos!", "In Paris"], None, golds[:2]) == [1.0, 0.0]
    assert squad_f1(["x y"], ["y z"]) == pytest.approx([0.5])
    assert squad_f1(["x y"], None, [{"text": ["q", "x y"], "answer_start": [0, 3]}]) == [1.0]


def test_accuracy_without_labels_says_what_is_missing(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"]} for row in tiny_rows("opt", 4)]
    with (
        closing(zo_trainer(tmp_path, tiny_model("opt"), rows, objective="accuracy")) as trainer,
        pytest.raises(ConfigError, match=r"accuracy.*`labels`"),
    ):
        trainer.train()


def test_accuracy_of_a_language_model_is_the_share_of_right_tokens(tmp_path: Path) -> None:
    with closing(sft_trainer(tmp_path, small_model(), prompts(4), objective="accuracy")) as trainer:
        found = trainer.evaluate(trainer.train_dataset)["eval_objective/accuracy"]
        n_right = n_all = 0
        for row in trainer.train_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            with torch.no_grad():
                guesses = trainer.model(input_ids=ids).logits[0, :-1].argmax(-1)
            counts = labels[1:] != -100
            n_right, n_all = n_right + int((guesses == labels[1:])[counts].sum()), n_all + int(counts.sum())
    assert found == pytest.approx(n_right / n_all)


# -- on outputs


@pytest.mark.parametrize("place", [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK], ids=["device", "disk"])
def test_accuracy_of_classes_is_optimised_and_logged(place: dict, tmp_path: Path) -> None:
    rows = tiny_rows("roberta-classes", 8)
    options = {"objective": "accuracy", "zo_eps": 0.3, "per_device_train_batch_size": 8, **place}
    with closing(zo_trainer(tmp_path, tiny_model("roberta-classes"), rows, **options)) as trainer:
        before = weights_of(trainer.model)
        trainer.train()
        logs = step_logs(trainer)
        assert differing(weights_of(trainer.model), before)
    for log in logs:
        losses = (log["zo/loss_plus"], log["zo/loss_minus"])
        assert all(8 * loss == pytest.approx(round(8 * loss)) for loss in losses)  # eighths: an accuracy
        assert log["objective/accuracy"] == pytest.approx(1 - sum(losses) / 2)
    assert any(log["zo/projected_grad"] != 0 for log in logs)


def test_a_differentiable_objective_moves_weights_as_the_same_loss_does(tmp_path: Path) -> None:
    def cross_entropy(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    grads = []
    for name, extra in (("loss", {}), ("objective", {"objective": cross_entropy})):
        with closing(zo_trainer(tmp_path / name, tiny_model("opt"), tiny_rows("opt", 8), extra=extra)) as trainer:
            trainer.train()
            grads.append([log["zo/projected_grad"] for log in step_logs(trainer)])
            assert ("objective/cross_entropy" in step_logs(trainer)[0]) == (name == "objective")
    assert grads[0] == pytest.approx(grads[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("takes_items", [True, False], ids=["normalised by the function", "means"])
def test_four_micro_batches_are_one_batch(takes_items: bool, tmp_path: Path) -> None:
    def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    def mean(outputs: Any, labels: torch.Tensor) -> list[float]:
        return (outputs.logits.double().square().mean((1, 2)) + labels[:, 0]).tolist()  # one number a row

    losses = []
    for size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        extra = {"objective": summed if takes_items else mean}
        with closing(
            zo_trainer(tmp_path / str(size), tiny_model("opt"), tiny_rows("opt", 8), extra=extra, **options)
        ) as trainer:
            trainer.train()
            losses.append(step_logs(trainer)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_loss_function_that_returns_a_mean_is_not_multiplied_by_the_number_of_micro_batches(tmp_path: Path) -> None:
    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    losses = []
    for size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        extra = {"compute_loss_func": mean}
        with closing(
            zo_trainer(tmp_path / str(size), tiny_model("opt"), tiny_rows("opt", 8), extra=extra, **options)
        ) as trainer:
            trainer.train()
            losses.append(step_logs(trainer)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_preference_trainers_take_an_objective_on_outputs(tmp_path: Path) -> None:
    def gap(outputs: Any) -> torch.Tensor:
        chosen, rejected = outputs.logits.mean((1, 2)).chunk(2)
        return chosen - rejected

    extra = {"peft_config": lora(), "objective": OutputObjective(function=gap, maximize=True)}
    with closing(dpo_trainer(tmp_path, extra=extra, max_steps=2)) as trainer:
        trainer.train()
        assert all(log["objective/gap"] == pytest.approx(-log["loss"], abs=1e-4) for log in step_logs(trainer))


# -- on generated text


def test_generation_in_lockstep_gives_the_bits_of_the_plain_algorithm(tmp_path: Path) -> None:
    objective = TextObjective(function=wordiness, max_new_tokens=5)
    batches: list[dict] = []
    options = {"zo_eps": 0.05, "learning_rate": 1e-4, **STREAMED_FROM_DISK}
    options |= {"max_steps": 2, "granularity": "block"}
    with closing(sft_trainer(tmp_path, small_model(), extra={"objective": objective}, **options)) as trainer:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: batches.append(collate(rows)) or dict(batches[-1])
        trainer.train()
        logs, found = step_logs(trainer), weights_of(trainer.model)
    model, tokenizer = small_model(), tiny_tokenizer()
    algorithm = PlainZO(model, eps=0.05)

    def loss(batch: dict) -> torch.Tensor:
        starts = [int((labels != -100).nonzero()[0]) for labels in batch["labels"]]
        rows = [ids[:start] for ids, start in zip(batch["input_ids"], starts, strict=True)]
        texts = []
        for row in rows:  # one by one: no padding
            with torch.no_grad():
                new = model.generate(row[None], max_new_tokens=5, do_sample=False, pad_token_id=1)[0, len(row) :]
            texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        return -torch.tensor(wordiness(texts), dtype=torch.float64).mean()

    steps = [algorithm.step([partial(loss, batch)], step=i, learning_rate=1e-4) for i, batch in enumerate(batches[:2])]
    assert [log["zo/loss_plus"] for log in logs] == pytest.approx([step.loss_plus for step in steps])
    assert [log["zo/loss_minus"] for log in logs] == pytest.approx([step.loss_minus for step in steps])
    assert any(log["zo/projected_grad"] != 0 for log in logs)
    assert differing(found, weights_of(model)) == []


def test_f1_is_trained_and_evaluated_alike_on_every_tier(tmp_path: Path) -> None:
    runs = []
    for name, place in (("device", EVERYTHING_ON_DEVICE), ("disk", STREAMED_FROM_DISK)):
        options = {"objective": "squad_f1", "objective_max_new_tokens": 3, "zo_eps": 0.05, "max_steps": 2, **place}
        extra = {"eval_dataset": answered(4)}
        with closing(sft_trainer(tmp_path / name, small_model(), answered(), extra=extra, **options)) as trainer:
            trainer.train()
            metrics = trainer.evaluate()
            trained = [log["objective/squad_f1"] for log in step_logs(trainer)]
            runs.append((trained, metrics["eval_objective/squad_f1"]))
            assert metrics["eval_loss"] > 1  # evaluation of the trainer's own loss is unchanged
    assert runs[0] == runs[1]
    assert all(0 < value < 1 for value in [*runs[0][0], runs[0][1]])


def test_prompts_of_a_plain_trainer_are_whole_rows(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"][:6], "gold": f"w{i}"} for i, row in enumerate(tiny_rows("opt", 6))]
    objective = TextObjective(function=lambda completions, gold: [float(len(g)) for g in gold], max_new_tokens=2)
    extra = {"objective": objective, "processing_class": tiny_tokenizer()}
    with closing(zo_trainer(tmp_path, tiny_model("opt"), rows, extra=extra)) as trainer:
        trainer.train()
        assert step_logs(trainer)[0]["zo/loss_plus"] == -2.0


def test_an_encoder_decoder_generates_from_its_whole_input(tmp_path: Path) -> None:
    objective = TextObjective(function=wordiness, max_new_tokens=3)
    extra = {"objective": objective, "processing_class": tiny_tokenizer()}
    with closing(zo_trainer(tmp_path, tiny_model("t5"), tiny_rows("t5", 6), extra=extra, zo_eps=0.1)) as trainer:
        trainer.train()
        assert step_logs(trainer)[0]["objective/wordiness"] > 0


def test_a_crash_leaves_no_trace(tmp_path: Path) -> None:
    def make(folder: Path, **options: Any) -> Any:
        options = {
            "objective": "squad_f1", "objective_max_new_tokens": 3, "zo_eps": 0.05, "save_strategy": "steps",
            "save_steps": 2, "max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, **options,
        }  # fmt: skip
        extra = {"eval_dataset": answered(2)}
        return sft_trainer(folder, small_model(), answered(), extra=extra, **options)

    lives = [EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK]
    wanted = straight(make, tmp_path / "straight")
    found = resumed(make, tmp_path / "crashed", [Crash("step_end", 3)], lives=lives)
    assert any("objective/squad_f1" in entry for entry in wanted.logs)
    assert wanted.difference(found) == ""


def test_going_on_with_another_objective_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n_steps, options in ((2, {"objective": "accuracy"}), (3, {})):
        options = {**options, "max_steps": n_steps, "save_strategy": "steps", "save_steps": 1}
        with closing(sft_trainer(tmp_path, small_model(), prompts(8), **options)) as trainer:
            trainer.train(resume_from_checkpoint=n_steps > 2)
    assert "`objective` was 'accuracy' when this training began and is None now" in caplog.text


# -- refusals


async def late_verdict(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


def trained(folder: Path, objective: Any) -> None:
    rows = [{**row, "labels": row["input_ids"]} for row in tiny_rows("opt", 4)]
    extra = {"objective": objective, "processing_class": tiny_tokenizer(), "data_collator": default_data_collator}
    with closing(zo_trainer(folder, tiny_model("opt"), rows, extra=extra)) as trainer:
        trainer.train()


def test_a_16_bit_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossPrecisionError, match="bfloat16"):
        trained(tmp_path, lambda outputs: outputs.logits.bfloat16().mean())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda outputs: "high", "must return a number"),
        (lambda outputs: [1.0, None], "None for a row"),
        (lambda outputs: torch.ones(3), "3 numbers for 2 rows"),
        (lambda outputs, gold: 1.0, "reads .'gold'"),
        (TextObjective(function=wordiness, max_new_tokens=2), "no prompt to generate from"),
    ],
    ids=["no number", "none", "three", "column", "prompt"],
)
def test_what_an_objective_cannot_be_is_said_when_it_shows(objective: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "f1"}, "must be one of"),
        ({"objective": "squad_f1"}, "objective_max_new_tokens"),
        ({"objective": "accuracy", "objective_max_new_tokens": 3}, "generates nothing"),
        ({"objective_max_new_tokens": 3}, "no effect"),
    ],
)
def test_names_and_lengths_that_do_not_fit_are_refused_before_anything_moves(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        zo_trainer(tmp_path, tiny_model("opt"), tiny_rows("opt", 4), **options)


def test_choices_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given twice"):
        zo_trainer(
            tmp_path, tiny_model("opt"), tiny_rows("opt", 4), extra={"objective": "accuracy"}, objective="accuracy"
        )
    with pytest.raises(ConfigError, match="is async"):
        TextObjective(function=late_verdict, max_new_tokens=2)
    with pytest.raises(ConfigError, match="is a model"):
        TextObjective(function=tiny_model("opt"), max_new_tokens=2)
    with pytest.raises(ConfigError, match="do_sample"):
        TextObjective(function=wordiness, max_new_tokens=2, generation_kwargs={"do_sample": True})
    with pytest.raises(UnsupportedError, match="packing"):
        sft_trainer(tmp_path, tiny_model("opt"), packing=True, objective="exact_match", objective_max_new_tokens=2)
