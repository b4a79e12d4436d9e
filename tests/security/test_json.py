"""S3: every JSON file that the package reads, changed at random. What does not fit is refused by an error of ours."""

import json
import random
import shutil
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import get_scheduler

from tests.support.hostile import mutated
from tests.support.made_store import make_run
from tests.support.models import tiny_model
from zo2trl.checkpoints.export import export_store
from zo2trl.checkpoints.load import load_mapped
from zo2trl.checkpoints.model_files import ModelFiles
from zo2trl.checkpoints.stored_run import StoredRun, method_to_repeat
from zo2trl.checkpoints.verify import verify_store
from zo2trl.checkpoints.weight_files import indexed_files
from zo2trl.errors import ZO2TRLError
from zo2trl.journal.format import CRC, RECORD_BYTES, chain, crc_at, encode_header, parse_header
from zo2trl.journal.journal import Journal
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout_file import read_layout
from zo2trl.tiers.folder import StoreFolder
from zo2trl.trainers.resume import checkpoint, states
from zo2trl.trainers.resume.checkpoint import Pointer, commit_checkpoint, read_checkpoint

MAX_CPU_S = 10.0  # tells a reader that follows a bomb from a slow machine
MAX_EXTRA_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Reader:
    """A document, how it is put in its place, and who reads it."""

    document: Any
    write: Callable[[bytes], Any]
    read: Callable[[], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, as it should be."""
    root = tmp_path_factory.mktemp("good")
    model = tiny_model("llama")
    model.save_pretrained(root / "model", max_shard_size="60KB")
    make_run(model, root / "store", steps=range(3))
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    folder = root / "checkpoint-3"
    folder.mkdir()
    states.write_schedule(folder, optimizer, get_scheduler("linear", optimizer, 2, 10))
    states.write_rng(folder / states.RNG_NAME)
    counters = {"tr_loss": 0.5, "step_metrics": {"sums": {"tokens": 3}, "estimates": [(0.5, 1.0, 2.0)]}, "data": None}
    commit_checkpoint(
        folder,
        Pointer(store="store", store_id="ab", position=3, fingerprint="cd", step=3, step_offset=0, counters=counters),
    )
    return root


@pytest.fixture
def here(good: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of everything, to spoil; random generators are put back."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    before = states.rng_state()
    yield Path(shutil.copytree(good, tmp_path / "here"))
    states.set_rng_state(before, where="here")
    transformers.logging.set_verbosity(level)


def plain(path: Path, read: Callable[[], Any]) -> Reader:
    return Reader(json.loads(path.read_text()), path.write_bytes, read)


def index(here: Path) -> Reader:
    path = here / "model" / "model.safetensors.index.json"
    return plain(path, lambda: indexed_files(path))


def model_config(here: Path) -> Reader:
    return plain(here / "model" / "config.json", lambda: load_mapped(here / "model"))


def store_description(here: Path) -> Reader:
    return plain(here / "store" / "store.json", lambda: StoreFolder.look(here / "store"))


def layout(here: Path) -> Reader:
    path = here / "store" / "layout.json"
    return plain(path, lambda: read_layout(path).layout)


def described_model(here: Path, name: str) -> Reader:
    tensors = [spec for unit in read_layout(here / "store" / "layout.json").units for spec in unit.tensors]

    def read() -> None:
        model = ModelFiles.read(here / "store" / "model")
        model.skeleton(tensors)
        model.buffers()
        model.others()

    return plain(here / "store" / "model" / name, read)


def logbook(here: Path) -> Reader:
    path = here / "store" / "logbook"

    def write(document: bytes) -> None:
        path.write_bytes(b"%08x %s\n" % (zlib.crc32(document), document))

    return Reader(["step", 3, "", {"loss": [0.5, None]}], write, lambda: Logbook.open(path, read_only=True).close())


def journal_header(here: Path) -> Reader:
    path = here / "store" / "journal"
    raw = path.read_bytes()
    header, n_bytes = parse_header(raw, path)
    bodies = [raw[at : at + RECORD_BYTES - CRC.size] for at in range(n_bytes, len(raw), RECORD_BYTES)]
    bodies = [body for body in bodies if any(body)]

    def write(document: bytes) -> None:
        """As somebody would who can compute the checksums, too."""
        try:
            first = encode_header(json.loads(document))
        except (ValueError, RecursionError, TypeError):
            first = document
        records = chain(bodies, crc_at(first, len(first)))[0] if len(first) > CRC.size else b""
        path.write_bytes((first + records).ljust(1 << 16, b"\0"))

    def read() -> None:
        with Journal.open(path, read_only=True) as journal:
            assert isinstance(journal.header, dict)
        method_to_repeat(StoredRun.look(here / "store"), torch.device("cpu"))

    return Reader(header, write, read)


def marker(here: Path) -> Reader:
    path = here / "checkpoint-3" / checkpoint.MARKER_NAME
    document = json.loads(path.read_text())
    del document["crc32"]

    def write(changed: bytes) -> None:
        try:
            body = json.loads(changed)
            path.write_text(json.dumps(body | {"crc32": checkpoint._crc_of(body)}))
        except (ValueError, TypeError, AttributeError):
            path.write_bytes(changed)

    return Reader(document, write, lambda: read_checkpoint(here / "checkpoint-3"))


def schedule(here: Path, name: str) -> Reader:
    def read() -> None:
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        states.read_schedule(here / "checkpoint-3", optimizer, get_scheduler("linear", optimizer, 2, 10))

    return plain(here / "checkpoint-3" / name, read)


def rng(here: Path) -> Reader:
    path = here / "checkpoint-3" / states.RNG_NAME
    return plain(path, lambda: states.read_rng(path))


READERS: dict[str, tuple[Callable[[Path], Reader], int]] = {  # and how many mutations the short run makes
    "the index of a model's weights": (index, 110),
    "a model's configuration": (model_config, 60),
    "store.json": (store_description, 110),
    "layout.json": (layout, 110),
    "the header of a journal": (journal_header, 110),
    "a line of the logbook": (logbook, 110),
    "model_class.json": (lambda here: described_model(here, "model_class.json"), 60),
    "the configuration in a store": (lambda here: described_model(here, "config.json"), 60),
    "the generation defaults in a store": (lambda here: described_model(here, "generation_config.json"), 60),
    "the marker of a checkpoint": (marker, 110),
    "scheduler.json": (lambda here: schedule(here, "scheduler.json"), 110),
    "optimizer.json": (lambda here: schedule(here, "optimizer.json"), 110),
    "rng_state.json": (rng, 110),
}

NEVER_REFUSED = "a line of the logbook"  # weights do not depend on it: the book ends before what does not check


def test_a_short_run_makes_a_thousand_mutations() -> None:
    assert sum(n for _, n in READERS.values()) >= 1000


@pytest.mark.parametrize("name", READERS)
def test_a_changed_document_is_refused_with_an_error_of_ours_or_still_makes_sense(name: str, here: Path) -> None:
    change_and_read(name, here, READERS[name][1])


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_a_hundred_thousand_changed_documents(name: str, here: Path) -> None:
    change_and_read(name, here, 90 * READERS[name][1])


def change_and_read(name: str, here: Path, n_mutations: int) -> None:
    reader = READERS[name][0](here)
    reader.write(json.dumps(reader.document).encode())
    with_reason(reader.read, "unchanged", must_work=True)  # also what is imported on first use
    seed = random.randrange(2**32)
    n_refused = 0
    for number in range(n_mutations):
        document = mutated(reader.document, random.Random(seed + number))
        reader.write(document)
        n_refused += with_reason(reader.read, f"random.Random({seed + number}): {document[:2000]!r}")
    assert n_refused > n_mutations // 10 or name == NEVER_REFUSED


def with_reason(read: Callable[[], Any], what: str, *, must_work: bool = False) -> bool:
    """Read; whether it was refused. Anything but an error of ours, in time and memory, fails the test."""
    started_s = time.process_time()
    tracemalloc.start()
    refused = False
    try:
        read()
    except ZO2TRLError as error:
        refused = True
        assert not must_work and len(str(error)) < 5000, what
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} after {what}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= MAX_EXTRA_BYTES, what
    assert must_work or time.process_time() - started_s <= MAX_CPU_S, what
    return refused


WHOLE_STORE = [layout, journal_header, store_description, *(
    lambda here, name=name: described_model(here, name) for name in ("model_class.json", "config.json")
)]  # fmt: skip


@pytest.mark.parametrize("n_stores", [25, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_changed_store_is_exported_or_refused_and_verified_in_any_case(
    n_stores: int, good: Path, tmp_path: Path, here: Path
) -> None:
    seed = random.randrange(2**32)
    for number in range(n_stores):
        dice = random.Random(seed + number)
        reader = dice.choice(WHOLE_STORE)(here)
        document = mutated(reader.document, dice)
        reader.write(document)
        what = f"random.Random({seed + number}): {document[:2000]!r}"
        out = tmp_path / f"out-{number}"
        with_reason(lambda out=out: export_store(here / "store", out), what)
        with_reason(lambda: list(verify_store(here / "store")), what)
        assert not list(tmp_path.glob("out-*.tmp")), what
        shutil.rmtree(here / "store")
        shutil.copytree(good / "store", here / "store")
