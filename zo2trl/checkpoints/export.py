"""This module exports a store as an ordinary model folder, with the weights after any step, even during a training.

Does not: need the model's Python objects, a GPU, or more memory than one unit; change the store.
Invariant:
- The folder appears complete and durable, or not at all.
- Its weight files equal those that the trainer's own save writes: transformers' `save_pretrained` writes them.
"""

import logging
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from zo2trl.checkpoints.base_weights import BaseWeights
from zo2trl.checkpoints.model_files import ModelFiles, fill
from zo2trl.checkpoints.rebuild import Progress, Rebuild
from zo2trl.checkpoints.stored_run import Moment, StoredRun
from zo2trl.errors import BudgetError, ConfigError, StoreError, StoreForeign, UnsupportedError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.paths import inside
from zo2trl.layout.layout import Unit

__all__ = ["export_store"]

logger = logging.getLogger(__name__)

_SCRATCH = ".scratch"
_METADATA = {"format": "pt"}


def export_store(
    store_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    moment: Moment | None = None,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = lambda what, done, total: None,
    fs: FS = LOCAL,
) -> None:
    """Write the weights of a store, and the other files of its model folder, to `out`.

    Args:
        store_dir: a store with a run in it.
        out: the folder to make, which must not exist or must be empty.
        step: the number of optimizer steps in the weights; None means all.
        moment: the moment of a checkpoint, instead of a step.
        base: the folder or hub id of the model the run began with; None takes the one in the store.
        device: the device that replays steps.
        progress: a function that is called for each unit.

    Raises:
        StoreForeign: there is no store, or this zo2trl, this device or these base weights cannot rebuild it.
        StoreCorrupt: it is damaged, and no sound version or base leads to these weights.
        ConfigError: `out` is taken, or the run has no such step.
        BudgetError: the disk of `out` is too small.
    """
    out = out.resolve()  # the draft needs its name and its parent
    run = StoredRun.look(store_dir, fs=fs)
    position = run.position_at(moment) if moment is not None else run.position_of(step)
    model = ModelFiles.read(run.folder.model, fs=fs)
    wanted = _wanted_units(run, model)
    with _appearing(out, fs) as draft:
        scratch = draft / _SCRATCH
        source = BaseWeights(run, model, base, scratch=scratch)
        rebuild = Rebuild(
            run, position, base=source, device=torch.device(device), scratch=scratch, progress=progress, fs=fs
        )
        n_bytes = rebuild.hold(wanted) + sum(spec.n_bytes for unit in wanted for spec in unit.tensors)
        if n_bytes > (free := fs.free_bytes(draft)):
            raise BudgetError(
                f"{out} takes up to {n_bytes:,} bytes while it is made, {free:,} are free. Free some space, or choose "
                "a folder on a larger disk."
            )
        values = model.buffers() | rebuild.tensors(wanted)
        if not run.is_same_until(position):
            raise StoreError(f"The run in {store_dir} was rewound or started over while it was read. Export it again.")
        try:
            _save(draft, values, run=run, model=model)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"Cannot write the weights to {draft}: {error}. Nothing was left there.") from error


def _wanted_units(run: StoredRun, model: ModelFiles) -> list[Unit]:
    """Return the units with tensors to save: all, or those with tensors of an adapter."""
    if model.adapters is None:
        return list(run.stored.units)
    computed = [place for place, names in model.adapters.items() if names is None]
    if computed:
        raise UnsupportedError(
            f"The adapter in {run.path} is computed from its parameters while it is saved, which takes the model. "
            "Open it with the trainer (`resume_from_checkpoint`) and call `save_model`."
        )
    names = {name for names in model.adapters.values() for name in (names or {}).values()}
    trained = [spec.name for unit in run.stored.units for spec in unit.tensors if spec.trainable]
    if left := [name for name in trained if name not in names]:
        logger.warning("%d trained tensors are in no adapter's file, as PEFT saves it: %s ...", len(left), left[0])
    return [unit for unit in run.stored.units if any(spec.trainable and spec.name in names for spec in unit.tensors)]


# -- saving


def _save(draft: Path, values: Mapping[str, torch.Tensor], *, run: StoredRun, model: ModelFiles) -> None:
    skeleton = None
    if model.adapters is not None:
        _save_adapters(draft, model, values)
    else:
        skeleton = model.skeleton(spec for unit in run.stored.units for spec in unit.tensors)
        if skeleton is None:
            _save_plainly(draft, values, run=run, model=model)
        else:
            fill(skeleton, values)
            skeleton.save_pretrained(draft)
    for name in model.others():
        if not (draft / name).exists():
            shutil.copyfile(inside(model.folder, name), draft / name)


def _save_adapters(draft: Path, model: ModelFiles, values: Mapping[str, torch.Tensor]) -> None:
    for place, names in (model.adapters or {}).items():
        folder = inside(draft, place) if place else draft
        folder.mkdir(exist_ok=True)
        missing = [name for name in (names or {}).values() if name not in values]
        if missing:
            raise StoreForeign(f"{model.folder} wants {missing[0]} in the adapter, which the store does not have.")
        tensors = _unshared({saved: values[name] for saved, name in (names or {}).items()})
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata=_METADATA)
        if place:
            name = "adapter_config.json"
            shutil.copyfile(inside(model.folder, f"{place}/{name}"), folder / name)


def _save_plainly(draft: Path, values: Mapping[str, torch.Tensor], *, run: StoredRun, model: ModelFiles) -> None:
    if model.module.startswith("transformers."):
        logger.warning(
            "%s is not the class it was when %s was made: its parameters have other names now. The weights are saved "
            "under the names they had then.", model.class_name, run.path,
        )  # fmt: skip
    safetensors.torch.save_file(_unshared(values), draft / "model.safetensors", metadata=_METADATA)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors where needed, so that each is contiguous and shares no storage: a file holds no aliases."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen and tensor.numel() else tensor.contiguous()
        seen.add(address)
    return result


# -- where it is saved


@contextmanager
def _appearing(out: Path, fs: FS) -> Generator[Path, None, None]:
    """Make a draft folder beside `out`, rename it to `out` durably when the block ends, and remove it on failure.

    A crash leaves the draft behind; the next export to the same folder removes it.
    """
    if fs.exists(out) and (not out.is_dir() or fs.list_names(out)):
        raise ConfigError(f"{out} exists already and is not an empty folder. Remove it, or choose another one.")
    draft = out.with_name(f"{out.name}.partial")
    lock = draft / _SCRATCH / "lock"
    if fs.exists(draft) and not fs.exists(lock):
        raise ConfigError(f"{draft} is in the way: exports are made there. Remove it, or choose another folder.")
    fs.make_dir(lock.parent)
    owned = fs.lock(lock)
    try:
        for folder, keep in ((draft, _SCRATCH), (lock.parent, lock.name)):
            for name in fs.list_names(folder):
                if name != keep:
                    fs.remove(folder / name)
        try:
            yield draft
        except BaseException:
            fs.remove(draft)
            raise
        fs.remove(lock.parent)
        fs.sync_tree(draft)
        fs.rename(draft, out)
        fs.sync_folder(out.parent)
    finally:
        fs.close(owned)
