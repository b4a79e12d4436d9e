"""This module has the commands that train: `sft`, `dpo` and `reward` run TRL's script under `accelerate launch`.

Does not: train in this process; `trainers/scripts.py` does, in the processes that accelerate starts.
Invariant: as in TRL, every argument reaches exactly one parser: the script's own arguments go to the script, whether
from the command line or from the `--config` file, and the rest to `accelerate launch`. Only options may go there,
because accelerate runs the first positional as a script.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from zo2trl.errors import ConfigError

__all__ = ["COMMANDS", "add_commands", "run"]

COMMANDS = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization",
    "reward": "training of a reward model",
}
_MODULE = "zo2trl.trainers.scripts"
_ACCELERATE_CONFIG = "--accelerate_config"
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "none")
_CONFIGS = ("zo2trl", "trl")  # packages with bundled configurations of accelerate; the first one wins


def add_commands(commands: Any) -> None:
    """Add the three commands to the command line; `run` reads their arguments."""
    for name, what in COMMANDS.items():
        parser = commands.add_parser(
            name, add_help=False, help=f"{what} with the arguments of `trl {name}`, those of zo2trl and of accelerate"
        )
        parser.set_defaults(run=None)


def run(name: str, argv: Sequence[str]) -> int:
    """Start one training, wait for it and return its exit code.

    Raises:
        ConfigError: the `--config` file or an argument cannot be read, or no parser has the argument.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher = launch_command_parser()
    known = launcher._option_string_actions
    from_config, from_line, for_script = _split(name, argv)
    _refuse_unknown(from_config[::2], name=name, known=known)
    _refuse_unread(from_line, name=name, known=known)
    for_launch = [*_as_flags(from_config, known), *from_line]
    arguments = [*_all_cores(with_config_file(for_launch)), "--module", _MODULE, name, *for_script]
    options = launcher.parse_args(arguments)
    try:
        _warn_of_one_process(options)
        with _forwarding_signals(), _marking_keys_checked():
            launch_command(options)
    except subprocess.CalledProcessError as error:  # the process has printed the reason
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    except (FileNotFoundError, ValueError) as error:  # accelerate refused its arguments
        raise ConfigError(f"accelerate launch: {error}") from error
    return 0


def _split(name: str, argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split off the launcher's arguments from the file, those from the line, and the script's; `--help` exits here."""
    from zo2trl.trainers.scripts import make_parser, parse

    parser = make_parser(name, prog=f"zo2trl {name}")
    *_, from_config, from_line = parse(parser, argv, return_remaining_strings=True, separate_remaining_strings=True)
    return from_config, from_line, _without(argv, from_line)


def _as_flags(from_config: Sequence[str], known: Any) -> Iterator[str]:
    """Turn `--multi_gpu True`, which comes from `multi_gpu: true` in a file, into the flag `--multi_gpu`."""
    for option, value in zip(from_config[::2], from_config[1::2], strict=True):
        if getattr(known.get(option), "nargs", None) == 0:
            if value.lower() not in (*_TRUE, *_FALSE):
                name = option.removeprefix("--")
                raise ConfigError(
                    f"`{name}` is {value!r} in the `--config` file, and is true or false. Set one of them."
                )
            if value.lower() in _TRUE:
                yield option
        else:
            yield from (option, value)


def _without(argv: Sequence[str], ordered: Sequence[str]) -> list[str]:
    """Return `argv` without a subsequence of it."""
    left = list(ordered)
    return [item for item in argv if not (left and item == left[0] and left.pop(0) is not None)]


def _refuse_unread(arguments: Sequence[str], *, name: str, known: Any) -> None:
    """Refuse arguments that accelerate does not have, and positionals, which it would run instead of the training."""
    from zo2trl.trainers.scripts import refuse_positional

    is_value = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if is_value:
            is_value = False
        elif not argument.startswith("-"):
            refuse_positional(argument, name=name)
        else:
            _refuse_unknown([option], name=name, known=known)
            is_value = not equals and getattr(known.get(option), "nargs", None) != 0


def _refuse_unknown(options: Sequence[str], *, name: str, known: Any) -> None:
    from zo2trl.trainers.scripts import refuse_unknown

    for option in options:
        if option not in (*known, _ACCELERATE_CONFIG):
            refuse_unknown(option, name=name, others=[*known, _ACCELERATE_CONFIG])


def _warn_of_one_process(options: Any) -> None:
    """Warn if accelerate will start one process instead of the several requested, which it does silently."""
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file

    if (options.num_processes or 1) < 2:
        return
    starts_several = (
        options.multi_gpu or options.tpu or options.use_deepspeed or options.use_fsdp or options.use_megatron_lm
    )
    if options.config_file is not None or (Path(default_config_file).is_file() and not options.cpu):
        kind = load_config_from_file(options.config_file).distributed_type
        starts_several = starts_several or str(getattr(kind, "value", kind)) != "NO"
    else:
        starts_several = starts_several or torch.cuda.device_count() > 1
    if options.cpu or not starts_several:
        print(
            f"zo2trl: warning: `num_processes` is {options.num_processes}, and accelerate starts one process where "
            f"there are not several GPUs to train on. For several on CPUs: `torchrun --nproc_per_node "
            f"{options.num_processes} -m {_MODULE} ...`.",
            file=sys.stderr,
        )


def _all_cores(arguments: list[str]) -> list[str]:
    """Let one process on a machine without a GPU compute with all cores, where accelerate would give it one."""
    import torch
    from accelerate.commands.config import default_config_file

    given = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    is_set = {"__num_cpu_threads_per_process", "__num_processes", "__config_file"} & given
    if is_set or torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ or Path(default_config_file).is_file():
        return arguments
    return ["--num_cpu_threads_per_process", str(torch.get_num_threads()), *arguments]


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """Replace `--accelerate_config NAME_OR_PATH`, if given, by accelerate's own `--config_file PATH`.

    Raises:
        ConfigError: the value is neither a file nor the name of a bundled configuration.
    """
    option = _ACCELERATE_CONFIG
    arguments = [
        part for each in arguments for part in (each.split("=", 1) if each.startswith(f"{option}=") else [each])
    ]
    if option not in arguments:
        return arguments
    at = arguments.index(option)
    if at + 1 == len(arguments):
        raise ConfigError(f"`{option}` needs a name ({', '.join(bundled_configs())}) or the path of a file.")
    value = arguments[at + 1]
    path = value if Path(value).is_file() else bundled_configs().get(value.removesuffix(".yaml"))
    if path is None:
        raise ConfigError(
            f"`{option}` is {value!r}, which is no file, and not the name of a bundled configuration "
            f"({', '.join(bundled_configs())})."
        )
    return ["--config_file", str(path), *arguments[:at], *arguments[at + 2 :]]


def bundled_configs() -> dict[str, Path]:
    """Map names to files of all configurations that come with zo2trl, and then with TRL."""
    found: dict[str, Path] = {}
    for package in _CONFIGS:
        folder = Path(str(resources.files(package))) / "accelerate_configs"
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return found


@contextmanager
def _marking_keys_checked() -> Iterator[None]:
    """Mark in the environment that accelerate's keys in the file were checked here, for the training's processes."""
    from zo2trl.trainers.scripts import CHECKED

    before = os.environ.get(CHECKED)
    os.environ[CHECKED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECKED]
        else:
            os.environ[CHECKED] = before


@contextmanager
def _forwarding_signals() -> Iterator[None]:
    """Pass SIGTERM on to the training, which ends its journal properly by itself, and outlive SIGINT.

    A terminal sends Ctrl-C to both; a process manager sends SIGTERM to this one only.
    """

    def forward(number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            for child in psutil.Process().children():
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
