"""Files of a checkpoint folder restore their state bit for bit, and no damage of them goes unnoticed."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from tests.support.models import tiny_model
from tests.support.tokenizer import tiny_tokenizer
from zo2trl.checkpoints.load import load_mapped
from zo2trl.errors import CheckpointError
from zo2trl.trainers.resume import checkpoint as files
from zo2trl.trainers.resume import states
from zo2trl.trainers.resume.checkpoint import Pointer, commit_checkpoint, last_valid_checkpoint, read_checkpoint

POINTER = Pointer(
    store="store", store_id="3f2a", position=7, fingerprint="0badcafe", step=5, step_offset=2,
    counters={"tr_loss": float("nan"), "globalstep_last_logged": 4, "sums": {"tokens": 12}, "data": None},
)  # fmt: skip


def saved(folder: Path, pointer: Pointer = POINTER) -> Path:
    """Make a checkpoint of a few small files, as a trainer writes it."""
    folder.mkdir(parents=True)
    states.write_rng(folder / states.RNG_NAME)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1e-3)
    states.write_schedule(folder, optimizer, get_scheduler("linear", optimizer, 2, 10))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": pointer.step}))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(64)))
    (folder / "empty.txt").touch()
    commit_checkpoint(folder, pointer)
    return folder


# -- the marker


def test_a_committed_checkpoint_is_read_back(tmp_path: Path) -> None:
    found = read_checkpoint(saved(tmp_path / "checkpoint-5"))
    assert (found.position, found.step, found.step_offset) == (7, 5, 2)
    assert (found.store, found.store_id, found.fingerprint) == ("store", "3f2a", "0badcafe")
    assert math.isnan(found.counters.pop("tr_loss"))
    assert found.counters == {"globalstep_last_logged": 4, "sums": {"tokens": 12}, "data": None}


def test_a_checkpoint_takes_kilobytes_and_no_pickle(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 100_000
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


def test_every_truncation_of_every_file_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 2} & set(range(len(data) - 1)):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=path.name):
                read_checkpoint(folder)
        path.write_bytes(data)
        read_checkpoint(folder)


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """A flip in the spaces of the marker may leave its meaning unchanged; everything else is refused."""
    folder = saved(tmp_path / "checkpoint-5")
    wanted = repr(read_checkpoint(folder))
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    for path in sorted(path for path in folder.rglob("*") if path.stat().st_size and path.is_file()):
        data = bytearray(path.read_bytes())
        bits = range(8 * len(data))
        for bit in bits if len(bits) <= 512 else dice.sample(bits, 150 if path.name != files.MARKER_NAME else 1500):
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            data[bit // 8] ^= 1 << bit % 8
            try:
                assert repr(read_checkpoint(folder)) == wanted and path.name == files.MARKER_NAME, f"seed {seed}"
            except CheckpointError as error:
                assert str(folder) in str(error)
        path.write_bytes(data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read_checkpoint(folder)


def test_a_file_that_was_added_later_does_no_harm(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    (folder / "README.md").write_text("the good one")
    read_checkpoint(folder)


def test_large_files_are_read_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_CHECKED_BYTES", 63)
    monkeypatch.setattr(files, "_PIECE_BYTES", 10)
    folder = saved(tmp_path / "checkpoint-5")
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(bytes(64))
    for name in ("optimizer.json", "scheduler.json", "trainer_state.json", states.RNG_NAME):
        assert (folder / name).stat().st_size > 10
    read_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors was changed"):
        read_checkpoint(folder, check_weights=True)
    weights.write_bytes(bytes(63))
    with pytest.raises(CheckpointError, match="has 63 bytes instead of 64"):
        read_checkpoint(folder)


def test_links_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("not ours")
    folder = saved(tmp_path / "checkpoint-5")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    commit_checkpoint(folder, POINTER)
    assert "link" not in json.loads((folder / files.MARKER_NAME).read_text())["files"]
    read_checkpoint(folder)


@pytest.mark.parametrize("format_", [0, 2, 99])
def test_another_format_is_refused_by_number(format_: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    marker = folder / files.MARKER_NAME
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": format_}))
    with pytest.raises(CheckpointError, match=f"format {format_}; this zo2trl reads 1"):
        read_checkpoint(folder)


# -- which checkpoint


def test_the_last_whole_checkpoint_counts_and_others_are_reported(tmp_path: Path) -> None:
    for step in (5, 100, 20, 30):
        saved(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / files.MARKER_NAME).unlink()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    last, skipped = last_valid_checkpoint(tmp_path)
    assert last is not None and last.folder == tmp_path / "checkpoint-20"
    assert len(skipped) == 2 and "checkpoint-100" in skipped[0] and "checkpoint-30" in skipped[1]


def test_where_there_is_no_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert last_valid_checkpoint(tmp_path / "nowhere") == (None, [])
    assert last_valid_checkpoint(tmp_path) == (None, [])
    (tmp_path / "checkpoint-1").mkdir()
    last, skipped = last_valid_checkpoint(tmp_path)
    assert last is None and "no zo_checkpoint.json" in skipped[0]


def test_a_checkpoint_that_is_written_over_counts_again_only_at_its_end(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint-5")
    files.begin_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cut off"):
        read_checkpoint(folder)
    commit_checkpoint(folder, POINTER)
    read_checkpoint(folder)


@pytest.mark.parametrize(
    "names",
    [
        ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model.safetensors"],
        ["pytorch_model.bin"],
    ],
)
def test_an_upstream_checkpoint_is_refused_with_the_way_out_and_its_pickles_stay_closed(
    names: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="never opened") as caught:
        read_checkpoint(folder)
    for words in ("not a checkpoint of this package", "pass it as `model`", "zo2trl convert"):
        assert words in str(caught.value)


def test_a_checkpoint_without_weights_given_as_the_model_says_how_to_get_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    files.save_without_weights(tiny_model("llama"), tiny_tokenizer(), folder)
    commit_checkpoint(folder, POINTER)
    with pytest.raises(CheckpointError, match="points into the run's store") as caught:
        load_mapped(folder)
    assert f"zo2trl export {folder} OUT" in str(caught.value) and "save_full_weights=True" in str(caught.value)


# -- what is there for people and for loading


def test_arguments_are_written_for_people_without_secrets_and_replace_the_pickle(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True)
    args.lr_scheduler_kwargs = {"patience": 3, "token": "hf_deep", "odd": {"api_key": "hf_key", "when": Path("x")}}
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04.")
    files.write_arguments(args, tmp_path)
    text = (tmp_path / files.ARGUMENTS_NAME).read_text()
    assert "hf_" not in text and json.loads(text)["lr_scheduler_kwargs"]["patience"] == 3
    assert not (tmp_path / "training_args.bin").exists()


def test_a_model_folder_without_weights_has_all_the_rest(tmp_path: Path) -> None:
    files.save_without_weights(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if "safetensors" in name or name.endswith(".bin")]


def test_a_copied_checkpoint_is_as_good_as_the_first(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved(tmp_path / "checkpoint-5"), tmp_path / "elsewhere" / "best"))
    assert read_checkpoint(copy).folder == copy
