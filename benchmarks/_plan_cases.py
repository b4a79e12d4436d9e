"""The models and budgets that benchmarks/plan.py predicts and trains, for a machine with a GPU and for one without."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config

__all__ = ["Case", "cases"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with random weights, the shape of its step, and what it is given to live in."""

    config: PreTrainedConfig
    dtype: torch.dtype
    shape: dict[str, int]
    on_gpu: bool

    def budgets(self, n_bytes: int) -> dict[str, dict[str, str]]:
        """Name -> budgets for a model of so many bytes."""
        if self.on_gpu:
            most = str(n_bytes * 2 // 3)  # weights, ring, scratch and activations
            return {
                "resident": {"device_memory": str(2 * n_bytes + (8 << 30)), "cpu_memory": "0"},
                "host memory": {"device_memory": most, "cpu_memory": str(2 * n_bytes)},
                "three tiers": {"device_memory": most, "cpu_memory": str(n_bytes * 2 // 5)},
            }
        third = str(n_bytes // 3)
        return {
            "resident": {"device_memory": "16GB", "cpu_memory": "0"},
            "host memory": {"device_memory": third, "cpu_memory": "16GB"},
            "disk": {"device_memory": third, "cpu_memory": "0"},
        }


def cases(*, on_gpu: bool) -> dict[str, Case]:
    """Name -> case."""
    return _on_gpu() if on_gpu else _on_cpu()


def _on_gpu() -> dict[str, Case]:
    """Steps of 0.1 s and more, beside which a trainer's own Python does not count."""
    common = {"dtype": torch.bfloat16, "on_gpu": True}
    return {
        "opt 1.3B bfloat16": Case(
            config=OPTConfig(hidden_size=2048, word_embed_proj_dim=2048, num_hidden_layers=24, ffn_dim=8192,
                             num_attention_heads=32),
            shape={"per_device_train_batch_size": 8, "max_length": 1024}, **common,
        ),
        "llama 3B bfloat16": Case(
            config=LlamaConfig(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                               num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
                               max_position_embeddings=4096),
            shape={"per_device_train_batch_size": 2, "max_length": 2048, "gradient_accumulation_steps": 2}, **common,
        ),
        "opt 6.7B bfloat16": Case(
            config=OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, num_hidden_layers=32, ffn_dim=16384,
                             num_attention_heads=32),
            shape={"per_device_train_batch_size": 2, "max_length": 2048}, **common,
        ),
    }  # fmt: skip


def _on_cpu() -> dict[str, Case]:
    common = {"vocab_size": 8192, "max_position_embeddings": 1024}
    return {
        "opt 40M float32": Case(
            config=OPTConfig(**common, hidden_size=512, word_embed_proj_dim=512, num_hidden_layers=12, ffn_dim=2048,
                             num_attention_heads=8),
            dtype=torch.float32, shape={"per_device_train_batch_size": 4, "max_length": 128}, on_gpu=False,
        ),
        "llama 100M float32": Case(
            config=LlamaConfig(**common, hidden_size=768, intermediate_size=2048, num_hidden_layers=13,
                               num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True),
            dtype=torch.float32, shape={"per_device_train_batch_size": 2, "max_length": 256}, on_gpu=False,
        ),
        "qwen3 170M bfloat16": Case(
            config=Qwen3Config(**common, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, head_dim=64,
                               num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True),
            dtype=torch.bfloat16,
            shape={"per_device_train_batch_size": 2, "max_length": 256, "gradient_accumulation_steps": 2},
            on_gpu=False,
        ),
    }  # fmt: skip
