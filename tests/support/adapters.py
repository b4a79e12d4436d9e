"""Every kind of adapter that PEFT can train without gradients, by name, and small models for them to sit on.

Does not: train or compare anything.
Invariant: an adapted model is a pure function of (model, kind, seed), and adapters start as something else than the
identity where PEFT lets them, so that a forgotten one shows in the logits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import PreTrainedModel, TrainerCallback

from tests.support.models import tiny_model
from tests.support.tokenizer import tiny_tokenizer

_ATTENTION = ["q_proj", "v_proj"]


def _lora(**options: Any) -> LoraConfig:
    named = {"r": 4, "target_modules": _ATTENTION, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**named, **options})


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": _lora,
    "rslora": lambda: _lora(use_rslora=True),
    "dora": lambda: _lora(use_dora=True),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM",
        init_ia3_weights=False,
    ),
    "vera": lambda: VeraConfig(r=8, target_modules=_ATTENTION, task_type="CAUSAL_LM", init_weights=False),
    "loha": lambda: LoHaConfig(r=4, target_modules=_ATTENTION, task_type="CAUSAL_LM", init_weights=False),
    "oft": lambda: OFTConfig(
        oft_block_size=8, target_modules=_ATTENTION, task_type="CAUSAL_LM", init_weights=False,
    ),
    "boft": lambda: BOFTConfig(
        boft_block_size=4, target_modules=_ATTENTION, task_type="CAUSAL_LM", init_weights=False,
    ),
    "ln tuning": lambda: LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm", "norm"], task_type="CAUSAL_LM"
    ),
    "trainable tokens": lambda: TrainableTokensConfig(
        token_indices=[8, 9, 11], target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_weights=False,
    ),
    "lora and tokens": lambda: _lora(trainable_token_indices={"embed_tokens": [8, 9, 11]}),
    "modules to save": lambda: _lora(modules_to_save=["lm_head"]),
    "target parameters": lambda: _lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
}  # fmt: skip
KINDS = tuple(ADAPTERS)
FUSED = ("target parameters",)
"""Their base keeps experts one by one in its files, and fuses them: as they are used, they are in no file."""


def base_of(kind: str) -> str:
    """The family that an adapter of this kind is tried on."""
    return "mixtral" if kind in FUSED else "llama"


def saved_base(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32) -> str:
    """A checkpoint folder of the base model, with its tokenizer."""
    tiny_model(base_of(kind), dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def adapted(model: PreTrainedModel, kind: str, *, seed: int = 3) -> PeftModel:
    """A model with an adapter drawn from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(model, ADAPTERS[kind]()))


class StopAt(TrainerCallback):
    """Ends a training early, as a crash between two steps would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def trainable_names(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
