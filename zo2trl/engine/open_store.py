"""A store's run: begun on a model's weights, continued from its journal, or only looked at.

Does not: plan, or run steps. What cannot work is refused before a byte is moved.
"""

import logging
import platform
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from zo2trl.checkpoints.stored_run import mismatches
from zo2trl.errors import BudgetError, StoreForeign
from zo2trl.files.fs import FS
from zo2trl.journal.journal import Journal
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout import Layout, Unit, trained_part
from zo2trl.layout.layout_file import base_digest, read_layout, write_layout
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.planning.write_schedule import WriteSchedule
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.folder import StoreFolder
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.original_files import OriginalFiles
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import Source, Tiers
from zo2trl.tiers.unit_files import CRC_BYTES, UnitFiles
from zo2trl.versions import package_version
from zo2trl.zo.method import Method, differing_part

__all__ = ["Mode", "StoreSpec", "open_store"]

logger = logging.getLogger(__name__)

Mode = Literal["begin", "continue", "read"]
BLOCK_BYTES = 4096  # the usual block of a file system
SMALL_FILES_BYTES = 1 << 20  # journal, logbook, descriptions; a million steps take 64 times as much
_TRACED = ("layout", "method", "codec", "decays", "seed", "quantised")


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What a store needs in order to begin or continue a run.

    Args:
        layout, placement: what the units are and where they live.
        method: how records change weights.
        write schedule: how often units are written.
        device: where leased weights are.
        facts: what the journal's header says of the run besides, and what has to be the same when it is continued.
        base_folder: the checkpoint that the weights come from, bit for bit; None: keep a copy of them.
        sync_every: steps between two syncs of the journal.
        describe: writes what an exported folder holds besides weights.
        saves_adapter: frozen weights are no part of an exported folder.
        store_id: names the run, if it is a new one; the stores of several processes that make one run share it.
    """

    layout: Layout
    placement: Placement
    method: Method
    write_schedule: WriteSchedule
    device: torch.device
    facts: Mapping[str, Any]
    base_folder: str | None
    sync_every: int
    describe: Callable[[Path], None]
    saves_adapter: bool = False
    store_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def kept_frozen(self) -> set[int]:
        """Indices of units that are written once although they are frozen: what is left of partly trained ones, if an
        exported folder needs it and no checkpoint is known to hold it."""
        if self.base_folder is not None or self.saves_adapter:
            return set()
        trained = {unit.name for unit in self.layout.units if unit.is_trained}
        return {unit.index for unit in self.layout.units if trained_part(unit.name) in trained}

    def header(self) -> dict[str, Any]:
        """The journal's header, but for what founding finds out."""
        return {
            "layout": self.layout.digest(),
            "method": self.method.identity,
            "codec": self.layout.stored_forms,
            "base_folder": self.base_folder,
            "device": self.device.type,
            "versions": {
                "zo2trl": package_version("zo2trl"), "python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "transformers": transformers.__version__,
            },
            **self.facts,
        }  # fmt: skip


def open_store(folder: StoreFolder, spec: StoreSpec, source: Source, *, mode: Mode, fs: FS) -> TieredStore:
    """A store with all units in their tiers; owns `folder` from here on, if it succeeds.

    Raises:
        BudgetError: the disk has no room for what would be written.
        StoreForeign: the run in the folder is one of other weights, or cannot be continued with these choices.
        StoreCorrupt: what is there is damaged.
    """
    with ExitStack() as undo:
        if mode == "begin":
            residency, journal = _begin(folder, spec, source, undo=undo, fs=fs)
        else:
            residency, journal = _continue(folder, spec, source, mode=mode, undo=undo, fs=fs)
        logbook = Logbook.open(folder.logbook, fs=fs) if mode != "read" else Logbook.blank(folder.logbook, fs=fs)
        undo.callback(logbook.close)
        if mode == "continue":
            logbook.forget_beyond(len(journal.records))
        store = TieredStore(
            residency, journal=journal, logbook=logbook, method=spec.method,
            write_schedule=spec.write_schedule, device=spec.device,
            on_first_step=folder.drop_earlier_run if mode == "begin" else lambda: None, on_close=folder.close,
        )  # fmt: skip
        undo.pop_all()
    return store


def _begin(
    folder: StoreFolder, spec: StoreSpec, source: Source, *, undo: ExitStack, fs: FS
) -> tuple[Residency, Journal]:
    n_steps = folder.set_run_aside()
    if n_steps:
        logger.warning(
            "%s holds a run of %d steps, and training starts over beside it. To continue that run instead, stop now "
            "and pass `resume_from_checkpoint=True`. With the first new step only its journal is kept.",
            folder.path, n_steps,
        )  # fmt: skip
    originals = OriginalFiles(fs=fs)
    found = _found_in(originals, spec, source)
    _check_disk_space(spec, folder, fs, found=found)
    files = UnitFiles(folder.units, fs=fs)
    residency = _make_residency(spec, files, originals=originals, fs=fs)
    undo.callback(residency.close)
    crcs = residency.populate(source, keep_base=spec.base_folder is None, kept_frozen=spec.kept_frozen())
    write_layout(folder.layout, spec.layout, crcs, fs=fs)
    spec.describe(folder.model)
    fs.sync_tree(folder.model)
    header = {**spec.header(), "store": spec.store_id, "base": base_digest(spec.layout, crcs)}
    journal = Journal.create(
        folder.journal, header=header, units=files.first_records, fs=fs, sync_every=spec.sync_every
    )  # fmt: skip
    undo.callback(journal.close)
    files.attach(journal, spec.layout.units)
    return residency, journal


def _continue(
    folder: StoreFolder, spec: StoreSpec, source: Source, *, mode: Mode, undo: ExitStack, fs: FS
) -> tuple[Residency, Journal]:
    read_only = mode == "read"
    journal = Journal.open(folder.journal, fs=fs, read_only=read_only, sync_every=spec.sync_every)
    undo.callback(journal.close)
    _refuse_other_run(journal.header, spec, folder)
    stored = read_layout(folder.layout, fs=fs)
    for problem in mismatches(folder, journal.header, stored):
        raise StoreForeign(problem)
    files = UnitFiles(folder.units, fs=fs)
    files.attach(journal, spec.layout.units)
    originals = OriginalFiles(fs=fs)
    found = _found_in(originals, spec, source)
    if read_only:
        spec = replace(spec, placement=_in_memory_unless_filed(spec, files, found=found))
    else:
        if journal.records:
            folder.drop_earlier_run()  # a crash may have come between this run's first step and that
        _check_disk_space(spec, folder, fs, found=found, there=files)
        for name in files.sweep(spec.layout.units):
            logger.info("%s is removed: no record of the journal names it.", folder.units / name)
    residency = _make_residency(spec, files, originals=originals, fs=fs, read_only=read_only)
    undo.callback(residency.close)
    residency.restore(source, base_crcs=stored.base_crcs, has_base=spec.base_folder is not None)
    return residency, journal


def _refuse_other_run(found: Mapping[str, Any], spec: StoreSpec, folder: StoreFolder) -> None:
    wanted = spec.header()
    for name in _TRACED:
        if found.get(name) != wanted.get(name):
            raise StoreForeign(
                f"The run in {folder.path} cannot be continued bit for bit: its {_difference(name, found, wanted)}. "
                "Use the arguments and the model it was begun with, or start anew with another `store_dir`."
            )


def _difference(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if name == "method" and (part := differing_part(str(found.get(name)), wanted[name])):
        return part
    return f"{name} is {_short(found.get(name))}, and would now be {_short(wanted.get(name))}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _found_in(originals: OriginalFiles, spec: StoreSpec, source: Source) -> set[int]:
    """Units that need no copy on disk, because they can be read from the files they were loaded from."""
    kept = spec.kept_frozen()
    return {unit.index for unit in spec.layout.units if unit.index not in kept and originals.note(unit, source)}


def _in_memory_unless_filed(spec: StoreSpec, files: UnitFiles, *, found: Collection[int]) -> Placement:
    """Without writing, a unit of the disk tier that has no file yet lives in memory."""
    tiers: dict[int, TierName] = {
        unit.index: "cpu" if tier == "disk" and files.newest(unit) is None and unit.index not in found else tier
        for unit in spec.layout.units
        for tier in (spec.placement.tier_of[unit.index],)
    }
    return replace(spec.placement, tier_of=tiers)


def _make_residency(
    spec: StoreSpec, files: UnitFiles, *, originals: OriginalFiles, fs: FS, read_only: bool = False
) -> Residency:
    in_cpu = [spec.layout.units[index] for index in spec.placement.units_in("cpu")]
    tiers = Tiers(
        gpu=DeviceTier(spec.device, [unit for unit in spec.layout.units if unit.is_resident]),
        cpu=HostTier(in_cpu, pinned=spec.device.type == "cuda"),
        disk=DiskTier(files, keep_base=spec.base_folder is None, originals=originals, fs=fs),
    )
    return Residency(spec.layout, spec.placement, tiers=tiers, files=files, device=spec.device, read_only=read_only)


def _check_disk_space(
    spec: StoreSpec, folder: StoreFolder, fs: FS, *, found: Collection[int], there: UnitFiles | None = None
) -> None:
    """Units on disk, the copy of the first weights, a snapshot of every unit in memory, and two drafts beside them."""
    needed, kept = 0, spec.kept_frozen()
    drafts = [0]
    for unit in spec.layout.units:
        on_disk = spec.placement.tier_of[unit.index] == "disk"
        if unit.is_trained or unit.index in kept or (on_disk and unit.index not in found):
            files = 1 + (unit.is_trained and spec.base_folder is None)
            needed += (files - len(there.versions(unit) if there else ())) * _file_bytes(unit)
        drafts.append(_file_bytes(unit) if unit.is_trained else 0)
    needed = max(needed + sum(sorted(drafts)[-2:]), 0) + (SMALL_FILES_BYTES if there is None else 0)
    free = fs.free_bytes(folder.path)
    if needed > free:
        raise BudgetError(
            f"`store_dir` {folder.path} will hold up to {needed:,} bytes more, {free:,} are free. {_fewer(spec)} Or "
            "choose another `store_dir`."
        )


def _file_bytes(unit: Unit) -> int:
    """On disk: bytes, a checksum per tensor, and what is lost to blocks."""
    return unit.stored_bytes + CRC_BYTES * len(unit.tensors) + BLOCK_BYTES


def _fewer(spec: StoreSpec) -> str:
    units: list[Unit] = [spec.layout.units[index] for index in spec.placement.units_in("disk")]
    tips = ["Free some space."]
    if spec.base_folder is None:
        tips.append("Hand over the checkpoint's path instead of a loaded model: its weights are then not copied.")
    if units:
        tips.append("Raise `cpu_memory` or `device_memory`, so that fewer units live on disk.")
    return " ".join(tips)
