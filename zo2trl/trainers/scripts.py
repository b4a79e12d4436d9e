"""This module runs TRL's scripts `sft`, `dpo` and `reward` with our trainers and configs.

    accelerate launch --module zo2trl.trainers.scripts sft --config sft.yaml --max_steps 100

Does not: start processes (cli/training.py does, through accelerate), or add an argument to those of TRL, transformers
and our configs.
Invariant: the command line takes precedence over the `--config` file, and that over defaults; an argument that no
config reads is refused.
"""

import difflib
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate import PartialState
from packaging.version import Version
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from zo2trl.errors import ConfigError, ZO2TRLError, errors_in_one_line

__all__ = [
    "CHECKED",
    "SCRIPTS",
    "USAGE",
    "ZOModelConfig",
    "load_datasets",
    "main",
    "make_parser",
    "model_init_kwargs",
    "parse",
    "refuse_no_model",
    "refuse_positional",
    "refuse_unknown",
    "train",
]

# argparse prints it before every error; without it that would be a list of 200 arguments.
USAGE = "%(prog)s [--config FILE] [arguments; --help lists them]"
SCRIPTS = ("sft", "dpo", "reward")
"""The commands."""
CHECKED = "ZO2TRL_ARGUMENTS_CHECKED"
"""`zo2trl sft` sets this variable for its processes, after it has checked the arguments and the file."""
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # PEFT's types for models that generate text

logger = logging.getLogger(__name__)


@dataclass
class ZOModelConfig(ModelConfig):
    """
    [`~trl.ModelConfig`] with another default: without `--dtype` the checkpoint's own dtype is kept.

    Parameters:
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype to store the weights in: `"auto"`, `"bfloat16"`, `"float16"` or `"float32"`.
    """

    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Dtype to store the weights in; 'auto' keeps the checkpoint's own.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )


def make_parser(name: str, *, prog: str | None = None) -> TrlParser:
    """Make the parser of one script: `ScriptArguments`, the trainer's config, `ZOModelConfig`, `DatasetMixtureConfig`.

    Raises:
        ConfigError: there is no such script.
    """
    _, config_class = _trainer_and_config(name)
    read: Any = (ScriptArguments, config_class, ZOModelConfig, DatasetMixtureConfig)
    # With abbreviations, accelerate's `--cpu` would be an ambiguous `--cpu_memory`.
    parser = TrlParser(read, prog=prog, usage=USAGE, allow_abbrev=False)
    if name == "reward":
        parser.set_defaults(lora_task_type="SEQ_CLS")
    return parser


def _trainer_and_config(name: str) -> tuple[Any, Any]:
    """Import the classes of one script, because a command needs no other trainer of TRL."""
    if name not in SCRIPTS:
        raise ConfigError(f"There is no script {name!r}. Choose one of {', '.join(SCRIPTS)}.")
    if name == "sft":
        from zo2trl.trainers.sft_trainer import ZOSFTConfig, ZOSFTTrainer

        return ZOSFTTrainer, ZOSFTConfig
    if name == "dpo":
        from zo2trl.trainers.dpo_trainer import ZODPOConfig, ZODPOTrainer

        return ZODPOTrainer, ZODPOConfig
    from zo2trl.trainers.reward_trainer import ZORewardConfig, ZORewardTrainer

    return ZORewardTrainer, ZORewardConfig


def parse(parser: TrlParser, arguments: Sequence[str], **how: Any) -> tuple[Any, ...]:
    """Call `parser.parse_args_and_config`, and convert every error in a file or a value into a `ConfigError`."""
    split = [part for each in arguments for part in _parts(each)]
    if split[-1:] == ["--config"]:
        raise ConfigError("`--config` needs the path of a YAML file.")
    try:
        return parser.parse_args_and_config(split, **how)
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from error


def _parts(argument: str) -> list[str]:
    """Split `--config=FILE` in two, because TRL's parser looks for these."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def refuse_unknown(option: str, *, name: str, others: Collection[str] = ()) -> None:
    """Refuse an option that no parser reads, and suggest the closest one that exists.

    Raises:
        ConfigError: always.
    """
    near = difflib.get_close_matches(option, [*make_parser(name)._option_string_actions, *others], n=1, cutoff=0.6)
    hint = f"Did you mean `{near[0]}`?" if near else f"`zo2trl {name} --help` lists those that exist."
    raise ConfigError(f"`{option}` is an argument of neither `zo2trl {name}` nor `accelerate launch`. {hint}")


def refuse_positional(value: str, *, name: str) -> None:
    """Refuse a value that belongs to no option.

    Raises:
        ConfigError: always.
    """
    option = "--config" if value.endswith((".yaml", ".yml")) else "--model_name_or_path"
    hint = "Leave it out." if value.endswith(".py") else f"Did you mean `{option} {value}`?"
    raise ConfigError(f"`{value}` belongs to no option, and `zo2trl {name}` takes options only. {hint}")


def _refuse_left_over(name: str, from_config: Sequence[str], from_line: Sequence[str]) -> None:
    """Refuse arguments that no dataclass has read.

    Without `CHECKED` the script was not started by `zo2trl`, so entries of the file are checked here, too.
    """
    for value in from_line:
        if not value.startswith("-"):
            refuse_positional(value, name=name)
        _refuse_in_script(value.partition("=")[0], name=name)
    if CHECKED not in os.environ:
        for option in from_config[::2]:
            _refuse_in_script(option, name=name)


def _refuse_in_script(option: str, *, name: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    if option == "--accelerate_config" or option in launch_command_parser()._option_string_actions:
        raise ConfigError(
            f"`{option}` is an argument of `accelerate launch`, and this script is started already. Put it before the "
            f"script's name on the command line of `accelerate launch`, or start with `zo2trl {name}`."
        )
    refuse_unknown(option, name=name)


def train(
    name: str,
    script_args: ScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train, save, and push if the arguments ask for it.

    Raises:
        ConfigError: no model or no data set was named, a split does not exist, or an argument cannot work.
    """
    trainer_class, _ = _trainer_and_config(name)
    refuse_no_model(model_args)
    _refuse_generating_adapter(name, model_args)
    resume = training_args.resume_from_checkpoint = _resume(training_args.resume_from_checkpoint)
    if script_args.ignore_bias_buffers:
        _warn("`ignore_bias_buffers` has no effect: the model is not wrapped in DDP, so no buffers are broadcast.")
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    dataset = load_datasets(script_args, dataset_args)
    wants_eval = training_args.eval_strategy != "no"
    with _refusals_of_peft(model_args):
        trainer = trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=_split(dataset, script_args.dataset_train_split, argument="dataset_train_split"),
            eval_dataset=_split(dataset, script_args.dataset_test_split, argument="dataset_test_split")
            if wants_eval
            else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    trainer.train(resume_from_checkpoint=resume)
    trainer.accelerator.print("Training completed.")
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to the hub as {trainer.hub_model_id}.")
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()


def refuse_no_model(model_args: ModelConfig) -> None:
    """Refuse a missing model, or a model folder that does not exist, before anything is loaded.

    Raises:
        ConfigError: see above.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ConfigError("No model was named. Pass `--model_name_or_path` with a checkpoint's folder or hub id.")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ConfigError(
            f"`model_name_or_path` {name} is no folder, and not what a hub id looks like. Check the path."
        )


def _refuse_generating_adapter(name: str, model_args: ModelConfig) -> None:
    if name == "reward" and model_args.use_peft and model_args.lora_task_type in _GENERATING:
        raise ConfigError(
            f"`lora_task_type` is {model_args.lora_task_type!r}, which is for models that generate text, and a reward "
            "model gives one number. Leave it out, or set `--lora_task_type SEQ_CLS`."
        )


@contextmanager
def _refusals_of_peft(model_args: ModelConfig) -> Iterator[None]:
    """Convert PEFT's error for an adapter that cannot be made into a `ConfigError`."""
    try:
        yield
    except ZO2TRLError:
        raise
    except ValueError as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None or not last.tb_frame.f_globals.get("__name__", "").startswith("peft."):
            raise
        raise ConfigError(
            f"PEFT cannot make this adapter (`lora_target_modules` {model_args.lora_target_modules}, `lora_r` "
            f"{model_args.lora_r}): {error}"
        ) from error


def _resume(given: str | bool | None) -> str | bool | None:
    """Convert the words `true` and `false` of a command line, because the field is a `str`; a file can hold True."""
    return {"true": True, "false": None}.get(given.lower(), given) if isinstance(given, str) else given


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def model_init_kwargs(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`: options of `ModelConfig`, overridden by `--model_init_kwargs`."""
    chosen: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(training_args, "trust_remote_code", False),
        "attn_implementation": model_args.attn_implementation,
        "dtype": None if model_args.dtype == "auto" else model_args.dtype,
    }
    given = training_args.model_init_kwargs or {}
    return {key: value for key, value in chosen.items() if value is not None} | dict(given)


def load_datasets(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    """Load the splits that `--dataset_name` or a config file's `datasets:` list names; TRL prefers the list, too.

    Raises:
        ConfigError: neither is given, or what is given cannot be loaded.
    """
    import datasets

    if not dataset_args.datasets and script_args.dataset_name is None:
        raise ConfigError("No data set was named. Pass `--dataset_name`, or list `datasets:` in a `--config` file.")
    if dataset_args.datasets and script_args.dataset_name is not None:
        _warn(f"`dataset_name` {script_args.dataset_name} is ignored: `datasets` is given as well, and comes first.")
    load: Any = datasets.load_dataset
    try:
        if dataset_args.datasets:
            return get_dataset(dataset_args)
        return load(script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (OSError, ValueError) as error:  # no such file, folder, hub id or configuration
        named = "`datasets`" if dataset_args.datasets else f"`dataset_name` {script_args.dataset_name}"
        raise ConfigError(f"{named} cannot be loaded: {error}") from error


def _split(dataset: Any, name: str, *, argument: str) -> Any:
    if name not in dataset:
        raise ConfigError(
            f"`{argument}` is {name!r}, and the data set has {', '.join(map(repr, dataset))}. Name one of these"
            + (', or set `eval_strategy="no"`.' if argument == "dataset_test_split" else ".")
        )
    return dataset[name]


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `sft`, `dpo` or `reward` in this process; an error made for users is one line on stderr and exit code 2.

    Args:
        argv: arguments of the script; those of the command line by default.
    """
    with errors_in_one_line(f"{name}{_rank()}"):
        arguments = sys.argv[1:] if argv is None else list(argv)
        how = {"return_remaining_strings": True, "separate_remaining_strings": True}
        *parsed, from_config, from_line = parse(make_parser(name), arguments, **how)
        _refuse_left_over(name, from_config, from_line)
        train(name, *parsed)
        PartialState().destroy_process_group()  # else NCCL complains at the end of every run on several GPUs


def _rank() -> str:
    """Return which of several processes reports an error, as text."""
    rank = os.environ.get("RANK", "0")
    return f" (process {rank})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
