"""The Hub gets the model, not the store that lies beside it, and no checkpoint before it is complete.

The Hub is replaced at its lowest layer: the tests check what `HfApi` would send.
"""

import fnmatch
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from tests.support.models import tiny_rows
from tests.support.runs import closing, sft_trainer, zo_trainer
from tests.support.trainings import lora, small_model
from zo2trl.trainers.resume.checkpoint import MARKER_NAME, read_checkpoint

MODEL = {"config.json", "generation_config.json", "model.safetensors"}


class Hub:
    """This class replaces the Hub: it records what was created, and the files of each upload."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.is_busy = False

    def create_repo(self, repo_id: str, **named: Any) -> Any:
        self.created.append({"repo_id": repo_id, **named})
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, folder_path: Path, run_as_future: bool = False, **named: Any) -> Any:
        root = Path(folder_path)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        files = set(filter_repo_objects(names, ignore_patterns=named.get("ignore_patterns")))
        self.uploads.append({**named, "files": files, "root": root})
        future: Future = Future()
        if not self.is_busy:
            future.set_result(None)
        return future if run_as_future else "the commit"

    def files(self, **wanted: Any) -> set[str]:
        """Return the files that the uploads with these arguments left in the repository."""
        chosen = [one for one in self.uploads if all(one.get(name) == value for name, value in wanted.items())]
        return set().union(*(one["files"] for one in chosen))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **named: hub.create_repo(repo_id, **named))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **named: hub.upload_folder(**named))
    yield hub
    for upload in hub.uploads:
        pickles = [name for name in upload["files"] if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
        assert not pickles
        assert not [name for name in upload["files"] if fnmatch.fnmatch(name, "*journal*") or "units/" in name]


PUSHING = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": "secret", "hub_private_repo": True}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_saving_pushes_the_model_and_finished_checkpoints_as_the_strategy_says(
    strategy: str, hub: Hub, tmp_path: Path
) -> None:
    options = {
        **PUSHING,
        "hub_strategy": strategy,
        "hub_revision": "branch",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    with closing(sft_trainer(tmp_path / "run", small_model(), **options, max_steps=4)) as trainer:
        trainer.train()
    assert hub.created == [{"repo_id": "me/model", "token": "secret", "private": True, "exist_ok": True}]
    assert all(one["repo_id"] == "me/model" and one["token"] == "secret" for one in hub.uploads)
    assert all(one["revision"] == "branch" for one in hub.uploads)
    model = hub.files(path_in_repo=None)
    places = {one["path_in_repo"] for one in hub.uploads if one.get("path_in_repo")}
    if strategy == "end":
        assert not hub.uploads
        return
    assert model >= MODEL | {"README.md", "tokenizer.json", "training_args.json"}
    assert not [name for name in model if "checkpoint" in name or "state" in name or name.startswith("store")]
    steps = {"checkpoint-2", "checkpoint-4"}
    assert places == {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": steps}[strategy]
    for upload in hub.uploads:
        if upload.get("path_in_repo"):  # it had its marker when it was uploaded, so a run can resume from it
            assert MARKER_NAME in upload["files"]
            assert read_checkpoint(upload["root"]).step in (2, 4)


def test_pushing_by_hand_leaves_the_store_out_and_puts_tags_on_the_card(hub: Hub, tmp_path: Path) -> None:
    options = {"store_dir": str(tmp_path / "run" / "deep" / "store"), "save_strategy": "steps", "save_steps": 3}
    with closing(sft_trainer(tmp_path / "run", small_model(), **options)) as trainer:
        trainer.train()
        assert trainer.push_to_hub("done", tags="mine", private=True, token="other") == "the commit"
    (upload,) = hub.uploads
    assert hub.created[0]["repo_id"] == "run"
    assert hub.created[0]["private"] is True
    assert (upload["repo_id"], upload["commit_message"], upload["token"]) == ("me/run", "done", "other")
    assert upload["files"] >= MODEL | {"README.md", "tokenizer.json"}
    assert not [name for name in upload["files"] if name.startswith(("checkpoint", "deep"))]
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(f"- {tag}" in card for tag in ("mine", "trl", "sft"))


def test_adapters_are_pushed_without_their_base(hub: Hub, tmp_path: Path) -> None:
    options = {**PUSHING, "save_strategy": "steps", "save_steps": 3}
    with closing(zo_trainer(tmp_path / "run", lora(), tiny_rows("llama", 8), **options)) as trainer:
        trainer.train()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files()
    assert "model.safetensors" not in hub.files()


@pytest.mark.parametrize("always", [True, False])
def test_a_push_that_is_still_going_on_is_waited_for_only_if_asked_to(always: bool, hub: Hub, tmp_path: Path) -> None:
    options = {**PUSHING, "hub_always_push": always, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    hub.is_busy = True
    with closing(zo_trainer(tmp_path / "run", small_model(), tiny_rows("opt", 8), **options)) as trainer:
        trainer._finish_current_push = lambda: None  # it would never return, because nothing is sent
        trainer.train()
    assert len({one["commit_message"] for one in hub.uploads}) == (3 if always else 1)


def test_what_is_pushed_are_the_weights_of_that_step(hub: Hub, tmp_path: Path) -> None:
    options = {**PUSHING, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    with closing(zo_trainer(tmp_path / "run", small_model(), tiny_rows("opt", 8), **options)) as trainer:
        trainer.train()
        now = trainer.model.state_dict()
        root = next(one["root"] for one in hub.uploads if "model.safetensors" in one["files"])
        assert all((now[name] == value).all() for name, value in load_file(root / "model.safetensors").items())
