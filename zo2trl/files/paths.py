"""This module checks file names that were read from data.

Does not: open anything.
Invariant: a returned path lies below the given folder, links followed, and is no pipe or device.
"""

import os
import stat
import unicodedata
from pathlib import Path

from zo2trl.errors import StoreError, ZO2TRLError

__all__ = ["inside"]


def inside(root: Path, name: str, *, error: type[ZO2TRLError] = StoreError, links_into: tuple[Path, ...] = ()) -> Path:
    """Return `root / name` for a name read from data; raise `error` unless that stays below `root`, links followed.

    `links_into` names further folders where symbolic links may lead (a hub cache keeps its blobs beside the
    snapshots). The name need not exist; if it does it must be a file or a folder, not a pipe or a device.
    """

    def refuse(why: str) -> ZO2TRLError:
        shown = name if len(name) <= 200 else name[:200] + "..."
        return error(
            f"{shown!r} is not a safe file name below {root}: {why}. Nothing was opened. Get the folder from a source "
            "you trust, or correct the name."
        )

    try:
        name.encode()
    except UnicodeEncodeError:
        raise refuse("it is not valid Unicode") from None
    if not name or "\0" in name or "\\" in name:
        raise refuse("it is empty, or has a NUL or a backslash")
    # Some file systems fold look-alike characters: a name that folds to ".." or "/" is refused as well.
    for spelling in (name, unicodedata.normalize("NFKC", name)):
        parts = spelling.split("/")
        if spelling.startswith("/") or ".." in parts:
            raise refuse("it is absolute, or climbs out of the folder")
    try:
        real = Path(os.path.realpath(root / name))
        allowed = [Path(os.path.realpath(folder)) for folder in (root, *links_into)]
        if real == allowed[0] or not any(real.is_relative_to(folder) for folder in allowed):
            raise refuse(f"it leads to {real}")
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return root / name
    except OSError as problem:
        raise refuse(str(problem.strerror)) from problem
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise refuse("it is neither a file nor a folder")
    return root / name
