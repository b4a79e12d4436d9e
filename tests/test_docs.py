"""Every code block of the README and of docs/ runs, in the order of its page, with a tiny model and two steps."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from tests.support.formats import chat_tokenizer
from tests.support.runs import prompts
from tests.support.trainings import small_model
from zo2trl import ZOConfig, ZODPOConfig, ZORewardConfig, ZOSFTConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SHORTER = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
MODELS = ("my-model", "path/or/hub-id")
DATA = {"train.jsonl": 8, "data.jsonl": 8, "heldout.jsonl": 4}
CONFIGS = (ZOConfig, ZOSFTConfig, ZODPOConfig, ZORewardConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """(line, content) of the blocks in one of the languages."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            yield text.count("\n", 0, match.start()) + 2, match[2]


def after(block: str) -> str:
    """A program, or what a diff makes of one."""
    lines = block.splitlines()
    is_diff = any(line.startswith(("- ", "+ ")) for line in lines)
    kept = [line[2:] for line in lines if not line.startswith("-")] if is_diff else lines
    program = "\n".join(kept)
    for name, value in SHORTER.items():
        program = re.sub(rf"\b{name}=[\d_]+", f"{name}={value}", program)
    return program


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and the data that pages speak of."""
    for name in MODELS:
        small_model().save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
    for name, n_rows in DATA.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in prompts(n_rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "python", "diff"))], ids=name_of)
def test_the_programs_of_a_page_run_one_after_the_other(page: Path, workplace: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks(page, "python", "diff"):
        program = compile("\n" * (line - 1) + after(block), str(page), "exec")
        exec(program, names)
    for value in names.values():
        if isinstance(value, Trainer):
            value.close()


@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p, "yaml"))], ids=name_of)
def test_the_configurations_of_a_page_name_arguments_that_there_are(page: Path) -> None:
    known = {name for config in CONFIGS for name in config.__dataclass_fields__}
    for _, block in blocks(page, "yaml"):
        assert set(yaml.safe_load(block)) <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_in_a_language_that_nobody_tries(page: Path) -> None:
    tried = {"", "python", "diff", "yaml", "bash", "mermaid"}
    assert {match[1] for match in BLOCK.finditer(page.read_text())} <= tried


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", BLOCK.sub("", page.read_text())):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if page.parent != ROOT:
            assert other.is_relative_to(ROOT / "docs"), f"{target} is not part of the site"
        if anchor:
            assert anchor in anchors(other), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"^ +- .*?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])
