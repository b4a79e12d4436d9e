"""This module defines objectives: numbers from a forward pass, or from generated text, that a run can optimise.

Does not: run in a Trainer by itself (objective_mixin.py), or draw random numbers: text is generated greedily, so that
both probes of a direction differ by their weights alone.

Zeroth-order estimates need no derivative: accuracy and F1 are as good as cross entropy (MeZO, arXiv 2305.17333,
section 3.3). Built in are token F1 as in SQuAD's evaluation script, exact match, and accuracy.

Invariant: a loss is `best - value` where larger values are better, else the value itself.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any

import numpy as np
import torch
from torch import nn

from zo2trl.errors import ConfigError
from zo2trl.trainers.objective.prompting import (
    base_of,
    decoded,
    is_chat,
    left_padded,
    pad_id_of,
    prompts_and_references,
    tokenizer_of,
    up_to_the_end,
)
from zo2trl.trainers.objective.scores import accuracy, exact_match, pair_accuracy, squad_f1

__all__ = [
    "COLUMNS", "OBJECTIVES", "Objective", "OutputObjective", "TextObjective", "find_objective", "mean_logit",
    "n_rows_of", "without_columns",
]  # fmt: skip

COLUMNS = "objective_columns"
"""Key under which a batch carries the columns that only the objective reads: a dict of lists, one item a row."""

_TEXT_OFFERED = (
    "prompts", "completions", "completion_ids", "references", "trainer_state", "log_extra", "log_metric",
)  # fmt: skip
_NOT_IN_KWARGS = ("prompt", "completion")  # as in GRPO, where `prompts` and `completions` replace them
_OUTPUT_OFFERED = ("outputs", "inputs", "labels", "model", "num_items_in_batch")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    An objective is a number to optimise. Use [`OutputObjective`] or [`TextObjective`].

    Parameters:
        function (`Callable`):
            It is called with those of its parameters, by name, that the objective offers; other parameters are columns
            of the dataset, or entries of the batch. It returns one number, or one per row, which are averaged: floats
            or a tensor.
        name (`str`, *optional*):
            Its name in the logs (`objective/<name>`). Defaults to the function's name.
        maximize (`bool`):
            Whether larger values are better.
        best (`float`, *optional*, defaults to `0.0`):
            With `maximize`, the loss is `best - value`. A constant changes no gradient, only what logs show.
    """

    function: Callable[..., Any]
    name: str = ""
    maximize: bool = True
    best: float = 0.0
    required: tuple[str, ...] = field(init=False, default=())
    optional: tuple[str, ...] = field(init=False, default=())

    generates = False
    takes_all_columns = False
    offered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"`objective` is {self.function!r}, which cannot be called.")
        name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        object.__setattr__(self, "name", name)
        named = [p for p in signature(self.function).parameters.values() if p.name not in self.offered]
        named = [p for p in named if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        object.__setattr__(self, "required", tuple(p.name for p in named if p.default is Parameter.empty))
        object.__setattr__(self, "optional", tuple(p.name for p in named if p.default is not Parameter.empty))

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the dataset that the function reads."""
        return self.required + self.optional

    def value_of(self, loss: float) -> float:
        """Return the value that gave a loss."""
        return self.best - loss if self.maximize else loss

    def loss_of(self, value: Any, *, n_rows: int, device: torch.device) -> torch.Tensor:
        """Convert what the function returned into a loss: a scalar in its own floating dtype, else in float64.

        Raises:
            ConfigError: it is no number, or not one per row.
        """
        if isinstance(value, Sequence) and not isinstance(value, str) and any(item is None for item in value):
            raise ConfigError(f"`objective` {self.name!r} returned None for a row; it must return a number for each.")
        if not isinstance(value, torch.Tensor):
            try:
                value = torch.as_tensor(np.asarray(value, dtype=np.float64), device=device)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"`objective` {self.name!r} returned {type(value).__name__}, but must return a number, or a list "
                    "or tensor with one number per row."
                ) from error
        value = value.detach() if value.is_floating_point() else value.detach().double()
        if value.numel() not in (1, n_rows):
            raise ConfigError(
                f"`objective` {self.name!r} returned {value.numel()} numbers for {n_rows} rows; it must return one, "
                "or one per row."
            )
        return self.best - value.mean() if self.maximize else value.mean()

    def measure(self, trainer: Any, model: nn.Module, batch: Mapping[str, Any], n_items: Any) -> torch.Tensor:
        """Compute the loss of one batch. Runs in a pass.

        Raises:
            ConfigError: the function returned None for every row.
        """
        loss, n_rows = self.measured(trainer, model, batch, n_items)
        if not n_rows:
            raise ConfigError(
                f"`objective` {self.name!r} returned None for every row of a batch, so there is nothing to optimise. "
                "Leave rows that it cannot judge out of `train_dataset`, or raise `per_device_train_batch_size`."
            )
        return loss

    def measured(
        self, trainer: Any, model: nn.Module, batch: Mapping[str, Any], n_items: Any
    ) -> tuple[torch.Tensor, int]:
        """Compute the loss of one batch, and how many of its rows count. Runs in a pass."""
        raise NotImplementedError

    def call(self, offered: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Call the function with what is offered and with the columns of a batch.

        Raises:
            ConfigError: the batch lacks a column that the function requires.
        """
        columns = batch.get(COLUMNS, {})
        known = {**without_columns(batch), **columns, **offered}
        missing = [name for name in self.required if name not in known]
        if missing:
            raise ConfigError(
                f"`objective` {self.name!r} reads {missing}, which the rows of the dataset do not all have. Add the "
                f"column, or rename the function's parameter: it is offered {[*self.offered, *sorted(batch)]}."
            )
        parameters = signature(self.function).parameters
        given = {name: value for name, value in known.items() if name in parameters}
        if self.takes_all_columns:
            given |= {name: known[name] for name in (*columns, *offered) if name not in _NOT_IN_KWARGS}
        return self.function(**given)


@dataclass(frozen=True, kw_only=True)
class OutputObjective(Objective):
    """
    An OutputObjective is a function of what one forward pass returns.

    It is offered `outputs` (the model's own, with whole fp32 logits), `inputs` (the batch), `labels` (None if the
    batch has none), `model`, and `num_items_in_batch` (items of all micro-batches of the step, or None).
    A function that takes `num_items_in_batch` divides by it itself; all other values are averaged over micro-batches.

    Parameters:
        maximize (`bool`, *optional*, defaults to `False`):
            Whether larger values are better. The value of a plain function is a loss.
    """

    maximize: bool = False
    offered = _OUTPUT_OFFERED

    @property
    def is_normalised(self) -> bool:
        """Return whether the function divides by the items of the whole step."""
        return "num_items_in_batch" in signature(self.function).parameters

    def measured(
        self, trainer: Any, model: nn.Module, batch: Mapping[str, Any], n_items: Any
    ) -> tuple[torch.Tensor, int]:
        """See `Objective.measured`; this runs one forward."""
        base: Any = base_of(model)
        known = signature(type(base).forward).parameters
        is_pair_of_stacks = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        unseen = () if is_pair_of_stacks else tuple(trainer.label_names or ("labels",))
        outputs = model(**{name: value for name, value in batch.items() if name in known and name not in unseen})
        labels = next((batch[name] for name in (trainer.label_names or ("labels",)) if name in batch), None)
        offered = {
            "outputs": outputs, "inputs": without_columns(batch), "labels": labels, "model": base,
            "num_items_in_batch": n_items,
        }  # fmt: skip
        n_rows = n_rows_of(trainer, batch)
        return self.loss_of(self.call(offered, batch), n_rows=n_rows, device=trainer.args.device), n_rows


@dataclass(frozen=True, kw_only=True)
class TextObjective(Objective):
    """
    A TextObjective is a function of the text that the model generates, such as a reward function.

    It gets the arguments of reward functions of [`~trl.GRPOTrainer`]: `prompts` and
    `completions` (strings, or lists of messages), `completion_ids`, `trainer_state`, `log_extra` and `log_metric`
    (which ignore their arguments), and `references`: the decoded labels of a row. Its other parameters are columns of
    the dataset; `**kwargs` gets all of these. Rows for which it returns None are left out of the mean. Reward
    models and async functions are refused.

    The model continues the tokens before a row's first label, or the whole row if it has no labels. Generation is
    greedy, and costs a traversal for every token: on a streamed model, one transfer of the model.

    Parameters:
        max_new_tokens (`int`):
            The most tokens to generate.
        stop (`str`, *optional*):
            Text at which a completion ends, besides the end-of-text token. MeZO stops at a newline.
        as_messages (`bool`, *optional*):
            Whether a completion is passed as `[{"role": "assistant", "content": text}]`. Defaults to whether the
            column `prompt` holds messages; False turns these into text too.
        generation_kwargs (`dict`, *optional*):
            More arguments of `generate`, such as `num_beams` or `repetition_penalty`; sampling is refused.
    """

    max_new_tokens: int = 0
    stop: str | None = None
    as_messages: bool | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    generates = True
    offered = _TEXT_OFFERED

    def __post_init__(self) -> None:
        super().__post_init__()
        function: Any = self.function
        if isinstance(function, nn.Module) or any(map(iscoroutinefunction, (function, type(function).__call__))):
            kind = "a model" if isinstance(function, nn.Module) else "async"
            raise ConfigError(f"`objective` {self.name!r} is {kind}: call it in a plain function, and pass that.")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ConfigError(
                f"`objective` {self.name!r} scores generated text, so it needs a length to generate, and "
                f"`max_new_tokens` is {self.max_new_tokens!r}. Give at least 1 (`objective_max_new_tokens` in a "
                "config); every token costs one traversal of the weights."
            )
        if self.generation_kwargs.get("do_sample"):
            raise ConfigError(
                "`generation_kwargs` asks for `do_sample=True`, but both probes of a direction must differ by their "
                "weights only. Leave it out: generation is greedy."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Objective.columns`; the prompts as they are in the dataset are offered, too."""
        return tuple(dict.fromkeys([*super().columns, "prompt"]))

    @property
    def takes_all_columns(self) -> bool:  # type: ignore[override]
        """Return whether the function has `**kwargs`."""
        return any(p.kind is Parameter.VAR_KEYWORD for p in signature(self.function).parameters.values())

    def measured(
        self, trainer: Any, model: nn.Module, batch: Mapping[str, Any], n_items: Any
    ) -> tuple[torch.Tensor, int]:
        """See `Objective.measured`; this runs a generation."""
        tokenizer = tokenizer_of(trainer)
        prompts, references = prompts_and_references(model, batch)
        ids, mask = left_padded(prompts, pad_id=pad_id_of(tokenizer))
        generator: Any = model
        config = self._generation(model, tokenizer)
        new_ids = generator.generate(input_ids=ids, attention_mask=mask, generation_config=config, tokenizer=tokenizer)
        new_ids = new_ids[:, 1 if base_of(model).config.is_encoder_decoder else ids.shape[1] :]
        texts = [text.strip() for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
        texts = texts if self.stop is None else [text.split(self.stop)[0].strip() for text in texts]
        given_prompts = batch.get(COLUMNS, {}).get("prompt", [None])
        are_chats = is_chat(given_prompts[0])
        as_messages = are_chats if self.as_messages is None else self.as_messages
        is_as_given = isinstance(given_prompts[0], str) or (are_chats and as_messages)
        value = self.call({
            "prompts": given_prompts if is_as_given else tokenizer.batch_decode(prompts, skip_special_tokens=True),
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if as_messages else texts,
            "completion_ids": [up_to_the_end(row, config) for row in new_ids.tolist()],
            "references": None if references is None else decoded(tokenizer, references),
            "trainer_state": trainer.state, "log_extra": _drop, "log_metric": _drop,
        }, batch)  # fmt: skip
        n_rows = len(prompts)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == n_rows:
            value = [item for item in value if item is not None]
            n_rows = len(value)
        loss = self.loss_of(value if n_rows else [0.0], n_rows=n_rows, device=trainer.args.device)
        return loss, n_rows

    def _generation(self, model: nn.Module, tokenizer: Any) -> Any:
        config = copy.deepcopy(base_of(model).generation_config)
        stops = {"stop_strings": [self.stop]} if self.stop is not None else {}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
        length = {"max_new_tokens": self.max_new_tokens, "max_length": None, "pad_token_id": pad_id_of(tokenizer)}
        config.update(**(greedy | length | stops | self.generation_kwargs))
        return config


def find_objective(given: Any, *, max_new_tokens: int | None = None, of_pairs: bool = False) -> Objective | None:
    """Find an objective by name, or make one of a plain function on outputs, whose value is then a loss.

    Args:
        given: a name, an objective, which is returned as it is, or a function.
        max_new_tokens: how much an objective chosen by name generates.
        of_pairs: whether outputs are scores of chosen answers, then of rejected ones.

    Raises:
        ConfigError: no objective has that name, or a length is missing or without effect.
    """
    found: Objective | None
    if given is None or isinstance(given, Objective):
        found = given
    elif isinstance(given, str):
        if given not in OBJECTIVES:
            raise ConfigError(f"`objective` is {given!r}, but must be one of {sorted(OBJECTIVES)}, or a callable.")
        return (PAIR_OBJECTIVES if of_pairs else OBJECTIVES).get(given, OBJECTIVES[given])(max_new_tokens)
    else:
        found = OutputObjective(function=given)
    if max_new_tokens is not None and found is not None:
        raise ConfigError(
            "`objective_max_new_tokens` is for objectives chosen by name; give `max_new_tokens` to the TextObjective."
        )
    return found


def without_columns(inputs: Any) -> Any:
    """Return a batch without the objective's columns, which the model and the trainer's own loss do not accept."""
    if not isinstance(inputs, Mapping) or COLUMNS not in inputs:
        return inputs
    return {name: value for name, value in inputs.items() if name != COLUMNS}


# -- objectives by name


def mean_logit(outputs: Any) -> torch.Tensor:
    """Compute the mean logit. It is no useful objective, but unlike accuracy or F1 it differs when any weight does."""
    return outputs.logits.double().mean()


OBJECTIVES: dict[str, Callable[[int | None], Objective]] = {
    "accuracy": lambda length: _without_generation(
        OutputObjective(function=accuracy, maximize=True, best=1.0), length
    ),
    "squad_f1": lambda length: _text_objective(squad_f1, length),
    "exact_match": lambda length: _text_objective(exact_match, length),
}
"""Name -> a function of `objective_max_new_tokens` that makes the objective."""

PAIR_OBJECTIVES: dict[str, Callable[[int | None], Objective]] = {
    "accuracy": lambda length: _without_generation(
        OutputObjective(function=pair_accuracy, name="accuracy", maximize=True, best=1.0), length
    ),
}
"""The same for rows that are pairs of answers, to each of which a model gives a score."""


def _text_objective(score: Callable[..., Any], length: int | None) -> Objective:
    return TextObjective(function=score, best=1.0, max_new_tokens=length or 0, as_messages=False)


def _without_generation(objective: Objective, max_new_tokens: int | None) -> Objective:
    if max_new_tokens is not None:
        raise ConfigError(f"`objective_max_new_tokens` has no effect: {objective.name!r} generates nothing.")
    return objective


# -- batches


def n_rows_of(trainer: Any, batch: Mapping[str, Any]) -> int:
    """Count the rows of the dataset in a batch: the length of its first tensor, or half of it where rows are pairs."""
    length = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
    return length // 2 if trainer.rows_are_pairs else length


def _drop(*_: Any) -> None:
    """Ignore what a probe logs, because that is no metric of a step."""
