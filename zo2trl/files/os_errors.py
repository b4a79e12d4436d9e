"""This module turns an `OSError` into a `StoreError` whose message has the path, numbers and a cure.

Does not: decide what is an error, or retry a call.
Invariant: a message names a path, also when only a descriptor is known.
"""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from zo2trl.errors import StoreError

__all__ = ["free_bytes", "naming"]

_CURES = {
    errno.EEXIST: "Remove it, or choose another folder.",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give this user access, or choose another folder."),
    errno.EROFS: "The file system is mounted read-only: choose a folder on a writable one.",
    errno.ENOSPC: "Free some space, or choose a folder on a larger disk.",
    errno.EDQUOT: "Free some space or ask for a larger quota.",
    errno.EFBIG: "Raise the file size limit (`ulimit -f`), or choose another file system.",
    errno.EIO: "The drive reported a failure: check the kernel log before trusting it again. Nothing was retried.",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`).",
    errno.ENOTDIR: "A part of the path is a file: choose another folder.",
    errno.ELOOP: "The path ends in a symbolic link (or a loop of them): replace it by the real path.",
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP), "Choose a folder on a local disk: this file system cannot."),
}


@contextmanager
def naming(action: str, where: Path | int, *, n_bytes: int = 0) -> Generator[None, None, None]:
    """Turn an `OSError` into a `StoreError` with path and cure; `n_bytes` is the size that a full disk lacks."""
    try:
        yield
    except OSError as error:
        path = _path_of(where) if isinstance(where, int) else where
        room = ""
        if n_bytes and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with suppress(OSError):
                room = f" {n_bytes:,} bytes are needed, {free_bytes(path.parent):,} are free."
        cure = _CURES.get(error.errno or 0, "Check the path and the file system.")
        raise StoreError(f"Cannot {action} {path}: {error.strerror} (errno {error.errno}).{room} {cure}") from error


def free_bytes(path: Path) -> int:
    """Return how many bytes an ordinary user can still write to the file system of `path`."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def _path_of(fd: int) -> Path:
    """Look up the path of a descriptor for a message, without keeping a table that could go stale."""
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    except OSError:
        return Path(f"descriptor {fd}")
