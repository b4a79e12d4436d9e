"""This module defines ObjectiveMixin, which makes a Trainer's steps optimise an objective instead of its own loss.

Does not: compute an objective (objectives.py), or change `compute_loss` and evaluation losses.
Invariant: the objective in the logs is computed from the losses in the journal, so retraced steps show it too.
"""

from collections.abc import Mapping, Sequence, Set
from inspect import Parameter, signature
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.parallel.ranks import Ranks
from zo2trl.trainers.objective.objectives import COLUMNS, Objective, OutputObjective, find_objective, mean_logit
from zo2trl.trainers.objective.prompting import base_of

__all__ = ["ObjectiveMixin"]

_Base = Trainer if TYPE_CHECKING else object


class ObjectiveMixin(_Base):
    """ObjectiveMixin is the part of `ZOTrainerMixin` that handles objectives."""

    args: Any
    model: Any
    ranks: Ranks

    objective: Objective | None = None
    rows_are_pairs = False  # a batch holds all chosen answers, then all rejected ones
    scores_pairs = False  # the model gives each of them one score
    _columns_of_batches: frozenset[str] = frozenset()  # columns that the trainer keeps for its collator
    _objective_values: list[tuple[float, int]]

    def _set_objective(self, given: Any, config: Any) -> None:
        if given is not None and config.objective is not None:
            raise ConfigError(
                f"`objective` is given twice: {given!r} to the trainer and {config.objective!r} in its config."
            )
        chosen = config.objective if given is None else given
        self.objective = find_objective(
            chosen, max_new_tokens=config.objective_max_new_tokens, of_pairs=self.scores_pairs
        )
        if self.objective is None and config.objective_max_new_tokens is not None:
            raise ConfigError("`objective_max_new_tokens` has no effect without an `objective` on generated text.")
        if self.objective is not None and self.rows_are_pairs:
            _refuse_for_pairs(self.objective)
        packs = [name for name in ("packing", "padding_free") if getattr(config, name, False)]
        if self.objective is not None and packs and (self.objective.generates or self.objective.columns):
            raise UnsupportedError(
                f"`objective` {self.objective.name!r} looks at rows one by one, and `{packs[0]}=True` joins them. "
                f"Set `{packs[0]}=False`."
            )

    def _carry_objective_columns(self) -> None:
        """Wrap the collator of a complete trainer, so that batches carry columns that only the objective reads."""
        if self.objective is None:
            return
        of_model = signature(type(base_of(self.model)).forward).parameters
        carried = [name for name in self.objective.columns if name not in of_model and name not in self.label_names]
        if not carried:
            return
        self._set_signature_columns_if_needed()
        own = self._columns_of_batches - {*self.objective.required, *self.objective.optional}
        self.data_collator = _CarryingColumns(
            self.data_collator, carried, but=own, all_others=self.objective.takes_all_columns,
            hides_all_others=self.args.remove_unused_columns,
        )  # fmt: skip

    def _set_signature_columns_if_needed(self) -> None:
        is_first = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self.objective is not None:
            if is_first:
                self._columns_of_batches = frozenset(self._signature_columns)
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.objective.columns]))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if self.objective is not None and self.objective.takes_all_columns:
            return dataset  # the collator removes columns that the model does not accept
        return super()._remove_unused_columns(dataset, description)  # type: ignore[misc]

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if self.objective is not None and self.objective.takes_all_columns:
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)  # type: ignore[misc]

    # -- in a pass

    def compute_step_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Compute what a step's probes compare: the objective if there is one, else the trainer's loss."""
        if self.objective is not None:
            return self.objective.measure(self, model, inputs, num_items_in_batch)
        return self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[return-value]

    def weight_sensitive_loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Compute a step's loss, so that it differs when any weight does.

        An objective such as accuracy may be equal for different weights, so the mean logit is added to it.
        """
        loss = self._loss(model, inputs, num_items_in_batch)
        if self.objective is not None:
            with self.compute_loss_context_manager():
                loss = loss + OutputObjective(function=mean_logit).measure(self, model, inputs, None)
        return loss

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        raise NotImplementedError

    @property
    def divides_by_items(self) -> bool | None:
        """Return whether the objective is divided by the items of the whole step; None without an objective."""
        if self.objective is None:
            return None
        return isinstance(self.objective, OutputObjective) and self.objective.is_normalised

    def before_predictions(self, batches: Sequence[Any]) -> None:
        """Prepare batches whose `prediction_step` calls follow in one traversal; runs outside of it."""

    def note_objective(self, inputs: Any) -> None:
        """Measure the objective on an evaluation batch. Runs in a pass."""
        if self.objective is None:
            return
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, n_rows = self.objective.measured(self, self.model, batch, None)
        if n_rows:
            self._objective_values.append((self.objective.value_of(float(loss)), n_rows))

    # -- in logs

    def _with_objective(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add to the means of some steps the objective that follows from their losses."""
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
    """This data collator adds columns of its rows to the batch that the wrapped collator makes.

    The wrapped collator gets those in `but`, too. With `all_others`, all columns that are not in `but` are carried;
    those that the objective does not name are removed from the wrapped collator's rows if `hides_all_others`.
    """

    def __init__(
        self, collator: Any, columns: Sequence[str], *, but: Set[str], all_others: bool, hides_all_others: bool
    ) -> None:
        self._collator, self._columns, self._but = collator, tuple(columns), but
        self._all_others, self._hides_all_others = all_others, hides_all_others

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._collator, name)

    def __call__(self, rows: Sequence[Any]) -> Any:
        others: list[str] = []
        if self._all_others and isinstance(rows[0], Mapping):
            others = [name for name in rows[0] if name not in self._columns and name not in self._but]
        names = [*self._columns, *others]
        carried = {name: [row[name] for row in rows] for name in names if all(name in row for row in rows)}
        hidden = {*self._columns} - self._but | {*(others if self._hides_all_others else ())}
        batch = self._collator([_without(row, hidden) for row in rows])
        if isinstance(batch, Mapping) and carried:
            batch[COLUMNS] = carried  # type: ignore[index]
        return batch


def _without(row: Any, names: Set[str]) -> Any:
    return {key: value for key, value in row.items() if key not in names} if isinstance(row, Mapping) else row


def _refuse_for_pairs(objective: Objective) -> None:
    if objective.generates:
        raise UnsupportedError(
            f"`objective` {objective.name!r} scores generated text, and a row here is a pair of answers, not a "
            "prompt. Use ZOTrainer or ZOSFTTrainer, or an objective on model outputs."
        )
    labels = signature(objective.function).parameters.get("labels")
    if labels is not None and labels.default is Parameter.empty:
        raise UnsupportedError(
            f"`objective` {objective.name!r} compares with `labels`, and a row here is a pair of answers, which has "
            "none. Pass a function of `outputs`: its first half of rows is of chosen answers, the second of rejected "
            "ones."
        )
