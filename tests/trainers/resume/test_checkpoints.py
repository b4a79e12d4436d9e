"""Tests of checkpoint-N: its files, which one is used, and what happens to one that is damaged or incomplete."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.crashes import Crash, Crashed, Outcome, drop_dead, in_peace, resumed, run_until_crash, straight
from tests.support.runs import closing, differing, prompts, weights_of
from tests.support.trainings import PLAIN, TRAININGS, Training, lora
from zo2trl.errors import CheckpointError
from zo2trl.files.fs import LOCAL
from zo2trl.trainers.resume.checkpoint import read_checkpoint

MAX_BYTES = 100_000
LAST = Crash("step_end", 5)
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".npy"}
SFT = Training({"max_steps": 2, "save_strategy": "steps", "save_steps": 2}, rows=lambda: prompts(11), is_sft=True)


def files_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def finished(training: Training, folder: Path) -> Outcome:
    with closing(training(folder)) as trainer:
        trainer.train(resume_from_checkpoint=True)
        return Outcome.of(trainer)


# -- what is in it


@pytest.mark.parametrize("name", ["plain", "sft", "adapters", "full"])
def test_a_checkpoint_is_kilobytes_of_json_and_safetensors(name: str, tmp_path: Path) -> None:
    training = {
        "plain": PLAIN, "sft": SFT, "adapters": PLAIN.of(lora), "full": PLAIN.having(save_full_weights=True),
    }[name].having(max_steps=2)  # fmt: skip
    with closing(training(tmp_path)) as trainer:
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        weights = weights_of(trainer.model)
    for folder in (tmp_path / "checkpoint-2", tmp_path / "saved"):
        found = files_of(folder)
        assert not [path for path in found if Path(path).suffix in PICKLES]
        assert {Path(path).suffix for path in found} <= {".json", ".safetensors", ".md", ".jinja"}
    found = files_of(tmp_path / "checkpoint-2")
    assert sum(size for path, size in found.items() if not path.startswith(("tokenizer", "model"))) < MAX_BYTES
    assert ("model.safetensors" in found) == (name == "full")
    assert ("adapter_model.safetensors" in found) == (name == "adapters")
    assert ("tokenizer.json" in found) == (name == "sft")
    if name == "full":
        saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
        assert differing(saved, {key: weights[key] for key in saved}) == []


def test_a_larger_model_has_no_larger_checkpoint(tmp_path: Path) -> None:
    sizes = []
    for name in ("opt", "t5"):
        training = TRAININGS["seq2seq"] if name == "t5" else PLAIN
        straight(training.having(max_steps=3, save_steps=3), tmp_path / name)
        sizes.append(files_of(tmp_path / name / "checkpoint-3"))
    small, large = (sum(size for path, size in found.items() if path != "config.json") for found in sizes)
    assert abs(small - large) < 2_000


def test_tokens_do_not_get_into_a_checkpoint(tmp_path: Path) -> None:
    straight(PLAIN.having(max_steps=2, hub_token="hf_secret"), tmp_path)
    for path in (tmp_path / "checkpoint-2").iterdir():
        assert "hf_secret" not in path.read_text()


# -- which ones are kept


def test_only_so_many_are_kept_also_over_crashes(tmp_path: Path) -> None:
    training = PLAIN.having(max_steps=9, save_steps=1, save_total_limit=2)
    wanted = in_peace(training)
    crashes = [Crash("save", 2), Crash("step_end", 5), Crash("save", 7)]
    assert wanted.difference(resumed(training, tmp_path / "run", crashes)) == ""
    assert steps_saved(tmp_path / "run") == [8, 9]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_one_is_kept_and_loaded_also_over_crashes(limit: int, tmp_path: Path) -> None:
    training = TRAININGS["best"].having(save_total_limit=limit)
    wanted = straight(training, tmp_path / "straight")
    crashes = [Crash("evaluate", 4), Crash("step_end", 9), Crash("save", 12)]
    assert wanted.difference(resumed(training, tmp_path / "run", crashes)) == ""
    assert wanted.state["best step"] in steps_saved(tmp_path / "run")
    assert steps_saved(tmp_path / "run") == steps_saved(tmp_path / "straight")


# -- damaged, or half saved

HARMS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b'"', b"'", 1)),
    "another digit": lambda path: path.write_bytes(_with_another_digit(path.read_bytes())),
}
NAMES = ("zo_checkpoint.json", "trainer_state.json", "optimizer.json", "scheduler.json", "rng_state.json")


def _with_another_digit(raw: bytes) -> bytes:
    at = max(raw.rfind(b"%d" % digit) for digit in range(10))
    return raw[:at] + b"%d" % ((raw[at] - ord("0") + 1) % 10) + raw[at + 1 :]


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = in_peace(PLAIN)
    run_until_crash(PLAIN(tmp_path / "made"), LAST)
    for i, name in enumerate(NAMES):
        folder = Path(shutil.copytree(tmp_path / "made", tmp_path / str(i)))
        harm = list(HARMS)[i % len(HARMS)]
        HARMS[harm](folder / "checkpoint-4" / name)
        caplog.clear()
        assert wanted.difference(finished(PLAIN, folder)) == "", f"{name} {harm}"
        assert "checkpoint-4" in caplog.text, f"{name} {harm}"


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_refused_when_it_is_asked_for(
    harm: str, name: str, made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    HARMS[harm](folder / "checkpoint-4" / name)
    with pytest.raises(CheckpointError, match="checkpoint-4"):
        read_checkpoint(folder / "checkpoint-4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    run_until_crash(PLAIN(folder), LAST)
    return folder


def test_without_a_whole_checkpoint_the_journal_is_enough(tmp_path: Path) -> None:
    wanted = in_peace(PLAIN)
    run_until_crash(PLAIN(tmp_path / "run"), LAST)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "zo_checkpoint.json").write_text("{}")
    assert wanted.difference(finished(PLAIN, tmp_path / "run")) == ""


@pytest.mark.parametrize("nth", range(5))
def test_a_crash_while_saving_leaves_the_checkpoint_before(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = in_peace(PLAIN)
    trainer = PLAIN(tmp_path / "run")
    n_written = 0
    real = type(LOCAL).write_text_atomically

    def write(fs: Any, path: Path, text: str) -> None:
        nonlocal n_written
        if path.parent.name == "checkpoint-4":
            n_written += 1
            if n_written > nth:
                drop_dead(trainer)
                raise Crashed
        real(fs, path, text)

    monkeypatch.setattr(type(LOCAL), "write_text_atomically", write)
    with closing(trainer), pytest.raises(Crashed):
        trainer.train()
    monkeypatch.undo()
    assert wanted.difference(finished(PLAIN, tmp_path / "run")) == ""


# -- the store is lost


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_weights_in_a_checkpoint_outlive_the_store(kind: str, tmp_path: Path) -> None:
    training = TRAININGS["lora"].having(save_steps=2) if kind == "adapters" else PLAIN.having(save_full_weights=True)
    training = training.having(max_steps=8, lr_scheduler_type="cosine")
    wanted = in_peace(training)
    run_until_crash(training(tmp_path / "run"), LAST)
    shutil.rmtree(tmp_path / "run" / "store")
    run_until_crash(training(tmp_path / "run"), LAST, resume_from_checkpoint=True)  # and it may crash again
    found = finished(training, tmp_path / "run")
    assert found.records == wanted.records[4:]
    assert (found.logs, found.state) == (wanted.logs, wanted.state)
    assert differing(dict(wanted.weights), dict(found.weights)) == []


def test_without_weights_a_checkpoint_says_which_store_it_needs(tmp_path: Path) -> None:
    run_until_crash(PLAIN(tmp_path / "run"), LAST)
    (tmp_path / "run" / "store").rename(tmp_path / "elsewhere")
    with closing(PLAIN(tmp_path / "run")) as trainer, pytest.raises(CheckpointError, match="store_dir"):
        trainer.train(resume_from_checkpoint=True)
    wanted = in_peace(PLAIN)
    found = finished(PLAIN.having(store_dir=str(tmp_path / "elsewhere")), tmp_path / "run")
    assert wanted.difference(found) == ""


def test_a_run_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    training = TRAININGS["best"]
    wanted = in_peace(training)
    run_until_crash(training(tmp_path / "run"), Crash("step_end", 11))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert wanted.difference(finished(training, tmp_path / "moved")) == ""
    marker = json.loads((tmp_path / "moved" / "checkpoint-12" / "zo_checkpoint.json").read_text())
    assert marker["store"] == "store"


def test_pickled_state_of_another_trainer_is_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_until_crash(PLAIN(tmp_path), LAST)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        (tmp_path / "checkpoint-4" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with caplog.at_level(logging.WARNING):
        assert len(finished(PLAIN, tmp_path).records) == 6
