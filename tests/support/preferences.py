"""Pairs of answers, and the trainers that learn from them: quiet, offline, tiny, in a folder of the test's own."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from tests.support.models import SPECIAL, VOCABULARY
from tests.support.runs import QUIET
from tests.support.tokenizer import SUBJECTS, VERDICTS, tiny_tokenizer
from tests.support.trainings import small_model
from zo2trl import ZODPOConfig, ZODPOTrainer, ZORewardConfig, ZORewardTrainer


def pairs(n_rows: int = 8, *, start: int = 0, margin: bool = False) -> Dataset:
    """A prompt and two answers, of different lengths."""
    rows = []
    for i in range(start, start + n_rows):
        filler = " ".join(f"w{(7 * i + k) % 60}" for k in range(i % 4))
        prompt = " ".join(f"the {SUBJECTS[i % len(SUBJECTS)]} was {filler} verdict :".split())
        row: dict[str, Any] = {
            "prompt": prompt, "chosen": f" {VERDICTS[i % 2]}", "rejected": f" {VERDICTS[1 - i % 2]} w{i % 9}",
        }  # fmt: skip
        rows.append(row | ({"margin": 0.1 * i} if margin else {}))
    return Dataset.from_list(rows)


def dpo_trainer(
    folder: Path, model: Any = None, rows: Any = None, *, extra: dict | None = None, **options: Any
) -> ZODPOTrainer:
    """A ZODPOTrainer on `pairs`; `extra` goes to the trainer, all else to ZODPOConfig."""
    named = {"processing_class": tiny_tokenizer(), "train_dataset": pairs() if rows is None else rows, **(extra or {})}
    config = ZODPOConfig(**{"output_dir": str(folder), **QUIET, "max_length": 32, **options})
    return ZODPOTrainer(model=small_model() if model is None else model, args=config, **named)


def reward_trainer(
    folder: Path, model: Any = None, rows: Any = None, *, extra: dict | None = None, **options: Any
) -> ZORewardTrainer:
    """A ZORewardTrainer on `pairs`; `extra` goes to the trainer, all else to ZORewardConfig."""
    named = {"processing_class": tiny_tokenizer(), "train_dataset": pairs() if rows is None else rows, **(extra or {})}
    config = ZORewardConfig(**{"output_dir": str(folder), **QUIET, "max_length": 32, **options})
    return ZORewardTrainer(model=tiny_scorer() if model is None else model, args=config, **named)


def tiny_scorer(*, seed: int = 0) -> PreTrainedModel:
    """A random Llama with one score for a text."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, **SPECIAL, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config).eval()


def lora(**options: Any) -> LoraConfig:
    """Adapters that change the model from the start."""
    named = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**named, **options})


scorer_lora = partial(lora, task_type="SEQ_CLS", modules_to_save=["score"])
"""Adapters with a trained head."""
