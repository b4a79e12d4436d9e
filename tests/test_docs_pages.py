"""The pages that are made from the code say what the code says, and the README stays short."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import zo2trl
from docs.generate import PAGES
from zo2trl.trainers.arguments.support_page import versions
from zo2trl.trainers.metrics import LOG_KEYS, StepMetrics
from zo2trl.zo.estimators import Estimate

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = {"README.md": 8_000, "docs/architecture.md": 10_000}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path: Path) -> None:
    page = path.read_text()
    if path.name == "support.md" and versions() not in page:
        pytest.skip(f"the page is about other versions than {versions()}")
    assert page == PAGES[path](), f"{path.relative_to(ROOT)} is out of date: run `make docs-pages`"


def test_every_key_in_the_logs_has_a_description() -> None:
    metrics = StepMetrics()
    metrics.add_work(n_tokens=3, seconds=1.0, moved={})
    metrics.add(Estimate(coefficients=(-500.0,), losses=(1.0, 2.0)))
    assert set(metrics.take()) == {key for key in LOG_KEYS if key.startswith("zo/")}


@pytest.mark.parametrize("name", MAX_BYTES)
def test_pages_that_are_meant_to_be_short_are_short(name: str) -> None:
    assert len((ROOT / name).read_bytes()) <= MAX_BYTES[name]


def test_every_file_that_a_page_names_exists() -> None:
    """Paths in backticks, in every page that is written by hand."""
    missing = []
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for name in re.findall(r"`((?:zo2trl|recipes|tests|benchmarks|docs)/[\w./]+?)/?`", page.read_text()):
            if not (ROOT / name).exists():
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert missing == []


def test_the_reference_describes_every_public_name() -> None:
    entries = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference" / "api.md").read_text(), flags=re.MULTILINE)
    described = {"__version__"}
    for entry in entries:
        if entry == "zo2trl.errors":  # all of it
            described |= set(zo2trl.errors.__all__)
        else:
            module, name = entry.rsplit(".", 1)
            described.add(getattr(import_module(module), name).__name__)
    assert set(zo2trl.__all__) <= described
