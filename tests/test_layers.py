"""Imports go down only, and each risky thing has one room: read from the syntax trees, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "zo2trl"

# From the bottom up. The package itself (`import zo2trl`) re-exports the trainers, so it stands above them.
FLOORS = (
    "errors versions", "files", "amp", "zo", "layout", "journal", "parallel", "planning", "tiers", "checkpoints",
    "engine", "forecast", "trainers", "zo2trl", "cli __main__",
)  # fmt: skip
RANKS = {name: rank for rank, names in enumerate(FLOORS) for name in names.split()}
ABOVE_THE_PACKAGE = ("recipes", "benchmarks", "tests")

# What a name refers to -> the files (relative to the package) that may use it. A trailing * matches any ending.
FS_ONLY = ("files/fs.py",)
CONFINED: dict[str, tuple[str, ...]] = {
    **{f"os.{name}": FS_ONLY for name in ("open", "pread*", "pwrite*", "fsync", "fdatasync", "rename*", "replace")},
    "os.posix_fallocate": FS_ONLY,
    "fcntl*": FS_ONLY,
    "numpy.memmap": FS_ONLY,
    "trl*": ("trainers/*",),
    "peft*": ("trainers/*", "checkpoints/model_files.py"),
    "transformers.Train*": ("trainers/*",),
    "transformers.train*": ("trainers/*",),
    "transformers.Seq2SeqTrain*": ("trainers/*",),
    "transformers.integrations.trainer*": ("trainers/*",),
    "torch.load": ("checkpoints/convert.py",),
    **{f"{name}*": () for name in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")},
    "torch.save": (),
}


def matches(name: str, pattern: str) -> bool:
    if not pattern.endswith("*"):
        return name == pattern
    stem = pattern[:-1]
    # "trl*" means the library and what is inside it, not another library whose name starts alike.
    return name == stem or name.startswith(stem if "." in stem else f"{stem}.")


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str, str]]:
    """(line, local name, full dotted name) of every import, also those inside functions. `module` resolves dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                yield node.lineno, local, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{base}.{alias.name}"


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` as written, or None for anything that is not a plain chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)) is not None:
        return f"{head}.{node.attr}"
    return None


def mentioned(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported or reached through an import."""
    meaning: dict[str, str] = {}
    for line, local, full in imported(tree, module):
        # `import a.b` binds `a`; `import a.b as c` and `from a import b` bind the thing itself.
        meaning[local] = local if full.split(".")[0] == local else full
        yield line, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            head, _, tail = name.partition(".")
            if head in meaning:
                yield node.lineno, f"{meaning[head]}.{tail}"


def room_of(full: str) -> str | None:
    """The room of the package a dotted name lives in, or None if it lives elsewhere."""
    parts = full.split(".")
    if parts[0] != "zo2trl":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANKS else "zo2trl"


def upward_imports(source: str, relative: str) -> list[str]:
    """Imports of the file `relative` (to the package) that go up, one line each."""
    module = ".".join(["zo2trl", *Path(relative).with_suffix("").parts])
    room = "zo2trl" if relative == "__init__.py" else Path(relative).with_suffix("").parts[0]
    found: list[str] = []
    for line, _, full in imported(ast.parse(source), module):
        target = room_of(full)
        if full.split(".")[0] in ABOVE_THE_PACKAGE or (target is not None and RANKS[target] > RANKS[room]):
            found.append(f"{line}: {room} imports {full}")
    return found


def out_of_room(source: str, relative: str) -> list[str]:
    """Uses of confined names in a file that is not their room, one line each."""
    module = ".".join(["zo2trl", *Path(relative).with_suffix("").parts])
    found = {
        f"{line}: {name}"
        for line, name in mentioned(ast.parse(source), module)
        for pattern, rooms in CONFINED.items()
        if matches(name, pattern) and not any(matches_path(relative, room) for room in rooms)
    }
    return sorted(found)


def matches_path(relative: str, room: str) -> bool:
    return relative.startswith(room[:-1]) if room.endswith("*") else relative == room


def relative_paths() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("relative", relative_paths())
def test_imports_go_down_only(relative: str) -> None:
    room = "zo2trl" if relative == "__init__.py" else Path(relative).with_suffix("").parts[0]
    assert room in RANKS, f"{relative} belongs to no room: give `{room}` a place in RANKS"
    assert upward_imports((PACKAGE / relative).read_text(), relative) == []


@pytest.mark.parametrize("relative", relative_paths())
def test_risky_calls_stay_in_their_room(relative: str) -> None:
    assert out_of_room((PACKAGE / relative).read_text(), relative) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("zo/method.py", "from zo2trl.tiers import journal"),
        ("zo/method.py", "def late() -> None:\n    import zo2trl.engine.step"),
        ("tiers/store.py", "from ..engine import step"),
        ("tiers/store.py", "from zo2trl import ZOTrainer"),
        ("trainers/mixin.py", "import recipes.sft"),
    ],
)
def test_an_upward_import_is_caught(relative: str, source: str) -> None:
    assert len(upward_imports(source, relative)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from zo2trl.errors import StoreError",
        "from . import fs",
        "from .fs import FS",
        "from ..zo import noise",
        "import numpy",
    ],
)
def test_a_downward_import_is_fine(source: str) -> None:
    assert upward_imports(source, "tiers/store.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.preadv(3, [], 0)",
        "import os as system\nsystem.fdatasync(3)",
        "from os import replace",
        "import fcntl",
        "import numpy as np\nnp.memmap('x')",
        "from transformers import Trainer",
        "import transformers\ntransformers.TrainingArguments",
        "from transformers.trainer_utils import EvalPrediction",
        "from trl import SFTTrainer",
        "import peft.utils",
        "import torch\ntorch.load('x')",
        "import pickle",
    ],
)
def test_a_risky_call_outside_its_room_is_caught(source: str) -> None:
    assert out_of_room(source, "tiers/store.py")


def test_a_room_may_do_what_it_is_for() -> None:
    assert out_of_room("import os, fcntl\nos.pwrite(3, b'', 0)", "files/fs.py") == []
    assert out_of_room("from trl import SFTTrainer\nfrom transformers import Trainer", "trainers/mixin.py") == []
    assert out_of_room("import torch\ntorch.load('x', weights_only=True)", "checkpoints/convert.py") == []
    assert out_of_room("import dataclasses\ndataclasses.replace", "tiers/store.py") == []
    assert out_of_room("from transformers import AutoModelForCausalLM, PreTrainedModel", "tiers/load.py") == []
