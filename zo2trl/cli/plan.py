"""`zo2trl plan MODEL`: report what a training would move, hold and take, before there is one.

Does not: load weights or train. It takes the arguments of `zo2trl sft`, so a training's own `--config` file will do.
Invariant: results go to stdout, as a table or with `--json` as one object; progress is shown on stderr.
"""

import copy
import functools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from zo2trl.errors import BudgetError, ConfigError, StoreError

if TYPE_CHECKING:
    from zo2trl.planning.rates import MachineRates
    from zo2trl.trainers.planning import Planned

__all__ = ["run"]

WORTH = 1.02  # a gain below this is no advice


@dataclass
class PlanArguments:
    """
    Arguments of `zo2trl plan` beside those of `zo2trl sft`.

    Parameters:
        probe (`str`, *optional*, defaults to `"once"`):
            When this machine's rates are measured: `"once"` and kept, `"again"`, or `"never"`.
    """

    probe: str = field(
        default="once",
        metadata={
            "help": 'When this machine\'s rates are measured (20 seconds at most, 75 with a GPU): "once" and kept, '
            '"again" or "never".',
            "choices": ["once", "again", "never"],
        },
    )


def run(argv: Sequence[str]) -> int:
    """Print the plan.

    Raises:
        ConfigError: an argument cannot work, or there is no such argument.
    """
    from zo2trl.cli.store import be_quiet

    be_quiet()
    plan_args, args, model_args, is_json = _parse(argv)
    from zo2trl.trainers.planning import plan_training

    process_bytes = _anonymous_bytes()
    rates = functools.cache(lambda: _rates(args, probe=plan_args.probe))

    def plan(args: Any, model_args: Any) -> "Planned":
        return plan_training(args, model_args, rates=rates, process_bytes=process_bytes)

    planned = plan(args, model_args)
    report = _report(planned, args, model_args, rates=rates())
    report["advice"] = _advice(planned, args, model_args, plan=plan)
    if is_json:
        print(json.dumps(report, allow_nan=False))
    else:
        from zo2trl.cli.plan_table import print_report

        print_report(report)
    return 0


def _parse(argv: Sequence[str]) -> tuple[PlanArguments, Any, Any, bool]:
    """(own arguments, the training's, the model's, whether to print JSON)"""
    from zo2trl.trainers.planning import plan_parser
    from zo2trl.trainers.scripts import parse

    parser = plan_parser(PlanArguments)
    # Not in the dataclass, whose flags take a value: `--json MODEL` would read the model as one.
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of tables.")
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--model_name_or_path", argv[0]]
    plan_args, _, args, model_args, _, more, from_config, from_line = parse(
        parser, argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    left = [*from_config[::2], *(each.partition("=")[0] for each in from_line if each.startswith("-"))]
    _refuse_unread(left, from_config=from_config, known=parser._option_string_actions)
    if from_line and not any(each.partition("=")[0] == "--model_name_or_path" for each in argv):
        model_args.model_name_or_path = from_line.pop(0)
    if from_line:
        raise ConfigError(f"`{from_line[0]}` belongs to no option, and `zo2trl plan` plans one model. Leave it out.")
    return plan_args, args, model_args, more.json


def _refuse_unread(options: Sequence[str], *, from_config: Sequence[str], known: Collection[str]) -> None:
    """Refuse options that neither a plan nor `zo2trl sft` reads; a file may hold those of `accelerate launch`."""
    if not options:
        return
    from accelerate.commands.launch import launch_command_parser

    from zo2trl.trainers.scripts import SCRIPTS, make_parser, refuse_unknown

    of_accelerate = {*launch_command_parser()._option_string_actions, "--accelerate_config"}
    for option in options:
        if option in of_accelerate:
            if option not in from_config:
                raise ConfigError(
                    f"`{option}` tells `accelerate launch` how to start, and a plan starts nothing. Leave it out."
                )
            continue
        for name in SCRIPTS:
            if option in make_parser(name)._option_string_actions:
                raise ConfigError(
                    f"`{option}` is an argument of `zo2trl {name}`, and `zo2trl plan` covers `zo2trl sft` only. "
                    "Leave it out."
                )
        refuse_unknown(option, name="sft", others=known)


def _rates(args: Any, *, probe: str) -> "MachineRates | None":
    """The rates that a run on this machine uses, measured first if they are to be and were not yet."""
    from zo2trl.planning.known_rates import identity, load_rates, rates_for, save_rates

    key = identity(args.device, args.store_path)
    if probe == "never" or (probe == "once" and load_rates(key) is not None):
        return rates_for(args.device, args.store_path)
    found = _measured(args)
    try:
        save_rates(key, found)
    except (OSError, RuntimeError, StoreError) as error:
        print(f"They cannot be kept, and will be measured again: {error}", file=sys.stderr)
    return found


def _measured(args: Any) -> "MachineRates":
    """Measure this machine, with a progress bar where a person looks and a line where none does."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from zo2trl.forecast.probe import announced_s, measure_machine

    announced = f"Measuring this machine (at most {announced_s(args.device)} seconds, kept for later)"
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{announced} ...", file=sys.stderr, flush=True)
        return measure_machine(args.device, args.store_path)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(announced, total=1.0)

        def on_part(name: str, done: float) -> None:
            progress.update(task, completed=done, description=f"{announced}: {name}")

        return measure_machine(args.device, args.store_path, on_part=on_part)


def _anonymous_bytes() -> int:
    """Bytes of this process that no file backs; where the system does not count them, those that are not shared."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_full_info().uss
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


# -- the report


def _report(planned: "Planned", args: Any, model_args: Any, *, rates: "MachineRates | None") -> dict[str, Any]:
    found, time = planned.forecast, planned.forecast.time
    placement = found.plan.placement
    every = {tier: found.every.get(tier, 1) for tier in ("gpu", "cpu", "disk")}
    n_steps = args.max_steps if args.max_steps > 0 else None
    return {
        "model": model_args.model_name_or_path,
        "parameters": planned.n_parameters,
        "trainable_parameters": planned.n_trainable,
        "device": str(planned.options.device),
        "tokens_per_step": found.tokens,
        "units": [
            {"name": unit.name, "tier": placement.tier_of[unit.index], "bytes": unit.stored_bytes, "kind": unit.kind}
            for unit in found.plan.layout.units
        ],
        "granularity": "leaf" if found.plan.layout.leaf_blocks else "block",
        "write_back_every": every,
        "device_bytes": placement.device_bytes,
        "ring_bytes": placement.ring_bytes,
        "scratch_bytes": placement.scratch_bytes * placement.scratch_copies,
        "bytes_per_step": found.links._asdict(),
        "disk_written_bytes_at_start": found.disk_written_first,
        "disk_written_bytes_per_run": None
        if n_steps is None
        else found.disk_written_first + found.links.disk_written * n_steps,
        "device_peak_bytes": found.peaks.device,
        "pinned_peak_bytes": found.peaks.pinned,
        "host_peak_bytes": found.peaks.host,
        "disk_peak_bytes": found.peaks.disk,
        "seconds_per_step": None if time is None else time.step_s,
        "seconds": None if time is None else {
            "forwards": time.forward_s, "visits": time.visit_s, "upload": time.upload_s, "disk": time.disk_s,
        },
        "tokens_per_second": found.tokens_per_s,
        "seconds_per_run": None if n_steps is None or time is None else time.step_s * n_steps,
        "bound": None if time is None else time.bound,
        "hiding_tokens_per_step": found.hiding_tokens,
        "counted": planned.is_counted,
        "machine": None if rates is None else {**asdict(rates), "age_s": rates.age_s},
    }  # fmt: skip


# -- the one option that would help most


def _advice(
    planned: "Planned", args: Any, model_args: Any, *, plan: Callable[..., "Planned"]
) -> dict[str, Any] | None:
    """Plan with one option changed at a time, and name the one with the most tokens per second."""
    best: dict[str, Any] | None = None
    if planned.forecast.tokens_per_s is None:
        return None
    for option, changed_args, changed_model in _neighbours(planned, args, model_args):
        try:
            other = plan(changed_args, changed_model)
        except BudgetError:
            continue
        time, tokens_per_s = other.forecast.time, other.forecast.tokens_per_s
        assert time is not None and tokens_per_s is not None  # the rates are the same
        gain = tokens_per_s / planned.forecast.tokens_per_s
        if other.forecast.peaks.disk > max(planned.forecast.peaks.disk, _free_on_disk(args.store_path)):
            continue
        if gain > max(WORTH, best["gain"] if best else 0.0):
            best = {
                "option": option, "gain": gain, "seconds_per_step": time.step_s, "tokens_per_second": tokens_per_s,
                "bound": time.bound,
                "disk_written_bytes_at_start": other.forecast.disk_written_first,
                "trains_16_bit": _trains_16_bit(other) and not _trains_16_bit(planned),
            }  # fmt: skip
    return best


def _trains_16_bit(planned: "Planned") -> bool:
    specs = (spec for unit in planned.forecast.plan.layout.units for spec in unit.tensors)
    return any(spec.trainable and spec.dtype.itemsize == 2 for spec in specs)


def _free_on_disk(store_dir: Path) -> int:
    from zo2trl.files.os_errors import free_bytes
    from zo2trl.planning.known_rates import drive_folder

    return free_bytes(drive_folder(store_dir))


def _neighbours(planned: "Planned", args: Any, model_args: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (option as on the command line, arguments with it) of plans that this machine could run."""
    from zo2trl.planning.budgets import free_device_bytes

    found, budgets = planned.forecast, planned.options.budgets
    tiers = set(found.plan.placement.tier_of.values())
    free = free_device_bytes(planned.options.device)
    if tiers - {"gpu"}:
        more = 2 * (budgets.device if budgets.device != "min" else found.peaks.device)
        if more <= free:
            yield _with(args, model_args, device_memory=f"{more // 10**6}MB")
        if "disk" in tiers:
            n_bytes = sum(unit.stored_bytes for unit in found.plan.layout.units)
            yield _with(args, model_args, cpu_memory=_least(n_bytes, psutil.virtual_memory().available))
        steps = args.gradient_accumulation_steps
        yield _with(args, model_args, gradient_accumulation_steps=2 * steps)
    yield _with(args, model_args, per_device_train_batch_size=2 * args.per_device_train_batch_size)
    if model_args.dtype == "float32" or any(
        spec.dtype.itemsize > 2 for unit in found.plan.layout.units for spec in unit.tensors if unit.kind == "block"
    ):
        yield "--dtype bfloat16", args, replace(model_args, dtype="bfloat16")
    if args.write_back_every != "auto":
        yield _with(args, model_args, write_back_every="auto")
    if args.granularity == "leaf":
        yield _with(args, model_args, granularity="block")


def _least(wanted: int, free: int) -> str:
    return f"{min(-(-wanted // 10**6), int(free * 0.7) // 10**6)}MB"


def _with(args: Any, model_args: Any, **changed: Any) -> tuple[str, Any, Any]:
    other = copy.copy(args)
    for name, value in changed.items():
        setattr(other, name, value)
    return " ".join(f"--{name} {value}" for name, value in changed.items()), other, model_args
