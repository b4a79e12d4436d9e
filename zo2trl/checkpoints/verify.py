"""This module checks every file of a store and lists what is damaged, where, and the cure.

Does not: change anything, lock anything, need the model, or stop at the first problem.
Invariant: a finding is `damage` if it makes a continued or exported run wrong or impossible, and else a `note`.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from zo2trl.checkpoints.base_weights import BaseWeights
from zo2trl.checkpoints.model_files import ModelFiles
from zo2trl.checkpoints.rebuild import Progress
from zo2trl.checkpoints.stored_run import StoredRun, method_to_repeat, mismatches
from zo2trl.errors import StoreError, StoreForeign, ZO2TRLError
from zo2trl.files.fs import FS, LOCAL, MAX_LOCK_TEXT
from zo2trl.files.strict_json import Fields, read_json
from zo2trl.journal.journal import Journal, UnitRecord
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout import Unit
from zo2trl.layout.layout_file import StoredLayout, read_layout
from zo2trl.tiers.folder import StoreFolder, where_it_may_be
from zo2trl.tiers.tier import encoded, host_bytes
from zo2trl.tiers.unit_files import UnitFiles, padded_crc

__all__ = ["Finding", "Severity", "verify_store"]

_OFFSET = re.compile(r" at offset (\d+)")
_STORE_FILES = re.compile(
    r"store\.json|lock|journal|logbook|layout\.json|model|units|earlier|journal-\d+\.old|(journal|logbook)\.broken(-\d+)?"
)
_COPY = "Restore it from a copy."


class Severity(StrEnum):
    """A Severity says whether data is lost."""

    DAMAGE = "damage"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """A Finding is one problem in a store."""

    severity: Severity
    path: Path
    offset: int | None
    """It is in bytes; None if the finding is about the file as a whole."""
    what: str
    cure: str

    def __str__(self) -> str:
        place = f"{self.path}" + (f" at offset {self.offset:,}" if self.offset is not None else "")
        return f"{self.severity}: {place}: {self.what}. {self.cure}"


def verify_store(
    store_dir: Path,
    *,
    base: str | Path | bool = False,
    progress: Progress = lambda what, done, total: None,
    fs: FS = LOCAL,
) -> list[Finding]:
    """Read every byte of a store and list all problems.

    Args:
        store_dir: the store.
        base: the folder or hub id of base weights to compare as well; True takes the one in the store.
        progress: a function that is called with the bytes done.
        fs: the file system of the store.

    Raises:
        StoreForeign: the folder has no part of a store.
    """
    if not any(fs.exists(store_dir / name) for name in ("store.json", "journal", "journal.moving", "earlier")):
        raise StoreForeign(f"{store_dir} holds no store. {where_it_may_be(store_dir, fs=fs)}")
    verification = _Verification(store_dir, progress, fs)
    verification.check_folder()
    for place in (store_dir, store_dir / "earlier"):
        if fs.exists(place / "journal"):
            verification.check_run(StoreFolder(place, fs=fs), base=base)
    return verification.findings


class _Verification:
    """A _Verification checks one store and collects findings."""

    findings: list[Finding]

    def __init__(self, root: Path, progress: Progress, fs: FS) -> None:
        self.findings = []
        self._root, self._progress, self._fs = root, progress, fs

    # -- findings

    def _add_damage(self, path: Path, what: str, cure: str, *, offset: int | None = None) -> None:
        self.findings.append(Finding(Severity.DAMAGE, path, offset, what, cure))

    def _add_note(self, path: Path, what: str, cure: str, *, offset: int | None = None) -> None:
        self.findings.append(Finding(Severity.NOTE, path, offset, what, cure))

    @contextmanager
    def _as_finding(self, path: Path, severity: Severity = Severity.DAMAGE) -> Iterator[None]:
        """Turn a `ZO2TRLError` in the block into a finding."""
        try:
            yield
        except ZO2TRLError as error:
            text = " ".join(str(error).replace("Nothing was changed. ", "").split())
            offset = _OFFSET.search(text)
            what, _, cure = text.partition(". ")
            self.findings.append(Finding(severity, path, int(offset[1]) if offset else None, what, cure or _COPY))

    # -- files in the folder

    def check_folder(self) -> None:
        root, fs = self._root, self._fs
        with self._as_finding(root / "lock"):
            holder = fs.read_text(root / "lock", max_bytes=MAX_LOCK_TEXT) if fs.exists(root / "lock") else ""
            if holder and fs.is_locked(root / "lock"):
                pid, _, host = holder.partition(" ")
                what = f"process {pid} on {host} works with this store"
                self._add_note(root / "lock", what, "Verify again when it has ended.")
        names = fs.list_names(root)
        if "store.json" not in names:
            self._add_damage(root / "store.json", "the file is missing", _COPY)
        for name in names:
            if name == "journal.moving":
                what = "a crash interrupted the setting aside of a run"
                self._add_note(root / name, what, "The next training goes on with it.")
            elif not _STORE_FILES.fullmatch(name):
                self._add_note(root / name, "it is no part of a store", "Move it away if it is yours.")
            elif name.endswith(".old"):
                with self._as_finding(root / name, Severity.NOTE):
                    Journal.open(root / name, fs=fs, read_only=True).close()
        if not any(fs.exists(root / name) for name in ("journal", "earlier/journal", "journal.moving")):
            what = "the file is missing: founding the store was cut off, or it was taken away"
            self._add_damage(root / "journal", what, "Restore it from a copy, or start a new run here.")

    # -- one run

    def check_run(self, folder: StoreFolder, *, base: str | Path | bool) -> None:
        journal = self._journal(folder)
        stored = None
        with self._as_finding(folder.layout):
            stored = read_layout(folder.layout, fs=self._fs)
        self._logbook(folder)
        model = self._model(folder, stored)
        if stored is None or journal is None:
            return
        for problem in mismatches(folder, journal.header, stored):
            what, _, cure = problem.partition(". ")
            self._add_damage(folder.layout, what, cure)
        if folder.path == self._root:
            self._description(journal)
        files = UnitFiles(folder.units, fs=self._fs)
        files.attach(journal, stored.units)
        run = StoredRun(folder, journal.header, list(journal.records), stored, files, self._fs, journal.fingerprint)
        with self._as_finding(folder.journal, Severity.NOTE):
            method_to_repeat(run, torch.device("cpu"))
        self._units(run)
        if model is not None:
            self._base(run, model, base)

    def _journal(self, folder: StoreFolder) -> Journal | None:
        with (
            self._as_finding(folder.journal),
            Journal.open(folder.journal, fs=self._fs, read_only=True) as journal,
        ):
            if journal.repaired:
                what, _, cure = journal.repaired.partition(". ")
                self._add_note(folder.journal, what.removeprefix(f"{folder.journal} "), cure)
            return journal
        return None

    def _description(self, journal: Journal) -> None:
        path = self._root / "store.json"
        if not self._fs.exists(path):
            return
        with self._as_finding(path):
            fields = Fields(read_json(path, max_bytes=1 << 20, fs=self._fs), str(path))
            if fields.text("layout") != journal.header.get("layout"):
                raise fields.refuse("layout", "it names another model than the journal")

    def _logbook(self, folder: StoreFolder) -> None:
        if not self._fs.exists(folder.logbook):
            self._add_note(folder.logbook, "there is none", "Evaluations are made again where they are needed.")
            return
        with self._as_finding(folder.logbook):
            book = Logbook.open(folder.logbook, fs=self._fs, read_only=True)
            book.close()
            if book.damaged_at is not None:
                what = "from here on its lines do not check: the last one was cut off, or the file is damaged"
                cure = "The next run blanks them out and evaluates again; weights do not depend on them."
                self._add_note(folder.logbook, what, cure, offset=book.damaged_at)

    def _model(self, folder: StoreFolder, stored: StoredLayout | None) -> ModelFiles | None:
        model = None
        with self._as_finding(folder.model / "model_class.json"):
            model = ModelFiles.read(folder.model, fs=self._fs)
        if model is None:
            return None
        with self._as_finding(folder.model / "buffers.safetensors"):
            model.buffers()
        with self._as_finding(folder.model / "config.json"):
            is_ours = model.adapters is None and model.transformers_class() is not None
            if is_ours and stored is not None:
                specs = (spec for unit in stored.units for spec in unit.tensors)
                if model.skeleton(specs) is None:
                    what = f"this transformers' {model.class_name} has other parameters or buffers than the store"
                    cure = "An export names weights as they were; use the transformers that wrote the store."
                    self._add_note(folder.model / "config.json", what, cure)
        return model

    # -- weights

    def _units(self, run: StoredRun) -> None:
        files, versions = run.files, {unit.index: run.files.versions(unit) for unit in run.stored.units}
        total = sum(unit.stored_bytes * len(versions[unit.index]) for unit in run.stored.units)
        done = 0
        for unit in run.stored.units:
            for record in versions[unit.index]:
                self._version(run, unit, record)
                done += unit.stored_bytes
                self._progress(unit.name, done, total)
            if unit.is_trained and not versions[unit.index] and not run.header.get("base_folder"):
                what = f"the journal names no version of unit {unit.name}, and no base model holds its weights"
                self._add_damage(run.folder.journal, what, "Restore the whole store from a copy.")
        named = {files.path(unit, record).name for unit in run.stored.units for record in files.versions(unit)}
        for name in self._fs.list_names(files.folder) if self._fs.exists(files.folder) else []:
            if name not in named:
                what = "no record names it: a crash left it, or a running training is writing it"
                self._add_note(files.folder / name, what, "The next run removes it.")

    def _version(self, run: StoredRun, unit: Unit, record: UnitRecord) -> None:
        path = run.files.path(unit, record)
        problems: list[tuple[int | None, str]] = []
        try:
            run.files.check(unit, record, report=lambda offset, what: problems.append((offset, what)))
        except StoreError as error:
            offset = _OFFSET.search(str(error))
            problems.append((int(offset[1]) if offset else None, str(error).partition(". ")[0].split(": ", 1)[-1]))
        if problems and self._is_replaced(run, unit, record):
            return
        for offset, what in problems:
            self._add_damage(path, f"unit {unit.name}: {what}", _cure(run, unit, record), offset=offset)

    def _is_replaced(self, run: StoredRun, unit: Unit, record: UnitRecord) -> bool:
        """Return whether a training that goes on has published a newer version meanwhile, and removed this one."""
        try:
            run.look_again()
        except StoreError:
            return False
        return record not in run.files.versions(unit)

    # -- base weights

    def _base(self, run: StoredRun, model: ModelFiles, base: str | Path | bool) -> None:
        given = None if isinstance(base, bool) else base
        with tempfile.TemporaryDirectory() as scratch:
            source = BaseWeights(run, model, given, scratch=Path(scratch))
            where = Path(source.where)
            if base is False or not source.where:
                if where.is_absolute() and not self._fs.exists(where):
                    what = "the base model is gone from here, and weights that only it holds with it"
                    cure = "Bring it back, or name its new place with `--base` when you export."
                    self._add_note(where, what, cure)
                return
            specs = [spec for unit in run.stored.units for spec in unit.tensors]
            total, done = sum(spec.n_bytes for spec in specs), 0
            with self._as_finding(where):
                for spec in specs:
                    value = source.tensor(spec).detach().to(spec.dtype).contiguous()
                    if padded_crc(spec, host_bytes(encoded(spec, value))) != run.stored.base_crcs[spec.tensor_id]:
                        what = f"{spec.name} is not what the run began with"
                        self._add_damage(where, what, "Bring back the base model as it was.")
                    done += spec.n_bytes
                    self._progress(f"{source.where}: {spec.name}", done, total)


def _cure(run: StoredRun, unit: Unit, record: UnitRecord) -> str:
    others = [other for other in run.files.versions(unit) if other.position < record.position]
    if record.is_base or not (others or run.header.get("base_folder")):
        return f"{_COPY} Nothing else leads to these weights."
    return (
        f"Nothing is lost: `zo2trl export {run.path} OUT` rebuilds the weights from older ones by replay. To go on "
        "with this run, restore the file from a copy."
    )
