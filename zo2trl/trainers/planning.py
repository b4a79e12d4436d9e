"""Planning a training before there is one, from its model's configuration and its arguments alone.

Does not: load weights, open a store, or decide anything that the trainer decides otherwise: both call the same planner
with the same counts of a pass and the same machine rates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, Trainer
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config

from zo2trl.checkpoints.load import class_named_by, read_config
from zo2trl.engine.activations import passes_per_traversal
from zo2trl.engine.device_fit import reserve_for
from zo2trl.engine.opening import EngineOptions, Plan, n_probes, plan_engine
from zo2trl.errors import ConfigError, UnsupportedError
from zo2trl.forecast.forecast import Forecast, forecast
from zo2trl.planning.budgets import resolve_budgets
from zo2trl.planning.placement import smallest_device_budget
from zo2trl.planning.rates import MachineRates
from zo2trl.planning.workload import Workload, rough_workload
from zo2trl.trainers.objective.objectives import find_objective
from zo2trl.trainers.scripts import USAGE, ZOModelConfig, model_init_kwargs, refuse_no_model
from zo2trl.trainers.sft_trainer import ZOSFTConfig
from zo2trl.trainers.sft_workload import build_model, count_batch

__all__ = ["Planned", "plan_parser", "plan_training"]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan of a training.

    Attributes:
        forecast: of one step.
        options: what its engine would be opened with.
        workload: of one pass.
        n_parameters, n_trainable: of the model, tied weights once.
        is_counted: whether the workload was counted in the model's forward, or taken from the number of weights.
    """

    forecast: Forecast
    options: EngineOptions
    workload: Workload
    n_parameters: int
    n_trainable: int
    is_counted: bool


def plan_parser(own: type) -> TrlParser:
    """A parser of `own` and of everything that `zo2trl sft` knows, so that it reads `--config` files of both."""
    read: Any = (own, ScriptArguments, ZOSFTConfig, ZOModelConfig, DatasetMixtureConfig)
    return TrlParser(read, prog="zo2trl plan", usage=USAGE, allow_abbrev=False)


def plan_training(
    args: Any, model_args: ModelConfig, *, rates: Callable[[], MachineRates | None], process_bytes: int = 0
) -> Planned:
    """Plan supervised fine-tuning from the model's config.json and the arguments alone.

    Batches are taken to be full: `per_device_train_batch_size` rows of `max_length` tokens.

    Args:
        args: a `ZOSFTConfig`.
        rates: called once everything that can be refused has been, because measuring takes time; None: not known.
        process_bytes: what this process holds now, with libraries loaded, which a training's process holds, too.

    Raises:
        ConfigError: no model is named, or an argument cannot work.
        BudgetError: the budgets cannot hold one step.
        CheckpointError: there is no config.json, or it makes no sense.
        UnsupportedError: the base is quantised, or the objective generates text.
    """
    _refuse_generation(args)
    _refuse_no_rows(args)
    config, there, dtype = _read_config(args, model_args)
    length = args.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    shape = (args.per_device_train_batch_size, length)
    model, run = build_model(class_named_by(config), config, dtype=dtype, peft_config=get_peft_config(model_args))
    options = replace(_options(args), decay_names=_decay_names(model))
    plan = plan_engine(model, options)
    n_probes_each, n_micro_batches = n_probes(options), args.gradient_accumulation_steps
    inputs = {"input_ids": torch.empty(shape, dtype=torch.long, device="meta")}
    together = max(passes_per_traversal(options, model, inputs, room=_room(plan, options)), n_probes_each)
    counted = count_batch(model, run, shape, autocast=_autocast(args), on_cpu=options.device.type == "cpu")
    workload = counted or rough_workload(plan.layout, n_tokens=shape[0] * shape[1])
    options = replace(
        options, rates=rates(), forward=workload, n_micro_batches=n_micro_batches, passes_per_traversal=together,
        tokens_per_step=shape[0] * shape[1] * n_micro_batches,
    )  # fmt: skip
    if options.device.type == "cuda" and options.budgets.device != "min":  # as DeviceFit does with the first batch
        n_passes = min(n_probes_each * n_micro_batches, together)
        reserve = reserve_for(workload, n_passes=n_passes, device=options.device)
        options = replace(options, budgets=replace(options.budgets, reserve=reserve))
    plan = plan_engine(model, options)
    specs = [spec for unit in plan.layout.units for spec in unit.tensors]
    return Planned(
        forecast=forecast(
            plan, options, tokens=shape[0] * shape[1] * n_micro_batches, process_bytes=process_bytes,
            copied=_cast_units(plan, there),
        ),
        options=options, workload=workload, is_counted=counted is not None,
        n_parameters=sum(spec.numel for spec in specs),
        n_trainable=sum(spec.numel for spec in specs if spec.trainable),
    )  # fmt: skip


def _refuse_generation(args: Any) -> None:
    objective = find_objective(args.objective, max_new_tokens=args.objective_max_new_tokens)
    if objective is not None and objective.generates:
        raise UnsupportedError(
            f"`zo2trl plan` cannot foresee `objective` {objective.name!r}: generating takes a pass of the weights for "
            "every token, and texts end when they like. Plan without `objective`, for the memory and the bytes of one "
            "pass, or train a few steps."
        )


def _read_config(args: Any, model_args: ModelConfig) -> tuple[PreTrainedConfig, torch.dtype, torch.dtype]:
    """The checkpoint's configuration, the dtype of its files, and the one to store weights in."""
    refuse_no_model(model_args)
    kwargs = model_init_kwargs(args, model_args)
    dtype = kwargs.pop("dtype", None)
    try:
        config = read_config(str(model_args.model_name_or_path), kwargs)
    except OSError as error:
        raise ConfigError(f"`model_name_or_path` {model_args.model_name_or_path} cannot be read: {error}") from error
    if model_args.load_in_4bit or model_args.load_in_8bit or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(
            "`zo2trl plan` cannot foresee a quantised base, which stays on the device whole. Plan the original model, "
            "or train a few steps."
        )
    there: Any = config.dtype or torch.get_default_dtype()
    dtype = there if dtype in (None, "auto") else dtype
    return config, there, getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _autocast(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _cast_units(plan: Plan, there: torch.dtype) -> set[int]:
    """Frozen units with a tensor in another dtype than the checkpoint's, which cannot be read from its files."""
    frozen = (unit for unit in plan.layout.units if not unit.is_trained)
    return {unit.index for unit in frozen if any(spec.dtype != there for spec in unit.tensors)}


def _room(plan: Plan, options: EngineOptions) -> int | None:
    """Bytes of the device that weights can leave to activations, as `DeviceFit` counts them."""
    device = options.budgets.device
    return None if device == "min" else device - smallest_device_budget(plan.layout)


def _refuse_no_rows(args: Any) -> None:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"`{name}` is {value}, but must be at least 1.")


def _decay_names(model: torch.nn.Module) -> list[str]:
    """Parameters that weight decay applies to in the Trainer: they are drawn apart from those around them."""
    return Trainer.get_decay_parameter_names(cast(Any, None), model)


def _options(args: Any) -> EngineOptions:
    return EngineOptions(
        budgets=resolve_budgets(device_memory=args.device_memory, cpu_memory=args.cpu_memory, device=args.device),
        device=args.device, store_dir=args.store_path, seed=args.seed, zo_eps=args.zo_eps,
        num_directions=args.num_directions, direction=args.direction, rounding=args.rounding,
        write_back_every="auto" if args.write_back_every == "auto" else int(args.write_back_every),
        granularity=args.granularity,
    )  # fmt: skip
