"""This module refuses arguments of transformers and TRL that forward-only training cannot honour, or warns about them.

Does not: decide which arguments are refused (upstream_arguments.py lists them). It finds those that the user changed.
Invariant: an argument that the user changed is honoured, warned about, or refused; none is silently ignored.
"""

import dataclasses
import inspect
import os
import warnings
from typing import Any

from transformers import TrainingArguments

from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.trainers.arguments.upstream_arguments import REFUSED, SUPPORTED, WITHOUT_EFFECT

__all__ = ["check_arguments", "check_optimizers", "refusal", "upstream_fields"]

_NO_OPTIMIZER = WITHOUT_EFFECT["optim"]

_SWITCHED_OFF = (
    "gradient_checkpointing", "activation_checkpointing", "enable_jit_checkpoint", "use_liger_kernel",
)  # fmt: skip
"""Upstream would act on these if they stayed true."""

_UPSTREAM = ("transformers", "trl")


def upstream_fields(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a config class that transformers or TRL declare, by name, in the order of the class."""
    declared = {
        name
        for base in config_class.__mro__
        if base.__module__.split(".")[0] in _UPSTREAM
        for name in inspect.get_annotations(base)
    }
    return {f.name: f for f in dataclasses.fields(config_class) if f.name in declared}


def check_arguments(args: TrainingArguments) -> None:
    """Warn about choices without effect, switch off those that upstream would act on, and refuse impossible ones.

    Raises:
        UnsupportedError: the message names the argument, the reason and the way out.
    """
    chosen = [name for name, field in upstream_fields(type(args)).items() if _is_chosen(args, field)]
    for name in chosen:
        value = getattr(args, name)
        if name in REFUSED:
            raise refusal(name, value)
        if name in WITHOUT_EFFECT:
            warnings.warn(f"`{name}={value!r}` has no effect in ZO training: {WITHOUT_EFFECT[name]}.", stacklevel=4)
        elif name not in SUPPORTED:
            warnings.warn(
                f"`{name}={value!r}` is newer than this zo2trl and untested with it: it is passed on to "
                "the trainer as it is. docs/support.md lists the arguments that are known.",
                stacklevel=4,
            )
    for name in _SWITCHED_OFF:
        if getattr(args, name, False):
            setattr(args, name, False)
    _refuse_launchers(args)


def refusal(name: str, value: Any) -> UnsupportedError:
    """Return the exception to raise for an argument in `REFUSED`."""
    return UnsupportedError(f"`{name}={value!r}` cannot work with ZO training: {REFUSED[name]}")


def check_optimizers(given: dict[str, Any]) -> None:
    """Refuse an optimizer or a scheduler that was passed to the trainer.

    Raises:
        ConfigError: `optimizers=` or `optimizer_cls_and_kwargs=` was given.
    """
    optimizer, scheduler = given.get("optimizers") or (None, None)
    if optimizer is not None or given.get("optimizer_cls_and_kwargs") is not None:
        name = "optimizers" if optimizer is not None else "optimizer_cls_and_kwargs"
        raise ConfigError(
            f"`{name}` holds an optimizer, but {_NO_OPTIMIZER}: it would never see a gradient. Leave it out and set "
            "`learning_rate`, `weight_decay` and `lr_scheduler_type` in the config."
        )
    if scheduler is not None:
        raise ConfigError(
            "`optimizers` holds a scheduler, which is bound to an optimizer of yours. Set `lr_scheduler_type` and "
            "`lr_scheduler_kwargs` in the config instead."
        )


def _is_chosen(args: TrainingArguments, field: dataclasses.Field[Any]) -> bool:
    """Return whether the user has set a value: neither upstream nor we would have put it there."""
    value = getattr(args, field.name)
    if field.name in REFUSED or field.name in _SWITCHED_OFF:
        # Upstream fills in defaults here: empty tables, and False for what was not set.
        given = any(value.values()) if isinstance(value, dict) else value
        return bool(given) and value != _default(field)
    return value != _default(field)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _refuse_launchers(args: TrainingArguments) -> None:
    if (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    ):
        raise UnsupportedError(
            "`accelerate launch` was configured for DeepSpeed or FSDP, which own the parameters, and so does the "
            "tiered store. Launch with `distributed_type: NO`."
        )
