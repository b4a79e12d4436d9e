"""The folder of a store: whose it is, what lies where in it, and what happens to an earlier run.

Does not: read or write weights or records.

::

    store_dir/
    ├── store.json          format and layout digest: which model this store belongs to
    ├── lock                flock of the owning process
    ├── journal             the steps of this run
    ├── journal-1.old ...   steps of earlier runs in the same folder, or before a checkpoint was loaded
    └── units/              <unit>@<version>, one plain file each

Invariant: a folder that holds anything we did not write is never written to.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

from zo2trl.errors import StoreForeign
from zo2trl.tiers.fs import FS, LOCAL

__all__ = ["StoreFolder"]

FORMAT = 1
_DESCRIPTION = "store.json"
_MAX_DESCRIPTION_BYTES = 1 << 20
_UNIT_FILE = re.compile(r".+@\d+\+?")


class StoreFolder:
    """An owned store folder, emptied for a new run; `close` gives it up.

    `also_ours` are digests the same model had before (other weights were trainable, say).

    Raises:
        StoreForeign: the folder holds files that are not a store, or the store of another model.
        StoreLocked: another process owns it.
        StoreError: it cannot be made or written.
    """

    def __init__(self, path: Path, *, layout_digest: str, also_ours: Collection[str] = (), fs: FS = LOCAL) -> None:
        self.path, self._fs = path, fs
        self._lock: int | None = None
        fs.make_dir(path)
        self._refuse_foreign(layout_digest, also_ours)
        self._lock = fs.lock(path / "lock")
        try:
            self._retire_earlier_run()
            fs.write_text_atomically(
                path / _DESCRIPTION, json.dumps({"format": FORMAT, "layout": layout_digest}, indent=1)
            )
        except BaseException:
            self.close()
            raise

    @property
    def journal(self) -> Path:
        """File of this run's steps."""
        return self.path / "journal"

    @property
    def units(self) -> Path:
        """Folder of the disk tier."""
        return self.path / "units"

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._lock is not None:
            self._fs.close(self._lock)
            self._lock = None

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
        text = self._fs.read_text(self.path / _DESCRIPTION, max_bytes=_MAX_DESCRIPTION_BYTES)
        try:
            found = json.loads(text)
            known = found["format"], found["layout"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreForeign(
                f"`store_dir` {self.path} has a {_DESCRIPTION} that is not a store's ({error}). Nothing was changed. "
                "Choose another folder."
            ) from error
        if known[0] != FORMAT or known[1] not in (layout_digest, *also_ours):
            raise StoreForeign(
                f"`store_dir` {self.path} holds the store of another model or of other trainable parameters (format "
                f"{known[0]}, layout {str(known[1])[:12]}; this run: format {FORMAT}, layout {layout_digest[:12]}). "
                "Nothing was changed. Choose another `store_dir`, or delete that folder if its run is no longer "
                "needed."
            )
        strange = [name for name in self._unit_files() if not _UNIT_FILE.fullmatch(name)]
        if strange:
            raise StoreForeign(
                f"{self.units} holds {strange[0]!r}, which is no unit of this store. Nothing was changed. Move it "
                "away, or choose another `store_dir`."
            )

    def retire_journal(self) -> None:
        """Keep the journal, if there is one, under the first free name `journal-N.old`."""
        fs = self._fs
        if fs.exists(self.journal):
            taken = set(fs.list_names(self.path))
            number = next(n for n in range(1, len(taken) + 2) if f"journal-{n}.old" not in taken)
            fs.rename(self.journal, self.path / f"journal-{number}.old")
            fs.sync_folder(self.path)

    def _retire_earlier_run(self) -> None:
        fs = self._fs
        self.retire_journal()
        for name in self._unit_files():
            fs.unlink(self.units / name)

    def _unit_files(self) -> list[str]:
        return self._fs.list_names(self.units) if self._fs.exists(self.units) else []
