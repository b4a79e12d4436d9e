"""What somebody who means harm puts into a folder: names that lead elsewhere, pickles that act, documents that lie.

Does not: harm. A name leads to a bait beside the folder, and a pickle writes a canary.
"""

import copy
import json
import os
import pickle
import random
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import audited, paths_opened

BAIT = "model.safetensors"

TEXTS = {
    "up": "..",
    "up, with a slash": "../",
    "up to the bait": f"../bait/{BAIT}",
    "down and up": f"sub/../../bait/{BAIT}",
    "down and up, twice": f"a/b/../../../bait/{BAIT}",
    "a dot, then up": f"./../bait/{BAIT}",
    "up behind doubled slashes": f"sub//../..//bait/{BAIT}",
    "all the way up": "../" * 40 + "etc/passwd",
    "absolute": "/etc/passwd",
    "absolute, doubled": "//etc/passwd",
    "the process itself": "/proc/self/environ",
    "the folder": ".",
    "the folder, with a slash": "./",
    "the folder by a detour": "sub/..",
    "backslashes": f"..\\bait\\{BAIT}",
    "a drive": "C:\\bait",
    "a share": "\\\\server\\bait",
    "a NUL": f"{BAIT}\0.txt",
    "a NUL behind dots": "..\0",
    "a name of 5,000 characters": "x" * 5000,
    "a path of 5,000 characters": "x/" * 2500 + "x",
    "a name of 256 characters": "x" * 256,
    "full-width dots": f"．．/bait/{BAIT}",
    "a two-dot leader": f"‥/bait/{BAIT}",
    "one-dot leaders": f"․․/bait/{BAIT}",
    "a full-width slash": f"..／bait／{BAIT}",
    "half a character": "a\ud800",
}
N_NAMES = 40


def hostile_names(root: Path) -> dict[str, str]:
    """Forty names that must not be followed from the folder `root`, which gets the links and pipes they need."""
    bait = root.parent / "bait"
    (root / "sub").mkdir(exist_ok=True)
    links: dict[str, str | Path] = {
        "link-to-file": bait / BAIT,
        "link-up": f"../bait/{BAIT}",
        "link-to-folder": bait,
        "link-to-nothing": bait / "none",
        "link-to-itself": "link-to-itself",
        "link-to-link": "link-up",
        "link-to-root": ".",
        "null": "/dev/null",
        "zero": "/dev/zero",
        "memory": "/proc/self/mem",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    _make_socket(root / "socket")
    names = TEXTS | {name: name for name in (*links, "pipe", "socket")}
    names["link-to-folder"] += f"/{BAIT}"
    names["absolute bait"] = str(bait / BAIT)
    assert len(names) == N_NAMES
    return names


def _make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


@contextmanager
def opening_nothing_outside(root: Path) -> Iterator[None]:
    """Fail if something is opened in the block that is neither below `root` nor Python's own code."""
    with audited("open") as events:
        yield
    allowed = [root.resolve(), *(Path(path).resolve() for path in _OWN_CODE)]
    for path in paths_opened(events):
        real = Path(os.path.realpath(path))
        assert any(real.is_relative_to(home) for home in allowed), f"{path} was opened, which leads to {real}"


_OWN_CODE = (os.__file__.rpartition("/")[0], Path(pickle.__file__).parent, Path(__file__).parents[2], "/proc/self/fd")


# -- pickles


class _Canary:
    """Unpickling this writes a file: what a real one would do is up to its author."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def malicious(canary: Path) -> bytes:
    """A plain pickle that writes `canary`."""
    return pickle.dumps({"weight": _Canary(canary)}, protocol=2)  # as torch.save does


def malicious_archive(canary: Path, path: Path) -> None:
    """The same in the zip archive that `torch.save` writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", malicious(canary))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


# -- JSON

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, "", "x", "..", "../../x",
    "/etc/passwd", "a\0b", "\ud800", "NaN", "9" * 50, "x" * 70_000, [], {}, [[]], [None], {"": {}}, {"x": [1]},
    [1, "a", None, {}],
)  # fmt: skip
ODD_TEXTS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 200,
    b'{"a":1,"a":2}',
    b"\xff",
    b"\0",
    b"nul",
    b"1" * 5000,
    b"// x",
)

Path_ = tuple[str | int, ...]


def mutated(document: Any, dice: random.Random) -> bytes:
    """The document with something wrong in it: a value, a key, or the text itself."""
    document = copy.deepcopy(document)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        _change(document, dice)
    text = json.dumps(document, ensure_ascii=dice.random() < 0.9).encode(errors="surrogatepass")
    return _damage(text, dice) if dice.random() < 0.3 else text


def _change(document: Any, dice: random.Random) -> None:
    places = list(_places(document))
    if not places:
        return
    holder, key = dice.choice(places)
    how = dice.random()
    if how < 0.7:
        holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))
    elif how < 0.8:
        del holder[key]
    elif how < 0.9 and isinstance(holder, list):
        holder.insert(dice.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif isinstance(holder, dict):
        holder[dice.choice(("", "x", "..", "__class__", "format", "a\0b"))] = holder.pop(key)
    else:
        other_holder, other = dice.choice(places)
        holder[key] = copy.deepcopy(other_holder.get(other) if isinstance(other_holder, dict) else None)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    keys = document.keys() if isinstance(document, dict) else range(len(document) if isinstance(document, list) else 0)
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


def _damage(text: bytes, dice: random.Random) -> bytes:
    data = bytearray(text)
    at = dice.randrange(len(data) + 1)
    how = dice.randrange(4)
    if how == 0:
        return bytes(data[:at])
    if how == 1 and data:
        data[at % len(data)] ^= 1 << dice.randrange(8)
    elif how == 2:
        data[at:at] = dice.choice(ODD_TEXTS)
    else:
        data[at:at] = data[: dice.randrange(1, 200)]
    return bytes(data)
