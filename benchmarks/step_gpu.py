"""A step on a GPU in every mode, against bare forwards, raw copies and raw reads measured in the same run.

    python -m benchmarks.step_gpu --model opt-13b --out benchmarks/results/step_gpu_opt_13b.json
    python -m benchmarks.step_gpu --model opt-13b --modes streamed --device_memory 12GB

OPT or Llama by size name with random weights made on the GPU, full fine-tuning with SGD, one batch of 1 x 2048 tokens.
Reported per mode: median step time and tokens per second, what bounds it and the ratio to that bound, bytes per step
and link, and the peaks of the allocator, of the device, of pinned and of anonymous host memory.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks._floors import copy_rates, two_forwards_s
from benchmarks._report import add_out, write_report
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import Engine
from zo2trl.tiers.placement import Budgets, parse_size

# blocks, hidden size, feed-forward size, heads
OPT = {
    "opt-125m": (12, 768, 3072, 12), "opt-1.3b": (24, 2048, 8192, 32), "opt-6.7b": (32, 4096, 16384, 32),
    "opt-13b": (40, 5120, 20480, 40), "opt-30b": (48, 7168, 28672, 56),
}  # fmt: skip
LLAMA = {"llama-1b": (16, 2048, 8192, 32), "llama-8b": (32, 4096, 14336, 32)}
LINKS = ("h2d", "d2h", "disk_read", "disk_written")
EVERYTHING = 1 << 40
STEADY = 4  # steps before measuring: kernels compile, the ring fills, the first write-backs happen

MODES: dict[str, dict[str, Any]] = {
    "resident": {"device": EVERYTHING, "cpu": 0},
    "streamed": {"device": "min", "cpu": EVERYTHING},
    "written": {"device": "min", "cpu": EVERYTHING, "write_back_every": 1},
    "directions": {"device": "min", "cpu": EVERYTHING, "num_directions": 2},
    "batches": {"device": "min", "cpu": EVERYTHING, "n_batches": 4},
    "lora": {"device": "min", "cpu": EVERYTHING, "lora": True},
    "disk": {"device": "min", "cpu": 0},
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*OPT, *LLAMA], default="opt-1.3b")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["resident", "streamed", "written"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--direction", default="rademacher")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"])
    parser.add_argument("--granularity", default="block")
    parser.add_argument("--write_back_every", type=int)
    parser.add_argument("--device_memory", nargs="*", default=[], help="budgets to use in place of the mode's own")
    parser.add_argument("--cpu_memory")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--store", type=Path, help="folder for stores; for the disk mode, on the disk to measure")
    add_out(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False

    ids = torch.randint(4, 32000, (1, options.tokens), device="cuda")
    model = make_model(options)
    floors = {"two_forwards_ms": two_forwards_s(model, ids, repeats=options.repeats) * 1e3, **copy_rates()}
    del model
    rows = {}
    for name in options.modes:
        for budget in options.device_memory or [None]:
            mode = dict(MODES[name]) | ({"device": parse_size(budget, argument="--device_memory")} if budget else {})
            label = f"{name} {budget}" if budget else name
            rows[label] = run(ids, mode=mode, options=options, floors=floors)
            print(label, rows[label], flush=True)
    write_report(options.out, model=options.model, tokens=options.tokens, floors=floors, modes=rows)


def make_model(options: argparse.Namespace) -> nn.Module:
    """Random weights on the GPU."""
    torch.manual_seed(0)
    if options.model in OPT:
        n_blocks, hidden, wide, heads = OPT[options.model]
        config: Any = OPTConfig(
            hidden_size=hidden, ffn_dim=wide, num_hidden_layers=n_blocks, num_attention_heads=heads,
            word_embed_proj_dim=hidden, max_position_embeddings=2048, use_cache=False,
        )  # fmt: skip
        model_class: Any = OPTForCausalLM
    else:
        n_blocks, hidden, wide, heads = LLAMA[options.model]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=wide, num_hidden_layers=n_blocks, num_attention_heads=heads,
            num_key_value_heads=8, max_position_embeddings=8192, use_cache=False,
        )  # fmt: skip
        model_class = LlamaForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device("cuda"):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


@contextmanager
def opened(model: nn.Module, mode: dict[str, Any], options: argparse.Namespace) -> Iterator[Engine]:
    """An engine in a folder of its own. Nothing is kept of the first weights: they can be drawn again."""
    cpu = parse_size(options.cpu_memory, argument="--cpu_memory") if options.cpu_memory else mode["cpu"]
    with tempfile.TemporaryDirectory(dir=options.store) as folder:
        engine = open_engine(
            model,
            EngineOptions(
                budgets=Budgets(device=mode["device"], cpu=cpu), device=torch.device("cuda"), seed=0,
                store_dir=Path(folder) / "store", granularity=options.granularity, direction=options.direction,
                rounding=options.rounding, num_directions=mode.get("num_directions", 1),
                write_back_every=options.write_back_every or mode.get("write_back_every", "auto"),
                base_folder="random weights of benchmarks/step_gpu.py",
            ),
        )  # fmt: skip
        engine.on_shutdown += [handle.remove for handle in hook_heads(model)]
        try:
            yield engine
        finally:
            engine.shutdown(flush=False)


def run(
    ids: torch.Tensor, *, mode: dict[str, Any], options: argparse.Namespace, floors: dict[str, float]
) -> dict[str, Any]:
    """One mode in its steady state."""
    model = make_model(options)
    if mode.get("lora"):
        model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    n_batches = mode.get("n_batches", 1)
    started_s = time.perf_counter()
    with opened(model, mode, options) as engine:
        opened_s = time.perf_counter() - started_s
        gc.collect()
        torch.cuda.empty_cache()
        numbers = iter(range(1 << 30))

        def loss() -> torch.Tensor:
            with deferring_logits():
                return model(input_ids=ids, labels=ids).loss

        def step() -> None:
            engine.step([loss] * n_batches, step=next(numbers))
            engine.commit(learning_rate=1e-6, weight_decay=0.0)

        for _ in range(STEADY):
            step()
        torch.cuda.reset_peak_memory_stats()
        before = dict(engine.store.traffic)
        step_s = []
        for _ in range(options.repeats):
            started_s = time.perf_counter()
            step()
            step_s.append(time.perf_counter() - started_s)
        n_bytes = {link: (engine.store.traffic[link] - before.get(link, 0)) / options.repeats for link in LINKS}
        free, total = torch.cuda.mem_get_info()
        row = {
            "step_ms": statistics.median(step_s) * 1e3,
            "slowest_step_ms": max(step_s) * 1e3,
            "tokens_per_second": n_batches * ids.numel() / statistics.median(step_s),
            "bytes_per_step": n_bytes,
            "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
            "device_used_bytes": total - free,
            "cpu_tier_bytes": engine.store.placement.cpu_bytes,
            "anonymous_bytes": psutil.Process().memory_info().rss - psutil.Process().memory_info().shared,
            "store": engine.store.summary(),
            "opened_s": opened_s,
        }
    compute_ms = floors["two_forwards_ms"] * n_batches * mode.get("num_directions", 1)
    link_ms = n_bytes["h2d"] / floors["up_gb_s"] / 1e6
    # What goes down shares the link with what comes up: measured both at once, each way gets less.
    duplex_ms = max(n_bytes["h2d"], n_bytes["d2h"]) / floors["each_way_gb_s"] / 1e6
    row |= {
        "over_compute": row["step_ms"] / compute_ms,
        "over_upload": row["step_ms"] / link_ms if link_ms else None,
        "over_duplex": row["step_ms"] / duplex_ms if n_bytes["d2h"] else None,
    }
    return row


if __name__ == "__main__":
    main()
