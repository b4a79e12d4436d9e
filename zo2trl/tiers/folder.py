"""Store folder: finds the files of a run, locks the folder to one model and process, and keeps an earlier run.

Does not: read or write weights or records.

::

    store_dir/
    ├── store.json          format and layout digest: which model this store belongs to
    ├── lock                flock of the owning process
    ├── journal             the steps of this run; it appears when everything below is there, so it makes the run count
    ├── logbook             evaluations and other measurements of this run
    ├── layout.json         the units, and checksums of the weights the run began with
    ├── model/              what an exported folder holds besides weights
    ├── units/              versions of units
    ├── earlier/            the run before, complete, until this one has made its first step
    └── journal-N.old ...   the steps of runs that were started over

Invariants:
- A folder with a file that zo2trl did not write is never written to.
- A run with steps is set aside when another begins, and reduced to its journal only when that one makes a step: a
  script that looks at the model before it resumes loses nothing.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Self

from zo2trl.errors import StoreError, StoreForeign
from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.journal import Journal

__all__ = ["StoreFolder", "where_it_may_be"]

STORE_FORMAT = 2
_DESCRIPTION = "store.json"
_EARLIER = "earlier"
_STORES_BELOW = ("rank-0", "store", "store/rank-0")  # of several processes; of a trainer without a `store_dir`
_MOVING = "journal.moving"
_OF_A_RUN = ("journal", "logbook", "layout.json", "model", "units")  # the journal first: without it nothing counts
_MAX_DESCRIPTION_BYTES = 1 << 20
_UNIT_FILE = re.compile(r".+@\d+(\.\d+)?")


class StoreFolder:
    """A store folder; make one with `own` (to write) or `look` (to read)."""

    def __init__(self, path: Path, *, fs: FS = LOCAL) -> None:
        self.path, self._fs = path, fs
        self._lock: int | None = None

    @classmethod
    def own(cls, path: Path, *, layout_digest: str, also_ours: Collection[str] = (), fs: FS = LOCAL) -> Self:
        """Lock the folder, made if missing, and write which model it belongs to. `also_ours`: its earlier digests.

        Raises:
            StoreForeign: the folder holds files that are not a store, or the store of another model.
            StoreLocked: another process owns it.
            StoreError: it cannot be made or written.
        """
        folder = cls(path, fs=fs)
        fs.make_dir(path)
        for parent in path.absolute().parents[:2]:  # their names may not be synced yet
            fs.sync_folder(parent)
        folder._refuse_foreign(layout_digest, also_ours)
        folder._lock = fs.lock(path / "lock")
        try:
            folder._finish_moves()
            fs.write_text_atomically(
                path / _DESCRIPTION, json.dumps({"format": STORE_FORMAT, "layout": layout_digest}, indent=1)
            )
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def look(cls, path: Path, *, layout_digest: str | None = None, fs: FS = LOCAL) -> Self:
        """A store to read, of the model with this digest if one is given; nothing is locked or changed.

        Raises:
            StoreForeign: there is no store, or it is another model's.
        """
        folder = cls(path, fs=fs)
        found = folder._describe() if fs.exists(path / _DESCRIPTION) else None
        if layout_digest is not None and found is not None:
            folder._refuse_other(found, (layout_digest,))
        if fs.exists(path / _EARLIER / "journal") and folder._count_steps() == 0:
            folder.path = path / _EARLIER  # the run that would be continued
        if found is None or not fs.exists(folder.journal):
            raise StoreForeign(f"{path} holds no store with a run in it. {where_it_may_be(path, fs=fs)}")
        return folder

    @property
    def journal(self) -> Path:
        """File of this run's steps."""
        return self.path / "journal"

    @property
    def logbook(self) -> Path:
        """File of this run's measurements."""
        return self.path / "logbook"

    @property
    def layout(self) -> Path:
        """File that describes the units."""
        return self.path / "layout.json"

    @property
    def model(self) -> Path:
        """Folder of what is exported besides weights."""
        return self.path / "model"

    @property
    def units(self) -> Path:
        """Folder of the versions of units."""
        return self.path / "units"

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._lock is not None:
            self._fs.close(self._lock)
            self._lock = None

    # -- runs

    def set_run_aside(self) -> int:
        """Make room for a new run; returns how many steps the one set aside has."""
        n_steps = self._count_steps()
        if n_steps is None or n_steps > 0:
            self._remove_run(self.path / _EARLIER)
            self._move_run(self.path, self.path / _EARLIER)
        else:
            self._remove_run(self.path)
        for folder in (self.units, self.model):
            self._fs.make_dir(folder)
        return n_steps or 0

    def recall_run(self) -> bool:
        """Bring a run that was set aside back, unless the present one has steps; whether there is a run now."""
        earlier = self.path / _EARLIER
        if self._fs.exists(earlier / "journal") and self._count_steps() == 0:
            self._remove_run(self.path)
            self._move_run(earlier, self.path)
        return self._fs.exists(self.journal)

    def drop_earlier_run(self) -> None:
        """Reduce the earlier run to its journal, `journal-N.old`, because the present one has its first step."""
        earlier = self.path / _EARLIER
        if not self._fs.exists(earlier):
            return
        if self._fs.exists(earlier / "journal"):
            taken = set(self._fs.list_names(self.path))
            number = next(n for n in range(1, len(taken) + 2) if f"journal-{n}.old" not in taken)
            self._fs.rename(earlier / "journal", self.path / f"journal-{number}.old")
            self._fs.sync_folder(self.path)
        self._remove_run(earlier)

    def _count_steps(self) -> int | None:
        """Steps of the present run, 0 if there is none; None if its journal cannot be read."""
        if not self._fs.exists(self.journal):
            return 0
        try:
            with Journal.open(self.journal, fs=self._fs, read_only=True) as journal:
                return len(journal.records)
        except StoreError:
            return None

    def _move_run(self, here: Path, there: Path) -> None:
        """Move a run: the journal leaves first and arrives last, so that it never counts without its units."""
        self._fs.make_dir(there)
        if self._fs.exists(here / "journal"):
            self._fs.rename(here / "journal", there / _MOVING)
            for folder in (there, here):
                self._fs.sync_folder(folder)
        self._finish_move(here, there)

    def _finish_move(self, here: Path, there: Path) -> None:
        for name in _OF_A_RUN:
            if name != "journal" and self._fs.exists(here / name):
                self._fs.remove(there / name)  # its removal may not have survived
                self._fs.rename(here / name, there / name)
        for folder in (there, here):
            self._fs.sync_folder(folder)
        if self._fs.exists(there / _MOVING):
            self._fs.rename(there / _MOVING, there / "journal")
            self._fs.sync_folder(there)

    def _finish_moves(self) -> None:
        """Finish moves that a crash interrupted, in the direction they had."""
        earlier = self.path / _EARLIER
        for here, there in ((self.path, earlier), (earlier, self.path)):
            if self._fs.exists(there / _MOVING):
                self._finish_move(here, there)

    def _remove_run(self, folder: Path) -> None:
        if self._fs.exists(folder):
            for name in _OF_A_RUN:
                self._fs.remove(folder / name)
                if name == "journal":
                    self._fs.sync_folder(folder)

    # -- which model it belongs to

    def _refuse_foreign(self, layout_digest: str, also_ours: Collection[str]) -> None:
        # A run that died while it made the folder leaves a lock and half a description.
        names = [name for name in self._fs.list_names(self.path) if name not in ("lock", f"{_DESCRIPTION}.tmp")]
        if not names:
            return
        if _DESCRIPTION not in names:
            raise StoreForeign(
                f"`store_dir` {self.path} is not empty and holds no store ({names[0]!r}, {len(names)} entries). "
                "Nothing was changed. Choose an empty or new folder."
            )
        self._refuse_other(self._describe(), (layout_digest, *also_ours))
        strange = [name for name in self._unit_files() if not _UNIT_FILE.fullmatch(name)]
        if strange:
            raise StoreForeign(
                f"{self.units} holds {strange[0]!r}, which is no unit of this store. Nothing was changed. Move it "
                "away, or choose another `store_dir`."
            )

    def _describe(self) -> tuple[object, object]:
        text = self._fs.read_text(self.path / _DESCRIPTION, max_bytes=_MAX_DESCRIPTION_BYTES)
        try:
            found = json.loads(text)
            return found["format"], found["layout"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreForeign(
                f"`store_dir` {self.path} has a {_DESCRIPTION} that is not a store's ({error}). Nothing was changed. "
                "Choose another folder."
            ) from error

    def _refuse_other(self, found: tuple[object, object], digests: Collection[str]) -> None:
        if found[0] != STORE_FORMAT or found[1] not in digests:
            raise StoreForeign(
                f"`store_dir` {self.path} holds the store of another model or of other trainable parameters (format "
                f"{found[0]}, layout {str(found[1])[:12]}; this run: format {STORE_FORMAT}, layout "
                f"{next(iter(digests))[:12]}). Nothing was changed. Choose another `store_dir`, or delete that folder "
                "if its run is no longer needed."
            )

    def _unit_files(self) -> list[str]:
        return self._fs.list_names(self.units) if self._fs.exists(self.units) else []


def where_it_may_be(path: Path, *, fs: FS = LOCAL) -> str:
    """Advice for a folder that is no store: there may be one in it."""
    below = [path / name for name in _STORES_BELOW if fs.exists(path / name / "journal")]
    return f"Did you mean {below[0]}?" if below else "Check the path."
