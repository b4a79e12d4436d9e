"""ResumingMixin: checkpoints of a few kilobytes, and resuming from the journal instead of from weights.

Does not: know how a step is made. It overrides what the Trainer does around one: saving, loading, evaluating again.

A checkpoint is the Trainer's own state and a pointer into the journal. Resuming runs the Trainer's own loop from the
last checkpoint (else from the start), takes losses from the journal until its end, and goes on from there.

Invariant: no pickle is read, and none is left behind.
"""

import logging
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length, rotate_checkpoints

from zo2trl.engine.opening import has_run
from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.tiers.ingest import load_mapped
from zo2trl.tiers.journal import MarkKind
from zo2trl.tiers.tier import Source
from zo2trl.trainers import checkpoint
from zo2trl.trainers.metrics import StepMetrics
from zo2trl.trainers.recording import RecordingMixin
from zo2trl.trainers.replaying import (
    Replay,
    ResumePoint,
    can_start_over,
    compare_settings,
    locate,
    note_origin,
    note_start,
    refuse_other_rates,
    refuse_other_training,
    settings_of,
)  # fmt: skip
from zo2trl.trainers.states import (
    RNG_NAME,
    read_rng,
    read_schedule,
    rng_state,
    set_rng_state,
    write_rng,
    write_schedule,
)

__all__ = ["ResumingMixin", "save_processing_class"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_CURE = "Pass its folder as `model` to begin a run from its weights."
FULL_WEIGHTS = "model*.safetensors"
WEIGHTS = (FULL_WEIGHTS, "adapter_model.safetensors")


class ResumingMixin(RecordingMixin, _Base):
    """The part of `ZOTrainerMixin` that makes a run survive."""

    args: Any
    model: Any

    engine: Engine
    _resumes_at: ResumePoint | None = None
    _takes_weights_from_checkpoint = False
    _saves_checkpoint = False
    _begins_a_training: bool
    _random_state_of_epoch: Any = None
    _step_offset: int | None
    _step_metrics: StepMetrics
    _base_path: str | None

    # -- where to start

    def _resume(self, wanted: bool | str) -> None:
        """Bring the weights to the journal's end, and have the loop go through the steps up to there."""
        self._takes_weights_from_checkpoint = False
        folder = Path(wanted) if isinstance(wanted, str) else None
        if not has_run(Path(self.args.store_dir)):
            self._resume_from_weights(folder)
            return
        self._continue_run()
        compare_settings(self.engine, settings_of(self))
        self._forget_counters()
        point = self._last_point() if folder is None else locate(_point_of(folder), self.engine)
        if point.folder is not None and not has_length(self.train_dataset) and can_start_over(self.engine):
            # The Trainer cannot find its place in a stream again; going through all of it is what skipping costs, too.
            point = locate(ResumePoint(), self.engine)
        self._begins_a_training = point.folder is None and not can_start_over(self.engine)
        self._replay = Replay(self.engine, point)
        self._start_at(point)
        logger.info(
            "Resuming from %s: %d steps are taken from the journal.", point.folder or "the start", self._replay.n_left
        )

    def _last_point(self) -> ResumePoint:
        """The last whole checkpoint of this training, else its start."""

        def accept(found: checkpoint.Checkpoint) -> None:
            refuse_other_training(locate(_point(found), self.engine), self.engine)

        last, skipped = checkpoint.last_valid_checkpoint(Path(self.args.output_dir), accept=accept)
        for reason in skipped:
            logger.warning("A checkpoint is passed over: %s", reason)
        return locate(ResumePoint() if last is None else _point(last), self.engine)

    def _resume_from_weights(self, folder: Path | None) -> None:
        """The store is gone: begin another from the weights in a checkpoint, if it has any."""
        if folder is not None:
            found = checkpoint.read_checkpoint(folder)
        else:
            found, _ = checkpoint.last_valid_checkpoint(Path(self.args.output_dir))
        if found is None:
            raise ConfigError(
                f"`resume_from_checkpoint` found nothing to resume from: no checkpoint in {self.args.output_dir}, and "
                f"no run in the store {self.args.store_dir}. Leave it out to begin a run."
            )
        if not any(any(found.folder.glob(pattern)) for pattern in WEIGHTS):
            raise CheckpointError(
                f"{found.folder} holds no weights, and the store {self.args.store_dir} that it points into holds no "
                "run. Set `store_dir` to where that run's store is."
            )
        self._takes_weights_from_checkpoint = True
        self._start_at(_point(found))

    def _start_at(self, point: ResumePoint) -> None:
        self._resumes_at, self._step_offset = point, point.step_offset
        if point.folder is not None:
            read_rng(point.folder / RNG_NAME)  # samplers take their seed from it when they are made
            self._randomness.start(point.counters.get("data"))
        else:
            self._restore_random_state_at_start()

    def _continue_run(self) -> None:
        """Open the engine on the run in the folder, unless it is open on it."""
        raise NotImplementedError

    def _refuse_steps_left(self) -> None:
        if self._resumes_at is not None and self.state.global_step > self.state.max_steps:
            raise ConfigError(
                f"`max_steps` is {self.state.max_steps}, but the checkpoint was saved at step "
                f"{self.state.global_step}. Raise it, or take earlier weights with `zo2trl export --step`."
            )
        if self._replay is not None and not self._replay.is_over:
            raise ConfigError(
                f"Training ended at step {self.state.global_step}, but the journal holds {self._replay.n_left} more "
                "steps of this run: `max_steps` (or epochs) was lowered, or a callback stopped earlier than it did "
                "then. The weights are those of the last journaled step; `zo2trl export --step` gives earlier ones."
            )

    # -- hooks of the Trainer: loading

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if self._begins_a_training:
            self._random_state_at_start = rng_state()
        elif self._resumes_at is not None and self._resumes_at.folder is None:
            self._restore_random_state_at_start()
        return prepared

    def _restore_random_state_at_start(self) -> None:
        assert self._resumes_at is not None
        book = self.engine.store.logbook
        state = book.get("started", self._resumes_at.position)
        if state is not None:
            set_rng_state(state, where=book.path)

    def _run_epoch(self, **named: Any) -> None:
        """The random state at an epoch's beginning decides its order, with samplers that draw from it."""
        if self._resumes_at is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # nothing is left to do, in the middle of an epoch
            return
        folder = named.get("resume_from_checkpoint")
        if folder is not None and named["epoch"] == named["epochs_trained"]:
            assert self._resumes_at is not None
            state = self._resumes_at.counters.get("epoch")
            if named["steps_trained_in_current_epoch"] and state is not None:
                set_rng_state(state, where=folder)
            else:
                read_rng(Path(folder) / RNG_NAME)
        self._random_state_of_epoch = rng_state()
        super()._run_epoch(**named)  # type: ignore[misc]

    def _load_callback_state(self) -> None:
        """What callbacks count (evaluations without progress, say) goes on, unless upstream is asked to do more."""
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()  # type: ignore[misc]
            return
        saved: dict[str, Any] = dict(self.state.stateful_callbacks or {})  # type: ignore[arg-type]
        left = {name: list(data) if isinstance(data, list) else [data] for name, data in saved.items()}
        for callback in self.callback_handler.callbacks:
            states = left.get(type(callback).__name__)
            if states and isinstance(callback, ExportableState):
                callback.__dict__.update(states.pop(0).get("attributes", {}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._takes_weights_from_checkpoint:
            return
        if not self._reload(resume_from_checkpoint):
            checkpoint.refuse_pickles(Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        assert self._resumes_at is not None
        note_origin(self._resumes_at, self.engine)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            assert self._resumes_at is not None
            refuse_other_rates(self._resumes_at, self.engine, scheduler=self.lr_scheduler)
            read_schedule(Path(checkpoint_folder), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        """Nothing is scaled."""

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Called before the first new batch is used: random state, and what is left over since the last log."""
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        if not self._randomness.was_restored:
            read_rng(folder / RNG_NAME)
        assert self._resumes_at is not None
        try:
            self._set_counters(deepcopy(self._resumes_at.counters))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: its counters are not those of this trainer ({error!r}). Resume with the trainer class "
                "that saved it."
            ) from error

    def _load_best_model(self) -> None:
        folder, home = Path(self.state.best_model_checkpoint or ""), Path(self.args.output_dir)
        if not folder.resolve().is_relative_to(home.resolve()):
            raise CheckpointError(f"The best checkpoint is said to be {folder}, which is not below {home}. {_CURE}")
        if self._reload(str(folder)):
            return
        point = locate(_point_of(folder), self.engine)
        self.engine.go_back(point.position, base=self._base_weights())

    def _reload(self, folder: str | None) -> bool:
        """Bring a checkpoint's full weights into the store, unit by unit. False: it has none, or not of this kind."""
        if not folder or not isinstance(self.model, PreTrainedModel) or not any(Path(folder).glob(FULL_WEIGHTS)):
            return False
        self.engine.replace_weights(self._weights_in(folder))
        return True

    def _weights_in(self, folder: str) -> Source:
        mapped = load_mapped(folder, model_class=type(self.model), offload_folder=self._offload_folder(self.args))
        values = dict(mapped.model.named_parameters(remove_duplicate=False))
        return lambda spec: values[spec.name].detach().to(spec.dtype)

    def _base_weights(self) -> Source:
        loaded: list[Source] = []

        def weights(spec: Any) -> torch.Tensor:
            if not loaded:  # only if a unit needs it: units of models that came as objects have their own copy
                assert self._base_path is not None, "a run without a base keeps its first weights"
                loaded.append(self._weights_in(self._base_path))
            return loaded[0](spec)

        return weights

    def _offload_folder(self, args: Any) -> Path:
        """Beside the store, on the disk the user chose for weights: where experts are fused, in nameless files."""
        folder = Path(args.store_dir).parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # -- hooks of the Trainer: saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`checkpoint-N` counts from the moment its marker is written, last; only then older ones may go."""
        if self._replay is not None and self._was_saved_before():
            self._note_best_checkpoint(trial)
            if self._replay.is_over:
                self._rotate(Path(self._get_output_dir(trial=trial)), self.args.save_total_limit)
            return
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
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
        checkpoint.commit_checkpoint(
            folder,
            checkpoint.Pointer(
                store=self._relative_store(run_dir), store_id=str(store.journal.header["store"]), position=position,
                step=self.state.global_step, step_offset=self._step_offset or 0,
                fingerprint=store.journal.fingerprint(position), counters=self._counters(),
            ),
        )  # fmt: skip
        store.journal.append_mark(MarkKind.SAVED, step=self.state.global_step)
        self._rotate(run_dir, limit)

    def _rotate(self, run_dir: Path, limit: int | None) -> None:
        best = self.state.best_model_checkpoint
        rotate_checkpoints(output_dir=str(run_dir), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _was_saved_before(self) -> bool:
        assert self._replay is not None
        if not self._replay.is_over:
            return True  # or was not to be saved then: the weights of this step are not at hand now
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{self.state.global_step}"
        return self._replay.was_marked(MarkKind.SAVED) and (folder / checkpoint.MARKER_NAME).is_file()

    def _note_best_checkpoint(self, trial: Any) -> None:
        if self.state.best_global_step:
            best = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.best_global_step}"
            if best.exists():
                self.state.best_model_checkpoint = str(best)

    def _relative_store(self, run_dir: Path) -> str | None:
        store, home = Path(self.args.store_dir).resolve(), run_dir.resolve()
        return str(store.relative_to(home)) if store.is_relative_to(home) and store != home else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._saves_checkpoint and not self._wants_full_weights():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_without_weights(self.model, self.processing_class, folder)
        else:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        checkpoint.write_arguments(self.args, folder)

    def _wants_full_weights(self) -> bool:
        pushes = self.args.push_to_hub and self.args.hub_strategy != "end"
        return self.args.save_full_weights or pushes or not isinstance(self.model, PreTrainedModel | _peft_model())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write_schedule(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing is scaled."""

    def _save_rng_state(self, output_dir: str) -> None:
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


def _point_of(folder: Path) -> ResumePoint:
    return _point(checkpoint.read_checkpoint(folder))


def _point(found: checkpoint.Checkpoint) -> ResumePoint:
    return ResumePoint(
        folder=found.folder, store_id=found.store_id, fingerprint=found.fingerprint, position=found.position,
        step_offset=found.step_offset, counters=found.counters,
    )  # fmt: skip


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
