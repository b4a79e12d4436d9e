"""This module computes scores for objectives: accuracy, and SQuAD's F1 and exact match of generated answers.

Does not: generate, or depend on a trainer or a dataset.
Invariant: a score lies between 0 and 1, and 1 is right.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zo2trl.errors import ConfigError

__all__ = ["accuracy", "exact_match", "normalize_answer", "pair_accuracy", "squad_f1"]


def accuracy(outputs: Any, labels: torch.Tensor | None, model: nn.Module) -> torch.Tensor:
    """Compute the share of right classes, or of labelled tokens that were predicted as the most likely ones."""
    if labels is None:
        raise ConfigError(
            "`objective` 'accuracy' compares with labels, and the batches have none. Add a `labels` column (or name "
            "yours in `label_names`), or pass a function of outputs."
        )
    logits = outputs.logits
    if logits.dim() == 2 and labels.dim() == 1:
        return (logits.argmax(-1) == labels).double().mean()
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    counts = labels != -100
    return ((logits.argmax(-1) == labels) & counts).sum().double() / counts.sum().clamp(min=1)


def pair_accuracy(outputs: Any) -> torch.Tensor:
    """Return 1.0 where a chosen answer scores higher than the rejected one, else 0.0."""
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    return (chosen > rejected).double()


def squad_f1(completions: Sequence[str], references: Sequence[str] | None, answers: Any = None) -> list[float]:
    """Compute the token F1 of each completion with its best answer, from the `answers` column or else the labels."""
    return [max(_f1(text, gold) for gold in golds) for text, golds in _with_answers(completions, references, answers)]


def exact_match(completions: Sequence[str], references: Sequence[str] | None, answers: Any = None) -> list[float]:
    """Return 1.0 where a completion equals one of its answers after normalisation, else 0.0."""
    return [
        float(any(normalize_answer(text) == normalize_answer(gold) for gold in golds))
        for text, golds in _with_answers(completions, references, answers)
    ]


def normalize_answer(text: str) -> str:
    """Convert to lower case without punctuation, articles and surplus blanks (SQuAD's evaluation script)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(text: str, gold: str) -> float:
    found, wanted = normalize_answer(text).split(), normalize_answer(gold).split()
    if gold.lower() in ("no answer", "cannotanswer") or not found or not wanted:
        return float(found == wanted)
    n_same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * n_same / (len(found) + len(wanted))


def _with_answers(
    completions: Sequence[str], references: Sequence[str] | None, answers: Any
) -> list[tuple[str, list[str]]]:
    golds = answers if answers is not None else references
    if golds is None:
        raise ConfigError(
            "The objective has nothing to compare completions with: the dataset has no `answers` column (a string, a "
            'list of strings, or SQuAD\'s {"text": [...]}), and its rows no labels.'
        )
    lists = [gold["text"] if isinstance(gold, Mapping) else gold for gold in golds]
    lists = [[gold] if isinstance(gold, str) else list(gold) or ["no answer"] for gold in lists]
    return list(zip(completions, lists, strict=True))
