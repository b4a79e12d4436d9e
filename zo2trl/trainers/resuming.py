"""ResumingMixin: checkpoints of a few kilobytes, and resuming from the journal instead of from weights.

Does not: know how a step is made. It overrides what the Trainer does around one: saving, loading, evaluating again.

A checkpoint is the Trainer's own state and a pointer into the journal. Resuming runs the Trainer's own loop from the
last checkpoint (else from the start), takes losses from the journal until its end, and goes on from there.

Invariants:
- No pickle is read, and none is left behind.
- Evaluations consume none of the global random numbers, so that data comes in the same order without them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from zo2trl.engine.opening import has_run
from zo2trl.engine.step import Engine
from zo2trl.errors import CheckpointError, ConfigError
from zo2trl.tiers.ingest import load_mapped
from zo2trl.tiers.journal import MarkKind
from zo2trl.tiers.tier import Source
from zo2trl.trainers import checkpoint
from zo2trl.trainers.data_checks import global_random_state_kept
from zo2trl.trainers.metrics import StepMetrics
from zo2trl.trainers.randomness import RandomnessKeeper
from zo2trl.trainers.replaying import Replay, ResumePoint, locate

__all__ = ["ResumingMixin", "save_processing_class"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_CURE = "Pass its folder as `model` to begin a run from its weights."
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")


class ResumingMixin(_Base):
    """The part of `ZOTrainerMixin` that makes a run survive."""

    args: Any
    model: Any

    engine: Engine
    _replay: Replay | None = None
    _resumes_at: ResumePoint | None = None
    _takes_weights_from_checkpoint = False
    _saves_checkpoint = False
    _step_offset: int | None
    _step_metrics: StepMetrics
    _base_path: str | None

    @property
    def is_replaying(self) -> bool:
        """True while `train` goes through steps that the journal holds already: the model is ahead of the loop."""
        return self._replay is not None and not self._replay.is_over

    # -- where to start

    def _find_resume_point(self, wanted: bool | str | None) -> ResumePoint | None:
        """What `resume_from_checkpoint` asks for: nothing, the last whole checkpoint (else the start), or a folder."""
        if not wanted:
            return None
        output_dir = Path(self.args.output_dir)
        if wanted is not True:
            return self._point_of(Path(wanted))
        last, skipped = checkpoint.last_valid_checkpoint(output_dir)
        for reason in skipped:
            logger.warning("A checkpoint is passed over: %s", reason)
        if last is not None:
            return self._point_of(last)
        if not has_run(Path(self.args.store_dir)):
            raise ConfigError(
                f"`resume_from_checkpoint` found nothing to resume from: no checkpoint in {output_dir}, and no run in "
                f"the store {self.args.store_dir}. Leave it out to begin a run."
            )
        return ResumePoint()

    def _point_of(self, folder: Path) -> ResumePoint:
        found = checkpoint.read_checkpoint(folder)
        return ResumePoint(
            folder=folder, store_id=found.store_id, fingerprint=found.fingerprint, position=found.position,
            step_offset=found.step_offset,
        )  # fmt: skip

    def _resume_at(self, point: ResumePoint) -> None:
        """Bring the weights to the journal's end, and have the loop go through the steps up to there."""
        self._takes_weights_from_checkpoint = False
        if not has_run(Path(self.args.store_dir)) and point.folder is not None:
            if not any(any(point.folder.glob(pattern)) for pattern in WEIGHTS):
                raise CheckpointError(
                    f"{point.folder} holds no weights, and the store {self.args.store_dir} that it points into holds "
                    "no run. Set `store_dir` to where that run's store is."
                )
            self._takes_weights_from_checkpoint = True
            self._step_offset = point.step_offset
            self._resumes_at = point
            return
        self._continue_run()
        self._resumes_at = point = locate(point, self.engine)
        self._step_offset = point.step_offset
        self._replay = Replay(self.engine, point)
        logger.info(
            "Resuming from %s: %d steps are taken from the journal.", point.folder or "the start", self._replay.n_left
        )

    def _continue_run(self) -> None:
        """Open the engine on the run in the folder, unless it is open on it."""
        raise NotImplementedError

    def _refuse_steps_left(self) -> None:
        if self._replay is not None and not self._replay.is_over:
            raise ConfigError(
                f"Training ended at step {self.state.global_step}, but the journal holds {self._replay.n_left} more "
                "steps of this run: `max_steps` (or epochs) was lowered, or a callback stopped earlier than it did "
                "then. The weights are those of the last journaled step; `zo2trl export --step` gives earlier ones."
            )

    # -- hooks of the Trainer: loading

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if self._resumes_at is None:
            self._random_state_at_start = checkpoint.rng_state()
        elif self._resumes_at.folder is None and self._replay is not None:
            state = self.engine.store.logbook.get("started", self._resumes_at.position)
            if state is not None:
                checkpoint.set_rng_state(state, where=self.engine.store.logbook.path)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._takes_weights_from_checkpoint and not self._reload(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.read_schedule(Path(checkpoint_folder), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        """Nothing is scaled."""

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Called before the first new batch is used: random state, and what is left over since the last log."""
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        if not self._randomness.was_restored:
            checkpoint.read_rng(folder / checkpoint.RNG_NAME)
        self._set_counters(checkpoint.read_checkpoint(folder).counters)

    def _load_best_model(self) -> None:
        folder, home = Path(self.state.best_model_checkpoint or ""), Path(self.args.output_dir)
        if not folder.resolve().is_relative_to(home.resolve()):
            raise CheckpointError(f"The best checkpoint is said to be {folder}, which is not below {home}. {_CURE}")
        if any(any(folder.glob(pattern)) for pattern in WEIGHTS[:1]) and self._reload(str(folder)):
            return
        point = locate(self._point_of(folder), self.engine)
        self.engine.go_back(point.position, base=self._base_weights())

    def _reload(self, folder: str | None) -> bool:
        """Bring a checkpoint's full weights into the store, unit by unit. False: it has none, or not of this kind."""
        if (
            not folder
            or not isinstance(self.model, PreTrainedModel)
            or not any(Path(folder).glob("model*.safetensors"))
        ):
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
            return
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._saves_checkpoint = False
            self.args.save_total_limit = limit
        run_dir = Path(self._get_output_dir(trial=trial))
        store = self.engine.store
        position = len(store.records)
        checkpoint.commit_checkpoint(
            run_dir / f"checkpoint-{self.state.global_step}",
            checkpoint.Pointer(
                store=self._relative_store(run_dir), store_id=str(store.journal.header["store"]), position=position,
                step=self.state.global_step, step_offset=self._step_offset or 0,
                fingerprint=store.journal.fingerprint(position), counters=self._counters(),
            ),
        )  # fmt: skip
        store.journal.append_mark(MarkKind.SAVED, step=self.state.global_step)
        rotate_checkpoints(
            output_dir=str(run_dir), save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
        )  # fmt: skip

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
        checkpoint.write_schedule(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing is scaled."""

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        checkpoint.write_rng(Path(output_dir) / checkpoint.RNG_NAME)

    # -- hooks of the Trainer: evaluating

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See [`~transformers.Trainer.evaluate`]. An evaluation that the journal's steps had is not made again."""
        given = {"eval_dataset": eval_dataset, "ignore_keys": ignore_keys, "metric_key_prefix": metric_key_prefix}
        with global_random_state_kept(self.args.device):
            datasets = eval_dataset if eval_dataset is not None else self.eval_dataset
            if isinstance(datasets, dict) or not self.is_in_train:
                return super().evaluate(**given)  # type: ignore[misc]
            known = None if self._replay is None else self._replay.evaluation(metric_key_prefix)
            if known is not None:
                return self._report_again(dict(known))
            if self.is_replaying:
                logger.warning("The evaluation at step %d is left out: it was not made then.", self.state.global_step)
                return {}
            metrics = super().evaluate(**given)  # type: ignore[misc]
        self._note_evaluation(metric_key_prefix, metrics)
        return metrics

    def _report_again(self, metrics: dict[str, float]) -> dict[str, float]:
        self.model.eval()  # as after an evaluation: trainers file metrics by this flag
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _note_evaluation(self, name: str, metrics: dict[str, float]) -> None:
        store = self.engine.store
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        store.logbook.put("evaluation", len(store.records), numbers, name=name, sync=True)
        store.journal.append_mark(MarkKind.EVALUATED, step=self.state.global_step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.is_replaying and self.control.should_evaluate:
            assert self._replay is not None
            self.control.should_evaluate = self._replay.was_marked(MarkKind.EVALUATED)
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _note_start(self, step_offset: int) -> None:
        """The first step of a training is next: its loop could start again here, without a checkpoint."""
        store = self.engine.store
        store.logbook.put("started", len(store.records), self._random_state_at_start, sync=True)
        store.journal.append_mark(MarkKind.STARTED, step=step_offset)

    # -- what is left over between two logs

    def _counters(self) -> dict[str, Any]:
        return {
            "tr_loss": self._tr_loss.item(),
            "globalstep_last_logged": self._globalstep_last_logged,
            "step_metrics": self._step_metrics.state(),
            "data": self._randomness.state(),
        }

    def _set_counters(self, counters: dict[str, Any]) -> None:
        self._tr_loss.fill_(counters["tr_loss"])
        # The mean loss that `train` returns is of the steps it made itself.
        self._total_loss_scalar = -self._tr_loss.item()
        self._globalstep_last_logged = counters["globalstep_last_logged"]
        self._step_metrics.set_state(counters["step_metrics"])

    # -- random numbers of the data pipeline

    @property
    def _randomness(self) -> RandomnessKeeper:
        if not hasattr(self, "_randomness_keeper"):
            self._randomness_keeper = RandomnessKeeper()
        return self._randomness_keeper

    def get_train_dataloader(self) -> Any:
        """See [`~transformers.Trainer.get_train_dataloader`]; the collator's random numbers are kept track of."""
        with self._watching_collator():
            return super().get_train_dataloader()  # type: ignore[misc]

    @contextmanager
    def _watching_collator(self) -> Iterator[None]:
        collator, self.data_collator = self.data_collator, self._randomness.watch(self.data_collator)
        try:
            yield
        finally:
            self.data_collator = collator


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
