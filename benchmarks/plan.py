"""Whether `zo2trl plan` predicts what real trainings take, for three models under three budgets.

    python -m benchmarks.plan --out benchmarks/results/plan_cpu.json
    python -m benchmarks.plan --out benchmarks/results/plan_gpu.json      # on a machine with a GPU: six minutes

On a machine without a GPU small models train resident, from host memory and from disk, and the peak of the process's
anonymous memory is compared. With a GPU models of 1.3 to 6.7 B weights train resident, partly streamed from host
memory, and in three tiers, and the allocator's peak is compared. So are the mean time of a step and, unit by unit,
where weights live. The prediction is made from config.json alone, before the training starts, and the machine is
measured once before all. The promise is

    peak memory within 10 %, step time within 25 %, every unit where it was planned
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks._plan_cases import Case, cases
from benchmarks._report import add_out, save_report, write_report
from benchmarks.memory import Peak, anonymous_bytes

WARM_UP_STEPS = 3
STEPS = 24
MIN_GPU_STEPS, GPU_STEPS_S = 5, 6.0


def main() -> None:
    """Predict, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--budgets", nargs="*", help="only these")
    parser.add_argument("--scratch", type=Path, default=Path.cwd(), help="where models and stores are made")
    parser.add_argument("--preset", action="store_true", help="plan and train by the GPU's preset, unmeasured")
    parser.add_argument("--limit", type=float, default=330.0, help="on a GPU: begin no row after so many seconds")
    add_out(parser)
    options = parser.parse_args()
    if options.train:
        given = json.loads(options.train)
        print(json.dumps(train(**given, case=cases(on_gpu=False)[given.pop("name")])))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if torch.cuda.is_available():  # rates of the machine's own file may be old
            os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        for row in all_rows(options, Path(scratch)):
            rows.append(row)
            shown = {key: value for key, value in row.items() if key not in ("predicted", "measured")}
            print(json.dumps(shown), flush=True)
            save_report(options.out, rows=rows)
    write_report(
        options.out,
        worst_memory_error=max(abs(each["memory_error"]) for each in rows),
        worst_seconds_error=max(abs(each["seconds_error"]) for each in rows),
        all_units_as_planned=all(each["units_as_planned"] for each in rows),
        rows=rows,
    )


def all_rows(options: argparse.Namespace, scratch: Path) -> Any:
    """One row for each model and budget that was asked for."""
    started_s, on_gpu = time.monotonic(), torch.cuda.is_available()
    for name, case in cases(on_gpu=on_gpu).items():
        if options.models and name not in options.models:
            continue
        folder = make_model(name, case, scratch)
        n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for budget, memory in case.budgets(n_bytes).items():
            if options.budgets and budget not in options.budgets:
                continue
            if on_gpu and time.monotonic() - started_s > options.limit:
                print(f"no time left for {name}, {budget}", file=sys.stderr, flush=True)
                continue
            store = folder.with_name(f"{folder.name}-{budget.replace(' ', '-')}")
            arguments = {**case.shape, **memory}
            probe = "never" if options.preset else "once"
            predicted = predict(folder, store=store, arguments=arguments, probe=probe, on_gpu=on_gpu)
            measured = measure(name, case, folder=folder, store=store, arguments=arguments, predicted=predicted)
            yield row(name, budget, arguments=arguments, predicted=predicted, measured=measured)
            remove(store)
        remove(folder)


def remove(folder: Path) -> None:
    """Make room on the drive."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def make_model(name: str, case: Case, scratch: Path) -> Path:
    """A folder with random weights and a tokenizer that is never used."""
    from tests.support.tokenizer import tiny_tokenizer

    folder = scratch / name.replace(" ", "-")
    torch.manual_seed(0)
    with torch.device("cuda" if case.on_gpu else "cpu"):  # where billions of weights are drawn in no time
        model = AutoModelForCausalLM.from_config(case.config, dtype=case.dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def row(
    name: str, budget: str, *, arguments: dict[str, Any], predicted: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """One prediction beside one training."""
    planned = [[unit["name"], unit["tier"], unit["bytes"]] for unit in predicted["units"]]
    placed = measured.pop("units")
    peak = "device_peak_bytes" if "device_peak_bytes" in measured else "host_peak_bytes"
    return {
        "model": name, "budget": budget, "arguments": arguments,
        "units_planned": Counter(tier for _, tier, _ in planned),
        "units_placed": Counter(tier for _, tier, _ in placed),
        "units_as_planned": planned == placed,
        "write_back_planned": predicted["write_back_every"], "write_back": measured["write_back_every"],
        "peak_planned_bytes": predicted[peak], "peak_bytes": measured[peak],
        "seconds_planned": predicted["seconds_per_step"], "seconds": measured["seconds_per_step"],
        "bound": predicted["bound"],
        "memory_error": predicted[peak] / measured[peak] - 1,
        "seconds_error": predicted["seconds_per_step"] / measured["seconds_per_step"] - 1,
        "predicted": predicted, "measured": measured,
    }  # fmt: skip


def predict(folder: Path, *, store: Path, arguments: dict[str, Any], probe: str, on_gpu: bool) -> dict[str, Any]:
    """The JSON of `zo2trl plan`."""
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    given = ["plan", str(folder), "--store_dir", str(store), "--json", "--probe", probe, *options]
    if not on_gpu:
        command = [sys.executable, "-m", "zo2trl", *given, "--use_cpu"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    else:  # a process of its own would spend more time on imports and on CUDA than on the plan
        from zo2trl import cli

        free_device_memory()
        # Advice takes as long as six more plans, and is not compared.
        no_advice = mock.patch("zo2trl.cli.plan._neighbours", lambda *_: iter(()))
        with no_advice, contextlib.redirect_stdout(io.StringIO()) as stdout:
            if cli.main(given) != 0:
                raise SystemExit("zo2trl plan failed")
        said = stdout.getvalue()
    return {**json.loads(said), "model": folder.name}


def measure(
    name: str, case: Case, *, folder: Path, store: Path, arguments: dict[str, Any], predicted: dict[str, Any]
) -> dict[str, Any]:
    """Train: in a process of its own where its memory is measured as a whole, and here on a GPU."""
    given = {"folder": str(folder), "store": str(store), "arguments": arguments}
    if case.on_gpu:
        n_steps = int(GPU_STEPS_S / predicted["seconds_per_step"])
        return train(**given, case=case, n_steps=min(max(n_steps, MIN_GPU_STEPS), STEPS))
    command = [sys.executable, "-m", "benchmarks.plan", "--train", json.dumps({**given, "name": name})]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def free_device_memory() -> None:
    """Give back what earlier trainings left with the allocator."""
    gc.collect()
    torch.cuda.empty_cache()


class Stopwatch(TrainerCallback):
    """Notes when every step ended, and the device's peak from the last warm-up step on."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self.first_peak_bytes = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends_s.append(time.perf_counter())
        if len(self.ends_s) == WARM_UP_STEPS and torch.cuda.is_available():
            self.first_peak_bytes = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def train(
    *, folder: str, store: str, arguments: dict[str, Any], case: Case, n_steps: int = STEPS, **_: Any
) -> dict[str, Any]:
    """Train some steps in this process."""
    from datasets import Dataset

    from zo2trl import ZOSFTConfig, ZOSFTTrainer

    imported, watch = anonymous_bytes(), Stopwatch()
    rows = torch.randint(10, case.config.vocab_size, (64, arguments["max_length"])).tolist()
    n_steps += WARM_UP_STEPS
    if case.on_gpu:
        free_device_memory()
        torch.cuda.reset_peak_memory_stats()
    own = {} if case.on_gpu else {"use_cpu": True, "bf16": False}
    with tempfile.TemporaryDirectory() as output, Peak() as peak:
        trainer = ZOSFTTrainer(
            model=folder,
            args=ZOSFTConfig(
                output_dir=output, store_dir=store, max_steps=n_steps, report_to="none", save_strategy="no",
                logging_steps=n_steps, disable_tqdm=True, **own, **arguments,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
        engine_store = trainer.engine.store
        where, units = engine_store.summary(), [list(unit) for unit in engine_store.describe()]
        every = dict(engine_store.write_schedule.write_back)
        peaks = {"device_peak_bytes": torch.cuda.max_memory_allocated()} if case.on_gpu else {}
        trainer.close()
    ends_s = watch.ends_s[WARM_UP_STEPS - 1 :]
    each_s = [after - before for before, after in itertools.pairwise(ends_s)]
    logs = [entry for entry in trainer.state.log_history if "zo/projected_grad" in entry][-1]
    return {
        "store": where,
        "units": units,
        "write_back_every": every,
        **peaks,
        "device_peak_until_warm_bytes": watch.first_peak_bytes,
        "host_peak_bytes": peak.n_bytes,
        "host_imported_bytes": imported,
        "seconds_per_step": statistics.mean(each_s),
        "median_seconds_per_step": statistics.median(each_s),
        "disk_read_bytes_per_step": logs["zo/bytes_disk_read"],
        "disk_written_bytes_per_step": logs["zo/bytes_disk_written"],
    }


if __name__ == "__main__":
    main()
