"""This module reads the weights that a run began with from their checkpoint.

Does not: run code that came with a checkpoint; compare the weights with the store's checksums, as its callers do.
Invariant: nothing is loaded before the first call of `tensor`, and weights are then only mapped.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zo2trl.checkpoints.load import load_mapped
from zo2trl.checkpoints.model_files import ModelFiles
from zo2trl.checkpoints.stored_run import StoredRun
from zo2trl.errors import CheckpointError, StoreForeign, UnsupportedError, ZO2TRLError
from zo2trl.layout.layout import TensorSpec

__all__ = ["BaseWeights"]


class BaseWeights:
    """BaseWeights looks up base weights by tensor.

    Args:
        run, model: the run and the model folder of the store.
        given: the folder or hub id of the base; None takes the one in the run's header.
        scratch: a folder on a disk with room for fused experts, if there are any.
    """

    where: str
    """This is the base's folder or hub id; it is empty if neither an argument nor the header names one."""

    def __init__(self, run: StoredRun, model: ModelFiles, given: str | Path | None, *, scratch: Path) -> None:
        self._run, self._model, self._scratch = run, model, scratch
        recorded = run.header.get("base_folder")
        self.where = str(given) if given is not None else recorded if isinstance(recorded, str) else ""

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor's values in the checkpoint's dtype.

        Raises:
            StoreForeign: neither an argument nor the header names the checkpoint.
            CheckpointError: the checkpoint cannot be read, or belongs to another model.
            UnsupportedError: the model's class is not transformers' own.
        """
        if spec.name not in self._values:
            raise CheckpointError(
                f"{self.where} has no {spec.name}: it is not the model {self._run.path} began with. Name another "
                "folder with `--base`."
            )
        return self._values[spec.name]

    @cached_property
    def _values(self) -> Mapping[str, torch.Tensor]:
        if not self.where:
            raise StoreForeign(
                f"{self._run.path} does not hold all weights by itself. Name the model it began with: `--base FOLDER`."
            )
        model_class = self._model.transformers_class()
        if model_class is None:
            raise UnsupportedError(
                f"{self._model.class_name} is not one of transformers' classes, and no code that comes with a model "
                "is run here. Open the store with the trainer and call `save_model`."
            )
        try:
            mapped: Any = load_mapped(self.where, model_class=model_class, offload_folder=self._scratch)
        except ZO2TRLError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Cannot read the base weights from {self.where}: {str(error).splitlines()[0]} Name the folder with "
                "`--base`."
            ) from error
        return dict(mapped.model.named_parameters(remove_duplicate=False))
