"""S1: forty names that lead elsewhere, in every place a file name comes from. Nothing outside the folder is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hostile import BAIT, N_NAMES, hostile_names, opening_nothing_outside
from tests.support.models import tiny_model, tiny_rows
from tests.support.runs import QUIET, closing, weights_of
from zo2trl import ZOConfig, ZOTrainer
from zo2trl.checkpoints.convert import convert_checkpoint
from zo2trl.checkpoints.load import load_mapped
from zo2trl.checkpoints.model_files import ModelFiles, describe_model
from zo2trl.errors import CheckpointError, StoreCorrupt, UnsupportedError, ZO2TRLError
from zo2trl.journal.format import UnitRecord
from zo2trl.layout.layout_file import read_layout, write_layout
from zo2trl.layout.model_layout import plan_layout
from zo2trl.tiers.unit_files import UnitFiles
from zo2trl.trainers.resume import checkpoint
from zo2trl.trainers.resume.checkpoint import Pointer, commit_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in safetensors, and a bait beside it that would do as a part of it, and is known by its zeros."""
    folder = tmp_path_factory.mktemp("folders") / "model"
    model = tiny_model("llama")
    model.save_pretrained(folder)
    bait = folder.parent / "bait"
    bait.mkdir()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(zeros, bait / BAIT, metadata={"format": "pt"})
    return folder


def refused(folder: Path, use: Callable[[str], Any], error: type[ZO2TRLError]) -> None:
    """Every name must be refused with `error`, and lead to nothing being opened outside."""
    names = hostile_names(folder)
    assert len(names) == N_NAMES
    for label, name in names.items():
        with opening_nothing_outside(folder):
            try:
                use(name)
            except error as refusal:
                assert len(str(refusal)) < 2000, label
            else:
                pytest.fail(f"{label}: {name[:60]!r} was followed")


def copy_of(model_folder: Path, tmp_path: Path) -> Path:
    """A folder to spoil, with the bait beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "bait").symlink_to(model_folder.parent / "bait")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    return folder


def test_names_in_an_index_of_safetensors(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path)
    (folder / "model.safetensors").rename(folder / "rest.safetensors")

    def use(name: str) -> None:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name, "lm_head.weight": "rest.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        load_mapped(folder)

    refused(folder, use, CheckpointError)


def test_names_in_an_index_of_pickles(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "rest.bin").touch()

    def use(name: str) -> None:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name, "lm_head.weight": "rest.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        convert_checkpoint(folder, tmp_path / "converted")

    refused(folder, use, CheckpointError)
    assert not (tmp_path / "converted").exists()


def test_the_name_of_the_weights_in_a_configuration(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())

    def use(name: str) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        load_mapped(folder)

    refused(folder, use, CheckpointError)


def test_weights_that_are_links_or_pipes_themselves(model_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(model_folder, tmp_path)
    names = hostile_names(folder)
    for label in ("link-to-file", "link-to-nothing", "link-to-itself", "null", "zero", "memory", "pipe", "socket"):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / names[label]).rename(folder / "model.safetensors")
        with opening_nothing_outside(folder), pytest.raises(CheckpointError):
            load_mapped(folder)


def test_names_of_files_in_a_checkpoint(tmp_path: Path) -> None:
    folder = spoilt_checkpoint(tmp_path)

    def use(name: str) -> None:
        rewrite_marker(folder, lambda marker: marker["files"].update({name: {"bytes": 1, "crc32": 0}}))
        try:
            read_checkpoint(folder)
        finally:
            rewrite_marker(folder, lambda marker: marker["files"].pop(name))

    refused(folder, use, CheckpointError)
    read_checkpoint(folder)


def test_the_store_that_a_checkpoint_points_to(tmp_path: Path) -> None:
    folder = spoilt_checkpoint(tmp_path / "run")
    (folder.parent.parent / "bait").mkdir()

    def use(name: str) -> None:
        rewrite_marker(folder, lambda marker: marker.update(store=name))
        read_checkpoint(folder)

    refused(folder.parent, use, CheckpointError)


def test_folders_of_adapters_that_a_store_describes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    describe_model(tiny_model("llama"), folder)
    path = folder / "model_class.json"
    described = json.loads(path.read_text())

    def use(name: str) -> None:
        path.write_text(json.dumps(described | {"adapters": {name: {}}}))
        ModelFiles.read(folder)

    refused(folder, use, StoreCorrupt)


def test_names_of_units_never_leave_the_folder_of_units(tmp_path: Path) -> None:
    """They are names of modules, and only quoted do they become names of files."""
    layout = plan_layout(tiny_model("llama"), decay_names=[], leaf_blocks=())
    path = tmp_path / "store" / "layout.json"
    path.parent.mkdir()
    crcs = {spec.tensor_id: 7 for unit in layout.units for spec in unit.tensors}
    write_layout(path, layout, crcs)
    described = json.loads(path.read_text())
    n_read = 0
    for label, name in hostile_names(path.parent).items():
        described["units"][0]["name"] = name
        path.write_text(json.dumps(described))
        try:
            stored = read_layout(path)
        except StoreCorrupt:
            continue
        n_read += 1
        files = UnitFiles(path.parent / "units")
        record = UnitRecord(unit=0, position=3, revision=0, n_bytes=1, crc=0, is_base=True)
        found = files.path(stored.units[0], record)
        assert found.parent == path.parent / "units" and "\0" not in found.name, label
        assert found.name not in (".", "..") and "/" not in found.name, label
    assert n_read > 20


@pytest.mark.parametrize("field", ["base_model_name_or_path", "peft_type", "auto_mapping", "revision"])
def test_an_adapter_folder_is_refused_whatever_its_configuration_names(
    field: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = copy_of(model_folder, tmp_path)

    def use(name: str) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", field: name}))
        load_mapped(folder)

    refused(folder, use, UnsupportedError)


def spoilt_checkpoint(run: Path) -> Path:
    folder = run / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    pointer = Pointer(
        store=None, store_id="a", position=3, fingerprint="b", step=3, step_offset=0, counters={},
    )  # fmt: skip
    commit_checkpoint(folder, pointer)
    return folder


def rewrite_marker(folder: Path, change: Callable[[dict], Any]) -> None:
    """As somebody would who can compute a checksum, too."""
    path = folder / checkpoint.MARKER_NAME
    marker = json.loads(path.read_text())
    marker.pop("crc32")
    change(marker)
    path.write_text(json.dumps(marker | {"crc32": checkpoint._crc_of(marker)}))


def test_the_best_checkpoint_that_a_checkpoint_names_is_not_followed_out_of_the_run(
    model_folder: Path, tmp_path: Path
) -> None:
    """`trainer_state.json` says where the best weights are."""
    bait = model_folder.parent / "bait"
    choices: dict[str, Any] = {
        **QUIET, "max_steps": 2, "save_steps": 1, "save_strategy": "steps", "eval_steps": 1, "eval_strategy": "steps",
        "load_best_model_at_end": True, "save_full_weights": True,
    }  # fmt: skip
    rows = tiny_rows("llama", 4)

    def trainer(**more: Any) -> ZOTrainer:
        args = ZOConfig(output_dir=str(tmp_path / "run"), **choices | more)
        return ZOTrainer(model=tiny_model("llama"), args=args, train_dataset=rows, eval_dataset=rows)

    with closing(trainer()) as first:
        first.train()
    folder = tmp_path / "run" / "checkpoint-2"
    found = read_checkpoint(folder)
    pointer = Pointer(**{name: getattr(found, name) for name in Pointer.__dataclass_fields__})
    state = json.loads((folder / "trainer_state.json").read_text())
    state |= {"best_model_checkpoint": str(bait), "best_metric": -1e9, "best_global_step": 1}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    commit_checkpoint(folder, pointer)
    with closing(trainer(max_steps=3)) as second:
        try:
            second.train(resume_from_checkpoint=str(folder))
        except ZO2TRLError as refusal:
            assert str(bait) in str(refusal)
        assert all(value.count_nonzero() for value in weights_of(second.model).values())
