"""Measure a step on a GPU in every mode, against bare forwards, raw copies and raw reads of the same run.

    python -m benchmarks.step_gpu --model opt-13b --out benchmarks/results/step_gpu_opt_13b.json
    python -m benchmarks.step_gpu --model opt-13b --modes budget --budgets 6GB 12GB 18GB 24GB

The model is OPT or Llama by size name with random weights made on the GPU; training is full fine-tuning with SGD on
one batch of 1 x 2048 tokens. The report has per mode the median and least step time, tokens per second, the bounds and
the ratio to each, bytes per step and link, and peaks: allocated, reserved and used device memory, pinned and anonymous
host memory. One engine serves all modes: its units move.

Machines and their drives are shared, so that a drive may read twice as fast at one moment as at the next. Where units
live on disk, steps are measured in turns with bare reads of the same files and writes of a unit's size. Such a mode
steps until a unit is written back, and counts by its mean step, because steps write different amounts.
"""

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks._floors import DriveRates, Extent, copy_rates, drive_rates, two_forwards_s
from benchmarks._judging import Steps, bounds_ms, drive_floors, judged, line
from benchmarks._report import add_out, save_report
from zo2trl.engine.device_fit import DeviceFit
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.step import Engine
from zo2trl.engine.trace import draw_timeline, zo_trace
from zo2trl.files.sizes import parse_size
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.known_rates import rates_for
from zo2trl.planning.placement import place
from zo2trl.zo.estimators import TwoSidedSPSA

# blocks, hidden size, feed-forward size, heads
OPT = {
    "opt-125m": (12, 768, 3072, 12), "opt-1.3b": (24, 2048, 8192, 32), "opt-6.7b": (32, 4096, 16384, 32),
    "opt-13b": (40, 5120, 20480, 40), "opt-30b": (48, 7168, 28672, 56),
}  # fmt: skip
LLAMA = {"llama-1b": (16, 2048, 8192, 32), "llama-8b": (32, 4096, 14336, 32)}
LINKS = ("h2d", "d2h", "disk_read", "disk_written")
EVERYTHING = 1 << 40
ROOM_FOR_A_PASS = 260 << 20  # activations of a 13B model over 2,048 tokens
STEADY = 4  # steps before measuring, in which kernels compile, the ring fills, and the first write-backs happen
STEADY_ON_DISK = 2  # in addition to those up to the first write-back; such steps take seconds
QUIET_S = 0.3  # without a read or a write no fetch is in flight

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
    "mixed": {"device": "a quarter", "cpu": "half of the rest"},
}
ON_DISK = {"disk", "mixed"}
TURNS, STEPS_A_TURN = 5, 3  # turns of steps with bare forwards where computing bounds a step, or with bare reads


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
    parser.add_argument("--cpu_memory", default="1TB", help="of every mode but `disk` and `mixed`")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--store", type=Path, help="folder for the store, on the disk to measure")
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
                    print(line(label, rows[label]), flush=True)
                    save_report(
                        options.out, model=options.model, direction=options.direction, lora=options.lora,
                        floors=floors, modes=rows,
                    )  # fmt: skip


def make_model(options: argparse.Namespace) -> nn.Module:
    """Build a model with random weights on the GPU."""
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
    """Open an engine in a folder of its own, without a copy of the first weights, which can be drawn again."""
    only_disk = ON_DISK.issuperset(options.modes)  # so that only the model is written, once
    cpu = 0 if only_disk else parse_size(options.cpu_memory, argument="--cpu_memory")
    assert isinstance(cpu, int), "--cpu_memory is a number of bytes"
    with tempfile.TemporaryDirectory(dir=options.store) as folder:
        settings = EngineOptions(
            budgets=Budgets(device="min" if only_disk else EVERYTHING, cpu=cpu), device=torch.device("cuda"), seed=0,
            store_dir=Path(folder) / "store", granularity=BLOCK, direction=options.direction,
            rounding=options.rounding, base_folder="random weights of benchmarks/step_gpu.py",
            rates=rates_for(torch.device("cuda"), Path(folder)),
        )  # fmt: skip
        engine = open_engine(model, settings)
        engine.on_shutdown += [handle.remove for handle in hook_heads(model)]
        try:
            yield engine, settings
        finally:
            engine.shutdown(flush=False)


class Bench:
    """A Bench measures one mode: it moves the engine's units to their tiers, then times steps in the steady state."""

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
        n_passes = 2 * self.n_directions * self.n_batches
        device, cpu = budgets(engine.model, mode, n_passes=n_passes, cpu=settings.budgets.cpu)
        self.settings = replace(
            settings, num_directions=self.n_directions, granularity=mode.get("granularity", BLOCK),
            write_back_every=mode.get("write_back_every", "auto"), budgets=Budgets(device=device, cpu=cpu),
        )  # fmt: skip
        engine.estimator = TwoSidedSPSA(zo_eps=1e-3, num_directions=self.n_directions)

    def run(self, ids: torch.Tensor, *, label: str, traced: bool) -> dict[str, Any]:
        """Measure this mode with one batch [1, tokens] as every micro-batch."""
        engine = self.engine

        def loss() -> torch.Tensor:
            with deferring_logits():
                return engine.model(input_ids=ids, labels=ids).loss

        def step() -> None:
            number = len(engine.store.journal.records)
            engine.step([loss] * self.n_batches, step=number, passes_per_traversal=passes_per_traversal)
            engine.commit(learning_rate=1e-6, weight_decay=0.0)

        free_device_memory()  # the next units would fragment blocks that earlier modes left cached
        plan = plan_engine(engine.model, self.settings)
        engine.relayout(plan.layout, plan.placement)
        fit = DeviceFit(engine, self.settings)
        passes_per_traversal = fit.passes_per_traversal({"input_ids": ids})
        free_device_memory()
        if self.settings.budgets.device != EVERYTHING:
            fit.before_steps(loss, {"input_ids": ids}, n_passes=2 * self.n_directions * self.n_batches)
        self.floors |= copy_rates()  # again for every mode, because machines and their links are shared
        free_device_memory()
        files = self._disk_files()
        drive = [drive_rates(files)] if files else []
        self._steady(step)
        figures = self._measured(step, tokens=ids.numel(), drive=drive)
        if figures["bound"] == "compute":
            figures["in_turns"] = turns = self._in_turns(step, ids)
            figures["over"]["compute"] = turns["over"]
        if traced and self.options.trace is not None:
            figures["trace"] = self._traced(step, label.replace(" ", "_"))
        return figures

    def _disk_files(self) -> list[Extent]:
        """Return the files of units on disk, once no read or write of them is in flight."""
        store = self.engine.store
        units = [store.layout.units[index] for index in store.placement.units_in("disk")]
        if units:
            wait_until_quiet(lambda: store.traffic["disk_read"] + store.traffic["disk_written"])
        files = store.residency.files
        return [(files.path(unit, record), unit.n_bytes) for unit in units if (record := files.newest(unit))]

    def _steady(self, step: Callable[[], None]) -> None:
        store = self.engine.store
        on_disk = [store.layout.units[index] for index in store.placement.units_in("disk")]
        for _ in range(STEADY_ON_DISK if on_disk else STEADY):
            step()
        if any(unit.is_trained for unit in on_disk):
            before = store.traffic["disk_written"]
            for _ in range(store.write_schedule.store_every("disk")):
                if store.traffic["disk_written"] > before:
                    break
                step()

    def _measured(self, step: Callable[[], None], *, tokens: int, drive: list[DriveRates]) -> dict[str, Any]:
        """Time steps and compare them with their bounds; `drive` has rates from before, if any unit is on a drive."""
        torch.cuda.reset_peak_memory_stats()
        if drive:
            steps = Steps()
            for _ in range(TURNS):
                step()  # more is prefetched for this step than in the steady state
                steps += self._timed(step, times=math.ceil(self.options.repeats / TURNS))
                drive = [*drive, drive_rates(self._disk_files(), like=drive[0])]
        else:
            steps = self._timed(step, times=self.options.repeats)
        n_bytes = {link: steps.moved[link] / len(steps.seconds) for link in LINKS}
        free, total = torch.cuda.mem_get_info()
        memory = psutil.Process().memory_info()
        figures: dict[str, Any] = {
            "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": total - free,
            "device_memory": self.settings.budgets.device,
            "cpu_tier_bytes": self.engine.store.placement.cpu_bytes,
            "anonymous_bytes": memory.rss - memory.shared,
            "cpu_cores": steps.cpu_s / sum(steps.seconds),
            "write_back_every": dict(self.engine.store.write_schedule.write_back),
            "store": self.engine.store.summary(),
        }
        floors = dict(self.floors)
        if drive:
            floors |= drive_floors(drive)
            figures["drive"] = [asdict(one) for one in drive]
        compute_ms = floors[f"two_forwards_ms_{tokens}"] * self.n_batches * self.n_directions
        return judged(steps.seconds, n_bytes, bounds_ms(n_bytes, floors, compute_ms=compute_ms)) | {
            "tokens_per_second": self.n_batches * tokens / statistics.median(steps.seconds),
            "bytes_per_step": n_bytes,
            "floors": {name: rate for name, rate in floors.items() if name.endswith("gb_s")},
            **figures,
        }

    def _timed(self, step: Callable[[], None], *, times: int) -> Steps:
        before, cpu_before_s = Counter(self.engine.store.traffic), time.process_time()
        taken_s = [seconds(step) for _ in range(times)]
        return Steps(taken_s, self.engine.store.traffic - before, time.process_time() - cpu_before_s)

    def _in_turns(self, step: Callable[[], None], ids: torch.Tensor) -> dict[str, Any]:
        """Time steps and bare forwards in turns, because the speed of a GPU depends on its temperature."""
        bare, n_pairs = make_model(self.options), self.n_batches * self.n_directions
        turns = [
            (
                statistics.median(seconds(step) for _ in range(STEPS_A_TURN)) * 1e3,
                two_forwards_s(bare, ids, repeats=STEPS_A_TURN) * 1e3 * n_pairs,
            )
            for _ in range(TURNS)
        ]
        del bare
        free_device_memory()
        names = ("steps_ms", "forwards_ms")
        over = statistics.median(step_ms / forwards_ms for step_ms, forwards_ms in turns)
        return {"over": over} | dict(zip(names, map(list, zip(*turns, strict=True)), strict=True))

    def _traced(self, step: Callable[[], None], name: str) -> str:
        self.options.trace.mkdir(parents=True, exist_ok=True)
        with zo_trace(self.engine, self.options.trace / f"{name}.json.gz") as trace:
            for _ in range(3):
                step()
        draw_timeline(trace.timeline, self.options.trace / f"{name}.png", title=f"{self.options.model}, {name}")
        return str(trace.summary)


def budgets(model: nn.Module, mode: Mapping[str, Any], *, n_passes: int, cpu: Any) -> tuple[Any, Any]:
    """Compute the bytes of device and host memory of a mode; `cpu` is the default for host memory."""
    layout = plan_layout(model)
    streamable = sum(unit.n_bytes for unit in layout.units if not unit.is_resident)
    least = place(layout, Budgets(device="min", cpu=EVERYTHING))
    # Every block is streamed through a ring of three; activations are included.
    all_streamed = least.device_bytes + least.largest_segment_bytes + n_passes * ROOM_FOR_A_PASS
    named = {
        "all streamed": all_streamed, "a quarter": all_streamed + streamable // 4,
        "half of the rest": streamable * 3 // 8,
    }  # fmt: skip
    device, cpu = mode["device"], mode.get("cpu", cpu)
    return named.get(device, device), named.get(cpu, cpu)


def free_device_memory() -> None:
    """Release cached blocks of the allocator, which would count as used and be split by smaller requests."""
    gc.collect()
    torch.cuda.empty_cache()


def wait_until_quiet(moved: Callable[[], int]) -> None:
    """Wait until a count of bytes stays the same for `QUIET_S`."""
    before = None
    while (now := moved()) != before:
        before = now
        time.sleep(QUIET_S)


def seconds(run: Callable[[], None]) -> float:
    """Measure the wall time of one call, which waits for the losses by itself."""
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
