"""Measure the memory of training a model from disk: the peak of the process's anonymous memory.

    python -m benchmarks.memory --out benchmarks/results/memory_cpu.json

The benchmark makes a random 500 M-parameter Llama-shaped checkpoint (fp32, tied vocabulary of 8192 words, 2 GB on
disk) in a child process, then trains it from disk with `device_memory="256MB", cpu_memory="256MB"`. Anonymous memory
is what the process needs for itself; the kernel may drop pages of mapped files at any time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._report import add_out, write_report

INTERVAL_S = 0.02
BUDGET = "256MB"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.make)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        checkpoint = Path(folder) / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.memory", "--make", str(checkpoint)], check=True)
        write_report(options.out, **train(checkpoint, Path(folder) / "out", n_steps=options.steps))


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint of about 500 M parameters in fp32."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=38, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def train(checkpoint: Path, output: Path, *, n_steps: int) -> dict[str, object]:
    """Train a few steps and save; return anonymous memory after the imports and at its peak."""
    from zo2trl import ZOConfig, ZOTrainer

    imported = anonymous_bytes()
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 8192, (8, 64))]
    with Peak() as peak:
        trainer = ZOTrainer(
            model=str(checkpoint),
            args=ZOConfig(
                output_dir=str(output), max_steps=n_steps, device_memory=BUDGET, cpu_memory=BUDGET,
                per_device_train_batch_size=1, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
            ),
            train_dataset=rows,
        )  # fmt: skip
        where = trainer.engine.store.summary()
        trainer.train()
        trainer.save_model(str(output / "final"))
    logs = [entry for entry in trainer.state.log_history if "zo/projected_grad" in entry]
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "store": where,
        "anonymous_after_imports_bytes": imported,
        "anonymous_peak_bytes": peak.n_bytes,
        "disk_read_bytes_per_step": logs[-1]["zo/bytes_disk_read"],
        "disk_written_bytes_per_step": logs[-1]["zo/bytes_disk_written"],
    }


class Peak:
    """A Peak samples the process's anonymous memory in a thread while the block runs."""

    n_bytes = 0

    def __enter__(self) -> "Peak":
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self.n_bytes = max(self.n_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Read the memory of this process that no file backs: RssAnon, and RssShmem, which includes the ring."""
    sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


if __name__ == "__main__":
    main()
