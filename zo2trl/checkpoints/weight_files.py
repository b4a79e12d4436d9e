"""This module finds the weight files of a checkpoint, in a folder or on the hub, and reads their headers.

Does not: read weights, build models, run pickles.
Invariant: no file is opened whose name leads out of the folder; a hub cache's blobs count as inside.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from zo2trl.errors import CheckpointError
from zo2trl.files.paths import inside
from zo2trl.files.strict_json import Fields, read_json

__all__ = [
    "StoredTensor", "checkpoint_folder", "hub_arguments", "indexed_files", "read_headers", "read_index",
    "refuse_misfits", "trusted_file", "weight_files",
]  # fmt: skip

# An index has one line per tensor; the largest published ones stay under 20 MB.
MAX_INDEX_BYTES = 256 * 2**20
_MARKER = "zo_checkpoint.json"  # of trainers/resume/checkpoint.py
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def trusted_file(folder: Path, name: str) -> Path:
    """Return ``folder / name``, and refuse it unless it stays in the folder or leads to the blobs of a hub cache."""
    here = folder.absolute()
    caches = [above for above in here.parents if above.name.startswith("models--") and (above / "blobs").is_dir()]
    return inside(folder, name, error=CheckpointError, links_into=tuple(caches))


def read_index(path: Path) -> list[str]:
    """Read the file names in a ``*.index.json``, sorted and checked to stay in the folder, without opening any."""
    try:
        index = Fields(
            read_json(path, max_bytes=MAX_INDEX_BYTES, error=CheckpointError), str(path), error=CheckpointError
        )
        index.table("metadata")
        found = list(index.table("weight_map").values())
        if not found or not all(isinstance(name, str) for name in found):
            raise index.refuse("weight_map", "it does not give every tensor the name of a file")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is not an index of weights, which has `metadata` and a `weight_map` from tensor names to file "
            f"names. {error}"
        ) from error
    names = sorted(set(found))
    for name in names:
        trusted_file(path.parent, name)
    return names


def indexed_files(index: Path) -> list[Path]:
    """Return the files that a ``*.index.json`` names, after checking that all of them exist."""
    files = [index.parent / name for name in read_index(index)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{len(missing)} of the {len(files)} weight files that {index} names are missing, the first is "
            f"{missing[0]}. Finish the download or copy them."
        )
    return files


def checkpoint_folder(source: str, kwargs: Mapping[str, Any]) -> Path:
    """Return the folder that `subfolder` in `from_pretrained`'s arguments selects."""
    return Path(source, kwargs.get("subfolder") or "")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for a look-up on the hub that returns None where the repository lacks the file."""
    given = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    return given | {"_raise_exceptions_for_missing_entries": False}


def weight_files(source: str, config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors files of a checkpoint, fetched if they are on the hub, without reading them."""
    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    named = getattr(config, "transformers_weights", None)
    candidates = [named] if named else [f"model{variant}.safetensors", f"model.safetensors.index{variant}.json"]
    if not Path(source).is_dir():
        return _hub_files(source, candidates, kwargs)
    folder = checkpoint_folder(source, kwargs)
    for path in (trusted_file(folder, name) for name in candidates):
        if path.is_file():
            return indexed_files(path) if path.suffix == ".json" else [path]
    if trusted_file(folder, _MARKER).is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint of zo2trl without weights: its {_MARKER} points into the run's store. Write an "
            f"ordinary model folder first, `zo2trl export {folder} OUT`, and load that; or train with "
            "`save_full_weights=True`, which puts the weights into every checkpoint."
        )
    if not any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} has no {' or '.join(candidates)}: no weights to load. Check the path.")
    raise CheckpointError(
        f"{folder} holds pickled weights only (*.bin), and unpickling can run code. Convert them once, without "
        f"running any: `zo2trl convert {folder} {folder.absolute()}-safetensors`, then load that folder."
    )


def _hub_files(source: str, candidates: list[str], kwargs: Mapping[str, Any]) -> list[Path]:
    for name in candidates:
        path = cached_file(source, name, **hub_arguments(kwargs))
        if path is not None and name.endswith(".json"):
            read_index(Path(path))
            return [Path(file) for file in get_checkpoint_shard_files(source, path, **hub_arguments(kwargs))[0]]
        if path is not None:
            return [Path(path)]
    raise CheckpointError(
        f"The repository {source!r} has no {' or '.join(candidates)}, and pickled weights can run code. If it has "
        "*.bin files, download it to a folder SRC and run `zo2trl convert SRC DST`."
    )


class StoredTensor(NamedTuple):
    """A StoredTensor is a tensor in a header; the dtype is None unless it is a floating one that can be trained."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of the files and return every tensor by name."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is not a dict
                    tensor = opened.get_slice(name)
                    dtype = _FLOAT_DTYPES.get(tensor.get_dtype())
                    found[name] = StoredTensor(dtype, tuple(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({error}). Fetch it again from where it came from."
            ) from error
    return found


def refuse_misfits(
    stored: Mapping[str, StoredTensor], names: Mapping[str, tuple[str, bool]], expected: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that do not fit the model; `names` maps them to its names and whether they are converted."""
    for name, tensor in stored.items():
        wanted, is_converted = names[name]
        value = expected.get(wanted)
        if value is None or is_converted:
            continue
        if tensor.shape != tuple(value.shape):
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint and {list(value.shape)} in the model. The "
                "configuration and the weights belong to different models."
            )
        if value.is_floating_point() and tensor.dtype is None:
            raise CheckpointError(
                f"{name} does not hold floating-point numbers of 16, 32 or 64 bits. Load the original, unquantised "
                "checkpoint."
            )
