"""TextObjective calls reward functions written for TRL's GRPO as GRPO does, with every argument they may request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl.rewards.format_rewards import think_format_reward

from tests.support.formats import chat_prompts, chat_tokenizer
from tests.support.models import tiny_model
from tests.support.runs import closing, prompts, sft_trainer, step_logs
from tests.support.tokenizer import tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl import TextObjective
from zo2trl.errors import ConfigError


def with_column(rows: Dataset, name: str, values: Sequence[Any]) -> Dataset:
    return rows.add_column(name, list(values))


def test_a_reward_function_gets_prompts_and_columns_of_its_own_rows(tmp_path: Path) -> None:
    rows = with_column(prompts(8), "weight", [float(i) for i in range(8)])
    asked = list(zip(rows["prompt"], rows["weight"], strict=True))
    seen: list[tuple[str, float]] = []

    def reward(prompts: list[str], completions: list[str], weight: list[float], **kwargs: Any) -> list[float]:
        assert len(prompts) == len(completions) == len(weight)
        seen.extend(zip(prompts, weight, strict=True))
        return weight

    objective = TextObjective(function=reward, max_new_tokens=2)
    with closing(sft_trainer(tmp_path, tiny_model("opt"), rows, extra={"objective": objective})) as trainer:
        trainer.train()
        assert "objective/reward" in step_logs(trainer)[0]
    assert seen
    assert set(seen) <= set(asked)


def test_a_reward_function_with_kwargs_gets_everything_as_in_grpo(tmp_path: Path) -> None:
    rows = with_column(prompts(8), "answer", [f"gold of {row}" for row in prompts(8)["prompt"]])
    seen: list[dict[str, Any]] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen.append(kwargs)
        kwargs["log_metric"]("length", 1.0)
        return [float(len(ids)) for ids in kwargs["completion_ids"]]

    objective = TextObjective(function=reward, max_new_tokens=2)
    extra = {"objective": objective, "eval_dataset": rows.select(range(4))}
    for name, given in (("rows", rows), ("stream", rows.to_iterable_dataset())):
        with closing(sft_trainer(tmp_path / name, tiny_model("opt"), given, extra=extra, max_steps=1)) as trainer:
            trainer.train()
            trainer.evaluate()
            assert trainer.state is seen[-1]["trainer_state"]
    for kwargs in seen:
        assert kwargs["answer"] == [f"gold of {prompt}" for prompt in kwargs["prompts"]]
        assert {"references", "log_extra"} < kwargs.keys()
        assert not {"prompt", "completion", "input_ids"} & kwargs.keys()


def test_token_ids_of_a_completion_end_with_what_ended_it(tmp_path: Path) -> None:
    model = tiny_model("opt")
    seen: list[tuple[list[list[int]], list[str]]] = []

    def reward(completion_ids: list[list[int]], completions: list[str]) -> list[float]:
        seen.append((completion_ids, completions))
        return [float(len(ids)) for ids in completion_ids]

    for end in (None, 0):
        objective = TextObjective(function=reward, max_new_tokens=4, generation_kwargs={"eos_token_id": end})
        with closing(sft_trainer(tmp_path / str(end), model, extra={"objective": objective}, max_steps=1)) as trainer:
            trainer.train()
            assert step_logs(trainer)[0]["objective/reward"] <= 4
        ids, texts = seen[-1]
        assert tiny_tokenizer().batch_decode(ids, skip_special_tokens=True) == texts
        assert all(end not in row[:-1] for row in ids)


def test_rewards_of_chats_get_messages_unless_they_ask_for_text(tmp_path: Path) -> None:
    rows = chat_prompts()
    seen: list[tuple[Any, Any]] = []

    def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.append((prompts, completions))
        return think_format_reward(completions, **kwargs)

    def lengths(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(prompt + text)) for prompt, text in zip(prompts, completions, strict=True)]

    objectives = [
        TextObjective(function=reward, max_new_tokens=2),
        TextObjective(function=lengths, max_new_tokens=2, as_messages=False),
    ]
    for objective in objectives:
        extra = {"objective": objective, "processing_class": chat_tokenizer()}
        folder = tmp_path / objective.name
        with closing(sft_trainer(folder, tiny_model("opt"), rows, extra=extra, max_steps=1)) as trainer:
            trainer.train()
    assert seen
    for asked, answers in seen:
        assert all(prompt in list(rows["prompt"]) for prompt in asked)
        assert all(answer[0]["role"] == "assistant" for answer in answers)


def test_rows_without_a_verdict_are_left_out_of_the_mean(tmp_path: Path) -> None:
    rows = with_column(prompts(6), "verdict", [None, 1.0, 2.0, None, None, 6.0])

    def reward(completions: list[str], verdict: list[float | None]) -> list[float | None]:
        return verdict

    extra = {"objective": TextObjective(function=reward, max_new_tokens=1), "eval_dataset": rows}
    options = {"per_device_train_batch_size": 6, "max_steps": 1, "per_device_eval_batch_size": 2}
    with closing(sft_trainer(tmp_path / "some", tiny_model("opt"), rows, extra=extra, **options)) as trainer:
        trainer.train()
        assert step_logs(trainer)[0]["objective/reward"] == 3
        assert trainer.evaluate()["eval_objective/reward"] == 3
        nothing = trainer.evaluate(rows.select([0, 3]))  # returns None for every row
        assert "eval_loss" in nothing
        assert "eval_objective/reward" not in nothing
    none = with_column(prompts(6), "verdict", [None] * 6)
    with (
        closing(sft_trainer(tmp_path / "none", tiny_model("opt"), none, extra=extra, **options)) as trainer,
        pytest.raises(ConfigError, match="None for every row of a batch"),
    ):
        trainer.train()


def test_f1_of_chats_is_that_of_their_text(tmp_path: Path) -> None:
    rows = with_column(chat_prompts(), "answers", [" ".join(chat_tokenizer().get_vocab())] * 8)
    options = {"objective": "squad_f1", "objective_max_new_tokens": 3, "max_steps": 1}
    extra = {"processing_class": chat_tokenizer()}
    with closing(sft_trainer(tmp_path, small_model(), rows, extra=extra, **options)) as trainer:
        trainer.train()
        assert 0 < step_logs(trainer)[0]["objective/squad_f1"] < 1
