"""A step on a GPU in every mode, against bare forwards and raw copies measured in the same run.

    python -m benchmarks.step_gpu --size 1.3b --out benchmarks/results/step_gpu_opt_1.3b.json

OPT by size name with random bf16 weights, one batch of 1 x 2048 tokens, full fine-tuning. Modes: everything resident,
all blocks streamed from host memory, all blocks streamed from disk. Reported per mode: median step time, its ratio to
two bare forwards, bytes per step and link, and the allocator's peak.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks._report import add_out, median_seconds, write_report
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.tiers.placement import Budgets

SIZES = {"125m": (12, 768, 12), "1.3b": (24, 2048, 32), "6.7b": (32, 4096, 32), "13b": (40, 5120, 40)}
LINKS = ("h2d", "d2h", "disk_read", "disk_written")
EVERYTHING = 1 << 40

MODES: dict[str, dict[str, Any]] = {
    "resident": {"budgets": Budgets(device=EVERYTHING, cpu=0)},
    "streamed from host memory": {"budgets": Budgets(device="min", cpu=EVERYTHING)},
    "streamed from host memory, written back every step": {
        "budgets": Budgets(device="min", cpu=EVERYTHING), "write_back_every": 1,
    },
    "streamed from disk": {"budgets": Budgets(device="min", cpu=0)},
}  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--direction", default="rademacher")
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")

    ids = torch.randint(4, 50000, (1, options.tokens), device="cuda")
    forwards_s = two_forwards_s(make_model(options.size).cuda(), ids, repeats=options.repeats)
    rows = {
        mode: run(make_model(options.size), ids, mode=MODES[mode], options=options, forwards_s=forwards_s)
        for mode in MODES
    }
    write_report(
        options.out, model=f"OPT-{options.size}", tokens=options.tokens, direction=options.direction,
        two_forwards_ms=forwards_s * 1e3, host_to_device_gb_s=copy_gb_s(), modes=rows,
    )  # fmt: skip


def make_model(size: str) -> OPTForCausalLM:
    """Random bf16 weights, made on the GPU and moved to the host."""
    n_blocks, hidden, heads = SIZES[size]
    config = OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=n_blocks, num_attention_heads=heads,
        word_embed_proj_dim=hidden, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    return model.cpu().eval()


def two_forwards_s(model: OPTForCausalLM, ids: torch.Tensor, *, repeats: int) -> float:
    """Two forwards with a loss, nothing else."""

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=ids, labels=ids)

    return median_seconds(forwards, repeats=repeats, warm_up=2)


def copy_gb_s() -> float:
    """Pinned host memory to the device, 512 MiB at once."""
    host = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    return host.numel() / median_seconds(lambda: device.copy_(host, non_blocking=True), repeats=5, warm_up=2) / 1e9


def run(
    model: OPTForCausalLM, ids: torch.Tensor, *, mode: dict[str, Any], options: argparse.Namespace, forwards_s: float
) -> dict[str, Any]:
    """One mode: steady state after three steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(
            model,
            EngineOptions(
                device=torch.device("cuda"), store_dir=Path(folder) / "store", seed=0, granularity="block",
                direction=options.direction, **mode,
            ),
        )  # fmt: skip
        steps = iter(range(1 << 30))

        def step() -> None:
            engine.step([lambda: model(input_ids=ids, labels=ids).loss], step=next(steps))
            engine.commit(learning_rate=1e-6, weight_decay=0.0)

        step_s = median_seconds(step, repeats=options.repeats, warm_up=3)
        n_steps = options.repeats + 3
        row = {
            "step_ms": step_s * 1e3,
            "over_two_forwards": step_s / forwards_s,
            "tokens_per_second": ids.numel() / step_s,
            "bytes_per_step": {link: engine.store.traffic[link] / n_steps for link in LINKS},
            "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
            "store": engine.store.summary(),
        }
        engine.shutdown()
    return row


if __name__ == "__main__":
    main()
