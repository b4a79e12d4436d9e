"""This module refuses datasets that cannot be trained on, before any weight is moved.

Does not: consume a stream, or change the random state that shuffling depends on.
"""

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch

from zo2trl.errors import ConfigError

__all__ = ["check_dataset", "check_labels", "global_random_state_kept"]


def check_dataset(dataset: Any, *, name: str) -> None:
    """Refuse an empty dataset.

    Raises:
        ConfigError: it has a length, and that is 0.
    """
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ConfigError(
            f"`{name}` is empty. If it was not before, every example was filtered out: look at `max_length` "
            "(examples whose completion was cut off entirely are dropped) and at the columns it should have."
        )


def check_labels(trainer: Any) -> None:
    """Collate the first example and check that a loss can be computed from the batch.

    Raises:
        ConfigError: the batch has no label, and the model cannot return a loss without one.
    """
    dataset = trainer.train_dataset
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or trainer.can_return_loss:
        return
    if trainer.compute_loss_func is not None or trainer.objective is not None:
        return
    if not trainer.takes_labels or not trainer.label_names:
        return
    columns: Any = dataset
    if isinstance(dataset, datasets.Dataset) and trainer.args.remove_unused_columns:
        columns = trainer._remove_unused_columns(dataset, description="training")
    with global_random_state_kept():
        batch = trainer.data_collator([columns[0]])
    if not any(name in batch for name in trainer.label_names):
        raise ConfigError(
            f"`train_dataset` gives batches without labels: expected one of {list(trainer.label_names)}, got "
            f"{sorted(batch)}. Add that column, use a data collator that makes labels (such as "
            "DataCollatorForLanguageModeling(mlm=False)), or set `label_names`."
        )


@contextmanager
def global_random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch after the block, whatever is drawn inside."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
