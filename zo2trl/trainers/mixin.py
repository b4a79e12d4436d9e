"""This module defines ZOTrainerMixin, whose hooks make a transformers Trainer, or a subclass, train forward-only.

Does not: contain arithmetic, a training loop or an evaluation loop. It passes closures to the engine and numbers to
the Trainer.

The Trainer keeps its own loop. Steps are made in stepping.py; resume/ saves checkpoints and resumes runs.
"""

import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from zo2trl.checkpoints.load import load_mapped
from zo2trl.engine.binding import FirstUse
from zo2trl.engine.device_fit import DeviceFit
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.open_store import Mode
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError, ConfigError, StoreError
from zo2trl.files.sizes import parse_size
from zo2trl.layout.quantised import quantised_bytes, quantised_parameters
from zo2trl.planning.budgets import Budgets, resolve_budgets
from zo2trl.planning.known_rates import rates_for
from zo2trl.planning.workload import Workload
from zo2trl.trainers.adapter_state import adapter_states
from zo2trl.trainers.adapters import prepare_adapters, refuse_full_quantised
from zo2trl.trainers.arguments.config import ZOArguments, convert_arguments
from zo2trl.trainers.arguments.data_checks import check_dataset, check_labels
from zo2trl.trainers.arguments.refusals import check_arguments, check_optimizers
from zo2trl.trainers.evaluation import EvaluationTraversal
from zo2trl.trainers.loss_normalisation import LossNormalisation
from zo2trl.trainers.metrics import StepMetrics
from zo2trl.trainers.optimizer import ZOOptimizer
from zo2trl.trainers.parallel import refuse_other_world_size
from zo2trl.trainers.resume.saving import save_processing_class
from zo2trl.trainers.signals import ending_in_time, stopping_on_signals
from zo2trl.trainers.stepping import SteppingMixin

__all__ = ["ZOTrainerMixin"]

_Base = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

_MEZO_NO_DECAY = ("bias", "layer_norm", "layernorm")


class ZOTrainerMixin(SteppingMixin, _Base):
    """A ZOTrainerMixin comes before a Trainer class: `class ZOTrainer(ZOTrainerMixin, Trainer)`."""

    config_class: type[ZOArguments]
    takes_labels = True  # a batch without labels has no loss
    args: Any
    model: Any

    _engine: Engine | None = None
    _loaded_addresses: dict[nn.Parameter, int]  # address that each parameter of a checkpoint was mapped to
    _casts: dict[nn.Parameter, torch.dtype]  # casts that the store makes when it takes in a mapped checkpoint
    device_fit: DeviceFit
    _shutdown: Any = None
    _first_use: FirstUse | None = None  # set while parameters have a mapped checkpoint's dtype

    def __init__(self, *positional: Any, objective: Any = None, **named: Any) -> None:
        given = signature(super().__init__).bind_partial(*positional, **named).arguments
        given |= given.pop("kwargs", {})
        model = given.get("model")
        given["args"] = config = self._convert(given.get("args"), model)
        self._set_objective(objective, config)
        check_arguments(config)
        self._join_ranks(config)
        self._check_given(given)
        check_optimizers(given)
        check_dataset(given.get("train_dataset"), name="train_dataset")
        config._n_gpu = min(config.n_gpu, 1)  # one device a process; more would mean DataParallel
        self._casts, self._loaded_addresses = {}, {}
        self._micro_batches: list[tuple[Any, Any]] = []
        self._step_offset: int | None = None  # journal step - global step; set by the first step
        self._begins_a_training = True
        self._step_metrics = StepMetrics()
        self._normalisation = LossNormalisation()
        init_kwargs = getattr(config, "model_init_kwargs", None)
        self._base_path = model if isinstance(model, str) else None
        if isinstance(model, str):
            given["model"] = self._load(model, given)
            config.model_init_kwargs = None  # upstream would warn: it cannot apply them to a loaded model
        refuse_full_quantised(given.get("model"), is_adapted=given.get("peft_config") is not None)
        super().__init__(**given)
        if self._base_path is not None:  # new tokens of a chat template, for example, enlarge embeddings
            self._is_drawn |= any(p.data_ptr() != place for p, place in self._loaded_addresses.items())
            self._loaded_addresses.clear()
        prepare_adapters(self.model, device=config.device, casts=self._casts)
        config.model_init_kwargs = init_kwargs
        check_dataset(self.train_dataset, name="train_dataset")
        check_labels(self)
        self._carry_objective_columns()
        self._check_model_and_budgets()
        if any(p.dtype != dtype for p, dtype in self._casts.items()):
            self._first_use = FirstUse(self.model, partial(_open_engine_of, weakref.ref(self)))

    # -- the engine and its store

    @property
    def engine(self) -> Engine:
        """Return the engine of the current model; the first use makes it, and moves weights into the store."""
        if self._engine is None or self._engine.model is not self.model or not self._engine.store.is_open:
            self._open_engine("begin")
        assert self._engine is not None
        return self._engine

    def _open_engine(self, mode: Mode) -> None:
        self.close()
        refuse_other_world_size(self.args.store_path, self.ranks)
        self._engine_options = self._options()
        with nullcontext() if self._first_use is None else self._first_use.preparing():
            self._engine = engine = open_engine(self.model, self._engine_options, mode=mode)
        self.device_fit = DeviceFit(engine, self._engine_options, count=self._count_pass)
        engine.pass_locals += adapter_states(self.model)
        engine.on_shutdown += [handle.remove for handle in hook_heads(self.model)]
        engine.on_shutdown.append(partial(self.model.__dict__.pop, "_is_accelerate_prepared", None))
        self._shutdown = weakref.finalize(self, engine.shutdown)
        self._shutdown.atexit = False  # worker threads have ended by then; the journal is already durable
        logger.info(engine.store.summary())

    def _continue_run(self) -> None:
        engine = self._engine  # after a return to the best model it is at an earlier step than the run
        is_open = engine is not None and engine.model is self.model and engine.store.is_open
        if not is_open or not engine.store.records or engine.store.records is not engine.store.journal.records:  # type: ignore[union-attr]
            self._open_engine("continue")

    def close(self) -> None:
        """Release the store: threads, folder lock and hooks; idempotent.

        From then on the model is an ordinary one, and each weight is where its unit was resident: in host memory, in a
        mapped file, or on the device.
        """
        try:
            if self._shutdown is not None:
                self._shutdown()
        finally:
            self._engine = None

    def _close_if_choices_changed(self) -> None:
        """Close an engine whose model or options have changed.

        Freezing, unfreezing or another `zo_eps` between two calls of `train()` needs a new one.
        """
        if self._engine is None:
            return
        trainable = {tensor.name for tensor in self._engine.store.layout.trainable_tensors()}
        same_weights = trainable == {name for name, p in self.model.named_parameters() if p.requires_grad}
        kept = {"budgets": self._engine_options.budgets, "dtypes": self._engine_options.dtypes}
        if not same_weights or replace(self._options(), **kept) != self._engine_options:
            logger.info("Trainable parameters or ZO arguments have changed: the store is opened again.")
            self.close()

    def _convert(self, args: TrainingArguments | None, model: Any) -> Any:
        if args is None:
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
            args = self.config_class(output_dir=f"{Path(name).name or 'model'}-ZO")  # type: ignore[call-arg]
        return convert_arguments(args, self.config_class)  # type: ignore[return-value]

    def _load(self, path: str, given: dict[str, Any]) -> nn.Module:
        kwargs = dict(getattr(given["args"], "model_init_kwargs", None) or {})
        kwargs.setdefault("trust_remote_code", getattr(given["args"], "trust_remote_code", False))
        kwargs |= self._what_to_load()
        if (quantization := given.pop("quantization_config", None)) is not None:
            if "quantization_config" in kwargs:
                raise ConfigError(
                    "`quantization_config` was given to the trainer and in `model_init_kwargs`. Leave one of them out."
                )
            kwargs["quantization_config"] = quantization
        is_adapted = given.get("peft_config") is not None
        set_seed(given["args"].seed)  # a new head is drawn at random, with the seed that upstream's trainers use
        mapped = load_mapped(
            path, offload_folder=self._offload_folder(given["args"]),
            quantised_on=given["args"].device if is_adapted else None, **kwargs,
        )  # fmt: skip
        self._is_drawn = mapped.is_drawn
        self._loaded_addresses = {p: p.data_ptr() for p in mapped.model.parameters()}
        named = dict(mapped.model.named_parameters())
        self._casts = {named[name]: dtype for name, dtype in mapped.casts().items()}
        return mapped.model

    def _check_given(self, given: dict[str, Any]) -> None:
        """Check arguments that only this kind of trainer has; `given["args"]` is a ZO config already."""

    def _what_to_load(self) -> dict[str, Any]:
        """Return the arguments of `load_mapped` that this kind of trainer needs for a model given as a path."""
        return {}

    def _count_pass(self, inputs: Any) -> Workload | None:
        """Count the work of one pass over such a batch; return None where this kind of trainer cannot count it."""
        return None

    def _check_model_and_budgets(self) -> None:
        """Refuse models without weights and budgets that cannot work, before any weight is moved."""
        empty = next((name for name, p in self.model.named_parameters() if p.is_meta), None)
        if empty is not None:
            raise ConfigError(
                f"`model` has no weights yet: {empty} is on the meta device. Load it without `init_empty_weights` and "
                "`device_map`, or pass the checkpoint's path, which is then read unit by unit."
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError("The model has no trainable parameter: set `requires_grad` on those to train.")
        try:
            plan_engine(self.model, self._options())
        except BudgetError as error:
            if not (n_bytes := self._quantised_bytes()):
                raise
            beside = f"The quantised base takes {n_bytes:,} bytes of the device beside these."
            raise BudgetError(f"{error} {beside}") from error

    def _budgets(self) -> Budgets:
        args = self.args
        budgets = resolve_budgets(
            device_memory=args.device_memory, cpu_memory=args.cpu_memory, device=args.device,
            n_processes=self.ranks.n_local,
        )  # fmt: skip
        if budgets.device == "min" or parse_size(args.device_memory, argument="device_memory") == "auto":
            return budgets  # "auto" is computed from the memory that a quantised base leaves free
        return replace(budgets, device=max(budgets.device - self._quantised_bytes(), 0))

    def _quantised_bytes(self) -> int:
        return sum(map(quantised_bytes, quantised_parameters(self.model).values()))

    def _options(self) -> EngineOptions:
        args = self.args
        return EngineOptions(
            budgets=self._budgets(),
            device=args.device,
            store_dir=self._own_store_dir,
            rates=rates_for(args.device, self._own_store_dir),
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
            ranks=self.ranks,
        )

    def _base_folder(self) -> str | None:
        """Return the checkpoint with the weights that training begins from, if these are unchanged since loading."""
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
        """Do nothing: the store places parameters."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Return the model without DDP, an autocast wrapper or a call of `.to()`.

        accelerate does not change a model that is marked as prepared.
        """
        assert self.engine is not None
        model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make an optimizer whose step commits the estimate; it holds parameter groups for schedulers and no state."""
        self.accelerator.scaler = None  # no gradients exist that a scaler could scale
        if self.optimizer is None:
            self.optimizer = ZOOptimizer(self.model, self.args, decay_names=self._decay_names(), commit=self._commit)
        return self.optimizer

    def compute_loss_context_manager(self) -> ExitStack:
        """Enter autocast as the arguments ask, and defer logits so that they are never computed as a whole.

        Autocast's cache is off, because a Parameter holds the weights of several probes in turn.
        """
        stack = super().compute_loss_context_manager()  # type: ignore[misc]
        stack.enter_context(self.accelerator.autocast(autocast_handler=AutocastKwargs(cache_enabled=False)))
        stack.enter_context(deferring_logits(wanted=self.objective is None))
        return stack

    # -- hooks of the Trainer: a training

    def train(self, resume_from_checkpoint: bool | str | None = None, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`]. When it returns, the model's parameters include every finished step.

        Args:
            resume_from_checkpoint: True resumes the run in `store_dir` after its last journaled step; a path resumes
                the run from that checkpoint. Without it a new run begins.
        """
        self._micro_batches.clear()
        self._step_offset = self._retrace = self._resumes_at = None
        self._begins_a_training = not resume_from_checkpoint
        self._randomness.start(None)
        self._close_if_choices_changed()
        with stopping_on_signals(), ending_in_time() if self.ranks.size > 1 else nullcontext():
            if resume_from_checkpoint:
                self._resume(resume_from_checkpoint)
            started_from = None if self._resumes_at is None else self._resumes_at.folder
            folder = None if started_from is None else str(started_from)
            evaluates_first = self.args.eval_on_start
            self.args.eval_on_start = evaluates_first and folder is None  # a resumed run does not start
            try:
                with self._naming_lost_rank():
                    result = super().train(folder, *args, **kwargs)  # type: ignore[misc]
                self._refuse_steps_left()
                return result
            except SystemExit:  # SIGTERM: everything is in the journal
                if self._engine is not None:
                    with suppress(StoreError):  # if a version was not written, an older one is on disk
                        self._engine.shutdown(flush=False)
                raise
            finally:  # also after Ctrl-C: the user may read the parameters next
                self.args.eval_on_start = evaluates_first
                if self._engine is not None:
                    self._engine.flush()

    # -- hooks of the Trainer: evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's own loop over a dataloader that evaluates several batches in one traversal."""
        given = signature(Trainer.evaluation_loop).bind(self, dataloader, *args, **kwargs).arguments
        loss_only = given.get("prediction_loss_only")
        batches = EvaluationTraversal(
            self, dataloader,
            prediction_loss_only=self.args.prediction_loss_only if loss_only is None else loss_only,
            ignore_keys=given.get("ignore_keys"),
        )  # fmt: skip
        self.prediction_step = batches.take  # the loop calls it for each batch of `batches`
        try:
            return super().evaluation_loop(batches, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.prediction_step
            # Drop prefetched copies, because the user may now write into the parameters.
            self.engine.store.weights_changed()


def _open_engine_of(trainer: Callable[[], ZOTrainerMixin | None]) -> None:
    """Move the weights of a trainer's model into the store, which casts them, if the trainer still exists."""
    found = trainer()
    if found is not None:
        with torch.inference_mode(False):  # inference tensors could not be trained
            assert found.engine is not None
