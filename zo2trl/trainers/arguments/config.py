"""This module defines the ZO arguments, and mixes them into transformers' and TRL's configs.

Does not: act on a choice. Choices that cannot work are refused here or in refusals.py, by name.
"""

import dataclasses
import difflib
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from zo2trl.errors import ConfigError
from zo2trl.files.sizes import parse_size
from zo2trl.trainers.arguments.refusals import refusal
from zo2trl.zo.noise import DIRECTIONS

__all__ = ["ZOArguments", "ZOConfig", "convert_arguments"]

_CHOICES = {
    "direction": DIRECTIONS,
    "rounding": ("nearest", "stochastic", None),
    "granularity": ("auto", "block", "leaf"),
    "parallelism": ("data", "directions"),
}


@dataclass
class ZOArguments:
    """
    Arguments of forward-only (zeroth-order) training out of three tiers, common to all ZO trainers.

    Parameters:
        > Parameters that control where the weights are

        device_memory (`str` or `int`, *optional*, defaults to `"auto"`):
            Ceiling for weights, transfer ring, scratch and (on a GPU) activations on the execution device: a size
            (`"8GB"` is 8e9 bytes, `"8GiB"` is 8 x 2^30, an integer is bytes), `"min"` for the least that works, or
            `"auto"` for 90 % of the free GPU memory (half of the available RAM on a machine without a GPU).
            With several processes it is the ceiling of each.
        cpu_memory (`str` or `int`, *optional*, defaults to `"auto"`):
            Host memory for blocks that do not fit the device (pinned when there is a GPU): a size, `"0"`, or `"auto"`
            for 70 % of the available RAM. Blocks that fit neither are on disk. A size applies to each process;
            `"auto"` divides the RAM among the processes of a machine.
        store_dir (`str`, *optional*):
            Folder of the step journal and of the blocks on disk. Defaults to `<output_dir>/store`. Each of several
            processes has its own in it, `rank-0` and so on.
        granularity (`str`, *optional*, defaults to `"auto"`):
            What is transferred to the device at a time: `"block"`, `"leaf"` (single linear layers and norms; needs
            less memory), or `"auto"` for leaves only where blocks do not fit.
        write_back_every (`str` or `int`, *optional*, defaults to `"auto"`):
            Steps between two write-backs of a streamed block. Steps in between are replayed when the block is visited,
            with the same result bit for bit.

        > Parameters that control what survives

        save_full_weights (`bool`, *optional*, defaults to `False`):
            Whether checkpoints also hold the model's weights. Without them a checkpoint is a few kilobytes that refer
            to the store, from which `resume_from_checkpoint` and `zo2trl export` rebuild the weights.
        sync_every (`int`, *optional*, defaults to `1`):
            Steps between two syncs of the journal to the disk, after which its steps survive a power cut.
        max_replay_s (`float`, *optional*, defaults to `600.0`):
            About how many seconds of replaying steps a resume may take. Blocks in memory are written to disk just
            often enough for that.

        > Parameters that control the gradient estimate

        zo_eps (`float`, *optional*, defaults to `1e-3`):
            Distance of the two probes from the weights.
        num_directions (`int`, *optional*, defaults to `1`):
            Random directions per step; their estimates are averaged. One traversal of the blocks evaluates all.
        direction (`str`, *optional*, defaults to `"rademacher"`):
            Distribution of the directions: `"rademacher"` (+1 or -1), `"gaussian"`, or `"mezo"` for the noise stream
            of the MeZO reference implementation.
        rounding (`str`, *optional*):
            How updates are rounded to the storage dtype: `"nearest"` or `"stochastic"`. Defaults to `"stochastic"`
            when trainable weights are stored in 16 bit, else `"nearest"`.

        parallelism (`str`, *optional*, defaults to `"data"`):
            How several processes divide a step: `"data"` (each has micro-batches of its own and evaluates all
            directions on them) or `"directions"` (all have the same micro-batches, and each evaluates an
            equal part of the `num_directions` directions).

        > Parameters that control what is optimised

        objective (`str`, *optional*):
            Optimise this instead of the trainer's loss: `"accuracy"` (one forward), `"squad_f1"` or `"exact_match"`
            (of generated text). Functions of your own are passed to the trainer as `objective=`.
        objective_max_new_tokens (`int`, *optional*):
            The most tokens to generate for `"squad_f1"` and `"exact_match"`, which need it. A streamed model is
            transferred once for every token.

        > Parameters of [`~transformers.TrainingArguments`] with other defaults

        learning_rate (`float`, *optional*, defaults to `1e-6`):
            A projected gradient is as large as the gradient's norm times its angle to a random direction, so learning
            rates are much smaller than with backpropagation.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            The learning rate schedule.
        max_grad_norm (`float`, *optional*, defaults to `0.0`):
            If positive, the projected gradient is clipped to this absolute value.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            This has no effect, because nothing is stored for a backward pass.
    """

    device_memory: str = field(
        default="auto",
        metadata={
            "help": "Ceiling for weights, ring, scratch and (on a GPU) activations on the device: a size such as "
            '"8GB", "auto" or "min".'
        },
    )
    cpu_memory: str = field(
        default="auto",
        metadata={"help": 'Host memory for blocks that do not fit the device: a size such as "32GB", "0" or "auto".'},
    )
    store_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the step journal and of the blocks on disk. Defaults to <output_dir>/store."},
    )
    granularity: str = field(
        default="auto", metadata={"help": 'What is transferred to the device at a time: "block", "leaf" or "auto".'}
    )
    write_back_every: str = field(
        default="auto", metadata={"help": 'Steps between two write-backs of a streamed block, or "auto".'}
    )
    save_full_weights: bool = field(
        default=False, metadata={"help": "Whether checkpoints also hold the model's weights."}
    )
    sync_every: int = field(
        default=1, metadata={"help": "Steps between two syncs of the journal to the disk, against power cuts."}
    )
    max_replay_s: float = field(
        default=600.0, metadata={"help": "About how many seconds of replaying steps a resume may take."}
    )
    zo_eps: float = field(default=1e-3, metadata={"help": "Distance of the two probes from the weights."})
    num_directions: int = field(
        default=1, metadata={"help": "Random directions per step; their estimates are averaged."}
    )
    direction: str = field(
        default="rademacher", metadata={"help": 'Distribution of the directions: "rademacher", "gaussian" or "mezo".'}
    )
    rounding: str | None = field(
        default=None, metadata={"help": 'Rounding of updates: "nearest" or "stochastic" (default for 16-bit weights).'}
    )
    parallelism: str = field(
        default="data", metadata={"help": 'How several processes divide a step: "data" or "directions".'}
    )
    objective: str | None = field(
        default=None,
        metadata={"help": 'Optimise "accuracy", "squad_f1" or "exact_match" instead of the trainer\'s loss.'},
    )
    objective_max_new_tokens: int | None = field(
        default=None, metadata={"help": 'The most tokens to generate for "squad_f1" and "exact_match".'}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "If positive, the projected gradient is clipped to this absolute value."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Has no effect: nothing is stored for a backward pass."}
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        if deepspeed := getattr(self, "deepspeed", None):  # before upstream requires the package
            raise refusal("deepspeed", deepspeed)
        if getattr(self, "bf16", False) is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL's None means "if the GPU can"; transformers refuses it without a GPU
        if not self.gradient_checkpointing:
            # Upstream takes any value but None for a use of the old name of `activation_checkpointing`.
            self.gradient_checkpointing = None  # type: ignore[assignment]
        super().__post_init__()  # type: ignore[misc]
        self.gradient_checkpointing = bool(self.gradient_checkpointing)

    @property
    def store_path(self) -> Path:
        """Return `store_dir`, or its default beside the current `output_dir`.

        Scripts that sweep set another `output_dir` per run, after the config was made.
        """
        return Path(self.store_dir) if self.store_dir else Path(self.output_dir or ".") / "store"  # type: ignore[attr-defined]


@dataclass
class ZOConfig(ZOArguments, TrainingArguments):
    """
    Configuration of [`ZOTrainer`]: the parameters of [`ZOArguments`] and of [`~transformers.TrainingArguments`].
    """


_Config = TypeVar("_Config", bound=ZOArguments)


def convert_arguments(args: TrainingArguments, to: type[_Config]) -> _Config:
    """Add ZO defaults to a plain `TrainingArguments` or `SFTConfig`; a ZO config is returned as it is.

    A field that holds upstream's default gets our default where the two differ, and a warning names it. Values are
    copied one by one, because `to_dict()` would redact every field that ends in `_token`.
    """
    if isinstance(args, to):
        return args
    upstream = {f.name: f.default for f in dataclasses.fields(args)}
    converted: Any = to(output_dir=args.output_dir, use_cpu=args.use_cpu, bf16=args.bf16)  # type: ignore[call-arg]
    converted.__dict__.update(args.__dict__)
    replaced: list[str] = []
    for ours in dataclasses.fields(ZOArguments):
        had = args.__dict__.get(ours.name)
        if ours.name in upstream and had == upstream[ours.name] and had != ours.default:
            replaced.append(f"{ours.name}: {had} -> {ours.default}")
        if ours.name not in upstream or had == upstream[ours.name]:
            converted.__dict__[ours.name] = ours.default
    if getattr(args, "gradient_checkpointing", False) and not converted.gradient_checkpointing:
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            converted.__dict__[name] = False
    _warn_of_replaced([row for row in replaced if not row.startswith("gradient_checkpointing")], to)
    return converted


def _warn_of_replaced(replaced: list[str], to: type) -> None:
    if replaced:
        warnings.warn(
            f"A plain config was given, so values that are upstream's defaults become those of ZO training: "
            f"{', '.join(replaced)}. Pass a {to.__name__} to choose them yourself.",
            stacklevel=5,
        )


def _check_choices(args: ZOArguments) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        if value not in choices:
            names = [choice for choice in choices if choice]
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"`{name}` is {value!r}, but must be one of {names}. Did you mean {near!r}?")


def _check_numbers(args: ZOArguments) -> None:
    for name in ("device_memory", "cpu_memory"):
        parse_size(getattr(args, name), argument=name)
    if isinstance(args.learning_rate, str) or not math.isfinite(args.learning_rate):
        raise ConfigError(f"`learning_rate` is {args.learning_rate!r}, but must be a number (in YAML: 1.0e-6).")
    if isinstance(args.zo_eps, str) or not 0 < args.zo_eps < math.inf:
        raise ConfigError(f"`zo_eps` is {args.zo_eps!r}, but must be a positive number (in YAML: 1.0e-3).")
    if not isinstance(args.num_directions, int) or args.num_directions < 1:
        raise ConfigError(f"`num_directions` is {args.num_directions!r}, but must be a whole number, at least 1.")
    if not isinstance(args.sync_every, int) or args.sync_every < 1:
        raise ConfigError(f"`sync_every` is {args.sync_every!r}, but must be a whole number of steps, at least 1.")
    if isinstance(args.max_replay_s, str) or not args.max_replay_s >= 0:
        raise ConfigError(f"`max_replay_s` is {args.max_replay_s!r}, but must be a number of seconds, at least 0.")
    every: Any = args.write_back_every
    if every != "auto" and not (str(every).isdecimal() and int(every) >= 1):
        raise ConfigError(f'`write_back_every` is {every!r}, but must be a number of steps (at least 1) or "auto".')
