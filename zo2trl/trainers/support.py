"""Arguments of transformers and TRL that forward-only training cannot honour: refused, or warned about.

Invariant: an argument the user changed is honoured, warned about, or refused; never silently ignored.
"""

import dataclasses
import os
import warnings
from typing import Any

from transformers import TrainingArguments

from zo2trl.errors import ConfigError, UnsupportedError

__all__ = ["check_arguments", "check_optimizers"]

_NO_BACKWARD = "there is no backward pass"
_NO_OPTIMIZER = "a step is stochastic gradient descent on the projected gradient, without optimizer state"
_NOT_COMPILED = "the weights of a block change places between passes, so the model is run as it is"

WITHOUT_EFFECT = {
    "gradient_checkpointing_kwargs": _NO_BACKWARD,
    "activation_checkpointing_kwargs": _NO_BACKWARD,
    "optim": _NO_OPTIMIZER,
    "optim_args": _NO_OPTIMIZER,
    "optim_target_modules": _NO_OPTIMIZER,
    "adam_beta1": _NO_OPTIMIZER,
    "adam_beta2": _NO_OPTIMIZER,
    "adam_epsilon": _NO_OPTIMIZER,
    "neftune_noise_alpha": "probes run without any random noise but their own, in eval mode",
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
    "ddp_static_graph": "models are not wrapped in DDP",
    "ddp_find_unused_parameters": "models are not wrapped in DDP",
    "ddp_bucket_cap_mb": "models are not wrapped in DDP",
    "ddp_broadcast_buffers": "models are not wrapped in DDP",
}
"""Field -> why it changes nothing. Checked against the field's default, so that only a user's choice is reported."""


def check_arguments(args: TrainingArguments) -> None:
    """Warn about choices without effect, switch gradient checkpointing off, and refuse what cannot work.

    Raises:
        UnsupportedError: names the argument, the reason and the way out.
    """
    _switch_checkpointing_off(args)
    for name, default in {f.name: f.default for f in dataclasses.fields(args)}.items():
        if name in WITHOUT_EFFECT and getattr(args, name) != _plain(default):
            warnings.warn(
                f"`{name}={getattr(args, name)!r}` has no effect in ZO training: {WITHOUT_EFFECT[name]}.", stacklevel=4
            )
    _refuse(args)


def check_optimizers(given: dict[str, Any]) -> None:
    """Refuse an optimizer handed to the trainer; a learning rate scheduler is welcome.

    Raises:
        ConfigError: `optimizers=(optimizer, ...)` or `optimizer_cls_and_kwargs=` was given.
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


def _plain(default: Any) -> Any:
    return None if default is dataclasses.MISSING else default


def _switch_checkpointing_off(args: TrainingArguments) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, False):
            warnings.warn(
                f"`{name}=True` is ignored: {_NO_BACKWARD}, so no activations are kept that could be recomputed.",
                stacklevel=5,
            )
            setattr(args, name, False)


def _refuse(args: TrainingArguments) -> None:
    own_parameters = "owns the parameters, and so does the tiered store. Remove it: the store already spreads them."
    refused = {
        "deepspeed": (args.deepspeed, f"DeepSpeed {own_parameters}"),
        "fsdp": (args.fsdp, f"FSDP {own_parameters}"),
        "parallelism_config": (
            getattr(args, "parallelism_config", None),
            f"Tensor or context parallelism {own_parameters}",
        ),
        "bf16_full_eval": (args.bf16_full_eval, _full_eval("bfloat16")),
        "fp16_full_eval": (args.fp16_full_eval, _full_eval("float16")),
        "activation_offloading": (getattr(args, "activation_offloading", False), f"{_NO_BACKWARD}. Remove it."),
    }
    for name, (value, why) in refused.items():
        if value:
            raise UnsupportedError(f"`{name}={value!r}` cannot work with ZO training: {why}")
    if (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    ):
        raise UnsupportedError(
            "`accelerate launch` was configured for DeepSpeed or FSDP, which own the parameters, and so does the "
            "tiered store. Launch with `distributed_type: NO`."
        )
    if args.world_size > 1:
        raise UnsupportedError(
            f"`world_size` is {args.world_size}, but this release trains in one process. Launch with `num_processes: "
            "1`."
        )


def _full_eval(dtype: str) -> str:
    return (
        f"it would convert the whole model in memory. Store the weights in that dtype instead "
        f'(`model_init_kwargs={{"dtype": "{dtype}"}}`), or evaluate under autocast (`bf16=True`).'
    )
