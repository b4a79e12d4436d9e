"""Translation of a Trainer's state into what engine/retrace.py and engine/loop_notes.py need.

Does not: go through steps (engine/retrace.py), or read a checkpoint's files (checkpoint.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import has_length

from zo2trl.engine.retrace import StartPoint

__all__ = ["NOTED_BY_STEPS", "ResumePoint", "learning_rates_of", "settings_of"]

NOTED_BY_STEPS = ("zo_eps", "num_directions", "weight_decay", "max_grad_norm", "objective")
"""Settings that every step notes, so that they may change when a training is resumed."""
_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "max_length", "packing",
    "parallelism",
    *NOTED_BY_STEPS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ResumePoint(StartPoint):
    """The place where the Trainer's loop starts again, with the Trainer's own state there.

    Attributes:
        counters: the checkpoint's values of the trainer's own counters.
        rng: state of the random generators, in processes other than the one that wrote the checkpoint.
    """

    counters: dict[str, Any] = field(default_factory=dict)
    rng: Any = None


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return what a trainer's steps are made of beside weights, seeds and learning rates."""
    args, dataset = trainer.args, trainer.train_dataset
    settings = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    if args.auto_find_batch_size:  # the batches that are made may be smaller than those that were asked for
        settings["per_device_train_batch_size"] = trainer._train_batch_size
    settings |= {"objective": None if trainer.objective is None else trainer.objective.name}
    settings |= {"number of processes": trainer.ranks.size}
    return settings | {"train_dataset rows": len(dataset) if has_length(dataset) else None}


def learning_rates_of(scheduler: Any) -> Callable[[int], float] | None:
    """Return the learning rate by step, or None for a schedule that depends on more than the step's number."""
    if not isinstance(scheduler, LambdaLR):
        return None
    rate, shape = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return lambda step: float(rate * shape(step))
