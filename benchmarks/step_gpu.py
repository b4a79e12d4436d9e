"""A step on a GPU in every mode, against bare forwards, raw copies and raw reads measured in the same run.

    python -m benchmarks.step_gpu --model opt-13b --out benchmarks/results/step_gpu_opt_13b.json
    python -m benchmarks.step_gpu --model opt-13b --modes budget --budgets 6GB 12GB 18GB 24GB

OPT or Llama by size name with random weights made on the GPU, full fine-tuning with SGD, one batch of 1 x 2048 tokens.
Reported per mode: median step time and tokens per second, what bounds it and the ratio to that bound, bytes per step
and link, and the peaks of the allocator, of the device, of pinned and of anonymous host memory. One engine serves all
modes: its units move.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks._floors import copy_rates, two_forwards_s
from benchmarks._report import add_out, write_report
from zo2trl.engine.fitting import DeviceFit
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.step import Engine
from zo2trl.engine.trace import draw_timeline, zo_trace
from zo2trl.tiers.layout import plan_layout
from zo2trl.tiers.placement import Budgets, parse_size, place
from zo2trl.zo.estimators import TwoSidedSPSA

# blocks, hidden size, feed-forward size, heads
OPT = {
    "opt-125m": (12, 768, 3072, 12), "opt-1.3b": (24, 2048, 8192, 32), "opt-6.7b": (32, 4096, 16384, 32),
    "opt-13b": (40, 5120, 20480, 40), "opt-30b": (48, 7168, 28672, 56),
}  # fmt: skip
LLAMA = {"llama-1b": (16, 2048, 8192, 32), "llama-8b": (32, 4096, 14336, 32)}
LINKS = ("h2d", "d2h", "disk_read", "disk_written")
EVERYTHING = 1 << 40
ROOM_FOR_A_PASS = 260 << 20  # of a 13B model over 2,048 tokens
STEADY = 4  # steps before measuring: kernels compile, the ring fills, the first write-backs happen

BLOCK, LEAF = "block", "leaf"
MODES: dict[str, dict[str, Any]] = {
    "resident": {"device": EVERYTHING},
    "streamed": {"device": "all streamed"},
    "written": {"device": "all streamed", "write_back_every": 1},
    "directions": {"device": "all streamed", "num_directions": 2},
    "batches": {"device": "all streamed", "n_batches": 4},
    "leaves": {"device": 2 << 30, "granularity": LEAF},
    "budget": {},
    "disk": {"device": "all streamed", "cpu": 0},
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*OPT, *LLAMA], default="opt-1.3b")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["resident", "streamed", "written"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--direction", default="rademacher")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"])
    parser.add_argument("--lora", action="store_true", help="train rank-16 adapters on q_proj and v_proj only")
    parser.add_argument("--budgets", nargs="+", default=["6GB", "12GB"], help="device budgets of the mode `budget`")
    parser.add_argument("--cpu_memory", default="1TB", help="of every mode but `disk`")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--store", type=Path, help="folder for the store; for the disk mode, on the disk to measure")
    parser.add_argument("--trace", type=Path, help="folder for traces and pictures of three steps")
    parser.add_argument("--trace_modes", nargs="+", choices=MODES, default=["streamed"])
    add_out(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")

    model = make_model(options)
    batches = [torch.randint(4, 32000, (1, n), device="cuda") for n in options.tokens]
    floors = copy_rates() | {
        f"two_forwards_ms_{ids.numel()}": two_forwards_s(model, ids, repeats=options.repeats) * 1e3 for ids in batches
    }
    if options.lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    rows: dict[str, Any] = {}
    with opened(model, options) as (engine, settings):
        for name in options.modes:
            for budget in options.budgets if name == "budget" else [None]:
                for ids in batches:
                    mode = MODES[name] | ({"device": parse_size(budget, argument="--budgets")} if budget else {})
                    label = " ".join(filter(None, [name, budget, f"{ids.numel()} tokens"]))
                    bench = Bench(engine, settings, mode, options=options, floors=floors)
                    rows[label] = bench.run(ids, label=label, traced=name in options.trace_modes)
                    print(label, rows[label], flush=True)
    write_report(options.out, model=options.model, direction=options.direction, floors=floors, modes=rows)


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
def opened(model: nn.Module, options: argparse.Namespace) -> Iterator[tuple[Engine, EngineOptions]]:
    """An engine in a folder of its own. Nothing is kept of the first weights: they can be drawn again."""
    only_disk = options.modes == ["disk"]
    cpu = 0 if only_disk else parse_size(options.cpu_memory, argument="--cpu_memory")
    with tempfile.TemporaryDirectory(dir=options.store) as folder:
        settings = EngineOptions(
            budgets=Budgets(device="min" if only_disk else EVERYTHING, cpu=cpu), device=torch.device("cuda"), seed=0,
            store_dir=Path(folder) / "store", granularity=BLOCK, direction=options.direction,
            rounding=options.rounding, base_folder="random weights of benchmarks/step_gpu.py",
        )  # fmt: skip
        engine = open_engine(model, settings)
        engine.on_shutdown += [handle.remove for handle in hook_heads(model)]
        try:
            yield engine, settings
        finally:
            engine.shutdown(flush=False)


class Bench:
    """One mode: the engine's units moved to where it wants them, then steps in the steady state."""

    def __init__(
        self,
        engine: Engine,
        settings: EngineOptions,
        mode: dict[str, Any],
        *,
        options: argparse.Namespace,
        floors: dict[str, float],
    ) -> None:
        self.engine, self.options, self.floors = engine, options, floors
        self.n_batches = mode.get("n_batches", 1)
        self.n_directions = mode.get("num_directions", 1)
        settings = replace(
            settings, num_directions=self.n_directions, granularity=mode.get("granularity", BLOCK),
            write_back_every=mode.get("write_back_every", "auto"),
            budgets=Budgets(device=EVERYTHING, cpu=mode.get("cpu", settings.budgets.cpu)),
        )  # fmt: skip
        device = mode["device"]
        if device == "all streamed":
            device = three_of_a_ring(engine.model, n_passes=2 * self.n_directions * self.n_batches)
        self.settings = replace(settings, budgets=replace(settings.budgets, device=device))
        engine.estimator = TwoSidedSPSA(zo_eps=1e-3, num_directions=self.n_directions)

    def run(self, ids: torch.Tensor, *, label: str, traced: bool) -> dict[str, Any]:
        """Figures of this mode with one batch [1, tokens] as every micro-batch."""
        engine = self.engine

        def loss() -> torch.Tensor:
            with deferring_logits():
                return engine.model(input_ids=ids, labels=ids).loss

        def step() -> None:
            number = len(engine.store.journal.records)
            engine.step([loss] * self.n_batches, step=number, passes_per_march=passes_per_march)
            engine.commit(learning_rate=1e-6, weight_decay=0.0)

        plan = plan_engine(engine.model, self.settings)
        engine.regranulate(plan.layout, plan.placement)
        n_passes = 2 * self.n_directions * self.n_batches
        torch.cuda.empty_cache()
        fit = DeviceFit(engine, self.settings)
        passes_per_march = fit.passes_per_march({"input_ids": ids})
        if self.settings.budgets.device != EVERYTHING:
            fit.before_steps(loss, {"input_ids": ids}, n_passes=n_passes)
        torch.cuda.empty_cache()
        self.floors |= copy_rates()  # again for every mode: machines are shared, and links with them
        for _ in range(STEADY):
            step()
        torch.cuda.reset_peak_memory_stats()
        before = Counter(engine.store.traffic)
        step_s = [seconds(step) for _ in range(self.options.repeats)]
        moved = engine.store.traffic - before
        figures = self._figures(
            statistics.median(step_s), {link: moved[link] / len(step_s) for link in LINKS}, tokens=ids.numel()
        )
        if traced and self.options.trace is not None:
            figures["trace"] = self._traced(step, label.replace(" ", "_"))
        return figures

    def _figures(self, step_s: float, n_bytes: dict[str, float], *, tokens: int) -> dict[str, Any]:
        free, total = torch.cuda.mem_get_info()
        up, floors = n_bytes["h2d"], self.floors
        compute_ms = floors[f"two_forwards_ms_{tokens}"] * self.n_batches * self.n_directions
        # What goes down shares the link with what comes up: measured both at once, each way gets less.
        bounds_ms = {
            "compute": compute_ms,
            "upload": up / floors["up_gb_s"] / 1e6,
            "both ways": min(up, n_bytes["d2h"]) / floors["each_way_gb_s"] / 1e6
            + max(up - n_bytes["d2h"], 0.0) / floors["up_gb_s"] / 1e6,
        }
        memory = psutil.Process().memory_info()
        return {
            "step_ms": step_s * 1e3,
            "tokens_per_second": self.n_batches * tokens / step_s,
            "over": {name: step_s * 1e3 / bound_ms for name, bound_ms in bounds_ms.items() if bound_ms},
            "bytes_per_step": n_bytes,
            "floors": {"up_gb_s": floors["up_gb_s"], "each_way_gb_s": floors["each_way_gb_s"]},
            "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
            "device_memory": self.settings.budgets.device,
            "device_used_bytes": total - free,
            "cpu_tier_bytes": self.engine.store.placement.cpu_bytes,
            "anonymous_bytes": memory.rss - memory.shared,
            "write_back_every": dict(self.engine.store.rhythm.write_back),
            "store": self.engine.store.summary(),
        }

    def _traced(self, step: Callable[[], None], name: str) -> str:
        self.options.trace.mkdir(parents=True, exist_ok=True)
        with zo_trace(self.engine, self.options.trace / f"{name}.json.gz") as trace:
            for _ in range(3):
                step()
        draw_timeline(trace.timeline, self.options.trace / f"{name}.png", title=f"{self.options.model}, {name}")
        return str(trace.summary)


def three_of_a_ring(model: nn.Module, *, n_passes: int) -> int:
    """The device budget with which every block is streamed through a ring of three, activations included."""
    least = place(plan_layout(model), Budgets(device="min", cpu=EVERYTHING))
    return least.device_bytes + least.largest_segment_bytes + n_passes * ROOM_FOR_A_PASS


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call, which waits for the losses by itself."""
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
