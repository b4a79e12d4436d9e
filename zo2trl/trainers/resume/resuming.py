"""ResumingMixin: checkpoints of a few kilobytes, and resuming from the journal instead of from weights.

Does not: know how a step is made, or write checkpoints (saving.py).

A checkpoint is the Trainer's own state and a pointer into the journal. Resuming runs the Trainer's own loop from the
last checkpoint (else from the start), takes losses from the journal until its end, and goes on from there.

Invariant: no pickle is read.
"""

import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from zo2trl.checkpoints.load import load_mapped
from zo2trl.engine.loop_notes import can_start_over, compare_settings, random_state_at
from zo2trl.engine.opening import has_run
from zo2trl.engine.retrace import Retrace, locate, note_origin, refuse_other_rates, refuse_other_training
from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.tiers.tier import Source
from zo2trl.trainers.parallel import refuse_other_world_size
from zo2trl.trainers.resume import checkpoint
from zo2trl.trainers.resume.saving import FULL_WEIGHTS, WEIGHTS, SavingMixin
from zo2trl.trainers.resume.states import RNG_NAME, read_rng, read_schedule, rng_state, set_rng_state
from zo2trl.trainers.resume.translating import NOTED_BY_STEPS, ResumePoint, learning_rates_of, settings_of

__all__ = ["ResumingMixin"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_CURE = "Pass its folder as `model` to begin a run from its weights."


class ResumingMixin(SavingMixin, _Base):
    """The part of `ZOTrainerMixin` that makes a run survive."""

    args: Any
    model: Any

    engine: Engine
    _resumes_at: ResumePoint | None = None
    _takes_weights_from_checkpoint = False
    _begins_a_training: bool
    _micro_batches: list[tuple[Any, Any]]
    _base_path: str | None

    # -- where to start

    def _resume(self, wanted: bool | str) -> None:
        """Bring the weights to the journal's end, and have the loop go through the steps up to there."""
        self._takes_weights_from_checkpoint = False
        folder = Path(wanted) if isinstance(wanted, str) else None
        refuse_other_world_size(self.args.store_path, self.ranks)
        if not self._all_have_runs():
            self._resume_from_weights(folder)
            return
        self._continue_run()
        compare_settings(self.engine, settings_of(self), may_change=NOTED_BY_STEPS)
        self._forget_counters()
        point = self._agreed_point(folder)
        if point.folder is not None and not has_length(self.train_dataset) and can_start_over(self.engine):
            # The Trainer cannot find its place in a stream again; going through all of it is what skipping costs, too.
            point = locate(ResumePoint(), self.engine)
        self._begins_a_training = point.folder is None and not can_start_over(self.engine)
        self._retrace = Retrace(self.engine, point)
        self._start_at(point)
        logger.info(
            "Resuming from %s: %d steps are taken from the journal.", point.folder or "the start", self._retrace.n_left
        )

    def _all_have_runs(self) -> bool:
        known = self.ranks.all_gather("runs in the stores", has_run(self._own_store_dir))
        if any(known) and not all(known):
            raise ConfigError(
                f"`store_dir` {self.args.store_path} holds the stores of {sum(known)} processes, and there are "
                f"{len(known)}; that of rank {known.index(False)} is missing. If the run was made by {sum(known)}, "
                f"launch so many. If a folder was lost, put a copy of rank-{known.index(True)} in its place: all hold "
                "the same weights and steps."
            )
        return known[0]

    def _agreed_point(self, folder: Path | None) -> ResumePoint:
        """The same point in all processes, each with its own random numbers."""
        found = self._last_point() if folder is None and self.ranks.rank == 0 else None
        if self.ranks.size > 1 and folder is None:
            own_folder = str(found.folder) if found and found.folder else None
            folders = self.ranks.all_gather("checkpoint to resume from", own_folder)
            folder = None if folders[0] is None else Path(folders[0])
        if found is None:
            found = locate(ResumePoint() if folder is None else _point_of(folder), self.engine)
        self.ranks.agree_on(
            "The step to resume from", {"position in the journal": found.position, "first step": found.step_offset}
        )
        own = None if found.folder is None else self.engine.store.logbook.get("checkpoint", found.position)
        if self.ranks.rank == 0 or own is None:
            return found
        return replace(found, counters={**found.counters, "data": own["data"], "epoch": own["epoch"]}, rng=own["rng"])

    def _read_rng(self) -> None:
        point = self._resumes_at
        assert point is not None and point.folder is not None
        if point.rng is None:
            read_rng(point.folder / RNG_NAME)
        else:
            set_rng_state(point.rng, where=self.engine.store.logbook.path)

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
                f"no run in the store {self.args.store_path}. Leave it out to begin a run."
            )
        if not any(any(found.folder.glob(pattern)) for pattern in WEIGHTS):
            raise CheckpointError(
                f"{found.folder} holds no weights, and the store {self.args.store_path} that it points into holds no "
                "run. Set `store_dir` to where that run's store is."
            )
        self._takes_weights_from_checkpoint = True
        self._start_at(_point(found))

    def _start_at(self, point: ResumePoint) -> None:
        self._resumes_at, self._step_offset = point, point.step_offset
        if point.folder is not None:
            self._read_rng()  # samplers take their seed from it when they are made
            self._randomness.start(point.counters.get("data"))
        else:
            self._restore_random_state_at_start()

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """A batch did not fit: what upstream begins again, on the weights so far, is another training in the journal.

        Raises:
            ConfigError: a run is being resumed, whose steps were made of larger batches, or other processes go on.
        """
        if batch_size != self._train_batch_size:
            tried = f"Out of memory with `per_device_train_batch_size={self._train_batch_size}`"
            if self.args.world_size > 1:
                raise ConfigError(
                    f"{tried} in one of {self.args.world_size} processes, which all have batches of one size. Set it "
                    f"to {batch_size} or less, and raise `gradient_accumulation_steps`."
                )
            if self._resumes_at is not None:
                raise ConfigError(
                    f"{tried} while a run is being resumed, whose place in the data counts batches of that size. "
                    "Resume with a smaller `device_memory`, which leaves more to activations, or export the weights "
                    f"(`zo2trl export`) and start a new run from them with batches of {batch_size}."
                )
            self._micro_batches.clear()
            self._step_offset, self._begins_a_training = None, True
        super()._update_auto_batch_size(batch_size)  # type: ignore[misc]

    def _continue_run(self) -> None:
        """Open the engine on the run in the folder, unless it is open on it."""
        raise NotImplementedError

    def _refuse_steps_left(self) -> None:
        if self._resumes_at is not None and self.state.global_step > self.state.max_steps:
            raise ConfigError(
                f"`max_steps` is {self.state.max_steps}, but the checkpoint was saved at step "
                f"{self.state.global_step}. Raise it, or take earlier weights with `zo2trl export --step`."
            )
        if self._retrace is not None and not self._retrace.is_over:
            raise ConfigError(
                f"Training ended at step {self.state.global_step}, but the journal holds {self._retrace.n_left} more "
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
        state = random_state_at(self.engine, self._resumes_at.position)
        if state is not None:
            set_rng_state(state, where=self.engine.store.logbook.path)

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
                self._read_rng()
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
            if (rate_at := learning_rates_of(self.lr_scheduler)) is not None:
                refuse_other_rates(self._resumes_at, self.engine, rate_at=rate_at)
            read_schedule(Path(checkpoint_folder), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        """Nothing is scaled."""

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Called before the first new batch is used: random state, and what is left over since the last log."""
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        if not self._randomness.was_restored:
            self._read_rng()
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
        folder = args.store_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _point_of(folder: Path) -> ResumePoint:
    return _point(checkpoint.read_checkpoint(folder))


def _point(found: checkpoint.Checkpoint) -> ResumePoint:
    if not (found.folder / RNG_NAME).exists():
        raise CheckpointError(
            f"{found.folder} was saved with `save_only_model=True`: it holds weights, and no state to resume from. "
            f"Resume from the journal alone with `resume_from_checkpoint=True`. {_CURE}"
        )
    return ResumePoint(
        folder=found.folder, store_id=found.store_id, fingerprint=found.fingerprint, position=found.position,
        step_offset=found.step_offset, counters=found.counters,
    )  # fmt: skip
