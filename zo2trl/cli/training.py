"""The commands that train: `sft`, `dpo` and `reward`, each TRL's script of that name under `accelerate launch`.

Does not: train in this process; `trainers/scripts.py` does, in the processes that accelerate starts.
Invariant: as in TRL, every argument reaches exactly one reader: what the script knows goes to it, whether from the
command line or from the `--config` file, and the rest to `accelerate launch`. Nothing but options reaches it: the
first positional is the script that it runs.
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
_CONFIGS = ("zo2trl", "trl")  # packages with bundled configurations of accelerate; ours first


def add_commands(commands: Any) -> None:
    """Add the three to the command line; their arguments are read by `run`."""
    for name, what in COMMANDS.items():
        parser = commands.add_parser(
            name, add_help=False, help=f"{what} with the arguments of `trl {name}`, those of zo2trl and of accelerate"
        )
        parser.set_defaults(run=None)


def run(name: str, argv: Sequence[str]) -> int:
    """Start one training and wait for it; its exit code.

    Raises:
        ConfigError: the `--config` file or an argument cannot be read, or nobody knows it.
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
    asked = launcher.parse_args(arguments)
    try:
        _warn_of_one_process(asked)
        with _passing_signals_on(), _checked():
            launch_command(asked)
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    except (FileNotFoundError, ValueError) as error:  # accelerate's own word on its arguments
        raise ConfigError(f"accelerate launch: {error}") from error
    return 0


def _split(name: str, argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(the launcher's arguments from the file, and from the line, the script's); `--help` prints these, and exits."""
    from zo2trl.trainers.scripts import make_parser, parse

    parser = make_parser(name, prog=f"zo2trl {name}")
    *_, from_config, from_line = parse(parser, argv, return_remaining_strings=True, separate_remaining_strings=True)
    return from_config, from_line, _without(argv, from_line)


def _as_flags(from_config: Sequence[str], known: Any) -> Iterator[str]:
    """`--multi_gpu True`, which `multi_gpu: true` in a file becomes, as a command line has it."""
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
    """`argv` less a subsequence of it."""
    left = list(ordered)
    return [item for item in argv if not (left and item == left[0] and left.pop(0) is not None)]


def _refuse_unread(arguments: Sequence[str], *, name: str, known: Any) -> None:
    """Refuse what accelerate has no option for; a positional above all, which it would run instead of the training."""
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


def _warn_of_one_process(asked: Any) -> None:
    """Where accelerate makes one process of the several that were asked for, it does not say so."""
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file

    if (asked.num_processes or 1) < 2:
        return
    starts_several = asked.multi_gpu or asked.tpu or asked.use_deepspeed or asked.use_fsdp or asked.use_megatron_lm
    if asked.config_file is not None or (Path(default_config_file).is_file() and not asked.cpu):
        kind = load_config_from_file(asked.config_file).distributed_type
        starts_several = starts_several or str(getattr(kind, "value", kind)) != "NO"
    else:
        starts_several = starts_several or torch.cuda.device_count() > 1
    if asked.cpu or not starts_several:
        print(
            f"zo2trl: warning: `num_processes` is {asked.num_processes}, and accelerate starts one process where "
            f"there are not several GPUs to train on. For several on CPUs: `torchrun --nproc_per_node "
            f"{asked.num_processes} -m {_MODULE} ...`.",
            file=sys.stderr,
        )


def _all_cores(arguments: list[str]) -> list[str]:
    """One process on a machine without a GPU computes with all cores, where accelerate would give it one."""
    import torch
    from accelerate.commands.config import default_config_file

    given = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    is_told = {"__num_cpu_threads_per_process", "__num_processes", "__config_file"} & given
    if is_told or torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ or Path(default_config_file).is_file():
        return arguments
    return ["--num_cpu_threads_per_process", str(torch.get_num_threads()), *arguments]


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """`--accelerate_config NAME_OR_PATH`, if it is there, as accelerate's own `--config_file PATH`.

    Raises:
        ConfigError: neither a file nor the name of a bundled configuration.
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
    """Name -> file of every configuration that comes with zo2trl, and then with TRL."""
    found: dict[str, Path] = {}
    for package in _CONFIGS:
        folder = Path(str(resources.files(package))) / "accelerate_configs"
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return found


@contextmanager
def _checked() -> Iterator[None]:
    """Tell the processes of the training that accelerate's own keys in the file have been read here."""
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
def _passing_signals_on() -> Iterator[None]:
    """Who asks this process to end means the training, which then brings its journal to a good end by itself.

    A terminal sends Ctrl-C to both; a process manager sends SIGTERM to this one only.
    """

    def pass_on(number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            for child in psutil.Process().children():
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
