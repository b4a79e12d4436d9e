"""A checkpoint folder: the Trainer's own state in JSON, and a pointer into the journal. No pickles.

Does not: know a trainer; it turns objects that have a `state_dict` into files and back.

::

    checkpoint-N/
    ├── trainer_state.json          the Trainer's
    ├── optimizer.json              learning rates of the parameter groups
    ├── scheduler.json              the schedule's `state_dict`
    ├── rng_state.json              Python's, numpy's and torch's global generators
    ├── training_args.json          for people; tokens are redacted
    ├── config.json, tokenizer ...  as in a model folder
    ├── adapter_model.safetensors   with PEFT; model*.safetensors with `save_full_weights`
    └── zo_checkpoint.json          the pointer, and sizes and checksums of all of these; written last

Invariants:
- A folder without a marker that checks is no checkpoint.
- What is read back equals what was written, to the last bit of a float and the kind of a sequence.
"""

import math
import random
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from zo2trl.errors import CheckpointError
from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.tiers.paths import inside
from zo2trl.tiers.strict_json import JSON, Fields, read_json, write_json

__all__ = [
    "MARKER_NAME", "RNG_NAME", "Checkpoint", "Pointer", "commit_checkpoint", "decode_state", "encode_state",
    "last_valid_checkpoint", "read_checkpoint", "read_rng", "read_schedule", "rng_state", "save_without_weights",
    "set_rng_state", "write_arguments", "write_rng", "write_schedule",
]  # fmt: skip

MARKER_NAME = "zo_checkpoint.json"
RNG_NAME = "rng_state.json"
OPTIMIZER_NAME = "optimizer.json"
SCHEDULER_NAME = "scheduler.json"
ARGUMENTS_NAME = "training_args.json"
FORMAT = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_CHECKED_BYTES = 256 * 2**20  # larger files are weights, which have other ways to be checked
_FOLDER = re.compile(r"checkpoint-(\d+)")
_CURE = "Resume from another checkpoint, or from the journal alone with `resume_from_checkpoint=True`."


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """Where a checkpoint lies in its run.

    Attributes:
        store: folder of the store relative to the one of the checkpoints; None if it lies elsewhere.
        store_id: the run the checkpoint belongs to.
        position, fingerprint: records of the journal before the checkpoint, and the name of that history.
        step: the Trainer's global step.
        step_offset: journal step - global step.
        counters: what the trainer keeps between two logs; JSON.
    """

    store: str | None
    store_id: str
    position: int
    fingerprint: str
    step: int
    step_offset: int
    counters: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Pointer):
    """A pointer that was read, from a folder whose files are all there."""

    folder: Path


# -- the marker


def commit_checkpoint(folder: Path, pointer: Pointer, *, fs: FS = LOCAL) -> None:
    """Make all files of the folder durable, then declare it a checkpoint."""
    fs.unlink(folder / MARKER_NAME, missing_ok=True)  # the folder of an earlier run with the same step
    fs.sync_tree(folder)
    files: dict[str, JSON] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        n_bytes = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"bytes": n_bytes, "crc32": _crc_of(path, n_bytes, fs)}
    write_json(folder / MARKER_NAME, {"format": FORMAT, **asdict(pointer), "files": files}, fs=fs)
    fs.sync_folder(folder.parent)


def read_checkpoint(folder: Path, *, fs: FS = LOCAL) -> Checkpoint:
    """The pointer of a checkpoint, after checking that its files are there and as they were.

    Raises:
        CheckpointError: no checkpoint of this package, an unfinished one, or damage; names the file.
    """
    marker = folder / MARKER_NAME
    if not fs.exists(marker):
        raise _refuse_foreign(folder)
    fields = Fields(
        read_json(marker, max_bytes=MAX_JSON_BYTES, fs=fs, error=CheckpointError), str(marker), error=CheckpointError
    )
    if (version := fields.integer("format")) != FORMAT:
        raise CheckpointError(f"{marker} has format {version}; this zo2trl reads {FORMAT}. Use the one that wrote it.")
    for name, row in fields.table("files").items():
        _check_file(folder, name, Fields(row, f"{marker}: files[{name[:80]!r}]", error=CheckpointError), fs)
    store = fields.text("store", optional=True)
    if store is not None:
        inside(folder.parent, store, error=CheckpointError)
    return Checkpoint(
        folder=folder, store=store, store_id=fields.text("store_id"), position=fields.integer("position", least=0),
        fingerprint=fields.text("fingerprint"), step=fields.integer("step", least=0),
        step_offset=fields.integer("step_offset", least=0), counters=fields.table("counters"),
    )  # fmt: skip


def last_valid_checkpoint(output_dir: Path, *, fs: FS = LOCAL) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that checks, and why higher ones do not."""
    if not output_dir.is_dir():
        return None, []
    found = [(int(match[1]), output_dir / name) for name in fs.list_names(output_dir)
             if (match := _FOLDER.fullmatch(name)) and (output_dir / name).is_dir()]  # fmt: skip
    reasons: list[str] = []
    for _, folder in sorted(found, reverse=True):
        try:
            read_checkpoint(folder, fs=fs)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return folder, reasons
    return None, reasons


def _refuse_foreign(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is no folder, so there is no checkpoint to resume from. Check the path.")
    return CheckpointError(
        f"{folder} has no {MARKER_NAME}: it is not a checkpoint of this package, or saving it was cut off. State in "
        "pickles (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin, *.bin) is never opened, because "
        "unpickling can run code. To start a new run from the weights in a folder, pass it as `model`; turn pickled "
        f"weights into safetensors with `zo2trl convert SRC DST` first. {_CURE}"
    )


def _check_file(folder: Path, name: str, row: Fields, fs: FS) -> None:
    path = inside(folder, name, error=CheckpointError)
    if not fs.exists(path):
        raise CheckpointError(f"{path} is missing: {folder} was not saved to its end, or damaged since. {_CURE}")
    n_bytes = row.integer("bytes", least=0)
    if (size := path.stat().st_size) != n_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes instead of {n_bytes:,}. {_CURE}")
    expected = None if row.values.get("crc32") is None else row.integer("crc32")
    if expected is not None and (found := _crc_of(path, n_bytes, fs)) != expected:
        raise CheckpointError(f"{path} was changed: its CRC32 is {found or 0:08x} instead of {expected:08x}. {_CURE}")


def _crc_of(path: Path, n_bytes: int, fs: FS) -> int | None:
    if n_bytes > MAX_CHECKED_BYTES:
        return None
    data = bytearray(n_bytes)
    fd = fs.open(path)
    try:
        fs.read_at(fd, data, 0, path=path)
    finally:
        fs.close(fd)
    return zlib.crc32(data)


# -- random numbers


def rng_state() -> dict[str, JSON]:
    """State of Python's, numpy's and torch's global generators, as JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()] if _has_cuda() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": list[JSON](cuda),
    }


def set_rng_state(state: object, *, where: Path | str) -> None:
    """Bring back what `rng_state` returned. Raises `CheckpointError` if that is not what `state` is."""
    fields = Fields(state, str(where), error=CheckpointError)
    try:
        version, words, gauss = fields.list("python")
        kind, keys, position, has_gauss, cached = fields.list("numpy")
        cpu, devices = _tensor(fields.text("torch")), [_tensor(text) for text in fields.list("cuda")]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(cpu)
        if _has_cuda() and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where} does not hold the state of random generators ({error}). {_CURE}") from error


def write_rng(path: Path, *, fs: FS = LOCAL) -> None:
    """Write the global generators' state."""
    write_json(path, rng_state(), fs=fs)


def read_rng(path: Path, *, fs: FS = LOCAL) -> None:
    """Bring the global generators' state back."""
    set_rng_state(read_json(path, max_bytes=MAX_JSON_BYTES, fs=fs, error=CheckpointError), where=path)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


# -- the schedule


def write_schedule(folder: Path, optimizer: Any, scheduler: Any, *, fs: FS = LOCAL) -> None:
    """Write the learning rates of an optimizer's groups and a scheduler's state."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    write_json(folder / OPTIMIZER_NAME, encode_state(groups, where="optimizer"), fs=fs)
    write_json(folder / SCHEDULER_NAME, encode_state(scheduler.state_dict(), where="scheduler"), fs=fs)


def read_schedule(folder: Path, optimizer: Any, scheduler: Any, *, fs: FS = LOCAL) -> None:
    """Bring both back.

    Raises:
        CheckpointError: damage, or another number of parameter groups.
    """
    groups, state = (
        decode_state(read_json(folder / name, max_bytes=MAX_JSON_BYTES, fs=fs, error=CheckpointError), where=name)
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
    )
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{folder / OPTIMIZER_NAME} is of another optimizer: this one has {len(optimizer.param_groups)} parameter "
            f"groups. {_CURE}"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)
    scheduler.load_state_dict(state)


def encode_state(value: Any, *, where: str) -> JSON:
    """Plain Python values as JSON that `decode_state` turns back into equal ones of the same types.

    Raises:
        CheckpointError: anything but None, booleans, numbers, strings, lists, tuples and dictionaries.
    """
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        items = [encode_state(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        rows = [[encode_state(k, where=where), encode_state(v, where=f"{where}[{k!r}]")] for k, v in value.items()]
        return {"dict": list[JSON](rows)}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be written to a checkpoint without pickling it. Use a "
        "schedule whose state is numbers, or `save_strategy='no'`: the journal alone is enough to resume."
    )


def decode_state(value: JSON, *, where: str) -> Any:
    """What `encode_state` was given. Raises `CheckpointError` if it was not that which wrote `value`."""
    if isinstance(value, list):
        return [decode_state(item, where=where) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items() if len(value) == 1 else [("", None)]
    try:
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(decode_state(item, where=where) for item in content)
        if kind == "dict" and isinstance(content, list):
            pairs = [(decode_state(row[0], where=where), row[1]) for row in content if _is_pair(row)]
            if len(pairs) == len(content):
                return {key: decode_state(item, where=f"{where}[{key!r}]") for key, item in pairs}
    except TypeError:  # a key that no dictionary can have
        pass
    raise CheckpointError(f"{where} is not a state that this package wrote. {_CURE}")


def _is_pair(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2


# -- what is there for people and for loading


def write_arguments(args: TrainingArguments, folder: Path, *, fs: FS = LOCAL) -> None:
    """Write the arguments, tokens redacted, in place of upstream's pickle of them."""
    fs.unlink(folder / "training_args.bin", missing_ok=True)
    fs.write_text_atomically(folder / ARGUMENTS_NAME, args.to_json_string() + "\n")


def save_without_weights(model: nn.Module, processing_class: Any, folder: Path) -> None:
    """What `save_pretrained` writes besides a model's weights; an adapter is small, and saved whole."""
    if not isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        model.config.save_pretrained(folder)
        if isinstance(model.generation_config, GenerationConfig) and model.can_generate():
            model.generation_config.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
