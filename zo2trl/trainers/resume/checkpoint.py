"""A checkpoint folder: the Trainer's own state in JSON, and a pointer into the journal. No pickles.

Does not: know a trainer, or what is in the states (states.py).

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
- A folder without a marker that checks is no checkpoint. The marker checks itself, too.
- A name in the marker leads to nothing outside of the folder (the store: of its parent).
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from zo2trl.errors import CheckpointError, ZO2TRLError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.paths import inside
from zo2trl.files.strict_json import JSON, Fields, read_json, write_json
from zo2trl.trainers.resume.states import (
    CURE,
    MAX_JSON_BYTES,
    OPTIMIZER_NAME,
    RNG_NAME,
    SCHEDULER_NAME,
    decode_state,
    encode_state,
)

__all__ = [
    "MARKER_NAME", "STATE_NAMES", "Checkpoint", "Pointer", "begin_checkpoint", "commit_checkpoint",
    "last_valid_checkpoint", "read_checkpoint", "refuse_pickles", "save_without_weights", "write_arguments",
]  # fmt: skip

MARKER_NAME = "zo_checkpoint.json"
ARGUMENTS_NAME = "training_args.json"
STATE_NAMES = (MARKER_NAME, "trainer_state.json", OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME)
"""What a checkpoint holds beside a model folder's files."""
CHECKPOINT_FORMAT = 1
MAX_CHECKED_BYTES = 256 * 2**20  # larger files are weights: their size is checked, and their sum if asked for
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PIECE_BYTES = 8 * 2**20
_FOLDER = re.compile(r"checkpoint-(\d+)")
_IS_SECRET = re.compile(r"(^|_)(token|password|secret|api_key)$", re.IGNORECASE)


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


def begin_checkpoint(folder: Path, *, fs: FS = LOCAL) -> None:
    """Files in the folder will change: what an earlier run has left there is a checkpoint no more."""
    if fs.exists(folder / MARKER_NAME):
        fs.unlink(folder / MARKER_NAME)
        fs.sync_folder(folder)


def commit_checkpoint(folder: Path, pointer: Pointer, *, fs: FS = LOCAL) -> None:
    """Make all files of the folder durable, then declare it a checkpoint."""
    begin_checkpoint(folder, fs=fs)
    fs.sync_tree(folder)
    files: dict[str, JSON] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        n_bytes, crc = _measure(path, fs)
        files[path.relative_to(folder).as_posix()] = {"bytes": n_bytes, "crc32": crc}
    counters = encode_state(pointer.counters, where="counters")  # a mean loss may be NaN
    body: dict[str, JSON] = {"format": CHECKPOINT_FORMAT, **asdict(pointer), "counters": counters, "files": files}
    write_json(folder / MARKER_NAME, {**body, "crc32": _crc_of(body)}, fs=fs)
    fs.sync_folder(folder.parent)


def read_checkpoint(folder: Path, *, check_weights: bool = False, fs: FS = LOCAL) -> Checkpoint:
    """The pointer of a checkpoint, after checking that its files are there and as they were.

    Args:
        check_weights: read large files as well; else their sizes are enough.

    Raises:
        CheckpointError: no checkpoint of this package, an unfinished one, or damage; names the file.
    """
    marker = folder / MARKER_NAME
    if not fs.exists(marker):
        raise _refuse_foreign(folder)
    fields = Fields(
        read_json(marker, max_bytes=MAX_JSON_BYTES, fs=fs, error=CheckpointError), str(marker), error=CheckpointError
    )
    if (version := fields.integer("format")) != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{marker} has format {version}; this zo2trl reads {CHECKPOINT_FORMAT}. Use the one that wrote it."
        )
    if _crc_of({name: value for name, value in fields.values.items() if name != "crc32"}) != fields.integer("crc32"):
        raise CheckpointError(f"{marker} was changed after it was written: its checksum differs. {CURE}")
    for name, row in fields.table("files").items():
        where = f"{marker}: files[{name[:80]!r}]"
        _check_file(folder, name, Fields(row, where, error=CheckpointError), fs=fs, check_weights=check_weights)
    store = fields.text("store", optional=True)
    if store is not None:
        inside(folder.parent, store, error=CheckpointError)
    counters = decode_state(fields.table("counters"), where=f"{marker}: counters")
    return Checkpoint(
        folder=folder, store=store, store_id=fields.text("store_id"), position=fields.integer("position", least=0),
        fingerprint=fields.text("fingerprint"), step=fields.integer("step", least=0),
        step_offset=fields.integer("step_offset", least=0),
        counters=Fields(counters, f"{marker}: counters", error=CheckpointError).values,
    )  # fmt: skip


def last_valid_checkpoint(
    output_dir: Path, *, accept: Callable[[Checkpoint], object] = lambda found: None, fs: FS = LOCAL
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step that checks and that `accept` lets pass, and why higher ones do not."""
    if not output_dir.is_dir():
        return None, []
    found = [(int(match[1]), output_dir / name) for name in fs.list_names(output_dir)
             if (match := _FOLDER.fullmatch(name)) and (output_dir / name).is_dir()]  # fmt: skip
    reasons: list[str] = []
    for _, folder in sorted(found, reverse=True):
        try:
            checkpoint = read_checkpoint(folder, fs=fs)
            accept(checkpoint)
        except ZO2TRLError as error:
            reasons.append(str(error))
        else:
            return checkpoint, reasons
    return None, reasons


def refuse_pickles(folder: Path) -> None:
    """Upstream takes pickled weights where it finds them, in sub-folders of adapters too: call this before it looks.

    Raises:
        CheckpointError: there is such a file; names it and the way out.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix in PICKLED_SUFFIXES)
    if found:
        raise CheckpointError(
            f"{found[0]} is a pickle, which is never opened, because unpickling can run code. Move it away if there "
            "are weights as safetensors beside it, or turn it into them with `zo2trl convert SRC DST`."
        )


def _refuse_foreign(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is no folder, so there is no checkpoint to resume from. Check the path.")
    return CheckpointError(
        f"{folder} has no {MARKER_NAME}: it is not a checkpoint of this package, or saving it was cut off. State in "
        "pickles (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin, *.bin) is never opened, because "
        "unpickling can run code. To start a new run from the weights in a folder, pass it as `model`; turn pickled "
        f"weights into safetensors with `zo2trl convert SRC DST` first. {CURE}"
    )


def _check_file(folder: Path, name: str, row: Fields, *, fs: FS, check_weights: bool) -> None:
    path = inside(folder, name, error=CheckpointError)
    if not fs.exists(path):
        raise CheckpointError(f"{path} is missing: {folder} was not saved to its end, or damaged since. {CURE}")
    n_bytes, expected = row.integer("bytes", least=0), row.integer("crc32", least=0)
    size, found = _measure(path, fs, max_bytes=None if check_weights else MAX_CHECKED_BYTES)
    if size != n_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes instead of {n_bytes:,}. {CURE}")
    if found not in (None, expected):
        raise CheckpointError(f"{path} was changed: its CRC32 is {found:08x} instead of {expected:08x}. {CURE}")


def _measure(path: Path, fs: FS, *, max_bytes: int | None = None) -> tuple[int, int | None]:
    """Size and CRC32 of a file; None for the latter if it is larger than `max_bytes`."""
    fd = fs.open(path)
    try:
        n_bytes, crc = fs.size(fd), 0
        if max_bytes is not None and n_bytes > max_bytes:
            return n_bytes, None
        for start in range(0, n_bytes, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, n_bytes - start))
            fs.read_at(fd, piece, start, path=path)
            crc = zlib.crc32(piece, crc)
        return n_bytes, crc
    finally:
        fs.close(fd)


def _crc_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


# -- what is there for people and for loading


def write_arguments(args: TrainingArguments, folder: Path, *, fs: FS = LOCAL) -> None:
    """Write the arguments, tokens redacted, in place of upstream's pickle of them."""
    fs.unlink(folder / "training_args.bin", missing_ok=True)
    text = json.dumps(_redacted(args.to_dict()), indent=2, default=str)
    fs.write_text_atomically(folder / ARGUMENTS_NAME, text + "\n")


def _redacted(value: Any) -> Any:
    """`to_dict` does it for its own fields only; a token may also be in `model_init_kwargs`, say."""
    if isinstance(value, dict):
        return {
            key: f"<{key.upper()}>" if isinstance(key, str) and _IS_SECRET.search(key) and item else _redacted(item)
            for key, item in value.items()
        }
    return [_redacted(item) for item in value] if isinstance(value, list | tuple) else value


def save_without_weights(model: nn.Module, processing_class: Any, folder: Path) -> None:
    """What `save_pretrained` writes besides a model's weights; an adapter is small, and saved whole."""
    if not isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        model.config.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            generation.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
