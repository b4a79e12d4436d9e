"""Promises of verify: everything is read, every damage is found and named, and nothing is changed."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.made_store import files_in, flip, invented, make_run, path_run, retold, running, unit_file
from tests.support.models import tiny_model
from tests.support.toys import toy
from zo2trl.checkpoints.verify import Finding, Severity, verify_store
from zo2trl.errors import StoreForeign
from zo2trl.files.fs import FS
from zo2trl.journal.journal import Journal
from zo2trl.layout.layout_file import read_layout


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_run(tiny_model("opt"), folder / "store")
    return folder / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def damage(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == Severity.DAMAGE]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert finding.cure and finding.what
    return finding


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_a_sound_store_has_no_findings(tmp_path: Path, tier: str) -> None:
    make_run(toy(), tmp_path / "store", tier=tier)
    assert verify_store(tmp_path / "store") == []


def test_a_store_that_knows_its_base_is_sound_without_versions(tmp_path: Path) -> None:
    assert verify_store(path_run(tmp_path)) == []


def test_nothing_is_changed(store: Path) -> None:
    flip(unit_file(store, "root"), 5)
    (store / "units" / "stray@9").write_bytes(b"")
    before = files_in(store), {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert damage(verify_store(store))
    assert before == (files_in(store), {path: path.stat().st_mtime_ns for path in store.rglob("*")})


class ReadOnly(FS):
    """Refuses to write, as a read-only mount does."""

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        raise AssertionError("written")

    def create(self, path: Path, n_bytes: int) -> int:
        raise AssertionError("created")

    def open(self, path: Path, *, write: bool = False) -> int:
        assert not write
        return super().open(path)


def test_a_store_can_be_verified_where_nothing_can_be_written(store: Path) -> None:
    assert verify_store(store, fs=ReadOnly()) == []


def test_every_damaged_parameter_is_named_with_file_and_offset(store: Path) -> None:
    unit = next(u for u in read_layout(store / "layout.json").units if u.name == "model.decoder.layers.3")
    file = unit_file(store, unit.name)
    for spec in (unit.tensors[2], unit.tensors[5]):
        flip(file, spec.byte_offset + 3)
    found = damage(verify_store(store))
    assert [(finding.path, finding.offset) for finding in found] == [
        (file, unit.tensors[2].byte_offset), (file, unit.tensors[5].byte_offset)
    ]  # fmt: skip
    assert unit.tensors[2].name in found[0].what and unit.name in found[0].what
    assert "Nothing is lost" in found[0].cure


@pytest.mark.parametrize("byte", range(0, 4096, 409))
def test_no_bit_of_a_version_goes_unread(store: Path, byte: int) -> None:
    files = sorted(store.glob("units/*"))
    file = files[byte % len(files)]
    flip(file, file.stat().st_size * byte // 4096, bit=byte % 8)
    assert {finding.path for finding in damage(verify_store(store))} == {file}


def test_a_flip_in_the_table_of_checksums_is_told_from_one_in_the_weights(store: Path) -> None:
    file = unit_file(store, "root")
    flip(file, file.stat().st_size - 1)
    assert "table of checksums" in damage(verify_store(store))[0].what


def test_a_missing_and_a_cut_version_are_named(store: Path) -> None:
    missing, cut = unit_file(store, "model.decoder.layers.0"), unit_file(store, "model.decoder.layers.1")
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    found = {finding.path: finding.what for finding in damage(verify_store(store))}
    assert "missing" in found.pop(missing)
    assert "bytes instead of" in found.pop(cut)
    assert not found


def test_first_weights_that_are_damaged_have_no_substitute(store: Path) -> None:
    file = store / "units" / "model.decoder.layers.2@0"
    flip(file, 100)
    assert "Nothing else leads" in only(verify_store(store)).cure


DESCRIPTIONS = ["journal", "layout.json", "store.json", "model/model_class.json"]


@pytest.mark.parametrize("name", [*DESCRIPTIONS, "model/config.json"])
def test_a_damaged_description_is_named(store: Path, name: str) -> None:
    path = store / name
    flip(path, 70 if name == "journal" else path.stat().st_size // 2, bit=7)
    found = damage(verify_store(store))
    assert path in {finding.path for finding in found}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_missing_description_is_named(store: Path, name: str) -> None:
    (store / name).unlink()
    assert store / name in {finding.path for finding in damage(verify_store(store))}


def test_damage_in_the_journal_is_named_with_its_offset(store: Path) -> None:
    with Journal.open(store / "journal", read_only=True) as journal:
        end = journal._end
    flip(store / "journal", end - 3 * 64 + 9)
    finding = only(damage(verify_store(store)))
    assert finding.offset == end - 3 * 64


def test_parts_of_two_runs_do_not_pass_for_one(store: Path, tmp_path: Path) -> None:
    make_run(tiny_model("opt", seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "layout.json", store / "layout.json")
    assert "does not belong" in damage(verify_store(store))[0].what


def test_a_store_described_as_another_models_is_damaged(store: Path) -> None:
    content = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(content | {"layout": "0" * 64}))
    assert only(verify_store(store)).path == store / "store.json"


def test_what_a_crash_leaves_is_noted_and_no_damage(store: Path) -> None:
    (store / "units" / "root@77").write_bytes(b"draft")
    (store / "units" / "zzz").write_bytes(b"")
    (store / "notes.txt").write_text("mine")
    with (store / "logbook").open("ab") as file:
        file.write(b"half a li")
    with (store / "journal").open("r+b") as file:
        file.truncate((store / "journal").stat().st_size - 100)
    (store / "lock").write_text("4242 elsewhere")
    found = verify_store(store)
    assert not damage(found)
    assert {finding.path.name for finding in found} >= {"root@77", "zzz", "notes.txt", "logbook"}
    assert "lock" not in {finding.path.name for finding in found}, "its owner is dead"


def test_a_run_of_arithmetic_from_the_future_is_noted(store: Path) -> None:
    retold(store, method="philox4x32-10/rademacher-1 | two-sided-spsa-1 | sgd-9/nearest")
    assert any("sgd-9" in finding.what for finding in verify_store(store) if finding.severity == Severity.NOTE)


def test_a_run_set_aside_is_looked_at_too(store: Path) -> None:
    with running(tiny_model("opt"), store):
        pass
    file = unit_file(store / "earlier", "root")
    flip(file, 9)
    assert only(damage(verify_store(store))).path == file


def test_a_version_that_a_training_replaces_meanwhile_is_no_damage(tmp_path: Path) -> None:
    with running(tiny_model("opt"), tmp_path / "store") as engine:
        steps = iter(range(100))

        def train_on(what: str, done: int, total: int) -> None:
            engine.store.append(invented(next(steps)))
            engine.store.flush()

        found = verify_store(tmp_path / "store", progress=train_on)
    assert not damage(found)


# -- the base model


def test_the_base_model_is_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    store = path_run(tmp_path)
    told: list[int] = []
    assert verify_store(store, base=True, progress=lambda what, done, total: told.append(done)) == []
    assert told == sorted(told)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert verify_store(store, base=tmp_path / "moved") == []


def test_another_base_model_is_damage_naming_parameters(tmp_path: Path) -> None:
    store = path_run(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.model.decoder.layers[1].fc1.weight.data[3, 3] += 1
    other.save_pretrained(tmp_path / "other")
    finding = only(verify_store(store, base=tmp_path / "other"))
    assert finding.path == tmp_path / "other" and "layers.1.fc1.weight" in finding.what


def test_a_base_model_that_is_gone_is_noted_and_damage_if_asked_for(tmp_path: Path) -> None:
    store = path_run(tmp_path)
    shutil.rmtree(tmp_path / "base")
    assert only(verify_store(store)).severity == Severity.NOTE
    assert damage(verify_store(store, base=True))


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreForeign, match="holds no store"):
        verify_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
