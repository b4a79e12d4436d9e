"""Tiny random models of every family the trainers promise to work with, and batches for them, by name.

Does not: download, cache or train anything. A model is a pure function of (name, seed).

Dropout stays at the family's own (non-zero) default: a probe that forgot to switch it off shows as different bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

Task = Literal["causal", "masked", "classes", "seq2seq"]

VOCABULARY = 96
N_BLOCKS = 5  # the fewest with which block granularity can keep one block resident beside a full ring
N_CLASSES = 3
FIRST_WORD = 8  # ids below are special tokens somewhere
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}

_SIZES = {"hidden_size": 32, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_ROTARY = {**_SIZES, **SPECIAL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_UNTIED = {**_ROTARY, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Family:
    """One row of the matrix: how to make a model, and what kind of batch it takes."""

    make: Callable[[], PreTrainedModel]
    task: Task


def _opt(*, pre_norm: bool) -> PreTrainedModel:
    config = OPTConfig(
        **_SIZES,
        **SPECIAL,
        ffn_dim=64,
        max_position_embeddings=64,
        do_layer_norm_before=pre_norm,
        word_embed_proj_dim=32 if pre_norm else 16,  # OPT-350m: post-norm, with projections around the blocks
    )
    return OPTForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=N_BLOCKS, n_head=4, n_positions=64, **SPECIAL)
    return GPT2LMHeadModel(config)


def _neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        **_SIZES,
        **SPECIAL,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return GPTNeoXForCausalLM(config)


def _roberta(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    config = RobertaConfig(
        **_SIZES, **SPECIAL, intermediate_size=64, max_position_embeddings=66, num_labels=N_CLASSES, type_vocab_size=1
    )
    return model_class(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=N_BLOCKS, num_decoder_layers=N_BLOCKS,
        num_heads=4, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

FAMILIES: dict[str, Family] = {
    "opt": Family(lambda: _opt(pre_norm=True), "causal"),
    "opt-post-norm": Family(lambda: _opt(pre_norm=False), "causal"),
    "llama": Family(lambda: LlamaForCausalLM(LlamaConfig(**_UNTIED)), "causal"),
    "llama-tied": Family(lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY, tie_word_embeddings=True)), "causal"),
    "qwen3": Family(lambda: Qwen3ForCausalLM(Qwen3Config(**_UNTIED, head_dim=8)), "causal"),
    "mistral": Family(lambda: MistralForCausalLM(MistralConfig(**_UNTIED, sliding_window=8)), "causal"),
    "gemma2": Family(
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**_ROTARY, head_dim=8, sliding_window=8, attention_dropout=0.1, attn_implementation="eager")
        ),
        "causal",
    ),
    "gpt2": Family(_gpt2, "causal"),
    "phi3": Family(lambda: Phi3ForCausalLM(Phi3Config(**_UNTIED)), "causal"),
    "gpt-neox": Family(_neox, "causal"),
    "mixtral": Family(lambda: MixtralForCausalLM(MixtralConfig(**_UNTIED, **_EXPERTS, num_local_experts=4)), "causal"),
    "qwen3-moe": Family(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**_UNTIED, **_EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=8)
        ),
        "causal",
    ),
    "roberta-mlm": Family(lambda: _roberta(RobertaForMaskedLM), "masked"),
    "roberta-classes": Family(lambda: _roberta(RobertaForSequenceClassification), "classes"),
    "t5": Family(_t5, "seq2seq"),
}
NAMES = tuple(FAMILIES)


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family in eval mode; the same bits for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[name].make()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: at 1 and 0 a forgotten one would not show
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype).eval()


def task_of(name: str) -> Task:
    """What kind of labels a family takes."""
    return FAMILIES[name].task


def tiny_rows(name: str, n_rows: int, *, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Unpadded examples of one length with labels of the family's kind; a list is a dataset."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n_rows):
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **_labels(name, ids, generator)})
    return rows


def tiny_batch(name: str, n_rows: int = 2, *, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """`tiny_rows`, stacked."""
    rows = tiny_rows(name, n_rows, length=length, seed=seed)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _labels(name: str, ids: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    task = task_of(name)
    if task == "classes":
        return {"labels": torch.randint(0, N_CLASSES, (), generator=generator)}
    if task == "seq2seq":
        return {"labels": torch.randint(FIRST_WORD, VOCABULARY, (6,), generator=generator)}
    labels = ids.clone()
    if task == "masked":
        labels[1::2] = -100
    else:
        labels[:4] = -100
    return {"labels": labels}
