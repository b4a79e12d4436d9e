"""Show a model that learns without backpropagation while its weights live in three tiers, on a CPU in a few minutes.

    make demo                                            # or, in an environment that has zo2trl and matplotlib:
    python -m recipes.sentiment_demo --output_dir demo_output --seed 0

The demo runs offline. It pretrains a small OPT on made-up reviews whose verdicts are unreliable (sentiment_task.py),
saves it as an ordinary checkpoint, fine-tunes that with `ZOSFTTrainer` under byte budgets that push blocks to host
memory and to disk, and loads the result with plain transformers. It exits with 1 if the accuracy is too low.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from recipes import sentiment_task as task
from zo2trl import ZOSFTConfig, ZOSFTTrainer

# The model has ten blocks of 0.66 MB. The device has room for two besides the needs of a step (a ring of three and a
# perturbed copy), the host for four more, and four stay on disk.
DEVICE_MEMORY, CPU_MEMORY = "4.1MB", "2.7MB"
WANTED_ACCURACY = 0.95
TIERS = {"gpu": "[green]device[/]", "cpu": "[yellow]host memory[/]", "disk": "[red]disk[/]"}

LINKS = {
    "h2d": "to the device",
    "d2h": "from the device",
    "disk_read": "read from disk",
    "disk_written": "written to disk",
}

console = Console()


def main() -> int:
    """Run the demo and return 0 if the fine-tuned model is accurate enough, before and after reloading."""
    args = parse_arguments()
    prepare(args.output_dir)
    start_s = time.monotonic()
    title = "[bold]Forward-only fine-tuning out of three tiers[/]\nzo2trl demo: CPU, offline"
    console.print(Panel(title, expand=False))
    reviews = task.make_reviews(args.seed)
    base, tuned = args.output_dir / "base", args.output_dir / "tuned"

    make_checkpoint(base, reviews, seed=args.seed, num_steps=args.pretrain_steps)
    before = reloaded_accuracy(base, reviews)
    console.print(f"Held-out accuracy [bold]{before:.1%}[/]: it knows the words, but mostly says '{task.GOOD}'.\n")

    trainer, watch = fine_tune(base, tuned, reviews=reviews, args=args)
    after = watch.accuracies[-1][1]
    reloaded = reloaded_accuracy(tuned, reviews)

    plot(watch, args.output_dir / "curves.png")
    console.print(summary(trainer, watch, before=before, after=after, reloaded=reloaded))
    took_s = time.monotonic() - start_s
    console.print(f"curves.png and both checkpoints are in [bold]{args.output_dir}[/]. All of it took {took_s:.0f} s.")
    if after < WANTED_ACCURACY or abs(reloaded - after) > 0.5 / len(reviews.held_out):
        console.print(f"[bold red]Expected at least {WANTED_ACCURACY:.0%}, and the same from the reloaded model.[/]")
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="emptied of earlier demos first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain_steps", type=int, default=350)
    parser.add_argument("--max_steps", type=int, default=250, help="zeroth-order steps")
    return parser.parse_args()


def prepare(output_dir: Path) -> None:
    """Remove the folders of an earlier run by name, and silence the libraries."""
    for name in ("base", "tuned", "run"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Matrices of 96 x 384 are too small to share: a second thread costs more than it brings.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "trl", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)


# -- first part: a checkpoint that has learned the words and not the task


def make_checkpoint(folder: Path, reviews: task.Reviews, *, seed: int, num_steps: int) -> None:
    """Pretrain a model with backpropagation and save it with `save_pretrained`."""
    tokenizer = task.build_tokenizer()
    model = task.build_model(tokenizer, seed=seed)
    n_parameters = sum(p.numel() for p in model.parameters())
    console.print(f"Pretraining an OPT of {n_parameters / 1e6:.1f} M parameters with backpropagation.")
    with progress_bar() as progress:
        bar = progress.add_task("pretraining", total=num_steps, note="")
        task.pretrain(
            model, tokenizer, reviews.pretrain, seed=seed, num_steps=num_steps,
            on_step=lambda step, loss: progress.update(bar, completed=step, note=f"loss {loss:.2f}"),
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reloaded_accuracy(folder: Path, reviews: task.Reviews) -> float:
    """Measure the held-out accuracy of a saved checkpoint with plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return task.accuracy(model, AutoTokenizer.from_pretrained(folder), reviews.held_out)


# -- second part: fine-tuning out of three tiers


def fine_tune(
    base: Path, tuned: Path, *, reviews: task.Reviews, args: argparse.Namespace
) -> tuple[ZOSFTTrainer, "Watch"]:
    """Train on honest verdicts without a backward pass, and save the result."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with progress_bar() as progress:
        watch = Watch(progress, num_steps=args.max_steps)
        trainer = ZOSFTTrainer(
            model=str(base),
            args=training_arguments(args),
            train_dataset=task.as_dataset(reviews.train),
            eval_dataset=task.as_exam(reviews.held_out, tokenizer),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        progress.console.print("Fine-tuning with forward passes only. Where the weights live:")
        progress.console.print(placement_table(trainer))
        trainer.train()
        trainer.save_model(str(tuned))
    return trainer, watch


def training_arguments(args: argparse.Namespace) -> ZOSFTConfig:
    """Make an SFT configuration; only its first four lines differ from ordinary SFT."""
    return ZOSFTConfig(
        device_memory=DEVICE_MEMORY,
        cpu_memory=CPU_MEMORY,
        store_dir=str(args.output_dir / "run" / "store"),
        zo_eps=1e-3,
        learning_rate=2e-4,
        output_dir=str(args.output_dir / "run"),
        max_steps=args.max_steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        eval_strategy="steps",
        eval_steps=max(1, args.max_steps // 10),
        eval_on_start=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
        bf16=False,
        use_cpu=True,
    )


class Watch(TrainerCallback):
    """A Watch moves the progress bar, times the steps, and keeps the trainer's logs."""

    def __init__(self, progress: Progress, *, num_steps: int) -> None:
        self.losses: list[tuple[int, float]] = []
        self.accuracies: list[tuple[int, float]] = []
        self.step_seconds: list[float] = []
        self._progress = progress
        self._bar = progress.add_task("fine-tuning", total=num_steps, note="")
        self._step_start_s = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; evaluation runs between the steps and is not counted."""
        self._step_start_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_seconds.append(time.monotonic() - self._step_start_s)
        self._progress.update(self._bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep the points of the two curves."""
        if "eval_mean_token_accuracy" in logs:
            self.accuracies.append((state.global_step, logs["eval_mean_token_accuracy"]))
        if "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))
        if self.losses and self.accuracies:
            note = f"loss {self.losses[-1][1]:.3f}, accuracy {self.accuracies[-1][1]:.1%}"
            self._progress.update(self._bar, note=note)


# -- third part: results


def progress_bar() -> Progress:
    """Make the progress bar of either training."""
    words, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    return Progress(words, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), note, console=console)


def placement_table(trainer: ZOSFTTrainer) -> Table:
    """List the tier of each unit."""
    table = Table(caption=f"device {DEVICE_MEMORY}, host {CPU_MEMORY}, else disk", caption_justify="left")
    for column in ("unit", "tier", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for name, tier, n_bytes in trainer.engine.store.describe():
        table.add_row(name, TIERS[tier], f"{n_bytes:,}")
    return table


def summary(trainer: ZOSFTTrainer, watch: Watch, *, before: float, after: float, reloaded: float) -> Table:
    """List accuracy, time and traffic."""
    table = Table(show_header=False)
    table.add_row("held-out accuracy before", f"{before:.1%}")
    table.add_row("held-out accuracy after", f"[bold green]{after:.1%}[/]")
    table.add_row("... of the saved model in plain transformers", f"{reloaded:.1%}")
    table.add_row("time per step", f"{1e3 * sum(watch.step_seconds) / len(watch.step_seconds):.0f} ms")
    logs = [log for log in trainer.state.log_history if "zo/bytes_h2d" in log]
    for link, words in LINKS.items():
        mean = sum(log[f"zo/bytes_{link}"] for log in logs) / len(logs)
        table.add_row(f"moved per step, {words}", f"{mean / 1e6:.2f} MB")
    return table


def plot(watch: Watch, path: Path) -> None:
    """Plot loss and accuracy over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(*zip(*watch.losses, strict=True), color="tab:blue")
    left.set(title="Training loss", xlabel="zeroth-order step", ylim=(0, None))
    right.plot(*zip(*watch.accuracies, strict=True), color="tab:green", marker="o")
    right.axhline(0.5, color="grey", linestyle=":")
    right.set(title="Held-out accuracy", xlabel="zeroth-order step", ylim=(0.4, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
