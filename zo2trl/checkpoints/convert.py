"""This module converts pickled weights (*.bin) to safetensors, tensor by tensor and without running pickled code.

Does not: change a value, a dtype or a name; load the model; touch the source.
Invariant: `destination` appears complete or not at all: everything is written and synced in `<destination>.tmp` and
renamed at the end. Plain ``from_pretrained`` loads the same model from it as from the source.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from zo2trl.checkpoints.load import build_skeleton, class_named_by, model_names, read_config
from zo2trl.checkpoints.weight_files import indexed_files, trusted_file
from zo2trl.errors import CheckpointError
from zo2trl.files.fs import LOCAL

__all__ = ["convert_checkpoint"]

COPY_PIECE_BYTES = 32 * 2**20
# They are configuration, tokenizer, generation defaults, chat templates, licence, and code that came with the model.
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
COPIED_NAMES = ("LICENSE", "NOTICE")

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def convert_checkpoint(source: Path, destination: Path) -> None:
    """Write the checkpoint folder `source`, whose weights are pickled, to `destination` with safetensors weights.

    Weights are one `pytorch_model.bin` or the shards of a `pytorch_model.bin.index.json`. Tensors that the model ties
    are written once. It needs memory for one tensor (for one file, if torch before 1.6 wrote it).

    Raises:
        CheckpointError: there is nothing to convert, `destination` is in use, or a file holds more than tensors.
    """
    source, destination = source.absolute(), destination.absolute()
    shards = _pickled_shards(source)
    scratch = destination.with_name(destination.name + ".tmp")
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not empty. Choose another folder, or delete it.")
    if scratch.exists():
        raise CheckpointError(
            f"{scratch} exists: another conversion is running, or one was cut off. In that case delete the folder and "
            "try again."
        )
    LOCAL.make_dir(scratch)
    try:
        _copy_companions(source, scratch)
        _convert_shards(shards, scratch, skeleton=_skeleton(source))
        LOCAL.sync_folder(scratch)
        LOCAL.rename(scratch, destination)
        LOCAL.sync_folder(destination.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _pickled_shards(source: Path) -> list[Path]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder. Check the path.")
    if any(source.glob("*.safetensors")):
        raise CheckpointError(f"{source} has safetensors weights already: load it as it is.")
    index, single = source / "pytorch_model.bin.index.json", source / "pytorch_model.bin"
    if single.is_file():
        return [trusted_file(source, single.name)]
    if not index.is_file():
        raise CheckpointError(
            f"{source} has no {single.name} and no {index.name}: nothing to convert. Check the path."
        )
    return indexed_files(index)


def _copy_companions(source: Path, scratch: Path) -> None:
    templates = source.glob("additional_chat_templates/*.jinja")
    for file in sorted((*source.iterdir(), *templates)):
        name = file.relative_to(source).as_posix()
        wanted = file.suffix in COPIED_SUFFIXES or file.name in COPIED_NAMES
        if not wanted or not file.is_file() or name.endswith((".bin.index.json", ".safetensors.index.json")):
            continue
        trusted_file(source, name)
        LOCAL.make_dir((scratch / name).parent)
        _copy(file, scratch / name)


def _copy(file: Path, copy: Path) -> None:
    read = LOCAL.open(file)
    try:
        n_bytes = LOCAL.size(read)
        written = LOCAL.create(copy, n_bytes)
        try:
            for offset in range(0, n_bytes, COPY_PIECE_BYTES):
                piece = bytearray(min(COPY_PIECE_BYTES, n_bytes - offset))
                LOCAL.read_at(read, piece, offset, path=file)
                LOCAL.write_at(written, piece, offset)
            LOCAL.sync_data(written)
        finally:
            LOCAL.close(written)
    finally:
        LOCAL.close(read)


def _skeleton(source: Path) -> PreTrainedModel | None:
    """Build the model without storage, to look up its ties; None if this installation lacks the architecture.

    Without it every tied tensor is written under each of its names, which costs bytes and is always correct.
    """
    try:
        config = read_config(str(source), {"trust_remote_code": False})
        return build_skeleton(class_named_by(config), config)
    except (OSError, ValueError, KeyError, AttributeError, CheckpointError):
        return None


def _convert_shards(shards: list[Path], scratch: Path, *, skeleton: PreTrainedModel | None) -> None:
    weight_map: dict[str, str] = {}
    total_bytes = 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Converting", total=sum(shard.stat().st_size for shard in shards))
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = _without_ties(_load(shard), skeleton)
            progress.update(task, description=name)
            for n_bytes in _write(tensors, scratch / name):
                progress.advance(task, n_bytes)
                total_bytes += n_bytes
            weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        LOCAL.write_text_atomically(
            scratch / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _load(shard: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of one pickled file, mapped if it is a zip archive, as torch >= 1.6 writes."""
    try:
        content = torch.load(shard, map_location="cpu", mmap=zipfile.is_zipfile(shard), weights_only=True)
    except Exception as error:  # A pickle, and a hostile one above all, can raise anything.
        why = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{shard} could not be read as a file of nothing but tensors ({type(error).__name__}: {why}). Nothing in "
            "it was run. Fetch it again, or get the checkpoint as safetensors."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{shard} holds a {type(content).__name__}, not tensors by name: no model checkpoint.")
    for name, tensor in content.items():
        kind = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            if isinstance(name, str) and tensor.layout == torch.strided and tensor.dtype in _SAFETENSORS_DTYPES:
                continue
            kind = f"{tensor.layout} tensor of {tensor.dtype}"
        raise CheckpointError(
            f"{shard} holds a {kind} named {name!r}, which safetensors cannot hold. Save the model's own "
            "`state_dict()` and convert that."
        )
    return dict(content)


def _without_ties(tensors: dict[str, torch.Tensor], skeleton: PreTrainedModel | None) -> dict[str, torch.Tensor]:
    """Drop tensors that share another one's storage under a name which the model ties to it."""
    if skeleton is None:
        return tensors
    same: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        where = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        same.setdefault((*where, tensor.dtype, tensor.shape, tensor.stride()), []).append(name)
    ties = skeleton.all_tied_weights_keys
    dropped: set[str] = set()
    for names in same.values():
        kept: dict[str, str] = {}  # the name that the model ties to -> the name that is written
        in_model = {name: model_name for name, (model_name, _) in model_names(skeleton, names).items()}
        # The name that others are tied to comes first: the model's own `save_pretrained` keeps that one.
        for name in sorted(names, key=lambda name: in_model[name] in ties):
            if kept.setdefault(ties.get(in_model[name], in_model[name]), name) != name:
                dropped.add(name)
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def _write(tensors: dict[str, torch.Tensor], path: Path) -> Iterator[int]:
    """Write a safetensors file durably, and yield the number of tensor bytes after each piece."""
    # Wider elements come first, so that every tensor starts at a multiple of its element size and can be mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    fd = LOCAL.create(path, 8 + len(text) + end)
    try:
        LOCAL.write_at(fd, len(text).to_bytes(8, "little") + text, 0)
        offset = 8 + len(text)
        for name in order:
            data: Any = tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy()
            for start in range(0, len(data), COPY_PIECE_BYTES):
                piece = data[start : start + COPY_PIECE_BYTES]
                LOCAL.write_at(fd, piece, offset)
                offset += len(piece)
                yield len(piece)
        LOCAL.sync_data(fd)
    finally:
        LOCAL.close(fd)
