"""SavingMixin: checkpoints of a few kilobytes, which point into the journal instead of holding weights.

Does not: read a checkpoint back (resuming.py), or know its files (checkpoint.py, states.py).
Invariant: no pickle is left behind.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from zo2trl.engine.binding import FirstUse
from zo2trl.engine.loop_notes import note_start
from zo2trl.engine.step import Engine
from zo2trl.journal.journal import MarkKind
from zo2trl.trainers.hub_upload import HubUploadMixin
from zo2trl.trainers.metrics import StepMetrics
from zo2trl.trainers.resume import checkpoint
from zo2trl.trainers.resume.recording import RecordingMixin
from zo2trl.trainers.resume.states import RNG_NAME, rng_state, write_rng, write_schedule
from zo2trl.trainers.resume.translating import settings_of

__all__ = ["FULL_WEIGHTS", "WEIGHTS", "SavingMixin", "save_processing_class"]

FULL_WEIGHTS = "model*.safetensors"
WEIGHTS = (FULL_WEIGHTS, "adapter_model.safetensors")

_Base = Trainer if TYPE_CHECKING else object


class SavingMixin(RecordingMixin, HubUploadMixin, _Base):
    """The part of `ZOTrainerMixin` that saves."""

    args: Any
    model: Any

    engine: Engine
    _first_use: FirstUse | None
    _saves_checkpoint = False
    _random_state_at_start: Any
    _random_state_of_epoch: Any = None
    _step_offset: int | None
    _step_metrics: StepMetrics

    # -- hooks of the Trainer: saving

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """See [`~transformers.Trainer.save_model`]."""
        if self._first_use is not None:
            self._first_use.come()  # in every process: a store is opened by all, a model is saved by one
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`checkpoint-N` counts from the moment its marker is written, last; only then older ones may go."""
        if self._retrace is not None and self._was_saved_before():
            self._note_best_checkpoint(trial)
            if self._retrace.is_over and self.args.should_save:
                self._rotate(Path(self._get_output_dir(trial=trial)), self.args.save_total_limit)
            return
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoint.begin_checkpoint(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._saves_checkpoint = False
            self.args.save_total_limit = limit
        store = self.engine.store
        position = len(store.records)
        if self.ranks.rank:
            own = {"rng": rng_state(), "data": self._randomness.state(), "epoch": self._random_state_of_epoch}
            store.logbook.put("checkpoint", position, own, sync=True)
        # It is one when every process can go on from it.
        self.ranks.all_true(f"checkpoint of step {self.state.global_step}", True)
        if self.args.should_save:
            self._commit_checkpoint(folder, position=position)
        store.journal.append_mark(MarkKind.SAVED, step=self.state.global_step)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            self._rotate(run_dir, limit)

    def _commit_checkpoint(self, folder: Path, *, position: int) -> None:
        store = self.engine.store
        checkpoint.commit_checkpoint(
            folder,
            checkpoint.Pointer(
                store=self._relative_store(folder.parent), store_id=str(store.journal.header["store"]),
                position=position, step=self.state.global_step, step_offset=self._step_offset or 0,
                fingerprint=store.journal.fingerprint(position), counters=self._counters(),
            ),
        )  # fmt: skip

    def _rotate(self, run_dir: Path, limit: int | None) -> None:
        best = self.state.best_model_checkpoint
        rotate_checkpoints(output_dir=str(run_dir), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _was_saved_before(self) -> bool:
        assert self._retrace is not None
        if not self._retrace.is_over:
            return True  # or was not to be saved then: the weights of this step are not at hand now
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{self.state.global_step}"
        is_there = self._retrace.was_marked(MarkKind.SAVED) and (folder / checkpoint.MARKER_NAME).is_file()
        return self.ranks.all_gather(f"checkpoint of step {self.state.global_step} that is there", is_there)[0]

    def _note_best_checkpoint(self, trial: Any) -> None:
        if self.state.best_global_step:
            best = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.best_global_step}"
            if best.exists():
                self.state.best_model_checkpoint = str(best)

    def _relative_store(self, run_dir: Path) -> str | None:
        store, home = self._own_store_dir.resolve(), run_dir.resolve()
        return str(store.relative_to(home)) if store.is_relative_to(home) and store != home else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._saves_checkpoint and not self._wants_full_weights():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_without_weights(self.model, self.processing_class, folder)
        else:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        checkpoint.write_arguments(self.args, folder)

    def _wants_full_weights(self) -> bool:
        args = self.args
        pushes = args.push_to_hub and args.hub_strategy != "end"
        wanted = args.save_full_weights or args.save_only_model or pushes
        return wanted or not isinstance(self.model, PreTrainedModel | _peft_model())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            write_schedule(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing is scaled."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:  # other processes keep theirs in their stores
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_rng(Path(output_dir) / RNG_NAME)

    def _note_start(self, step_offset: int) -> None:
        note_start(self.engine, step_offset, randomness=self._random_state_at_start, settings=settings_of(self))

    # -- what is left over between two logs

    def _counters(self) -> dict[str, Any]:
        return {
            "tr_loss": self._tr_loss.item(),
            "globalstep_last_logged": self._globalstep_last_logged,
            "step_metrics": self._step_metrics.state(),
            "data": self._randomness.state(),
            "epoch": self._random_state_of_epoch,
        }

    def _forget_counters(self) -> None:
        """What an interrupted training of this very trainer has left over since its last log."""
        self._step_metrics = StepMetrics()
        self.current_flos = 0

    def _set_counters(self, counters: dict[str, Any]) -> None:
        self._tr_loss.fill_(counters["tr_loss"])
        # The mean loss that `train` returns is of the steps it made itself.
        self._total_loss_scalar = -self._tr_loss.item()
        self._globalstep_last_logged = counters["globalstep_last_logged"]
        self._step_metrics.set_state(counters["step_metrics"])


def save_processing_class(processing_class: Any, folder: Path) -> None:
    """A tokenizer or processor, if there is one, into a folder."""
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def _peft_model() -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        return PreTrainedModel
    return PeftModel
