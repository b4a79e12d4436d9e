"""Datasets in every format that TRL's SFTTrainer takes, and tokenizers with chat templates for them.

Does not: train or compare anything (tests/trainers/test_sft_features.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.runs import prompts
from tests.support.tokenizer import SPECIAL, tiny_tokenizer, words

MARKS = ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "<tool_call>", "</tool_call>"]

GENERATION_TAGGED = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} <|im_end|> {% endgeneration %}"
    "{% else %}{{ message.content }} <|im_end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

TOOL = {
    "type": "function",
    "function": {
        "name": "w20",
        "description": "w21 w22",
        "parameters": {"type": "object", "properties": {"w23": {"type": "string"}}},
    },
}


def chat_tokenizer(template: str | None = GENERATION_TAGGED) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, whose last words are the marks of chats; as many tokens as before."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *words()[: -len(MARKS)], *MARKS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)
    fast.chat_template = template
    return fast


def untagged_template(name: str = "qwen2_5") -> str:
    """A template without generation tags, of a family for which TRL has a training template with them."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def texts(n_rows: int = 8, *, column: str = "text") -> Dataset:
    return Dataset.from_list([{column: f"{row['prompt']}{row['completion']}"} for row in prompts(n_rows)])


def _chat(row: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}


def chats(n_rows: int = 8) -> Dataset:
    """Conversations: two turns, and four in every second row."""
    rows = [_chat(row) for row in prompts(n_rows)]
    return Dataset.from_list([{"messages": [*row, *(rows[i - 1] if i % 2 else ())]} for i, row in enumerate(rows)])


def sharegpt_chats(n_rows: int = 8) -> Dataset:
    """The same in ShareGPT's words, which TRL converts."""
    rows = [_chat(row) for row in prompts(n_rows)]
    speakers = {"user": "human", "assistant": "gpt"}
    return Dataset.from_list(
        [{"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in row]} for row in rows]
    )


def chat_prompts(n_rows: int = 8) -> Dataset:
    rows = [_chat(row) for row in prompts(n_rows)]
    return Dataset.from_list([{"prompt": [question], "completion": [answer]} for question, answer in rows])


def tool_calls(n_rows: int = 8) -> Dataset:
    rows = []
    for i in range(n_rows):
        call = {"type": "function", "function": {"name": "w20", "arguments": {"w23": f"w{i}"}}}
        messages = [
            {"role": "user", "content": f"the film was w{i} verdict :"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "w20", "content": f"w{i + 30}"},
            {"role": "assistant", "content": "good"},
        ]
        rows.append({"messages": messages, "tools": [TOOL]})
    return Dataset.from_list(rows)


def tokenised(n_rows: int = 8, *, extra: str | None = None) -> Dataset:
    """`input_ids`, alone or with one more column: `labels`, `completion_mask` or `assistant_masks`."""
    make: dict[str, Callable[[list[int]], list[int]]] = {
        "labels": lambda ids: [-100] * (len(ids) - 2) + ids[-2:],
        "completion_mask": lambda ids: [0] * (len(ids) - 1) + [1],
        "assistant_masks": lambda ids: [0] * (len(ids) - 3) + [1] * 3,
    }
    rows: list[dict[str, Any]] = []
    for row in texts(n_rows):
        ids = tiny_tokenizer()(row["text"])["input_ids"]  # type: ignore[index]
        rows.append({"input_ids": ids, **({extra: make[extra](ids)} if extra else {})})
    return Dataset.from_list(rows)
