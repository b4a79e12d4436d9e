"""This module defines HubUploadMixin, which uploads the model to the Hub without the store that lies beside it.

Upstream uploads everything in `output_dir` except checkpoints, and uploads a checkpoint before it is finished. Here
the store is left out, a checkpoint is uploaded after its marker is written, and the model's files are uploaded from
the checkpoint itself.

Does not: save anything (resume/saving.py), or create the repository (upstream).
Invariant: no file of the store, and no pickle, is uploaded.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from zo2trl.trainers.resume.checkpoint import STATE_NAMES
from zo2trl.versions import package_version

__all__ = ["HubUploadMixin"]

_Base = Trainer if TYPE_CHECKING else object

_IGNORED = ("_*", "checkpoint-*")  # as upstream: files that a user hides, and checkpoints


class HubUploadMixin(_Base):
    """HubUploadMixin is the part of `ZOTrainerMixin` that uploads."""

    args: Any
    model: Any
    hub_model_id: Any
    push_in_progress: Any
    _saves_checkpoint = False

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """See [`~transformers.Trainer.push_to_hub`]. The store is not uploaded."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        name = kwargs.pop("model_name", None) or Path(args.hub_model_id or args.output_dir).name
        if self.hub_model_id is None:
            as_configured = args.hub_private_repo
            args.hub_private_repo = as_configured if private is None else private
            self.init_hf_repo(token=token)
            args.hub_private_repo = as_configured
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        self.create_model_card(model_name=name, tags=tags, **kwargs)
        self._finish_current_push()
        return self._upload(
            Path(args.output_dir), str(commit_message), ignored=self._ignored_patterns(), token=token,
            revision=revision, run_as_future=not blocking,
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a finished checkpoint.

        Upstream calls this after files are written and before the checkpoint is complete; that call does nothing, and
        `_save_checkpoint` makes a second one.
        """
        args = self.args
        if self._saves_checkpoint or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        is_by_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if is_by_steps else f"epoch {int(self.state.epoch or 0)}"
        message, folder = f"Training in progress, {at}", Path(checkpoint_folder)
        jobs = [
            self._upload(Path(args.output_dir), message, ignored=self._ignored_patterns()),  # the model card, logs
            self._upload(folder, message, ignored=list(STATE_NAMES)),
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(self._upload(folder, f"{message}, checkpoint", path_in_repo=place))
        before: Any = self.push_in_progress.jobs if is_busy and self.push_in_progress is not None else []
        self.push_in_progress = PushInProgress(before + jobs)

    @cached_property
    def _hub(self) -> HfApi:
        # The trainer has a single client, because one client runs its background uploads one after the other.
        return HfApi(library_name="zo2trl", library_version=package_version("zo2trl"))

    def _upload(
        self, folder: Path, message: str, *, ignored: list[str] | None = None, token: str | None = None,
        revision: str | None = None, run_as_future: Any = True, **named: Any,
    ) -> Any:  # fmt: skip
        return self._hub.upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, commit_message=message, ignore_patterns=ignored,
            token=token or self.args.hub_token, revision=revision or self.args.hub_revision,
            run_as_future=run_as_future, **named,
        )  # fmt: skip

    def _ignored_patterns(self) -> list[str]:
        """Return patterns, relative to `output_dir`, of files that are no part of the model."""
        store, output_dir = self.args.store_path.resolve(), Path(self.args.output_dir).resolve()
        is_inside = store.is_relative_to(output_dir) and store != output_dir
        return [*_IGNORED, f"{store.relative_to(output_dir).as_posix()}/*"] if is_inside else [*_IGNORED]
