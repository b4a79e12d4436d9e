"""This module makes every system call that touches a file, so that tests inject faults by subclassing :class:`FS`.

Does not: interpret the bytes, retry a failed sync, buffer anything, or write through a memory map
(a full disk under a writable map is SIGBUS; under `pwrite` it is an error with a message).
Invariant: an `OSError` never leaves this module; callers get a `StoreError` with path, numbers and cure.
"""

import errno
import fcntl
import mmap
import os
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zo2trl.errors import ShortRead, StoreCorrupt, StoreError, StoreLocked
from zo2trl.files.os_errors import free_bytes
from zo2trl.files.os_errors import naming as _naming

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DIRECT_ALIGNMENT", "FS", "LOCAL"]

DIRECT_ALIGNMENT = 4096
"""File offset, memory address and length of a read past the page cache must be multiples of so many bytes."""

_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT)  # the last one means that there is no /proc

MAX_LOCK_TEXT = 512
MAP_NORESERVE = 0x4000  # Python has the name from 3.13 on; Linux's value is the same on x86-64 and arm64

# Descriptors that hold a lock in this process. The guard is held over every change and over fork(), so that no child
# can be forked between taking a lock and recording it here.
_held: set[int] = set()
_guard = threading.RLock()


class FS:
    """An FS accesses the local file system. It has no state, so that one instance serves every thread."""

    lock_patience_s: float = 2.0
    """`lock` waits so long for a holder that is being killed or is about to write its name."""

    # These two calls may transfer fewer bytes than requested: tests override them to be short or broken.
    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        """Call `pwrite` once and return the number of bytes written, possibly fewer than requested."""
        return os.pwrite(fd, data, offset)

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        """Call `preadv` once and return the number of bytes read, possibly too few; 0 at the end of the file."""
        return os.preadv(fd, [into], offset)

    def make_dir(self, path: Path) -> None:
        """Make `path` and its missing parents, each durable in its own parent before the next is made."""
        with _naming("make the folder", path):
            missing = [folder for folder in (path, *path.parents) if not self.exists(folder)]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self.sync_folder(folder.parent)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def list_names(self, path: Path) -> list[str]:
        """Return the names in the folder `path`, sorted."""
        with _naming("list", path):
            return sorted(entry.name for entry in path.iterdir())

    def exists(self, path: Path) -> bool:
        """Return whether `path` exists, links followed. A missing permission is an error, not an absence."""
        with _naming("look up", path):
            try:
                path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def rename(self, old: Path, new: Path) -> None:
        """Move `old` over `new` atomically; the move is durable only after `sync_folder` of their folder."""
        with _naming(f"rename to {new}", old):
            old.replace(new)

    def unlink(self, path: Path, *, missing_ok: bool = False) -> None:
        """Remove the file's name. Its bytes remain while a descriptor or a map is open."""
        with _naming("remove", path):
            path.unlink(missing_ok=missing_ok)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its content, if it exists; symbolic links are removed and not followed."""
        with _naming("remove", path):
            if not path.is_dir() or path.is_symlink():
                return self.unlink(path, missing_ok=True)
            for entry in list(path.iterdir()):
                self.remove(entry)
            path.rmdir()

    def sync_folder(self, path: Path) -> None:
        """Make the names in the folder durable."""
        with _naming("sync the folder", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_tree(self, path: Path) -> None:
        """Make every file below a folder and its name durable."""
        for entry in sorted(path.rglob("*")):
            if entry.is_dir():
                self.sync_folder(entry)
            elif entry.is_file():
                fd = self.open(entry)
                try:
                    self.sync_data(fd)
                finally:
                    self.close(fd)
        self.sync_folder(path)

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes an ordinary user can still write to the file system of `path`, which must exist."""
        with _naming("measure the free space of", path):
            return free_bytes(path)

    def create(self, path: Path, n_bytes: int) -> int:
        """Create the file `path` with `n_bytes` zero bytes reserved on disk, and return its descriptor.

        It raises `StoreError` if the name is taken, or if the bytes do not fit: then it frees the name again.
        """
        with _naming("create", path, n_bytes=n_bytes):
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                if n_bytes:
                    os.posix_fallocate(fd, 0, n_bytes)
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
            return fd

    def open(self, path: Path, *, write: bool = False) -> int:
        """Open the existing regular file `path`; for writing, `path` must not be a symbolic link."""
        flags = os.O_RDWR | os.O_NOFOLLOW if write else os.O_RDONLY
        with _naming("open", path):
            return _open_regular(path, flags)

    def open_direct(self, fd: int) -> int:
        """Open a file again by its descriptor, for `read_at` past the page cache; only where `can_read_direct`."""
        with _naming("open for direct reads", fd):
            return _reopen_direct(fd)

    def can_read_direct(self, fd: int) -> bool:
        """Read 4096 bytes of an open file past the page cache and return whether that works.

        Some file systems accept O_DIRECT when a file is opened and refuse the read.
        """
        with _naming("try a direct read of", fd):
            try:
                direct = _reopen_direct(fd)
                try:
                    self.read_some(direct, memoryview(mmap.mmap(-1, DIRECT_ALIGNMENT)), 0)
                finally:
                    os.close(direct)
            except InterruptedError:
                return self.can_read_direct(fd)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                return False
            return True

    def close(self, fd: int) -> None:
        """Close a descriptor from `create`, `open`, `open_direct` or `lock` (which frees the lock)."""
        with _naming("close", fd), _guard:
            if fd in _held:
                _held.discard(fd)
                os.ftruncate(fd, 0)  # The next holder must not be reported under this process's name.
            os.close(fd)

    def size(self, fd: int) -> int:
        """Return the size of the file in bytes."""
        with _naming("measure", fd):
            return os.fstat(fd).st_size

    def write_at(self, fd: int, data: "Buffer", offset: int) -> None:
        """Write all of `data` (bytes or a contiguous array) at byte `offset`; only `sync_data` makes it durable."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        done = 0
        with _naming("write", fd, n_bytes=len(view)):
            while done < len(view):
                try:
                    n_written = self.write_some(fd, view[done:], offset + done)
                except InterruptedError:
                    continue
                if n_written <= 0:
                    raise OSError(errno.EIO, "The write made no progress")
                done += n_written

    def read_at(self, fd: int, into: "Buffer", offset: int, *, path: Path, direct: int | None = None) -> None:
        """Fill all of `into` (a writable buffer) from byte `offset`; `ShortRead` if the file ends before.

        With `direct` (from `open_direct`) bytes bypass the page cache, except those that are not aligned to
        `DIRECT_ALIGNMENT`, among them the remainder after a short read.
        """
        view = memoryview(into)
        if not view.nbytes:
            return
        view = view.cast("B")
        done = 0
        with _naming("read", path):
            while done < len(view):
                source = direct if direct is not None and _is_aligned(view[done:], offset + done) else fd
                try:
                    n_read = self.read_some(source, view[done:], offset + done)
                except InterruptedError:
                    continue
                except OSError as error:
                    if source != direct or error.errno != errno.EINVAL:
                        raise
                    direct = None
                    continue
                if n_read <= 0:
                    raise ShortRead(
                        f"{path} ended too early: wanted {len(view)} bytes from offset {offset}, got {done}. The file "
                        "was cut after it was written. Restore it from a copy, or start a new store."
                    )
                done += n_read

    def sync_data(self, fd: int) -> None:
        """Make everything written to `fd` durable.

        A failure is final: the kernel forgets which pages it failed to write, so that a second call would "succeed".
        """
        with _naming("sync", fd):
            os.fdatasync(fd)

    def map(self, path: Path) -> NDArray[np.uint8]:
        """Map the file as an array [n_bytes] without reading it. Writes stay private to the array (copy-on-write).

        A read-only map would turn a stray in-place operation into a segmentation fault. The file must not shrink while
        the array lives. Nothing is reserved, so that a file larger than memory plus swap can be mapped as well.
        """
        fd = self.open(path)
        try:
            return self.map_open(fd)
        finally:
            self.close(fd)

    def map_open(self, fd: int) -> NDArray[np.uint8]:
        """Map an open file as `map` does; its name may have been removed."""
        with _naming("map", fd):
            n_bytes = os.fstat(fd).st_size
            if not n_bytes:  # The kernel refuses empty maps.
                return np.empty(0, np.uint8)
            flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return np.frombuffer(mmap.mmap(fd, n_bytes, flags=flags, prot=access), np.uint8)

    def read_text(self, path: Path, *, max_bytes: int) -> str:
        """Read the UTF-8 text in `path`, and refuse a file of more than `max_bytes` bytes before reading it."""
        fd = self.open(path)
        try:
            n_bytes = self.size(fd)
            if n_bytes > max_bytes:
                raise StoreError(
                    f"{path} has {n_bytes} bytes where at most {max_bytes} make sense: it is not what its name says. "
                    "Restore it from a copy."
                )
            data = bytearray(n_bytes)
            self.read_at(fd, data, 0, path=path)
        finally:
            self.close(fd)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise StoreCorrupt(f"{path} is not UTF-8 text at offset {error.start}. Restore it from a copy.") from error

    def write_text_atomically(self, path: Path, text: str) -> None:
        """Replace the content of `path` by a text in UTF-8, as `write_atomically` does."""
        self.write_atomically(path, text.encode())

    def write_atomically(self, path: Path, data: bytes) -> None:
        """Replace the content of `path` durably: after a crash the file holds the old bytes or the new ones."""
        draft = path.with_name(path.name + ".tmp")
        self.unlink(draft, missing_ok=True)  # A crash may have left one; no other process writes here.
        fd = self.create(draft, len(data))
        try:
            self.write_at(fd, data, 0)
            self.sync_data(fd)
        finally:
            self.close(fd)
        self.rename(draft, path)
        self.sync_folder(path.parent)

    def lock(self, path: Path) -> int:
        """Lock `path` (made if missing) until the descriptor returned is closed or the process ends.

        The file holds "pid host" of its holder. It raises `StoreLocked` naming the holder if there is one already,
        which may be another descriptor of this process. Forked children do not keep the lock: in a child the
        descriptor refers to /dev/null.
        """
        give_up_s = time.monotonic() + self.lock_patience_s
        while True:
            fd = _try_lock(path)
            if fd is not None:
                return fd
            text = ""
            with suppress(ShortRead):  # The holder may release it, which empties the file, during the read.
                text = self.read_text(path, max_bytes=MAX_LOCK_TEXT)
            is_ours = text.startswith(f"{os.getpid()} ")
            if is_ours or time.monotonic() > give_up_s:
                holder = _lock_holder(text) + (", this very process" if is_ours else "")
                raise StoreLocked(
                    f"{path.parent} is in use by {holder} (lock file {path}). Wait until it ends, stop it, or choose "
                    "another folder."
                )
            time.sleep(0.01)

    def is_locked(self, path: Path) -> bool:
        """Return whether `path` is locked (see `lock`). Its text is no proof: a killed holder leaves it behind."""
        fd = self.open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            self.close(fd)
        return False


def _open_regular(path: Path, flags: int) -> int:
    # O_NONBLOCK: opening a pipe that was put in a file's place must fail, not wait for a writer.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise StoreError(f"{path} is not a regular file. Move it away, or choose another folder.")


def _reopen_direct(fd: int) -> int:
    # It is opened by its descriptor, because its name may have been removed or belong to another file by now.
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)


def _is_aligned(view: memoryview, offset: int) -> bool:
    address = np.frombuffer(view, np.uint8).ctypes.data
    return (address | offset | len(view)) % DIRECT_ALIGNMENT == 0


def _try_lock(path: Path) -> int | None:
    """Lock the file, write the holder into it and return the descriptor; None if it is locked already."""
    with _naming("lock", path), _guard:
        fd = _open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            raise
        _held.add(fd)
        return fd


def _lock_holder(text: str) -> str:
    """Name the holder from the text of a lock file, which is empty if the holder has just released it or died."""
    pid, _, host = text.partition(" ")
    return f"process {pid} on {host}" if pid.isdecimal() and host else "a process that did not leave its name"


def _drop_locks_in_child() -> None:
    """Release the parent's locks in a forked child, which shares them and would keep them after the parent's death.

    The descriptor numbers stay taken, so that a `close` of one in the child cannot close another file.
    """
    for fd in _held:
        os.close(fd)  # Closing comes first, so that a process out of descriptors can still open one.
    if _held:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in _held - {nowhere}:
            os.dup2(nowhere, fd, inheritable=False)
        if nowhere not in _held:
            os.close(nowhere)
    _held.clear()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_drop_locks_in_child)

LOCAL = FS()
