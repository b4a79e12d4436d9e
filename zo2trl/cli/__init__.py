"""This room is the `zo2trl` command, which trains, plans, reads stores, and exports and converts model folders.

Does not: do any work itself, or import torch before a subcommand needs it.
Invariant: a `ZO2TRLError` is one line on stderr and exit code 2; any other error is a bug and keeps its traceback.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zo2trl.cli import plan, store, training
from zo2trl.errors import ZO2TRLError
from zo2trl.versions import package_version

__all__ = ["main"]

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors", "numpy",
    "greenlet", "triton", "bitsandbytes", "torchao", "deepspeed",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse exits by itself on `--help`, `--version` and bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] and argv[0] in training.COMMANDS:  # TRL's parser reads their arguments
            return training.run(argv[0], argv[1:])
        if argv[:1] == ["plan"]:
            return plan.run(argv[1:])
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
    except ZO2TRLError as error:
        print(f"zo2trl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zo2trl: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader closed the pipe: `zo2trl log STORE | head`
        with Path(os.devnull).open("w") as nowhere:  # else the interpreter flushes at exit, and fails again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zo2trl", description="Forward-only fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"zo2trl {package_version('zo2trl')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="turn a folder with pickled weights (*.bin) into safetensors")
    convert.add_argument("source", type=Path, metavar="SRC", help="folder with pytorch_model.bin or its shards")
    convert.add_argument("destination", type=Path, metavar="DST", help="folder to make; must not hold anything yet")
    convert.set_defaults(run=_convert)

    training.add_commands(commands)
    commands.add_parser(
        "plan", add_help=False, help="say what a training would move, hold and take: MODEL and arguments of `sft`"
    )
    store.add_commands(commands)
    env = commands.add_parser("env", help="print versions, devices, memory and disk space for a bug report")
    env.set_defaults(run=_env)
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from zo2trl.checkpoints.convert import convert_checkpoint

    convert_checkpoint(arguments.source, arguments.destination)
    print(f"Converted {arguments.source} to {arguments.destination}.")


def _env(arguments: argparse.Namespace) -> None:
    for name, value in _facts():
        print(f"- {name}: {value}")


def _facts() -> Iterator[tuple[str, str]]:
    import psutil

    from zo2trl.files.fs import LOCAL
    from zo2trl.files.sizes import format_bytes

    yield "zo2trl", package_version("zo2trl")
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        yield name, package_version(name)
    yield from _devices()
    memory = psutil.virtual_memory()
    yield "CPU", f"{psutil.cpu_count()} cores ({platform.machine()})"
    yield "memory", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"
    here = Path.cwd()
    yield "disk", f"{format_bytes(LOCAL.free_bytes(here))} free at {here}"
    yield "accelerate config", _accelerate_config()


def _accelerate_config() -> str:
    """Describe accelerate's default configuration file, because its settings often surprise users."""
    from accelerate.commands.config import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return "not found"
    return ", ".join(f"{name}={value}" for name, value in load_config_from_file(None).to_dict().items())


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from zo2trl.files.sizes import format_bytes

    if not torch.cuda.is_available():
        yield "CUDA", "not available"
        return
    yield "CUDA", str(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"GPU {index}", f"{name}, {format_bytes(total)}, {format_bytes(free)} free"
