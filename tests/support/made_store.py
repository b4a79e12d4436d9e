"""Stores with a run in them, made by a real engine from invented steps: no forward pass, and a live model to compare.

The steps are real to the arithmetic (several directions, decay, skips, gaps in the numbering), so what a store gives
back can be compared with what the model had after each of them.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tqdm
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_model
from tests.support.toys import options
from zo2trl.engine.opening import open_engine
from zo2trl.engine.step import Engine
from zo2trl.journal.journal import Journal
from zo2trl.zo.records import Record, SkipRecord, StepRecord

tqdm.tqdm.monitor_interval = 0  # transformers' first bar would start a thread that stays


def invented(step: int) -> Record:
    """What happened at a step: every fourth one was skipped."""
    if step % 4 == 2:
        return SkipRecord(step=step, seed=900 + step, losses=(float("nan"), 1.0))
    return StepRecord(
        step=step, seed=900 + step, coefficients=(0.5 + step, -0.25)[: 1 + step % 2], learning_rate=0.01,
        weight_decay=0.125 if step % 3 else 0.0, zo_eps=1e-3, losses=(2.5, 2.25), scalars=(0.5 + step,),
    )  # fmt: skip


@contextmanager
def running(model: nn.Module, folder: Path, *, device: str = "cpu", **choices: Any) -> Iterator[Engine]:
    """An engine over a new store of `model`; `choices` are `EngineOptions` and the tier."""
    decay_names = [name for name, p in model.named_parameters() if p.dim() > 1]
    chosen = options(folder, decay_names=decay_names, **choices)
    engine = open_engine(model, replace(chosen, device=torch.device(device)))
    try:
        yield engine
    finally:
        engine.shutdown()


def make_run(
    model: nn.Module,
    folder: Path,
    *,
    steps: Iterator[int] | range = range(5),
    each: Callable[[int], None] = lambda step: None,
    **choices: Any,
) -> None:
    """Make a store of `model` in `folder` and do some steps.

    `each` is called with the number of a step before it, and once at the end, while the model shows its weights.
    """
    with running(model, folder, **choices) as engine:
        next_step = 0
        for step in steps:
            engine.flush()
            each(step)
            engine.store.append(invented(step))
            next_step = step + 1
        engine.flush()
        each(next_step)


def files_in(folder: Path) -> dict[str, str]:
    """Path below `folder` -> SHA-256 of the content, of all files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def flip(path: Path, offset: int, *, bit: int = 0) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def saver(model: nn.Module, folder: Path) -> Callable[[int], None]:
    """Saves the live model as a trainer does, to a folder per step."""

    def save(step: int) -> None:
        out = folder / f"saved-{step}"
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(out)
        else:
            out.mkdir(parents=True)
            save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})

    return save


def assert_same_files(made: Path, saved: Path) -> None:
    expected = {name: digest for name, digest in files_in(saved).items() if not name.endswith("README.md")}
    assert files_in(made) == expected


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.rglob("*.safetensors") for name, tensor in load_file(file).items()}


def path_run(tmp_path: Path, name: str = "opt", **choices: Any) -> Path:
    """A run that began with a checkpoint which it knows the path of; its units live in memory."""
    tiny_model(name).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base = {"base_folder": str(tmp_path / "base"), "tier": "cpu"}
    make_run(model, tmp_path / "store", each=saver(model, tmp_path), **base | choices)
    return tmp_path / "store"


def unit_file(store: Path, name: str) -> Path:
    """The newest version of a unit."""
    return max(store.glob(f"units/{name}@*"), key=lambda path: int(path.name.split("@")[1].split(".")[0]))


def retold(store: Path, **facts: Any) -> None:
    """Replace the journal by one with another header and the same steps."""
    with Journal.open(store / "journal", read_only=True) as old:
        header, records = old.header | facts, old.records
    (store / "journal").unlink()
    with Journal.create(store / "journal", header=header, sync_every=0) as new:
        for record in records:
            new.append(record)
