"""FaultyFS: a disk that misbehaves at the Nth call, once or from then on; and one that dawdles, or lies.

Does not: decide what should happen then. A test loops N = 1, 2, 3 ... until `fs.struck` stays false, and has then met
the fault at every call that could have met it.

It counts only the calls that can meet the fault it was made for, so that no N is spent on the others. Errors are
raised where the operating system would raise them, and reach the caller in the package's own words.
"""

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zo2trl.files.fs import FS, _naming

_CHANGES = ("create", "write_some", "sync_data", "sync_folder", "rename", "unlink", "remove", "make_dir")
_LOOKS = ("open", "read_some", "map_open", "list_names", "exists", "free_bytes", "size")

# Fault -> (error number or None, the calls that can meet it).
FAULTS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "EIO": (errno.EIO, (*_CHANGES, *_LOOKS, "lock", "close")),
    "ENOSPC": (errno.ENOSPC, ("create", "write_some", "sync_data", "make_dir", "rename")),
    "EAGAIN": (errno.EAGAIN, (*_CHANGES, *_LOOKS, "lock")),
    "EINTR": (errno.EINTR, ("write_some", "read_some")),
    "EROFS": (errno.EROFS, _CHANGES),
    "sync": (errno.EIO, ("sync_data", "sync_folder")),
    "short write": (None, ("write_some",)),
    "short read": (None, ("read_some",)),
}
INVISIBLE = ("EINTR", "short write", "short read")


class FaultyFS(FS):
    """Meets `fault` at call number `at` (from 1; 0: never) of those that can meet it, and `for_ever` after it."""

    def __init__(self, fault: str = "EIO", *, at: int = 0, for_ever: bool = False, **further: object) -> None:
        super().__init__(**further)
        self.code, self._calls_that_count = FAULTS[fault]
        assert not (self.code == errno.EINTR and for_ever), "interrupted for ever is a hang by definition"
        self.at, self.for_ever = at, for_ever
        self.n_calls = 0
        self.struck: list[str] = []
        """The calls that met the fault."""
        self.retried_syncs: list[str] = []
        """Syncs of a file or a folder whose sync had failed before under the same lock: must stay empty."""
        self._failed_syncs: set[tuple[int, int]] = set()
        self._counting = threading.Lock()
        self._stalled: dict[str, threading.Event] = {}
        self._flips: list[tuple[str, int]] = []
        self.waiting = threading.Event()
        """Set when a stalled call has begun to wait."""

    def only(self, call: str, nth: int) -> None:
        """From now on: this call alone, the nth time from here, meets the fault; 0 ends it."""
        with self._counting:
            self._calls_that_count, self.n_calls, self.at = (call,), 0, nth

    # -- faults

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        if self._strikes("write_some", fd):
            half = len(data) // 2 if self.code is None or self.code == errno.ENOSPC else 0
            n_bytes = super().write_some(fd, data[: max(half, 1)], offset) if half or self.code is None else 0
            if self.code is None:
                return n_bytes
            raise OSError(self.code, os.strerror(self.code))  # a disk that is full takes what still fits
        return super().write_some(fd, data, offset)

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        if self._strikes("read_some", fd):
            if self.code is not None:
                raise OSError(self.code, os.strerror(self.code))
            into = into[: max(len(into) // 2, 1)]
        n_bytes = super().read_some(fd, into, offset)
        self._flip(np.frombuffer(into[:n_bytes], np.uint8), _path_of(fd), offset)
        return n_bytes

    def map_open(self, fd: int) -> NDArray[np.uint8]:
        self._meet("map_open", fd)
        data = super().map_open(fd)
        self._flip(data, _path_of(fd), 0)
        return data

    def create(self, path: Path, n_bytes: int) -> int:
        self._meet("create", path)
        fd = super().create(path, n_bytes)
        self._failed_syncs.discard(_identity(os.fstat(fd)))  # the number of a file that is gone is given to a new one
        return fd

    def open(self, path: Path, *, write: bool = False) -> int:
        self._meet("open", path)
        return super().open(path, write=write)

    def close(self, fd: int) -> None:
        path = _path_of(fd)
        super().close(fd)  # Linux closes the descriptor whatever it answers
        self._meet("close", path)

    def size(self, fd: int) -> int:
        self._meet("size", fd)
        return super().size(fd)

    def sync_data(self, fd: int) -> None:
        with self._audited("sync_data", fd, os.fstat(fd)):
            super().sync_data(fd)

    def sync_folder(self, path: Path) -> None:
        with self._audited("sync_folder", path, path.stat()):
            super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._meet("rename", old)
        super().rename(old, new)

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        self._meet("unlink", path)
        super().unlink(path, missing_ok=missing_ok)

    def remove(self, path: Path) -> None:
        self._meet("remove", path)
        super().remove(path)

    def make_dir(self, path: Path) -> None:
        self._meet("make_dir", path)
        super().make_dir(path)

    def list_names(self, path: Path) -> list[str]:
        self._meet("list_names", path)
        return super().list_names(path)

    def exists(self, path: Path) -> bool:
        self._meet("exists", path)
        return super().exists(path)

    def free_bytes(self, path: Path) -> int:
        self._meet("free_bytes", path)
        return super().free_bytes(path)

    def lock(self, path: Path) -> int:
        self._meet("lock", path)
        fd = super().lock(path)
        self._failed_syncs.clear()  # a new owner relies only on files that it has written again itself
        return fd

    # -- dawdling and lying

    @contextmanager
    def stalled(self, *calls: str) -> Iterator[None]:
        """Inside, these calls wait until the block ends."""
        release = threading.Event()
        self._stalled.update(dict.fromkeys(calls, release))
        try:
            yield
        finally:
            for call in calls:
                self._stalled.pop(call, None)
            release.set()

    def flip_bit(self, name: str, bit: int) -> None:
        """From now on, files whose names start with `name` read as if this bit of them were the other one."""
        self._flips.append((name, bit))

    def _flip(self, data: NDArray[np.uint8], path: Path | int, offset: int) -> None:
        for name, bit in self._flips:
            at = bit // 8 - offset
            if isinstance(path, Path) and path.name.startswith(name) and 0 <= at < len(data):
                data[at] ^= 1 << bit % 8

    # -- counting

    def _meet(self, call: str, where: Path | int) -> None:
        if self._strikes(call, where):
            assert self.code is not None
            with _naming(call.replace("_", " "), where):
                raise OSError(self.code, os.strerror(self.code))

    def _strikes(self, call: str, where: Path | int) -> bool:
        release = self._stalled.get(call)
        if release is not None:
            self.waiting.set()
            release.wait()
        if call not in self._calls_that_count:
            return False
        with self._counting:
            self.n_calls += 1
            strikes = bool(self.at) and (self.n_calls == self.at or (self.for_ever and self.n_calls > self.at))
            if strikes:
                self.struck.append(f"{call} {(_path_of(where) if isinstance(where, int) else where).name}")
            return strikes

    @contextmanager
    def _audited(self, call: str, where: Path | int, status: os.stat_result) -> Iterator[None]:
        file = _identity(status)
        if file in self._failed_syncs:
            self.retried_syncs.append(f"{call} {(_path_of(where) if isinstance(where, int) else where)}")
        try:
            self._meet(call, where)
            yield
        except BaseException:
            self._failed_syncs.add(file)
            raise


class SlowFS(FS):
    """A SlowFS is so slow that several threads are in its calls at once."""

    def __init__(self, delay_s: float = 0.001, **further: object) -> None:
        super().__init__(**further)
        self.delay_s = delay_s

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        time.sleep(self.delay_s)
        return super().write_some(fd, data, offset)

    def sync_data(self, fd: int) -> None:
        time.sleep(self.delay_s)
        super().sync_data(fd)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()
