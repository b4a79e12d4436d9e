"""Imports go down only, and each risky thing has one room: read from the syntax trees, nothing is imported."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

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

# Folders within a room that are rooms of their own when sizes are compared.
INNER_ROOMS = ("trainers/arguments", "trainers/objective", "trainers/resume", "zo/kernels")
MAX_SHARE_OF_A_ROOM = 0.22
MAX_MEDIAN_LINES = 150
MAX_FILE_LINES = 400

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
        elif isinstance(node, ast.Call) and (name := imported_by_call(node, module)) is not None:
            yield node.lineno, "", name  # binds no local name


def imported_by_call(call: ast.Call, module: str) -> str | None:
    """The dotted name that `import_module("a.b")` or `__import__("a.b")` imports, if it is written out."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
    if function not in ("import_module", "__import__") or not given or not isinstance(given[0], ast.Constant):
        return None
    name = str(given[0].value)
    if not name.startswith("."):
        return name
    tail = name.lstrip(".")
    return ".".join([*module.split(".")[: -(len(name) - len(tail))], *([tail] if tail else [])])


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


def module_name(relative: str) -> str:
    """The dotted name of a file relative to the package, as its relative imports count from."""
    return ".".join(["zo2trl", *Path(relative).with_suffix("").parts])


def upward_imports(source: str, relative: str) -> list[str]:
    """Imports of the file `relative` (to the package) that go up, one line each."""
    module = module_name(relative)
    room = "zo2trl" if relative == "__init__.py" else Path(relative).with_suffix("").parts[0]
    found: list[str] = []
    for line, _, full in imported(ast.parse(source), module):
        target = room_of(full)
        if full.split(".")[0] in ABOVE_THE_PACKAGE or (target is not None and RANKS[target] > RANKS[room]):
            found.append(f"{line}: {room} imports {full}")
    return found


def out_of_room(source: str, relative: str) -> list[str]:
    """Uses of confined names in a file that is not their room, one line each."""
    module = module_name(relative)
    found = {
        f"{line}: {name}"
        for line, name in mentioned(ast.parse(source), module)
        for pattern, rooms in CONFINED.items()
        if matches(name, pattern) and not any(matches_path(relative, room) for room in rooms)
    }
    return sorted(found)


def matches_path(relative: str, room: str) -> bool:
    return relative.startswith(room[:-1]) if room.endswith("*") else relative == room


def sources() -> dict[str, str]:
    """The package's files: path relative to the package -> source."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def is_bare(source: str) -> bool:
    """Whether the file holds nothing, or a docstring only."""
    body = ast.parse(source).body
    return not body or (len(body) == 1 and ast.get_docstring(ast.parse(source)) is not None)


def resolved(full: str, modules: Mapping[str, str]) -> str | None:
    """The module that a dotted name lives in: itself or the closest parent, which may be a bare package."""
    parts = full.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in modules), None)


def circles(files: Mapping[str, str]) -> list[str]:
    """Groups of modules that import one another, directly or through others, one line each."""
    # "zo2trl.zo.__init__" resolves relative imports like its neighbours do; the module's own name is "zo2trl.zo".
    modules = {module_name(relative).removesuffix(".__init__"): relative for relative in files}
    bare = {
        name for name, relative in modules.items() if relative.endswith("__init__.py") and is_bare(files[relative])
    }
    edges: dict[str, set[str]] = {}
    for name, relative in modules.items():
        names = imported(ast.parse(files[relative]), module_name(relative))
        targets = {resolved(full, modules) for _, _, full in names}
        edges[name] = {target for target in targets if target is not None} - bare - {name}
    reached = {name: reachable(name, edges) for name in edges}
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in edges}
    return [" <-> ".join(group) for group in sorted(groups) if group]


def reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """The modules that `start` imports through any number of others; itself only if it stands in a circle."""
    found: set[str] = set()
    ahead = [*edges[start]]
    while ahead:
        if (name := ahead.pop()) not in found:
            found.add(name)
            ahead.extend(edges[name])
    return found


def size_room(relative: str) -> str:
    """The room that a file's lines count for; files beside the rooms are `zo2trl`."""
    inner = [room for room in INNER_ROOMS if relative.startswith(f"{room}/")]
    top, _, rest = relative.partition("/")
    return inner[0] if inner else top if rest else "zo2trl"


def too_big(n_lines: Mapping[str, int]) -> list[str]:
    """Rooms, files and the median file above their ceilings; `n_lines` is by path relative to the package."""
    total = sum(n_lines.values())
    rooms: Counter[str] = Counter()
    for relative, n in n_lines.items():
        rooms[size_room(relative)] += n
    found = [
        f"{room}/ has {n} of {total} lines, {n / total:.1%}; at most {MAX_SHARE_OF_A_ROOM:.0%}"
        for room, n in rooms.items()
        if n > MAX_SHARE_OF_A_ROOM * total
    ]
    found += [
        f"{relative} has {n} lines; at most {MAX_FILE_LINES}" for relative, n in n_lines.items() if n > MAX_FILE_LINES
    ]
    if (middle := median(n_lines.values())) > MAX_MEDIAN_LINES:
        found.append(f"the median file has {middle} lines; at most {MAX_MEDIAN_LINES}")
    return found


def test_imports_go_down_only() -> None:
    found: list[str] = []
    for relative, source in sources().items():
        room = "zo2trl" if relative == "__init__.py" else Path(relative).with_suffix("").parts[0]
        if room not in RANKS:
            found.append(f"{relative} belongs to no room: give `{room}` a place in FLOORS")
        else:
            found += [f"{relative}:{line}" for line in upward_imports(source, relative)]
    assert not found, "\n".join(found)


def test_no_modules_import_one_another_in_a_circle() -> None:
    found = circles(sources())
    assert not found, "\n".join(found)


def test_risky_calls_stay_in_their_room() -> None:
    found = [f"{path}:{use}" for path, source in sources().items() for use in out_of_room(source, path)]
    assert not found, "\n".join(found)


def test_rooms_and_files_are_of_a_size_to_read() -> None:
    found = too_big({relative: len(source.splitlines()) for relative, source in sources().items()})
    assert not found, "\n".join(found)


def test_the_confined_rooms_exist() -> None:
    paths = [*sources()]
    rooms = {room for patterns in CONFINED.values() for room in patterns}
    gone = sorted(room for room in rooms if not any(matches_path(path, room) for path in paths))
    assert not gone, f"CONFINED names files that are not there: {', '.join(gone)}"


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("zo/method.py", "from zo2trl.tiers import journal"),
        ("zo/method.py", "def late() -> None:\n    import zo2trl.engine.step"),
        ("tiers/store.py", "from ..engine import step"),
        ("tiers/store.py", "from zo2trl import ZOTrainer"),
        ("trainers/mixin.py", "import recipes.sft"),
        ("trainers/scripts.py", "from importlib import import_module\nimport_module('zo2trl')"),
        ("zo/method.py", "import importlib\nimportlib.import_module('zo2trl.tiers.store')"),
        ("zo/method.py", "import importlib\nimportlib.import_module(name='..tiers.store', package=__package__)"),
        ("zo/method.py", "def late() -> None:\n    __import__('zo2trl.engine.step')"),
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
        "from importlib import import_module\nimport_module('zo2trl.zo.noise')\nimport_module(name)",
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
        "from importlib import import_module\nimport_module('pickle')",
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


@pytest.mark.parametrize(
    ("b", "c"),
    [
        ("from zo2trl.zo import c", "import zo2trl.zo.a"),
        ("from zo2trl.zo.c import X", "def late() -> None:\n    from .a import Y"),
        ("from . import c", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from zo2trl.zo.a import Y"),
        ("__import__('zo2trl.zo.c')", "from importlib import import_module\nimport_module('.a', 'zo2trl.zo')"),
    ],
)
def test_a_circle_is_caught(b: str, c: str) -> None:
    files = {"zo/__init__.py": '"""Mathematics."""', "zo/a.py": "from zo2trl.zo import b", "zo/b.py": b, "zo/c.py": c}
    assert circles(files) == ["zo2trl.zo.a <-> zo2trl.zo.b <-> zo2trl.zo.c"]
    assert circles({**files, "zo/c.py": "import torch"}) == []


def test_a_package_is_part_of_a_circle_only_if_it_does_something() -> None:
    files = {"zo/a.py": "import zo2trl.zo"}
    assert circles({**files, "zo/__init__.py": '"""Mathematics."""'}) == []
    assert circles({**files, "zo/__init__.py": "from . import a"}) == ["zo2trl.zo <-> zo2trl.zo.a"]


def test_what_is_too_big_is_caught() -> None:
    even = {f"{room}/a.py": 100 for room in ("amp", "zo", "zo/kernels", "tiers", "engine", "trainers/resume")}
    assert too_big(even) == []
    assert too_big({**even, "zo/b.py": 100}) == ["zo/ has 200 of 700 lines, 28.6%; at most 22%"]
    assert too_big({path: 2 * n for path, n in even.items()}) == ["the median file has 200.0 lines; at most 150"]
    small = {f"{path}{i}": 100 for path in even for i in range(9)}
    assert too_big({**small, "journal/a.py": 401}) == ["journal/a.py has 401 lines; at most 400"]
