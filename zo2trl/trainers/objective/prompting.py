"""This module converts batches into prompts to generate from, and generated batches into the tokens of each row.

Does not: generate, or score completions.
Invariant: a prompt has no padding and no token that a label contains.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zo2trl.errors import ConfigError

__all__ = [
    "base_of", "decoded", "is_chat", "left_padded", "pad_id_of", "prompts_and_references", "tokenizer_of",
    "up_to_the_end",
]  # fmt: skip


def base_of(model: nn.Module) -> Any:
    """Return the transformers model below adapters."""
    adapted: Any = model
    return adapted.get_base_model() if hasattr(model, "get_base_model") else model


def prompts_and_references(
    model: nn.Module, batch: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Return the token ids of every row's prompt, and those of its labels, without padding.

    Raises:
        ConfigError: a row's first token has a label already, so the end of its prompt is unknown.
    """
    ids, labels = batch["input_ids"], batch.get("labels")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    references = None if labels is None else [row[row != -100] for row in labels]
    if labels is None or base_of(model).config.is_encoder_decoder:
        return [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)], references
    prompts = []
    for row, kept, marks in zip(ids, mask, labels, strict=True):
        labelled = (marks != -100).nonzero()
        end = int(labelled[0]) if len(labelled) else len(row)
        prompts.append(row[:end][kept[:end].bool()])
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError(
            "A row has a label on its first token, so there is no prompt to generate from. Use a prompt-completion "
            "dataset (with `completion_only_loss`), or mask the prompt's labels with -100."
        )
    return prompts, references


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, list) and any(isinstance(message, Mapping) and "role" in message for message in prompt)


def left_padded(rows: Sequence[torch.Tensor], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join rows into one left-padded batch to generate from; return it and its mask."""
    length = max(len(row) for row in rows)
    ids = rows[0].new_full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


def decoded(tokenizer: Any, rows: Sequence[torch.Tensor]) -> list[str]:
    """Decode the labels of each row."""
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def up_to_the_end(ids: list[int], config: Any) -> list[int]:
    """Cut one generated row after the token that ended it."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if (end := next((i for i, token in enumerate(ids) if token in ends), None)) is not None:
        return ids[: end + 1]
    while ids and ids[-1] == config.pad_token_id:
        ids = ids[:-1]
    return ids


def pad_id_of(tokenizer: Any) -> int:
    """Return the token id that pads short rows."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def tokenizer_of(trainer: Any) -> Any:
    """Return the tokenizer of a trainer, also of one with a processor.

    Raises:
        ConfigError: it has none.
    """
    given = trainer.processing_class
    if given is None:
        raise ConfigError("An objective on generated text needs a tokenizer: pass it as `processing_class`.")
    return getattr(given, "tokenizer", given)
