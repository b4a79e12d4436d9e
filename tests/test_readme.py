"""What the README says of the project is true of the project."""

import dataclasses
import re
from pathlib import Path

from zo2trl.trainers.arguments.config import ZOArguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def listed() -> set[str]:
    """Paths in the source tree of the README."""
    block = README.split("## Source tree")[1].split("```")[1]
    parents: list[str] = []
    paths: set[str] = set()
    for line in block.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        if name.endswith(".py"):
            paths.add("".join(parents))
    return paths


def test_the_source_tree_lists_every_module_and_nothing_else() -> None:
    found = {
        str(path.relative_to(ROOT))
        for top in ("zo2trl", "recipes", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == found


def test_every_argument_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \|", README, flags=re.M))
    named = {name: default for names, default in rows.items() for name in re.findall(r"\w+", names)}
    for argument in dataclasses.fields(ZOArguments):
        assert argument.name in named, f"{argument.name} is missing in the table of arguments"
        if argument.default is not None:
            value = f'"{argument.default}"' if isinstance(argument.default, str) else str(argument.default)
            spelled = {value, value.replace("0.001", "1e-3"), value.replace("1e-06", "1e-6")}
            assert any(spelling in named[argument.name] for spelling in spelled), argument.name


def test_every_file_the_readme_points_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    named = re.findall(r"`((?:recipes|tests|benchmarks)/[\w./]+)`", README)
    for target in links + named:
        assert (ROOT / target).exists(), target
