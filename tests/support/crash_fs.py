"""CrashFS: does everything for real, notes every operation, and afterwards builds what a power cut could have left.

Does not: sync anything for real (a test that cuts the power in a simulation need not wait for the drive), know what
the files mean, or record reading, locking and mapping, which change nothing that survives.

The world it assumes, as hostile as POSIX allows short of lying drives:

- Bytes written and not followed by `sync_data` of their file survive sector by sector (512 bytes), each or not at
  all, in any order; of several writes to one sector any prefix may be the one that survives. So does the length.
- Names (create, rename, unlink, folder) that no `sync_folder` of their folder followed survive or not: all,
  none, the first few of them (a journaling file system), or any selection (one that is not).
- A file's synced bytes survive whatever happens to its name; bytes that were only reserved read as zeros.
"""

import hashlib
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zo2trl.files.fs import FS

SECTOR = 512
ROOT = 0

Names = dict[int, dict[str, int]]  # folder -> name -> file or folder
Entry = tuple[int, str, int | None]  # in this folder, this name now means this file or folder, or nothing


class Operation(NamedTuple):
    """One thing done to the disk. `file` numbers a file or a folder for life, whatever its names."""

    kind: str
    text: str
    file: int = 0
    offset: int = 0
    data: bytes = b""
    entries: tuple[Entry, ...] = ()
    note: object = None

    def __str__(self) -> str:
        return f"{self.kind} {self.text}"


@dataclass(frozen=True)
class CrashImage:
    """What the disk holds after one particular power cut."""

    after: int
    """Operations that had been issued."""
    choice: str
    """What survived of the rest: "none", "all" (which is kill -9), or the seed it was drawn with."""
    folders: tuple[str, ...]
    files: dict[str, bytes]
    notes: tuple[object, ...]
    """What the workload had noted by then: the steps it was told are durable, say."""

    def write_to(self, folder: Path) -> Path:
        """Put the files into `folder`, which is emptied first."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in self.folders:
            (folder / name).mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    @property
    def digest(self) -> str:
        """Equal for images with equal names and bytes."""
        hashed = hashlib.sha1(repr(self.folders).encode())
        for name in sorted(self.files):
            hashed.update(f"{name}\0{len(self.files[name])}\0".encode())
            hashed.update(self.files[name])
        return hashed.hexdigest()

    def __str__(self) -> str:
        return f"the image after operation {self.after} with {self.choice} of the unsynced rest"


class CrashFS(FS):
    """A file system below `root` whose power can be cut after any operation; what is there already is durable."""

    def __init__(self, root: Path, **further: object) -> None:
        super().__init__(**further)
        self.root = root.resolve()
        self.operations: list[Operation] = []
        self._recording = threading.RLock()  # doing and noting are one thing, or two threads' notes would swap places
        self._open: dict[int, int] = {}  # descriptor -> file
        self._names: Names = {ROOT: {}}
        self._fresh: list[Path] = []  # folders that `make_dir` is making
        self._start = _Disk()
        self._n_files = ROOT
        for path in sorted(self.root.rglob("*")):
            folder, name = self._entry(path)
            file = self._names[folder][name] = self._new_file()
            if path.is_dir():
                self._names[file] = {}
            else:
                data = path.read_bytes()
                self._start.files[file] = _File(data, bytearray(data))
        self._start.names = {folder: dict(names) for folder, names in self._names.items()}

    def note(self, note: object) -> None:
        """Record the workload's progress, which images of later moments carry."""
        self._record(Operation("note", repr(note), note=note))

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        with self._recording:
            n_bytes = super().write_some(fd, data, offset)
            file, what = self._open[fd], f"bytes {offset} to {offset + n_bytes}"
            self._record(Operation("write", f"#{file} {what}", file, offset, bytes(data[:n_bytes])))
            return n_bytes

    def create(self, path: Path, n_bytes: int) -> int:
        with self._recording:
            fd = super().create(path, n_bytes)
            file = self._open[fd] = self._new_file()
            self._rename("create", f"{path} as #{file}, {n_bytes} bytes", [(path, file)], file=file, offset=n_bytes)
            return fd

    def open(self, path: Path, *, write: bool = False) -> int:
        with self._recording:
            fd = super().open(path, write=write)
            if write:
                self._open[fd] = self._file(path)
            return fd

    def close(self, fd: int) -> None:
        with self._recording:
            self._open.pop(fd, None)
            super().close(fd)

    def sync_data(self, fd: int) -> None:
        with self._recording:
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if fd not in self._open:
                self._adopt(path)
            file = self._open[fd] if fd in self._open else self._file(path)
            self._record(Operation("sync_data", f"#{file}", file))

    def sync_folder(self, path: Path) -> None:
        with self._recording:
            for folder in [folder for folder in self._fresh if folder.parent == path and folder.is_dir()]:
                self._note_folder(folder)
            # A folder above the root is not recorded: a store may make its own folder durable there.
            if path.resolve().is_relative_to(self.root):
                for entry in (path, *path.iterdir()):
                    self._adopt(entry)
                self._record(Operation("sync_folder", str(path), self._file(path)))

    def make_dir(self, path: Path) -> None:
        with self._recording:
            self._fresh = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
            super().make_dir(path)
            for folder in list(self._fresh):
                self._note_folder(folder)

    def rename(self, old: Path, new: Path) -> None:
        with self._recording:
            super().rename(old, new)
            file = self._file(old)
            self._rename("rename", f"{old} -> {new}", [(old, None), (new, file)])

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        with self._recording:
            folder, name = self._entry(path)
            super().unlink(path, missing_ok=missing_ok)
            if name in self._names.get(folder, {}):
                self._rename("unlink", str(path), [(path, None)])

    def remove(self, path: Path) -> None:
        with self._recording:
            is_folder = path.is_dir() and not path.is_symlink()
            super().remove(path)  # comes back here, or to `unlink`, for everything inside
            if is_folder:
                self._rename("rmdir", str(path), [(path, None)])

    def images(
        self, *, n_random: int = 8, seed: int = 0, first: int = 0, last: int | None = None
    ) -> Iterator[CrashImage]:
        """Images of a power cut after each of the operations `first` to `last`: none, all, and `n_random` draws."""
        disk = self._start.copy()
        for number, operation in enumerate(self.operations[:last], start=1):
            disk.apply(operation)
            if number < first or operation.kind == "note":
                continue
            yield disk.image(after=number, choice="none", draw=None)
            yield disk.image(after=number, choice="all", draw=None)
            for trial in range(n_random):
                choice = f"seed {seed}/{number}/{trial}"
                yield disk.image(after=number, choice=choice, draw=random.Random(choice))

    def story(self, around: int, *, n_lines: int = 12) -> str:
        """The operations before a crash point, for a failing test's message."""
        return "\n".join(f"{i}: {op}" for i, op in enumerate(self.operations, start=1) if -n_lines < i - around <= 1)

    def _record(self, operation: Operation) -> None:
        with self._recording:
            self.operations.append(operation)

    def _rename(
        self, kind: str, text: str, changes: list[tuple[Path, int | None]], *, file: int = 0, offset: int = 0
    ) -> None:
        entries = tuple((*self._entry(path), target) for path, target in changes)
        _apply(entries, self._names)
        text = text.replace(f"{self.root}/", "")
        self._record(Operation(kind, text, file, offset, entries=entries))

    def _note_folder(self, folder: Path) -> None:
        self._fresh = [other for other in self._fresh if other != folder]
        file = self._new_file()
        self._names[file] = {}
        self._rename("make_dir", f"{folder} as #{file}", [(folder, file)], file=file)

    def _adopt(self, path: Path) -> None:
        """Record bytes that were written past this class when they are synced; until then a power cut loses them."""
        for folder in reversed(path.parents):
            if folder.is_relative_to(self.root) and not self._is_known(folder):
                self._note_folder(folder)
        if self._is_known(path):
            return
        if path.is_dir():
            self._note_folder(path)
            return
        file, data = self._new_file(), path.read_bytes()
        self._rename("create", f"{path} as #{file}", [(path, file)], file=file)
        self._record(Operation("write", f"#{file}, all of it", file, 0, data))

    def _is_known(self, path: Path) -> bool:
        try:
            self._file(path)
        except KeyError:
            return False
        return True

    def _new_file(self) -> int:
        self._n_files += 1
        return self._n_files

    def _file(self, path: Path) -> int:
        file = ROOT
        for part in path.resolve().relative_to(self.root).parts:
            file = self._names[file][part]
        return file

    def _entry(self, path: Path) -> tuple[int, str]:
        return self._file(path.parent) if path.parent.exists() else -1, path.name


@dataclass
class _File:
    durable: bytes
    now: bytearray
    pending: list[tuple[int, bytes]] = field(default_factory=list)  # writes since the last sync
    sizes: list[int] = field(default_factory=list)  # lengths since the last sync

    def resize(self, n_bytes: int) -> None:
        del self.now[n_bytes:]
        self.now.extend(bytes(n_bytes - len(self.now)))
        self.sizes.append(n_bytes)

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.now):
            self.resize(offset + len(data))
        self.now[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def sync(self) -> None:
        if self.pending or self.sizes:
            self.durable = bytes(self.now)
            self.pending, self.sizes = [], []

    def survivor(self, draw: random.Random) -> bytes:
        """Some of the sectors written since the last sync, each at any of the versions it had since."""
        if not self.pending and not self.sizes:
            return self.durable
        size = draw.choice([len(self.durable), *self.sizes])
        image = bytearray(self.durable[:size].ljust(size, b"\0"))
        arrived = self._arrived(draw)
        for number, (offset, data) in enumerate(self.pending):
            for sector in _sectors(offset, data):
                if number < arrived[sector]:
                    start, stop = max(sector * SECTOR, offset), min((sector + 1) * SECTOR, offset + len(data))
                    image[start:stop] = data[start - offset : stop - offset]
        return bytes(image[:size])

    def _arrived(self, draw: random.Random) -> dict[int, int]:
        """Sector -> number of the first write that is not in what has arrived of it.

        Half the draws tear writes, a sector here and there; the others lose or keep whole writes, in any order. A
        sector that was written twice and arrived late holds both.
        """
        writes_of: dict[int, list[int]] = {}
        for number, (offset, data) in enumerate(self.pending):
            for sector in _sectors(offset, data):
                writes_of.setdefault(sector, []).append(number)
        if draw.random() < 0.5:
            kept = {number for number in range(len(self.pending)) if draw.random() < 0.5}
            return {s: max((n + 1 for n in numbers if n in kept), default=0) for s, numbers in writes_of.items()}
        return {sector: draw.choice([0, *(n + 1 for n in numbers)]) for sector, numbers in writes_of.items()}


def _sectors(offset: int, data: bytes) -> range:
    return range(offset // SECTOR, -(-(offset + len(data)) // SECTOR))


@dataclass(eq=False)
class _Change:
    entries: tuple[Entry, ...]
    unsynced: set[int]  # folders it is in that were not synced since: it is durable when all were


class _Disk:
    """The durable state, and what is on its way."""

    def __init__(self) -> None:
        self.files: dict[int, _File] = {}
        self.names: Names = {ROOT: {}}
        self.changes: list[_Change] = []  # since `names`, in order
        self.notes: list[object] = []

    def copy(self) -> "_Disk":
        disk = _Disk()
        disk.files = {file: _File(state.durable, bytearray(state.now)) for file, state in self.files.items()}
        disk.names = {folder: dict(names) for folder, names in self.names.items()}
        return disk

    def apply(self, operation: Operation) -> None:
        kind, file = operation.kind, operation.file
        if kind == "note":
            self.notes.append(operation.note)
        elif kind == "write":
            self.files[file].write(operation.offset, operation.data)
        elif kind == "sync_data":
            self.files[file].sync()
        elif kind == "sync_folder":
            for change in self.changes:
                change.unsynced.discard(file)
            while self.changes and not self.changes[0].unsynced:
                _apply(self.changes.pop(0).entries, self.names)
        else:
            if kind == "make_dir":
                self.names[file] = {}
            elif kind == "create":
                self.files[file] = _File(b"", bytearray())
                if operation.offset:
                    self.files[file].resize(operation.offset)
            self.changes.append(_Change(operation.entries, {folder for folder, _, _ in operation.entries}))

    def image(self, *, after: int, choice: str, draw: random.Random | None) -> CrashImage:
        names = {folder: dict(entries) for folder, entries in self.names.items()}
        lucky = self._surviving_changes(choice, draw)
        for change in self.changes:
            if not change.unsynced or change in lucky:
                _apply(change.entries, names)
        folders, files = [], {}

        def walk(folder: int, prefix: str) -> None:
            for name, file in sorted(names[folder].items()):
                if file in names:
                    folders.append(prefix + name)
                    walk(file, f"{prefix}{name}/")
                else:
                    files[prefix + name] = self._surviving_bytes(self.files[file], choice, draw)

        walk(ROOT, "")
        return CrashImage(after, choice, tuple(folders), files, tuple(self.notes))

    def _surviving_changes(self, choice: str, draw: random.Random | None) -> list[_Change]:
        pending = [change for change in self.changes if change.unsynced]
        if draw is None:
            return pending if choice == "all" else []
        kind = draw.random()
        if kind < 0.2:
            return [change for change in pending if draw.random() < 0.5]
        if kind < 0.4:
            return pending
        return pending[: draw.randrange(len(pending) + 1)]

    @staticmethod
    def _surviving_bytes(file: _File, choice: str, draw: random.Random | None) -> bytes:
        if draw is not None:
            return file.survivor(draw)
        return bytes(file.now) if choice == "all" else file.durable


def _apply(entries: tuple[Entry, ...], names: Names) -> None:
    for folder, name, file in entries:
        if file is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = file
