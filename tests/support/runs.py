"""Trainers with the arguments every test wants: quiet, offline, tiny, in a folder of the test's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import default_data_collator

from tests.support.tokenizer import SUBJECTS, VERDICTS, tiny_tokenizer
from zo2trl import ZOConfig, ZOSFTConfig, ZOSFTTrainer, ZOTrainer
from zo2trl.engine.opening import plan_engine
from zo2trl.planning.placement import RING_SEGMENTS, Placement

QUIET: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3, "learning_rate": 1e-3,
    "use_cpu": True, "bf16": False,
}  # fmt: skip

EVERYTHING_ON_DEVICE: dict[str, Any] = {"device_memory": "8GB", "cpu_memory": "0", "granularity": "block"}
STREAMED_FROM_CPU: dict[str, Any] = {"device_memory": "min", "cpu_memory": "8GB"}
STREAMED_FROM_DISK: dict[str, Any] = {"device_memory": "min", "cpu_memory": "0"}


def zo_trainer(folder: Path, model: Any, rows: Any = None, *, extra: dict | None = None, **options: Any) -> ZOTrainer:
    """A ZOTrainer on rows of one length; `extra` goes to the trainer, all else to ZOConfig."""
    named = {"data_collator": default_data_collator, "train_dataset": rows, **(extra or {})}
    return ZOTrainer(model=model, args=ZOConfig(**{"output_dir": str(folder), **QUIET, **options}), **named)


def sft_trainer(
    folder: Path, model: Any, rows: Any = None, *, extra: dict | None = None, **options: Any
) -> ZOSFTTrainer:
    """A ZOSFTTrainer on prompt-completion rows with the tiny tokenizer."""
    rows = prompts() if rows is None else rows
    named = {"processing_class": tiny_tokenizer(), "train_dataset": rows, **(extra or {})}
    config = ZOSFTConfig(**{"output_dir": str(folder), **QUIET, "max_length": 32, **options})
    return ZOSFTTrainer(model=model, args=config, **named)


def prompts(n_rows: int = 8, *, start: int = 0) -> Dataset:
    """Prompt-completion pairs of different lengths."""
    rows = []
    for i in range(start, start + n_rows):
        filler = " ".join(f"w{(7 * i + k) % 60}" for k in range(i % 4))
        prompt = f"the {SUBJECTS[i % len(SUBJECTS)]} was {filler} verdict :"
        rows.append({"prompt": " ".join(prompt.split()), "completion": f" {VERDICTS[i % 2]}"})
    return Dataset.from_list(rows)


@contextmanager
def closing(trainer: Any) -> Iterator[Any]:
    """Close the trainer's store at the end of the test."""
    try:
        yield trainer
    finally:
        trainer.close()


def step_logs(trainer: Any) -> list[dict[str, float]]:
    """The logs of training steps (not of evaluations, nor of the whole run)."""
    return [entry for entry in trainer.state.log_history if "zo/projected_grad" in entry]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter in host memory, tied ones under each of their names."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters(remove_duplicate=False)}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names whose bits differ; the list is empty if all are equal."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def budgets_for_all_tiers(trainer_of: Callable[..., Any], granularity: str) -> dict[str, Any]:
    """Budgets under which some blocks are resident, some in host memory and some on disk.

    `trainer_of` makes a trainer from ZO options; nothing has been moved when it is asked for its plan.
    """
    trainer = trainer_of(**STREAMED_FROM_DISK, granularity=granularity)
    plan = plan_engine(trainer.model, trainer._options())
    blocks = [unit.n_bytes for unit in plan.layout.units if unit.kind == "block"]
    placement: Placement = plan.placement
    full_ring = RING_SEGMENTS * placement.largest_segment_bytes
    device = placement.device_bytes + full_ring - placement.ring_bytes + max(blocks)
    return {"device_memory": device, "cpu_memory": 2 * max(blocks), "granularity": granularity}


_OUTSIDE = ("root", "shared")


def tiers_of(trainer: Any) -> set[str]:
    """Tiers that hold at least one block."""
    return {tier for name, tier, _ in trainer.engine.store.describe() if name.split(" ")[0] not in _OUTSIDE}
