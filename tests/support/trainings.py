"""Small trainings by name, each with a combination of things that a resumed run must not lose.

Does not: compare or crash anything (tests/support/crashes.py).
Invariant: a training is made from the same start each time, whatever was drawn or trained before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback

from tests.support.models import SPECIAL, VOCABULARY, tiny_model, tiny_rows
from tests.support.runs import EVERYTHING_ON_DEVICE, STREAMED_FROM_DISK, budgets_for_all_tiers, sft_trainer, zo_trainer
from tests.support.runs import prompts as prompt_rows
from tests.support.tokenizer import tiny_tokenizer


@dataclass(frozen=True, eq=False)
class Training:
    """Calling it with a folder makes a trainer there; options given then come on top.

    Args:
        options: of the config.
        model, rows, extra: make the model, the dataset and what else the trainer takes.
        is_sft: a ZOSFTTrainer instead of a ZOTrainer.
    """

    options: Mapping[str, Any]
    model: Callable[[], Any] = lambda: tiny_model("opt")
    rows: Callable[[], Any] = lambda: tiny_rows("opt", 11)
    extra: Callable[[], dict[str, Any]] = dict
    is_sft: bool = False

    def __call__(self, folder: Path, **options: Any) -> Any:
        make = sft_trainer if self.is_sft else zo_trainer
        trainer = make(folder, self.model(), self.rows(), extra=self.extra(), **{**self.options, **options})
        trainer.remove_callback(PrinterCallback)
        return trainer

    def having(self, **options: Any) -> "Training":
        """The same with other options."""
        return replace(self, options={**self.options, **options})

    def of(self, model: Callable[[], Any]) -> "Training":
        """The same of another model."""
        return replace(self, model=model)

    def places(self, folder: Path) -> list[dict[str, Any]]:
        """Where weights live in one life after the other: all three tiers, then all kinds of other choices."""
        three_tiers = budgets_for_all_tiers(partial(self, folder), "block")
        return [
            {**three_tiers, "write_back_every": "3", "max_replay_s": 0},
            {**STREAMED_FROM_DISK, "granularity": "leaf", "write_back_every": "2"},
            {**EVERYTHING_ON_DEVICE, "max_replay_s": 1e9},
            {**three_tiers, "granularity": "leaf", "write_back_every": "1", "sync_every": 3},
        ]


def small_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two blocks: too few for three tiers, and quick."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, **SPECIAL, vocab_size=VOCABULARY, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def lora(*, adapter_seed: int = 0, base_seed: int = 0) -> nn.Module:
    """A tiny Llama with adapters drawn from a seed of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter_seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights="gaussian")
        return get_peft_model(tiny_model("llama", seed=base_seed), config)


def partly_frozen() -> nn.Module:
    """A tiny OPT of which one kind of layer and one whole block are trained."""
    model = tiny_model("opt")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc1" in name or "layers.2" in name)
    return model


def loss_with_gaps(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross entropy that is not a number for some batches, by their labels."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    loss = functional.cross_entropy(logits, labels[:, 1:].flatten())
    return loss * torch.nan if int(labels[0, -1]) % 3 == 0 else loss


def masking_collator() -> DataCollatorForLanguageModeling:
    """Masks are drawn from torch's global generator, in the main process."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w1"})
    return DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4)


def unmasked(n_rows: int = 11) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in tiny_rows("roberta-mlm", n_rows)]


def stream(rows: list[dict[str, Any]]) -> Any:
    """A dataset that has no length."""
    lists = [{key: torch.as_tensor(value).tolist() for key, value in row.items()} for row in rows]
    return Dataset.from_list(lists).to_iterable_dataset()


def held_out(n_rows: int = 4, *, seed: int = 5) -> list[dict[str, Any]]:
    return tiny_rows("opt", n_rows, seed=seed)


def never_better(predictions: Any) -> dict[str, float]:
    """A metric that early stopping runs out of patience with."""
    return {"score": 1.0, "n_rows": len(predictions.label_ids)}


_SAVING = {"save_strategy": "steps", "save_steps": 3}
_EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1e-2}

TRAININGS: dict[str, Training] = {
    # 6 micro-batches an epoch, so steps of 4 and 2; nothing coincides: logs at 3, 6, saves at 3, evaluations at 2, 4
    "epochs": Training(
        {
            "max_steps": -1, "num_train_epochs": 4, "gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine",
            "warmup_steps": 2, "logging_steps": 3, "weight_decay": 0.1, "include_num_input_tokens_seen": "all",
            "eval_on_start": True, **_SAVING, **_EVALUATING,
        },
        extra=lambda: {"eval_dataset": {"a": held_out(2), "b": held_out(3, seed=6)}},
    ),
    "plateau": Training(
        {
            "max_steps": 8, "lr_scheduler_type": "reduce_lr_on_plateau", "learning_rate": 1e-2,
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.0}, "metric_for_best_model": "loss",
            **_SAVING, **_EVALUATING, "eval_steps": 1,
        },
        extra=lambda: {"eval_dataset": held_out()},
    ),
    "bf16": Training(
        {
            "max_steps": 8, "num_directions": 3, "max_grad_norm": 0.5, "lr_scheduler_type": "linear",
            "logging_steps": 4, **_SAVING,
        },
        model=partial(tiny_model, "opt", dtype=torch.bfloat16),
    ),
    "lora": Training({"max_steps": 8, "weight_decay": 0.1, **_SAVING}, model=lora),
    "frozen": Training({"max_steps": 8, "direction": "gaussian", **_SAVING}, model=partly_frozen),
    "seq2seq": Training(
        {"max_steps": 7, "direction": "mezo", **_SAVING},
        model=partial(tiny_model, "t5"), rows=partial(tiny_rows, "t5", 11),
    ),
    "skips": Training(
        {"max_steps": 9, "logging_steps": 2, "logging_nan_inf_filter": False, **_SAVING},
        extra=lambda: {"compute_loss_func": loss_with_gaps},
    ),
    "masking": Training(
        {"max_steps": 10, "gradient_accumulation_steps": 2, **_SAVING, **_EVALUATING},
        model=partial(tiny_model, "roberta-mlm"), rows=unmasked,
        extra=lambda: {"data_collator": masking_collator(), "eval_dataset": unmasked(3)},
    ),
    "workers": Training({"max_steps": 9, "dataloader_num_workers": 2, **_SAVING}),
    "by length": Training({"max_steps": 11, "train_sampling_strategy": "group_by_length", **_SAVING, "save_steps": 4}),
    "stream": Training(
        {"max_steps": 9, **_SAVING}, model=partial(tiny_model, "roberta-mlm"),
        rows=lambda: stream(unmasked(8)), extra=lambda: {"data_collator": masking_collator()},
    ),
    "best": Training(
        {"max_steps": 12, "save_total_limit": 2, **_BEST, **_EVALUATING, **_SAVING, "save_steps": 2},
        extra=lambda: {"eval_dataset": held_out()},
    ),
    "patience": Training(
        {
            "max_steps": 20, **_BEST, **_EVALUATING, **_SAVING, "eval_steps": 1, "save_steps": 2,
            "metric_for_best_model": "score", "greater_is_better": True, "eval_on_start": True,
        },
        extra=lambda: {
            "eval_dataset": held_out(), "compute_metrics": never_better, "callbacks": [EarlyStoppingCallback(5)],
        },
    ),
    "sft": Training(
        {
            "max_steps": 9, "gradient_accumulation_steps": 2, "logging_steps": 2, "lr_scheduler_type": "linear",
            **_SAVING, **_EVALUATING, "eval_steps": 4,
        },
        rows=lambda: prompt_rows(11), extra=lambda: {"eval_dataset": prompt_rows(4, start=20)}, is_sft=True,
    ),
    "packed": Training(
        {"max_steps": 7, "packing": True, "max_length": 24, **_SAVING},
        model=partial(tiny_model, "llama"), rows=lambda: prompt_rows(16), is_sft=True,
    ),
}  # fmt: skip

PLAIN = Training({"max_steps": 6, "save_strategy": "steps", "save_steps": 2}, model=small_model)
"""Checkpoints at 2, 4 and 6, and an epoch that ends at 6."""

UNSAVED = Training({"max_steps": 6}, model=small_model)
