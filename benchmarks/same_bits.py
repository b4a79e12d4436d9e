"""Write losses and final weights of many small trainings to a file, to compare two versions of the code.

Run it before a change that must not alter a bit, run it after, and compare the two files::

    python -m benchmarks.same_bits --output before.json
    python -m benchmarks.same_bits --output after.json --compare before.json
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from zo2trl import ZOConfig, ZODPOConfig, ZODPOTrainer, ZOTrainer

N_STEPS = 6
ROWS, LENGTH, VOCABULARY = 4, 24, 96
TILE = 4096  # elements; a tensor takes a multiple of these in a unit
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
        max_position_embeddings=64,
    ),
}  # fmt: skip
PLACES: dict[str, dict[str, Any]] = {
    "resident": {"device_memory": "1GB", "cpu_memory": 0},
    "three tiers": {},  # `three_tiers` computes budgets from the model's size
}


@dataclass(frozen=True)
class Case:
    """A Case is one training."""

    family: str
    dtype: str
    place: str
    kind: str = "full"
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name the case, for messages and as the key of its results."""
        beside = "".join(f" {name}={value}" for name, value in self.arguments.items())
        return f"{self.family} {self.dtype} {self.place} {self.kind}{beside}"


def cpu_cases() -> Iterator[Case]:
    """Yield three families in two dtypes and two places, then LoRA, DPO, accumulation and Gaussian noise."""
    for family in FAMILIES:
        for dtype in ("float32", "bfloat16"):
            for place in PLACES:
                yield Case(family, dtype, place)
    yield Case("llama", "bfloat16", "three tiers", "lora")
    yield Case("opt", "float32", "three tiers", "dpo")
    yield Case("opt", "bfloat16", "three tiers", "full", {"gradient_accumulation_steps": 3, "num_directions": 2})
    yield Case("llama", "float32", "three tiers", "full", {"direction": "gaussian", "weight_decay": 0.1})


def gpu_cases() -> Iterator[Case]:
    """Yield cases for the kernels: both kinds of noise, resident and streamed."""
    for family, direction in (("opt", "rademacher"), ("llama", "gaussian")):
        for place in PLACES:
            yield Case(family, "bfloat16", place, "full", {"direction": direction, "num_directions": 2})


def make_model(case: Case) -> PreTrainedModel:
    """Make a model with the same random weights at every call."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[case.family]())
    return model.to(getattr(torch, case.dtype))


def three_tiers(model: PreTrainedModel) -> dict[str, Any]:
    """Compute budgets: as little of the device as works, and host memory for about half of the blocks."""
    parameters = [p for block in _blocks(model) for p in block.parameters()]
    n_bytes = sum(-(-p.numel() // TILE) * TILE * p.element_size() for p in parameters)
    return {"device_memory": "min", "cpu_memory": int(0.5 * n_bytes)}


def _blocks(model: PreTrainedModel) -> Any:
    return model.get_decoder().layers


def _rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(2)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _pairs() -> list[dict[str, list[int]]]:
    half = LENGTH // 2
    return [
        {"prompt_ids": row["input_ids"][:half], "chosen_ids": row["input_ids"][half:],
         "rejected_ids": row["input_ids"][:half][::-1]}
        for row in _rows()
    ]  # fmt: skip


def _trainer(case: Case, folder: Path) -> Any:
    model = make_model(case)
    budgets = PLACES[case.place] or three_tiers(model)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": N_STEPS, "learning_rate": 1e-3, "logging_steps": 1,
        "per_device_train_batch_size": ROWS, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "seed": 3, "use_cpu": not torch.cuda.is_available(), "bf16": False, **budgets, **case.arguments,
    }  # fmt: skip
    if case.kind == "dpo":
        return _dpo_trainer(model, arguments)
    if case.kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(4)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora)
    return ZOTrainer(model, args=ZOConfig(**arguments), train_dataset=Dataset.from_list(_rows()))


def _dpo_trainer(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
    text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    rows = [
        {"prompt": text(p["prompt_ids"]), "chosen": text(p["chosen_ids"]), "rejected": text(p["rejected_ids"])}
        for p in _pairs()
    ]
    args = ZODPOConfig(**arguments)
    return ZODPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def run_case(case: Case) -> dict[str, Any]:
    """Train, and return losses, digest of the weights, and tiers."""
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    try:
        trainer = _trainer(case, folder)
        trainer.train()
        tiers = sorted({tier for _, tier, _ in trainer.engine.store.describe()})
        losses = [entry["loss"].hex() for entry in trainer.state.log_history if "loss" in entry]
        model = trainer.model
        trainer.close()
        return {"losses": losses, "sha256": _digest(model), "tiers": tiers}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    """Run all cases; with `--compare` the exit code is 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of another version")
    args = parser.parse_args()
    cases = list(gpu_cases() if torch.cuda.is_available() else cpu_cases())
    found = {case.name: run_case(case) for case in cases}
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.compare is None:
        return 0
    before = json.loads(args.compare.read_text())
    differing = [
        name for name in found
        if any(found[name][key] != before.get(name, {}).get(key) for key in ("losses", "sha256"))
    ]  # fmt: skip
    print(f"{len(found) - len(differing)} of {len(found)} trainings are equal bit for bit.")
    for name in differing:
        print(f"differs: {name}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
