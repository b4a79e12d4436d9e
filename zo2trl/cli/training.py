"""The commands that train: `sft`, `dpo` and `reward`, each TRL's script of that name under `accelerate launch`.

Does not: train in this process; `trainers/scripts.py` does, in the processes that accelerate starts.
Invariant: as in TRL, every argument reaches exactly one reader: what the script knows goes to it, whether from the
command line or from the `--config` file, and the rest to `accelerate launch`.
"""

import difflib
import os
import signal
import subprocess
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
    for_launch = [*_as_flags(from_config, known), *from_line]
    _refuse_unknown(for_launch, name=name, known=known)
    arguments = [*_all_cores(with_config_file(for_launch)), "--module", _MODULE, name, *for_script]
    try:
        with _passing_signals_on():
            launch_command(launcher.parse_args(arguments))
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except ChildFailedError as error:
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    except ValueError as error:  # accelerate's own word on its arguments
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
            if value.lower() in ("true", "1", "yes"):
                yield option
        else:
            yield from (option, value)


def _without(argv: Sequence[str], ordered: Sequence[str]) -> list[str]:
    """`argv` less a subsequence of it."""
    left = list(ordered)
    return [item for item in argv if not (left and item == left[0] and left.pop(0) is not None)]


def _refuse_unknown(arguments: Sequence[str], *, name: str, known: Any) -> None:
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    for option in options:
        if option == "--accelerate_config" or any(each.startswith(option) for each in known):
            continue
        from zo2trl.trainers.scripts import make_parser

        ours = make_parser(name)._option_string_actions
        near = difflib.get_close_matches(option, [*ours, *known, "--accelerate_config"], n=1, cutoff=0.6)
        hint = f"Did you mean `{near[0]}`?" if near else f"`zo2trl {name} --help` lists those that exist."
        raise ConfigError(f"`{option}` is an argument of neither `zo2trl {name}` nor `accelerate launch`. {hint}")


def _all_cores(arguments: list[str]) -> list[str]:
    """One process on a machine without a GPU computes with all cores, where accelerate would give it one."""
    import torch
    from accelerate.commands.config import default_config_file

    is_told = {"--num_cpu_threads_per_process", "--num_processes", "--config_file"} & set(arguments)
    if is_told or torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ or Path(default_config_file).is_file():
        return arguments
    return ["--num_cpu_threads_per_process", str(torch.get_num_threads()), *arguments]


def with_config_file(arguments: Sequence[str]) -> list[str]:
    """`--accelerate_config NAME_OR_PATH`, if it is there, as accelerate's own `--config_file PATH`.

    Raises:
        ConfigError: neither a file nor the name of a bundled configuration.
    """
    option = "--accelerate_config"
    if option not in arguments:
        return list(arguments)
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
