"""This module has the commands that read a store: `verify`, `export` and `log`.

Does not: verify or export by itself (checkpoints/ does), or import torch before that is needed.
Invariant: results go to stdout; progress goes to stderr, and only if that is a terminal.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo2trl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from zo2trl.checkpoints.rebuild import Progress
    from zo2trl.checkpoints.stored_run import Moment
    from zo2trl.zo.records import Record

__all__ = ["add_commands", "be_quiet"]

_MARKER = "zo_checkpoint.json"
_ROWS_PER_UPDATE = 500
_COLUMNS = ("step", "loss", "projected gradient", "learning rate", "notes")


def add_commands(commands: Any) -> None:
    """Add the three commands to the command line."""
    verify = commands.add_parser("verify", help="read a whole store and list what is damaged, with the cure")
    verify.add_argument("store", type=Path, metavar="STORE", help="store folder, or a checkpoint of its run")
    verify.add_argument(
        "--base", nargs="?", const=True, default=False, metavar="DIR",
        help="compare the base model, too: where the store says it is, or in DIR",
    )  # fmt: skip
    verify.add_argument(
        "--checkpoint", type=Path, action="append", default=[], metavar="DIR", help="check this checkpoint as well"
    )
    verify.set_defaults(run=_verify)

    export = commands.add_parser("export", help="write a store's weights, at any step, as an ordinary model folder")
    export.add_argument("source", type=Path, metavar="STORE|CHECKPOINT", help="store folder, or a checkpoint folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not hold anything yet")
    export.add_argument("--step", type=int, metavar="N", help="weights after N steps; without it, after all")
    export.add_argument("--base", metavar="DIR", help="the model the run began with, if it is not where it was")
    export.add_argument(
        "--store", type=Path, metavar="DIR", help="the store of a checkpoint, if it is not where it was"
    )
    export.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where steps are replayed: cpu (default), cuda"
    )
    export.set_defaults(run=_export)

    log = commands.add_parser("log", help="print the steps of a store")
    log.add_argument("store", type=Path, metavar="STORE", help="store folder")
    log.add_argument("--json", action="store_true", help="one JSON object per line, with everything the journal has")
    log.add_argument("--last", type=int, metavar="N", help="only the last N steps")
    log.set_defaults(run=_log)


# -- verify


def _verify(arguments: argparse.Namespace) -> int:
    from zo2trl.checkpoints.verify import Severity, verify_store

    be_quiet()
    store = arguments.store
    checkpoints = list(arguments.checkpoint)
    if (store / _MARKER).is_file():
        checkpoints.append(store)
        store, _ = _store_of(store, None)
    with _progress("Verifying") as progress:
        findings = verify_store(store, base=arguments.base, progress=progress)
    lines = [str(finding) for finding in findings]
    n_damaged = sum(finding.severity == Severity.DAMAGE for finding in findings)
    problems = [problem for folder in checkpoints for problem in _problems_of(folder, store)]
    for line in (*lines, *problems):
        print(line)
    n_damaged += len(problems)
    n_notes = len(lines) + len(problems) - n_damaged
    notes = f", {n_notes} {'note' if n_notes == 1 else 'notes'}" if n_notes else ""
    print(f"{store}: {n_damaged} damaged{notes}." if n_damaged else f"{store} is sound{notes}.")
    return 1 if n_damaged else 0


def _problems_of(folder: Path, store: Path) -> Iterator[str]:
    from zo2trl.checkpoints.stored_run import StoredRun
    from zo2trl.errors import ZO2TRLError

    try:
        _, moment = _store_of(folder, store)
        StoredRun.look(store).position_at(moment)
    except ZO2TRLError as error:
        yield f"damage: {folder}: {' '.join(str(error).split())}"


# -- export


def _export(arguments: argparse.Namespace) -> None:
    import torch

    from zo2trl.checkpoints.export import export_store

    be_quiet()
    source, moment = arguments.source, None
    if (source / _MARKER).is_file():
        if arguments.step is not None:
            raise ConfigError(f"`--step` and a checkpoint name two moments. Leave one out, or export {source.parent}.")
        source, moment = _store_of(source, arguments.store)
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f'`--device {arguments.device}` is no device to replay steps on: name "cpu" or "cuda".')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"`--device {arguments.device}`: no such CUDA device can be used here. Leave it out.")
    with _progress("Exporting") as progress:
        export_store(
            source, arguments.out, step=arguments.step, moment=moment, base=arguments.base, device=arguments.device,
            progress=progress,
        )  # fmt: skip
    print(f"Exported {arguments.source} to {arguments.out}.")


def _store_of(folder: Path, store: Path | None) -> tuple[Path, "Moment"]:
    """Return the store of a checkpoint, and the checkpoint's moment in the run."""
    from zo2trl.checkpoints.stored_run import Moment
    from zo2trl.trainers.resume.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(folder)
    moment = Moment(store_id=checkpoint.store_id, position=checkpoint.position, fingerprint=checkpoint.fingerprint)
    if store is not None:
        return store, moment
    if checkpoint.store is None:
        raise CheckpointError(f"{folder} does not say where its store is. Name it with `--store DIR`.")
    return folder.parent / checkpoint.store, moment


# -- log


def _log(arguments: argparse.Namespace) -> None:
    from zo2trl.journal.journal import Journal
    from zo2trl.tiers.folder import StoreFolder

    if arguments.last is not None and arguments.last < 0:
        raise ConfigError(f"`--last` must be a number of steps, got {arguments.last}.")
    with Journal.open(StoreFolder.look(arguments.store).journal, read_only=True) as journal:
        records, marks = journal.records, journal.marks
    notes: dict[int, list[str]] = {}
    for mark in marks:
        notes.setdefault(mark.position, []).append(mark.kind.name.lower())
    first = 0 if arguments.last is None else max(len(records) - arguments.last, 0)
    rows = _rows(records[first:], notes, first=first)
    # A bar and a table on one screen would overwrite each other.
    with _progress("Writing", shown=not sys.stdout.isatty()) as progress:
        shown = _with_progress(rows, len(records) - first, progress)
        if arguments.json:
            for row in shown:
                print(json.dumps(row, allow_nan=False))
        else:
            _print_table(shown)


def _rows(records: Sequence["Record"], notes: dict[int, list[str]], *, first: int) -> Iterator[dict[str, Any]]:
    """Yield each step of the journal as JSON values; numbers that are not finite are null."""
    from zo2trl.zo.records import StepRecord

    for position, record in enumerate(records, first + 1):
        row: dict[str, Any] = {"step": record.step, "position": position, "seed": record.seed}
        row["loss"] = (record.loss_plus + record.loss_minus) / 2
        row |= {"loss_plus": record.loss_plus, "loss_minus": record.loss_minus}
        if isinstance(record, StepRecord):
            row |= {
                "projected_grads": record.coefficients, "grad_norm": record.grad_norm,
                "learning_rate": record.learning_rate, "weight_decay": record.weight_decay, "zo_eps": record.zo_eps,
            }  # fmt: skip
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        yield {**finite, "skipped": not isinstance(record, StepRecord), "marks": notes.get(position, [])}


def _with_progress(rows: Iterable[dict[str, Any]], total: int, progress: "Progress") -> Iterator[dict[str, Any]]:
    for done, row in enumerate(rows):
        if done % _ROWS_PER_UPDATE == 0:
            progress("steps", done, total)
        yield row


def _print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Print fixed columns within 80 characters: unlike rich's tables, a million rows take seconds and no memory."""
    print(_line(_COLUMNS))
    print("-" * 80)
    for row in rows:
        print(_line(tuple(_cells(row))))


def _line(cells: Sequence[str]) -> str:
    step, loss, gradient, rate, notes = cells
    return f"{step:>8}  {loss:>11}  {gradient:>22}  {rate:>13}  {notes}".rstrip()


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield str(row["step"])
    yield "not finite" if row["loss"] is None else f"{row['loss']:.6f}"
    grads = row.get("projected_grads", ())
    yield " ".join(f"{grad:.4g}" for grad in grads[:2]) + (f" +{len(grads) - 2}" if len(grads) > 2 else "")
    yield f"{row['learning_rate']:.4g}" if "learning_rate" in row else ""
    yield ", ".join((["skipped"] if row["skipped"] else []) + row["marks"])


# -- progress and logging


@contextmanager
def _progress(title: str, *, shown: bool = True) -> Iterator["Progress"]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title} {what}", completed=done, total=max(total, 1))

        yield update


def be_quiet() -> None:
    """Turn off the bars and advice of transformers and accelerate, which would overwrite this command's."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("accelerate").setLevel(ERROR)
