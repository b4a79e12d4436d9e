"""Compare how directions and roundings learn on several seeds of the demo task, with everything on the device.

    python -m benchmarks.noise --seeds 5 --out benchmarks/results/noise.json

For each seed an OPT is pretrained once; every variant then fine-tunes it for the same number of steps on the same
batches. The report has per variant the held-out accuracy at checkpoints on the way and the mean training loss over the
last fifth of the steps (mean and worst over the seeds).
"""

import argparse
import copy
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks._report import add_out, write_report
from recipes import sentiment_task as task
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.planning.budgets import Budgets

BATCH_SIZE, LEARNING_RATE, ZO_EPS = 32, 2e-4, 1e-3


@dataclass(frozen=True)
class Variant:
    """A Variant is one way to take a step."""

    name: str
    direction: str
    dtype: torch.dtype = torch.float32
    rounding: Any = None


VARIANTS = [
    Variant("fp32 rademacher", "rademacher"),
    Variant("fp32 gaussian", "gaussian"),
    *(
        Variant(f"bf16 {direction} stochastic", direction, torch.bfloat16, "stochastic")
        for direction in ("rademacher", "gaussian")
    ),
    Variant("bf16 rademacher nearest", "rademacher", torch.bfloat16, "nearest"),
]


def main() -> None:
    """Run every variant on every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices of this size gain nothing from more
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in VARIANTS}
    for seed in range(options.seeds):
        tokenizer, reviews = task.build_tokenizer(), task.make_reviews(seed)
        base = task.build_model(tokenizer, seed=seed)
        task.pretrain(base, tokenizer, reviews.pretrain, seed=seed)
        for variant in VARIANTS:
            run = fine_tune(copy.deepcopy(base), tokenizer, reviews, variant=variant, seed=seed, n_steps=options.steps)
            runs[variant.name].append(run)
            print(seed, variant.name, run, flush=True)
    write_report(options.out, steps=options.steps, seeds=options.seeds, summary=summarise(runs), runs=runs)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reviews: task.Reviews,
    *,
    variant: Variant,
    seed: int,
    n_steps: int,
) -> dict[str, Any]:
    """Fine-tune once and return accuracies on the way and the loss at the end."""
    model.to(variant.dtype).eval()
    rng = random.Random(seed)
    accuracies: dict[int, float] = {}
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(
            model,
            EngineOptions(
                budgets=Budgets(device=1 << 34, cpu=0), device=torch.device("cpu"), store_dir=Path(folder) / "store",
                seed=seed, zo_eps=ZO_EPS, direction=variant.direction, rounding=variant.rounding,
            ),
        )  # fmt: skip
        for step in range(n_steps):
            batch = verdict_batch(tokenizer, rng.sample(reviews.train, BATCH_SIZE))
            estimate = engine.step([lambda batch=batch: verdict_loss(model, *batch)], step=step)
            engine.commit(learning_rate=LEARNING_RATE, weight_decay=0.0)
            losses.append(estimate.loss)
            if (step + 1) % (n_steps // 5) == 0:
                accuracies[step + 1] = task.accuracy(model, tokenizer, reviews.held_out)
        engine.shutdown()
    return {"accuracy": accuracies, "last_loss": statistics.fmean(losses[-n_steps // 5 :])}


def verdict_batch(tokenizer: PreTrainedTokenizerBase, reviews: list[task.Review]) -> tuple[Any, torch.Tensor]:
    """Tokenize prompts and the token that should follow each."""
    batch = tokenizer([r.prompt for r in reviews], padding=True, padding_side="right", return_tensors="pt")
    return batch, torch.tensor([tokenizer.convert_tokens_to_ids(r.verdict) for r in reviews])


def verdict_loss(model: PreTrainedModel, batch: Any, wanted: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of the verdict in fp32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    last = batch["attention_mask"].sum(dim=1) - 1
    return cross_entropy(logits[torch.arange(len(wanted)), last].float(), wanted)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compute mean and worst over the seeds."""
    table: dict[str, Any] = {}
    for name, results in runs.items():
        steps = list(results[0]["accuracy"])
        table[name] = {
            "mean_accuracy": {s: statistics.fmean(r["accuracy"][s] for r in results) for s in steps},
            "worst_final_accuracy": min(r["accuracy"][steps[-1]] for r in results),
            "mean_last_loss": statistics.fmean(r["last_loss"] for r in results),
        }
    return table


if __name__ == "__main__":
    main()
