"""Promises of an export: right from whatever is sound, beside a training, and nothing half done."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.made_store import (
    assert_same_files,
    files_in,
    flip,
    invented,
    make_run,
    path_run,
    retold,
    running,
    saver,
    unit_file,
)
from tests.support.models import tiny_model
from tests.support.toys import Block, Quadratic, toy
from zo2trl.checkpoints.export import export_store
from zo2trl.errors import BudgetError, CheckpointError, ConfigError, StoreCorrupt, StoreForeign
from zo2trl.files.fs import FS

TIERS = ("gpu", "cpu", "disk")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of OPT after five steps, its units on disk, and what was saved after each step beside it."""
    folder, model = tmp_path_factory.mktemp("original"), tiny_model("opt")
    make_run(model, folder / "store", each=saver(model, folder))
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "store"


# -- from whatever is sound


@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral"])
def test_base_and_journal_alone_are_enough(tmp_path: Path, name: str) -> None:
    store = path_run(tmp_path, name, tier="disk")
    shutil.rmtree(store / "units")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere" / "base")
    shutil.move(store, tmp_path / "elsewhere" / "store")
    for step in (0, 3, None):
        out = tmp_path / f"out-{step}"
        export_store(tmp_path / "elsewhere" / "store", out, step=step, base=tmp_path / "elsewhere" / "base")
        assert_same_files(out, tmp_path / f"saved-{5 if step is None else step}")


def test_a_run_that_knows_its_base_needs_nobody_to_name_it(tmp_path: Path) -> None:
    export_store(path_run(tmp_path), tmp_path / "out", step=2)
    assert_same_files(tmp_path / "out", tmp_path / "saved-2")


def test_a_base_in_another_dtype_is_cast_as_it_was_when_it_was_loaded(tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    make_run(model, tmp_path / "store", tier="cpu", base_folder=str(tmp_path / "base"), each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


def test_another_base_is_refused_naming_parameter_and_folder(tmp_path: Path) -> None:
    store = path_run(tmp_path)
    other = tiny_model("opt", seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(StoreForeign, match=r"model\.decoder\.embed_tokens\.weight") as refused:
        export_store(store, tmp_path / "out", base=tmp_path / "other")
    assert str(tmp_path / "other") in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_named_with_the_way_out(tmp_path: Path) -> None:
    store = path_run(tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="--base") as refused:
        export_store(store, tmp_path / "out")
    assert str(tmp_path / "base") in str(refused.value)


def test_frozen_weights_come_from_the_base(tmp_path: Path) -> None:
    model = tiny_model("opt")
    for block in model.model.decoder.layers[1:4]:
        block.requires_grad_(False)
    model.save_pretrained(tmp_path / "base")
    make_run(model, tmp_path / "store", tier="cpu", each=saver(model, tmp_path))
    with pytest.raises(StoreForeign, match="--base"):
        export_store(tmp_path / "store", tmp_path / "out")
    export_store(tmp_path / "store", tmp_path / "out", base=tmp_path / "base")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_a_damaged_version_is_rebuilt_from_the_first_weights(
    store: Path, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = unit_file(store, "model.decoder.layers.2")
    assert file.name.endswith("@5")
    harm_file(file, harm)
    export_store(store, tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")
    assert str(file) in caplog.text


def harm_file(file: Path, harm: str) -> None:
    if harm == "flipped":
        flip(file, 4096 * 4 + 7)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()


def test_damage_that_nothing_leads_around_is_refused_with_file_unit_and_parameter(store: Path, tmp_path: Path) -> None:
    for file in store.glob("units/model.decoder.layers.2@*"):
        flip(file, 4096 * 4 + 7)
    with pytest.raises(StoreCorrupt, match=r"k_proj\.bias.*CRC") as refused:
        export_store(store, tmp_path / "out")
    assert "model.decoder.layers.2@5" in str(refused.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tier", TIERS)
def test_weights_loaded_in_between_are_a_new_beginning(tmp_path: Path, tier: str) -> None:
    model = tiny_model("opt")
    save = saver(model, tmp_path)
    with running(model, tmp_path / "store", tier=tier) as engine:
        for step in range(6):
            if step == 3:
                engine.flush()
                model.load_state_dict(tiny_model("opt", seed=4).state_dict())
            engine.flush()
            save(step)
            engine.store.append(invented(step))
        engine.flush()
        save(6)
    for step in (1, 2, 3, 4, 5, 6):
        export_store(tmp_path / "store", tmp_path / f"out-{step}", step=step)
        assert_same_files(tmp_path / f"out-{step}", tmp_path / f"saved-{step}")
    unit_file(tmp_path / "store", "root").unlink()  # what the steps before led to is another model
    (tmp_path / "store" / "units" / "root@3.1").unlink(missing_ok=True)
    with pytest.raises(StoreCorrupt, match="root@"):
        export_store(tmp_path / "store", tmp_path / "out")


# -- beside a training, on a store that must not change


def test_the_store_is_only_read(store: Path, tmp_path: Path) -> None:
    before = files_in(store)
    export_store(store, tmp_path / "out", step=3)
    assert files_in(store) == before


def test_exports_beside_a_running_training_are_those_of_one_step(tmp_path: Path) -> None:
    model, stop = tiny_model("opt"), threading.Event()
    expected: dict[str, int] = {}
    make_run(
        model, tmp_path / "straight", steps=range(40), tier="disk", each=lambda step: digest(model, expected, step)
    )
    again = tiny_model("opt")
    with running(again, tmp_path / "store", tier="disk") as engine:

        def train() -> None:
            for step in range(40):
                engine.store.append(invented(step))
                engine.store.flush()
                if stop.wait(0.005):
                    return

        training = threading.Thread(target=train)
        training.start()
        try:
            for number in range(6):
                export_store(tmp_path / "store", tmp_path / f"out-{number}")
        finally:
            stop.set()
            training.join()
    found = [expected.get(files_in(tmp_path / f"out-{number}")["model.safetensors"]) for number in range(6)]
    assert None not in found and found == sorted(found) and found[-1] > found[0]


def digest(model: PreTrainedModel, expected: dict[str, int], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        expected[files_in(Path(folder))["model.safetensors"]] = step


# -- nothing half done


@pytest.mark.parametrize("taken", ["file", "full folder"])
def test_a_place_that_is_taken_is_left_alone(store: Path, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_store(store, out)
    assert (out if taken == "file" else out / "note").read_text() == "mine"


def test_an_empty_folder_is_filled(store: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_store(store, tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


def test_what_a_crash_left_is_removed_by_the_next_export(store: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / ".scratch").mkdir(parents=True)
    (tmp_path / "out.partial" / ".scratch" / "lock").touch()
    (tmp_path / "out.partial" / ".scratch" / "unit-0").write_bytes(b"half")
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")
    export_store(store, tmp_path / "out", step=2)
    assert_same_files(tmp_path / "out", tmp_path / "saved-2")
    assert not (tmp_path / "out.partial").exists()


def test_somebody_elses_folder_at_the_place_of_work_is_left_alone(store: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        export_store(store, tmp_path / "out")
    assert (tmp_path / "out.partial" / "note").read_text() == "mine"


class Small(FS):
    def free_bytes(self, path: Path) -> int:
        return 1000


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="1,000 are free"):
        export_store(store, tmp_path / "out", fs=Small())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("step", [-1, 7, 10**30])
def test_a_step_that_the_run_does_not_have_is_refused(store: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(ConfigError, match="from 0 to 5"):
        export_store(store, tmp_path / "out", step=step)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreForeign, match="holds no store"):
        export_store(tmp_path, tmp_path / "out")


SPSA = "two-sided-spsa-1"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"method": f"philox4x32-10/rademacher-2 | {SPSA} | sgd-1/nearest", "versions": {"zo2trl": "9.9"}},
            "method.*rademacher-2.*zo2trl 9.9",
        ),
        ({"method": f"philox4x32-10/rademacher-1 | {SPSA} | sgd-2/nearest"}, "method.*sgd-2"),
        ({"method": "philox4x32-10/rademacher-1 | sgd-1/nearest"}, "method"),
        ({"codec": "packed"}, "codec"),
        ({"method": f"mezo/torch-normal-1/cuda/132x2048 | {SPSA} | sgd-1/nearest", "device": "cuda"}, "--device cuda"),
        ({"layout": "0" * 64}, "does not belong"),
        ({"base": "0" * 64}, "does not belong"),
        ({"decays": []}, "decay"),
    ],
    ids=["direction", "update", "parts", "codec", "device", "layout", "base", "decays"],
)
def test_what_this_version_cannot_repeat_is_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    store = path_run(tmp_path)
    retold(store, **facts)
    with pytest.raises(StoreForeign, match=message):
        export_store(store, tmp_path / "out", step=3)


def test_progress_goes_from_nothing_to_all(store: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export_store(store, tmp_path / "out", step=3, progress=lambda *what: told.append(what))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2]
    assert {what for what, _, _ in told} >= {"root", "model.decoder.layers.0"}


def test_an_export_loads_like_any_model_folder(store: Path, tmp_path: Path) -> None:
    export_store(store, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-5").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_steps_that_were_taken_back_do_not_count(tmp_path: Path) -> None:
    model = tiny_model("opt")
    save, first = saver(model, tmp_path), {name: p.detach().clone() for name, p in model.named_parameters()}
    with running(model, tmp_path / "store") as engine:
        for step in range(6):
            engine.store.append(invented(step))
            engine.flush()
        engine.go_back(2, base=lambda spec: first[spec.name])
        engine.flush()
        save(2)
        for step in range(7, 10):
            engine.store.append(invented(step))
        engine.flush()
        save(10)
    for step in (2, 10):
        export_store(tmp_path / "store", tmp_path / f"out-{step}", step=step)
        assert_same_files(tmp_path / f"out-{step}", tmp_path / f"saved-{step}")


class Odd(Quadratic):
    """Tensors that nobody expects."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.number = nn.Parameter(torch.tensor(7), requires_grad=False)
        self.truth = nn.Parameter(torch.tensor([True, False]), requires_grad=False)


def test_empty_whole_and_truth_valued_parameters_survive(tmp_path: Path) -> None:
    model = Odd()
    make_run(model, tmp_path / "store", each=saver(model, tmp_path))
    export_store(tmp_path / "store", tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "saved-5")


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.fixture
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("one_thread")
def test_an_export_takes_the_memory_of_one_unit(tmp_path: Path) -> None:
    width, n_blocks = 512, 30  # 4 MiB a block, 120 MiB in all
    model = toy(n_blocks=n_blocks, block=lambda: Block(width))
    make_run(model, tmp_path / "store", tier="cpu", steps=range(2), max_replay_s=1e9)
    del model
    export_store(tmp_path / "store", tmp_path / "first", step=0)  # what is imported and started on first use stays
    before, most, n_looks = private_bytes(), 0, 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal most, n_looks
        most, n_looks = max(most, private_bytes() - before), n_looks + 1

    export_store(tmp_path / "store", tmp_path / "out", progress=watch)
    assert most < 48 * 2**20 and n_looks >= n_blocks
