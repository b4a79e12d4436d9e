"""ZOTrainerMixin: the few hooks that turn a transformers Trainer, or any subclass, into a forward-only one.

Does not: contain arithmetic, a training loop or an evaluation loop. It hands closures to the engine and numbers to the
Trainer.

The Trainer keeps its own order of things: `training_step` collects micro-batches until gradients would sync, then
estimates; `_clip_grad_norm` clips the scalar; the optimizer's `step` commits it to the journal.
"""

import logging
import math
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import AutocastKwargs
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from zo2trl.engine.activations import n_tokens
from zo2trl.engine.fitting import DeviceFit
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.runs import Mode
from zo2trl.engine.step import Engine
from zo2trl.errors import ConfigError, StoreError
from zo2trl.tiers.ingest import load_mapped
from zo2trl.tiers.machine import resolve_budgets
from zo2trl.trainers.arguments import ZOArguments, convert_arguments
from zo2trl.trainers.data_checks import check_dataset, check_labels
from zo2trl.trainers.evaluation import EvaluationMarch
from zo2trl.trainers.metrics import StepMetrics, count_tokens
from zo2trl.trainers.optimizer import ZOOptimizer
from zo2trl.trainers.replaying import Replay, estimate_of, refuse_changed_weights
from zo2trl.trainers.resuming import ResumingMixin, save_processing_class
from zo2trl.trainers.scaling import LossScaling
from zo2trl.trainers.signals import stop_if_asked, stopping_on_signals
from zo2trl.trainers.support import check_arguments, check_optimizers

__all__ = ["ZOTrainerMixin"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_MEZO_NO_DECAY = ("bias", "layer_norm", "layernorm")


class ZOTrainerMixin(ResumingMixin, _Base):
    """Put it in front of a Trainer class: `class ZOTrainer(ZOTrainerMixin, Trainer)`."""

    config_class: type[ZOArguments]
    args: Any
    model: Any

    _engine: Engine | None = None
    _casts: dict[nn.Parameter, torch.dtype]  # what the store still has to cast while it adopts a mapped checkpoint
    device_fit: DeviceFit
    _shutdown: Any = None

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, *positional: Any, **named: Any
    ) -> None:
        given = signature(super().__init__).bind_partial(model, args, *positional, **named).arguments
        given |= given.pop("kwargs", {})
        given["args"] = config = self._convert(args, model)
        check_arguments(config)
        check_optimizers(given)
        check_dataset(given.get("train_dataset"), name="train_dataset")
        config._n_gpu = min(config.n_gpu, 1)  # one process drives one device; more would mean DataParallel
        self._casts = {}
        self._micro_batches: list[tuple[Any, Any]] = []
        self._step_offset: int | None = None  # journal step - global step, known from the first step of a training on
        self._begins_a_training = True
        self._step_metrics = StepMetrics()
        self._scaling = LossScaling()
        init_kwargs = getattr(config, "model_init_kwargs", None)
        self._base_path = model if isinstance(model, str) else None
        if isinstance(model, str):
            given["model"] = self._load(model, given)
            config.model_init_kwargs = None  # used up: the trainer would warn that it cannot apply them
        super().__init__(**given)
        config.model_init_kwargs = init_kwargs
        check_dataset(self.train_dataset, name="train_dataset")
        check_labels(self)
        self._plan_first()

    # -- the engine and its store

    @property
    def engine(self) -> Engine:
        """The engine of the current model; made, and the model's weights moved into the store, on first use."""
        if self._engine is None or self._engine.model is not self.model or not self._engine.store.is_open:
            self._open_engine("begin")
        assert self._engine is not None
        return self._engine

    def _open_engine(self, mode: Mode) -> None:
        self.close()
        self._engine_options = self._options()
        self._engine = engine = open_engine(self.model, self._engine_options, mode=mode)
        self.device_fit = DeviceFit(engine, self._engine_options)
        engine.on_shutdown += [handle.remove for handle in hook_heads(self.model)]
        engine.on_shutdown.append(partial(self.model.__dict__.pop, "_is_accelerate_prepared", None))
        self._shutdown = weakref.finalize(self, engine.shutdown)
        self._shutdown.atexit = False  # worker threads have ended by then; the journal is already durable
        logger.info(engine.store.summary())

    def _continue_run(self) -> None:
        engine = self._engine  # gone back to the best model, it is not where the run is
        is_open = engine is not None and engine.model is self.model and engine.store.is_open
        if not is_open or not engine.store.records or engine.store.records is not engine.store.journal.records:  # type: ignore[union-attr]
            self._open_engine("continue")

    def close(self) -> None:
        """Give up the store: threads, folder lock and hooks; idempotent.

        The model is an ordinary one from then on, with each weight where its home was: in host memory, in a mapped
        file, or, if it was resident, on the device.
        """
        if self._shutdown is not None:
            self._shutdown()
        self._engine = None

    def _close_if_choices_changed(self) -> None:
        """Freezing, unfreezing or another `zo_eps` between two calls of `train()` needs a new engine."""
        if self._engine is None:
            return
        trainable = {tensor.name for tensor in self._engine.store.layout.trainable_tensors()}
        same_weights = trainable == {name for name, p in self.model.named_parameters() if p.requires_grad}
        kept = {"budgets": self._engine_options.budgets, "dtypes": self._engine_options.dtypes}
        if not same_weights or replace(self._options(), **kept) != self._engine_options:
            logger.info("Trainable parameters or ZO arguments have changed: the store is opened anew.")
            self.close()

    def _convert(self, args: TrainingArguments | None, model: Any) -> Any:
        if args is None:
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
            args = self.config_class(output_dir=f"{Path(name).name or 'model'}-ZO")  # type: ignore[call-arg]
        return convert_arguments(args, self.config_class)  # type: ignore[return-value]

    def _load(self, path: str, given: dict[str, Any]) -> nn.Module:
        kwargs = dict(getattr(given["args"], "model_init_kwargs", None) or {})
        kwargs.setdefault("trust_remote_code", getattr(given["args"], "trust_remote_code", False))
        if given.pop("quantization_config", None) is not None:
            kwargs["quantization_config"] = "given"
        set_seed(given["args"].seed)  # a new head is drawn at random, here as in the trainers this one stands in for
        mapped = load_mapped(path, offload_folder=self._offload_folder(given["args"]), **kwargs)
        self._is_drawn = mapped.is_drawn
        named = dict(mapped.model.named_parameters())
        self._casts = {named[name]: dtype for name, dtype in mapped.casts().items()}
        return mapped.model

    def _plan_first(self) -> None:
        """Refuse budgets that cannot work before anything is moved."""
        empty = next((name for name, p in self.model.named_parameters() if p.is_meta), None)
        if empty is not None:
            raise ConfigError(
                f"`model` has no weights yet: {empty} is on the meta device. Load it without `init_empty_weights` and "
                "`device_map`, or hand over the checkpoint's path, which is then read unit by unit."
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError("The model has no trainable parameter: set `requires_grad` on those that should move.")
        plan_engine(self.model, self._options())

    def _options(self) -> EngineOptions:
        args = self.args
        return EngineOptions(
            budgets=resolve_budgets(device_memory=args.device_memory, cpu_memory=args.cpu_memory, device=args.device),
            device=args.device,
            store_dir=Path(args.store_dir),
            seed=args.seed,
            zo_eps=args.zo_eps,
            num_directions=args.num_directions,
            direction=args.direction,
            rounding=args.rounding,
            write_back_every="auto" if args.write_back_every == "auto" else int(args.write_back_every),
            granularity=args.granularity,
            decay_names=self._decay_names(),
            dtypes=self._storage_dtypes(),
            base_folder=self._base_folder(),
            max_replay_s=args.max_replay_s,
            sync_every=args.sync_every,
            describe=partial(save_processing_class, self.processing_class),
        )

    def _base_folder(self) -> str | None:
        """The checkpoint that holds the weights training begins with, if nothing but loading it has made them."""
        folder = Path(self._base_path or "-")
        if not self._base_path or not folder.is_dir() or self._is_drawn:
            return None
        return str(folder.absolute()) if isinstance(self.model, PreTrainedModel) else None

    def _decay_names(self) -> list[str]:
        if self.args.direction != "mezo":
            return self.get_decay_parameter_names(self.model)
        names = [name for name, _ in self.model.named_parameters()]
        return [name for name in names if not any(part in name for part in _MEZO_NO_DECAY)]

    def _storage_dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._casts[p] for name, p in self.model.named_parameters() if p in self._casts}

    # -- hooks of the Trainer: set-up

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The store decides where parameters live."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """No DDP, no autocast wrapper, no `.to()`: accelerate leaves a model alone that says it is prepared."""
        assert self.engine is not None
        model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """An optimizer whose step commits the estimate; it holds parameter groups for schedulers and no state."""
        self.accelerator.scaler = None  # nothing is scaled, and a scaler would wait for gradients
        if self.optimizer is None:
            self.optimizer = ZOOptimizer(self.model, self.args, decay_names=self._decay_names(), commit=self._commit)
        return self.optimizer

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast as the arguments ask, without its cache: Parameters hold many probes' weights; no whole logits."""
        stack = super().compute_loss_context_manager()  # type: ignore[misc]
        stack.enter_context(self.accelerator.autocast(autocast_handler=AutocastKwargs(cache_enabled=False)))
        stack.enter_context(deferring_logits())
        return stack

    # -- hooks of the Trainer: a step

    def train(self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`]. When it returns, the model's parameters show every finished step.

        Args:
            resume_from_checkpoint: True goes on with the run in `store_dir`, from its last journaled step; a path does
                so from that checkpoint of the run on. Without it a new run begins.
        """
        self._micro_batches.clear()
        self._step_offset = self._replay = self._resumes_at = None
        self._begins_a_training = not resume_from_checkpoint
        self._randomness.start(None)
        self._close_if_choices_changed()
        with stopping_on_signals():
            if resume_from_checkpoint:
                self._resume(resume_from_checkpoint)
            started_from = None if self._resumes_at is None else self._resumes_at.folder
            folder = None if started_from is None else str(started_from)
            evaluates_first = self.args.eval_on_start
            self.args.eval_on_start = evaluates_first and folder is None  # a checkpoint is no start
            try:
                result = super().train(folder, *args, **kwargs)  # type: ignore[misc]
                self._refuse_steps_left()
                return result
            except SystemExit:  # SIGTERM: everything is in the journal
                if self._engine is not None:
                    with suppress(StoreError):  # a version that was not written: an older one is there
                        self._engine.shutdown(flush=False)
                raise
            finally:  # also after Ctrl-C: what the user looks at next should not be a few steps old
                self.args.eval_on_start = evaluates_first
                if self._engine is not None:
                    self._engine.flush()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Collect micro-batches until gradients would sync, then estimate the slope from all of them in one march."""
        stop_if_asked()
        self._micro_batches.append((self._prepare_inputs(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        self._randomness.used(len(batches))
        # The root says "training" to loss and metric code; everything below runs without dropout, as MeZO does.
        model.eval()
        model.training = True
        if self._replay is not None and not self._replay.is_over:
            return self._replay_step(self._replay)
        self._replay = None
        engine = self.engine
        step_offset = self._prepare_step(model, batches)
        started_s = time.perf_counter()
        with self.probes_counted_once(len(engine.estimator.probes())):
            estimate = engine.step(
                [partial(self._loss, model, *batch) for batch in batches],
                step=step_offset + self.state.global_step,
                passes_per_march=self.device_fit.passes_per_march(batches[0][0]),
            )
        self._estimate, self._grads = estimate, estimate.projected_grads
        every = self.args.torch_empty_cache_steps
        if every and self.state.global_step % every == 0:
            clear_device_cache()
        moved, self._moved_before = engine.store.traffic - self._moved_before, engine.store.traffic.copy()
        self._step_metrics.add_work(
            n_tokens=sum(count_tokens(batch) for batch, _ in batches), seconds=time.perf_counter() - started_s,
            moved=moved,
        )  # fmt: skip
        return torch.tensor(estimate.loss, device=self.args.device)

    def _replay_step(self, replay: Replay) -> torch.Tensor:
        refuse_changed_weights(self.engine, global_step=self.state.global_step)
        self._estimate = estimate_of(replay.record)
        self._grads = self._estimate.projected_grads
        measured = replay.measured()
        if measured is not None:
            self._measured_before(measured)
        return torch.tensor(self._estimate.loss, device=self.args.device)

    def _prepare_step(self, model: nn.Module, batches: list[tuple[Any, Any]]) -> int:
        with self.probes_counted_once(0):
            self._scaling.find_out(self, model, batches)
            largest = max(batches, key=lambda batch: n_tokens(batch[0]))
            n_passes = len(self.engine.estimator.probes()) * len(batches)
            if self.device_fit.before_steps(partial(self._loss, model, *largest), largest[0], n_passes=n_passes):
                self._moved_before = self.engine.store.traffic.copy()
        if self._step_offset is None:
            self._step_offset = self._find_step_offset()
        if self._begins_a_training:
            self._begins_a_training = False
            self._note_start(self._step_offset)
        return self._step_offset

    def _find_step_offset(self) -> int:
        # A second call of `train()` counts steps from 0 again, but its directions and records must be new ones.
        records, first_step = self.engine.store.records, self.state.global_step
        return records[-1].step + 1 - first_step if records and records[-1].step >= first_step else 0

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        return loss.mean() / self._scaling.divisor(self, num_items_in_batch)

    @contextmanager
    def probes_counted_once(self, n_probes: int) -> Iterator[None]:
        """Round a march in which every batch is seen by `n_probes` probes; trainers that count tokens correct them."""
        yield

    def _clip_grad_norm(self, model: nn.Module) -> float:
        if (norm := self._get_grad_norm(model)) > self.args.max_grad_norm > 0:
            self._grads = tuple(g * self.args.max_grad_norm / norm for g in self._grads)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        if grad_norm is None:
            grad_norm = abs(self._estimate.projected_grad) if self._estimate.is_finite else math.nan
            self._grad_norm = grad_norm
        return grad_norm

    def _commit(self, *, learning_rate: float) -> None:
        self._step_metrics.add(self._estimate)
        if self._replay is not None:
            self._replay.advance(learning_rate=learning_rate)
            return
        store, measured = self.engine.store, self._measured()
        if measured is not None:  # first: what the journal does not confirm is forgotten
            store.logbook.put("step", len(store.records) + 1, measured)
        self.engine.commit(
            learning_rate=learning_rate, weight_decay=self.args.weight_decay, projected_grads=self._grads,
            grad_norm=self._grad_norm,
        )  # fmt: skip

    def _measured(self) -> Any:
        """What the forwards of this step measured besides losses, as JSON, for trainers that log such things."""
        return None

    def _measured_before(self, measured: Any) -> None:
        """A step is gone through again without forwards; this is what `_measured` returned for it."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `zo/*` means since the last log to training logs."""
        if "loss" in logs:
            logs.update(self._step_metrics.take())
        super().log(logs, start_time)  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> int:
        """Two forwards (4 of the usual 6 units) per direction, and no backward."""
        return super().floating_point_ops(inputs) * 2 * self.args.num_directions // 3  # type: ignore[misc]

    # -- hooks of the Trainer: evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own loop over a dataloader that runs several batches' `prediction_step` in one march."""
        given = signature(Trainer.evaluation_loop).bind(self, dataloader, *args, **kwargs).arguments
        loss_only = given.get("prediction_loss_only")
        batches = EvaluationMarch(
            self, dataloader,
            prediction_loss_only=self.args.prediction_loss_only if loss_only is None else loss_only,
            ignore_keys=given.get("ignore_keys"),
        )  # fmt: skip
        self.prediction_step = batches.take  # what the loop calls for each batch it gets from `batches`
        try:
            return super().evaluation_loop(batches, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.prediction_step
            self.engine.store.homes_changed()  # the user is next: what they write must not meet copies fetched ahead
