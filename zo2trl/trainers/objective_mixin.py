"""ObjectiveMixin: a Trainer whose steps optimise an objective instead of its own loss.

Does not: compute an objective (objectives.py), or change what `compute_loss` and evaluation losses are.
Invariant: what logs show of an objective comes from the losses of the journal, so that replayed steps show it too.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from zo2trl.engine.ranks import Ranks
from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.trainers.objectives import (
    COLUMNS,
    Objective,
    OutputObjective,
    base_of,
    find_objective,
    mean_logit,
    n_rows_of,
)

__all__ = ["ObjectiveMixin"]

_Base = Trainer if TYPE_CHECKING else object


class ObjectiveMixin(_Base):
    """The part of `ZOTrainerMixin` that knows about objectives."""

    args: Any
    model: Any
    ranks: Ranks

    objective: Objective | None = None
    rows_are_pairs = False  # a batch holds all chosen answers, then all rejected ones
    _objective_values: list[tuple[float, int]]

    def _set_objective(self, given: Any, config: Any) -> None:
        if given is not None and config.objective is not None:
            raise ConfigError(
                f"`objective` is given twice: {given!r} to the trainer and {config.objective!r} in its config."
            )
        chosen = config.objective if given is None else given
        self.objective = find_objective(chosen, max_new_tokens=config.objective_max_new_tokens)
        if self.objective is None and config.objective_max_new_tokens is not None:
            raise ConfigError("`objective_max_new_tokens` has no effect without an `objective` on generated text.")
        if self.objective is not None and self.objective.generates and self.rows_are_pairs:
            raise UnsupportedError(
                f"`objective` {self.objective.name!r} scores generated text, and a row here is a pair of answers, not "
                "a prompt. Use ZOTrainer or ZOSFTTrainer, or an objective on model outputs."
            )
        packs = [name for name in ("packing", "padding_free") if getattr(config, name, False)]
        if self.objective is not None and packs and (self.objective.generates or self.objective.columns):
            raise UnsupportedError(
                f"`objective` {self.objective.name!r} looks at rows one by one, and `{packs[0]}=True` joins them. "
                f"Set `{packs[0]}=False`."
            )

    def _carry_objective_columns(self) -> None:
        """Called when the trainer is complete: batches carry what only the objective reads."""
        if self.objective is None:
            return
        of_model = signature(type(base_of(self.model)).forward).parameters
        carried = [name for name in self.objective.columns if name not in of_model and name not in self.label_names]
        if carried:
            self.data_collator = _CarryingColumns(self.data_collator, carried)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self.objective is not None:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.objective.columns]))

    # -- in a pass

    def compute_step_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """What a training step's probes compare: the objective if there is one, else the trainer's loss."""
        if self.objective is not None:
            return self.objective.measure(self, model, inputs, num_items_in_batch)
        return self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[return-value]

    def loss_that_shows_weights(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """A step's loss, and where that is an objective, something that other weights would not leave as it is."""
        loss = self._loss(model, inputs, num_items_in_batch)
        if self.objective is not None:
            with self.compute_loss_context_manager():
                loss = loss + OutputObjective(function=mean_logit).measure(self, model, inputs, None)
        return loss

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        raise NotImplementedError

    @property
    def divides_by_items(self) -> bool | None:
        """Whether the objective is divided by the items of the whole step; None without an objective."""
        if self.objective is None:
            return None
        return isinstance(self.objective, OutputObjective) and self.objective.is_normalised

    def before_predictions(self, batches: Sequence[Any]) -> None:
        """Called outside a march with batches whose `prediction_step` comes next, all in one march."""

    def note_objective(self, inputs: Any) -> None:
        """Measure the objective on an evaluation batch. Runs in a pass."""
        if self.objective is None:
            return
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.objective.measure(self, self.model, batch, None)
        n_rows = n_rows_of(self, batch)
        self._objective_values.append((self.objective.value_of(float(loss)), n_rows))

    # -- in logs

    def _with_objective(self, metrics: dict[str, float]) -> dict[str, float]:
        """The means of some steps, and the objective that their losses tell of."""
        if self.objective is not None and "zo/loss_plus" in metrics:
            loss = fmean([metrics["zo/loss_plus"], metrics["zo/loss_minus"]])
            metrics[f"objective/{self.objective.name}"] = self.objective.value_of(loss)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.evaluation_loop`]; metrics also show the objective."""
        self._objective_values = []
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.objective is None:
            return output
        sums = [sum(value * n for value, n in self._objective_values), sum(n for _, n in self._objective_values)]
        total, n_rows = map(sum, zip(*self.ranks.gather("objectives of an evaluation", sums), strict=True))
        if n_rows:
            given = signature(Trainer.evaluation_loop).bind(self, *args, **kwargs)
            given.apply_defaults()
            prefix = given.arguments["metric_key_prefix"]
            metrics: Any = output.metrics
            metrics[f"{prefix}_objective/{self.objective.name}"] = total / n_rows
        return output


class _CarryingColumns:
    """A data collator that puts columns of its rows beside the batch of the one it wraps."""

    def __init__(self, collator: Any, columns: Sequence[str]) -> None:
        self._collator, self._columns = collator, tuple(columns)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._collator, name)

    def __call__(self, rows: Sequence[Any]) -> Any:
        carried = {name: [row[name] for row in rows] for name in self._columns if all(name in row for row in rows)}
        batch = self._collator([_without(row, self._columns) for row in rows])
        if isinstance(batch, Mapping) and carried:
            batch[COLUMNS] = carried  # type: ignore[index]
        return batch


def _without(row: Any, names: Sequence[str]) -> Any:
    return {key: value for key, value in row.items() if key not in names} if isinstance(row, Mapping) else row
