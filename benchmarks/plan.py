"""Whether `zo2trl plan` tells the truth: what it predicts, beside what real trainings took, for three models.

    python -m benchmarks.plan --out benchmarks/results/plan_cpu.json

Each model trains under three budgets: everything resident, the blocks in host memory, the blocks on disk. Every
training is a process of its own. What is compared is the peak of its anonymous memory and the mean time of a step;
the prediction is made from the model's config.json alone, before the training starts. The promise is

    peak memory within 10 %, step time within 25 %
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen3Config, TrainerCallback

from benchmarks._report import add_out, write_report
from benchmarks.memory import Peak, anonymous_bytes

WARM_UP_STEPS = 3
STEPS = 24
VOCABULARY = 8192


def models() -> dict[str, tuple[PreTrainedConfig, torch.dtype, dict[str, int]]]:
    """Name -> config, stored dtype, and the shape of a step."""
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024}
    return {
        "opt 40M float32": (
            OPTConfig(**common, hidden_size=512, word_embed_proj_dim=512, num_hidden_layers=12, ffn_dim=2048,
                      num_attention_heads=8),
            torch.float32, {"per_device_train_batch_size": 4, "max_length": 128},
        ),
        "llama 100M float32": (
            LlamaConfig(**common, hidden_size=768, intermediate_size=2048, num_hidden_layers=13,
                        num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True),
            torch.float32, {"per_device_train_batch_size": 2, "max_length": 256},
        ),
        "qwen3 170M bfloat16": (
            Qwen3Config(**common, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, head_dim=64,
                        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True),
            torch.bfloat16,
            {"per_device_train_batch_size": 2, "max_length": 256, "gradient_accumulation_steps": 2},
        ),
    }  # fmt: skip


def budgets(n_bytes: int) -> dict[str, dict[str, str]]:
    """Name -> budgets for a model of so many bytes."""
    third = str(n_bytes // 3)
    return {
        "resident": {"device_memory": "16GB", "cpu_memory": "0"},
        "host memory": {"device_memory": third, "cpu_memory": "16GB"},
        "disk": {"device_memory": third, "cpu_memory": "0"},
    }


def main() -> None:
    """Predict, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--budgets", nargs="*", help="only these")
    add_out(parser)
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(**json.loads(options.train))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        for name in options.models or models():
            folder = make_model(name, Path(scratch))
            n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for budget, memory in budgets(n_bytes).items():
                if options.budgets and budget not in options.budgets:
                    continue
                rows.append(
                    row(name, budget, folder=folder, store=folder.with_name(f"{folder.name}-store"), memory=memory)
                )
                print(json.dumps(rows[-1]), flush=True)
    write_report(
        options.out,
        worst_memory_error=max(abs(each["memory_error"]) for each in rows),
        worst_seconds_error=max(abs(each["seconds_error"]) for each in rows),
        rows=rows,
    )


def make_model(name: str, scratch: Path) -> Path:
    """A folder with random weights and a tokenizer that nobody asks for a word."""
    from tests.support.tokenizer import tiny_tokenizer

    config, dtype, _ = models()[name]
    folder = scratch / name.replace(" ", "-")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def row(name: str, budget: str, *, folder: Path, store: Path, memory: dict[str, str]) -> dict[str, Any]:
    """One prediction and one training."""
    shape = models()[name][2]
    arguments = {**shape, **memory}
    predicted = predict(folder, store=store, arguments=arguments)
    command = [sys.executable, "-m", "benchmarks.plan", "--train"]
    given = json.dumps({"folder": str(folder), "store": str(store), "arguments": arguments})
    ended = subprocess.run([*command, given], check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(ended.stdout.splitlines()[-1])
    return {
        "model": name, "budget": budget, "arguments": arguments, "predicted": predicted, "measured": measured,
        "memory_error": predicted["host_peak_bytes"] / measured["host_peak_bytes"] - 1,
        "seconds_error": predicted["seconds_per_step"] / measured["seconds_per_step"] - 1,
    }  # fmt: skip


def predict(folder: Path, *, store: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `zo2trl plan --json` says."""
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "zo2trl", "plan", str(folder), "--store_dir", str(store), "--use_cpu", "--json",
               *options]  # fmt: skip
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(ended.stdout), "model": folder.name}


class Stopwatch(TrainerCallback):
    """When every step ended."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends_s.append(time.perf_counter())


def train(*, folder: str, store: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train some steps in this process."""
    from datasets import Dataset

    from zo2trl import ZOSFTConfig, ZOSFTTrainer

    imported, watch = anonymous_bytes(), Stopwatch()
    length, n_rows = arguments["max_length"], 64
    rows = torch.randint(10, VOCABULARY, (n_rows, length)).tolist()
    n_steps = WARM_UP_STEPS + STEPS
    with tempfile.TemporaryDirectory() as output, Peak() as peak:
        trainer = ZOSFTTrainer(
            model=folder,
            args=ZOSFTConfig(
                output_dir=output, store_dir=store, max_steps=n_steps, report_to="none", save_strategy="no",
                use_cpu=True, bf16=False, logging_steps=n_steps, disable_tqdm=True, **arguments,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
        where = trainer.engine.store.summary()
        every = dict(trainer.engine.store.write_schedule.write_back)
        trainer.close()
    ends_s = watch.ends_s[WARM_UP_STEPS - 1 :]
    each_s = [after - before for before, after in itertools.pairwise(ends_s)]
    logs = [entry for entry in trainer.state.log_history if "zo/projected_grad" in entry][-1]
    return {
        "store": where,
        "write_back_every": every,
        "host_peak_bytes": peak.n_bytes,
        "host_imported_bytes": imported,
        "seconds_per_step": statistics.mean(each_s),
        "median_seconds_per_step": statistics.median(each_s),
        "disk_read_bytes_per_step": logs["zo/bytes_disk_read"],
        "disk_written_bytes_per_step": logs["zo/bytes_disk_written"],
    }


if __name__ == "__main__":
    main()
