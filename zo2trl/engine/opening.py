"""Opening an engine: from a model and a user's choices to units in their tiers, hooks in place.

Does not: run a step. Everything that can be refused is refused here, before a byte is moved.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from zo2trl.checkpoints.model_files import describe_model, is_saved_as_adapter
from zo2trl.engine.join_ranks import agree_on_run, join_stores
from zo2trl.engine.open_store import Mode, StoreSpec, open_store
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError, ConfigError, StoreForeign
from zo2trl.files.fs import FS, LOCAL
from zo2trl.layout.layout import Layout
from zo2trl.layout.model_layout import plan_layout
from zo2trl.layout.quantised import quantised_digest
from zo2trl.parallel.ranks import ALONE, Ranks
from zo2trl.planning.budgets import Budgets, TierName
from zo2trl.planning.cost_model import CostModel
from zo2trl.planning.placement import Placement, place, place_again
from zo2trl.planning.rates import MachineRates
from zo2trl.planning.workload import UNBOUNDED, Work, Workload, loads_of, rough_workload
from zo2trl.planning.write_schedule import WriteSchedule, unmeasured_intervals, unmeasured_steps_replayed_in
from zo2trl.tiers.disk import CHECK_EVERY
from zo2trl.tiers.folder import StoreFolder
from zo2trl.tiers.tier import Source
from zo2trl.zo.estimators import TwoSidedSPSA
from zo2trl.zo.method import Method, make_method
from zo2trl.zo.mezo import MezoSeeds, device_kind
from zo2trl.zo.rounding import Rounding
from zo2trl.zo.seeds import derive_seed

__all__ = [
    "EngineOptions",
    "Plan",
    "cost_model_of",
    "has_run",
    "n_probes",
    "open_engine",
    "place_units",
    "plan_again",
    "plan_engine",
    "snapshot_interval",
    "work_of",
    "write_back_intervals",
]

logger = logging.getLogger(__name__)

Granularity = Literal["auto", "block", "leaf"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A user's choices, resolved to numbers.

    Args:
        budgets: byte ceilings.
        device: where forwards run.
        store_dir: folder of journal and disk tier.
        seed: of the run; with the step number it names every direction.
        zo_eps, num_directions: of the two-sided estimator.
        direction: "rademacher", "gaussian" or "mezo".
        rounding: "nearest", "stochastic", or None for stochastic where a trainable tensor is stored in 16 bit.
        write_back_every: steps between write-backs of a unit, or "auto".
        rates: what the machine does per second; None if that is not known. Bits never depend on them.
        tokens_per_step: about how many tokens a step's micro-batches have in all, as long as `forward` is not known.
            What computing takes depends on it, and so do `write_back_every="auto"` and the use of device memory.
        forward: one pass over one micro-batch, once it has been counted.
        n_micro_batches, passes_per_traversal: of a step with `forward`.
        granularity: "block", "leaf", or "auto": leaves only where blocks do not fit.
        decay_names: parameters that weight decay applies to.
        dtypes: storage dtypes of parameters to cast while adopting.
        base_folder: the checkpoint that the model's weights are, bit for bit (but for `dtypes`); None if there is no
            such thing, or nobody knows.
        max_replay_s: about how long replaying steps may take when a run is continued.
        sync_every: steps between two syncs of the journal.
        describe: writes into a folder what the caller wants exported besides weights.
        ranks: the processes that make the run together, each with a `store_dir` of its own.
    """

    budgets: Budgets
    device: torch.device
    store_dir: Path
    seed: int
    zo_eps: float = 1e-3
    num_directions: int = 1
    direction: str = "rademacher"
    rounding: Rounding | None = None
    write_back_every: int | Literal["auto"] = "auto"
    rates: MachineRates | None = field(default=None, compare=False)
    tokens_per_step: int = 2048
    forward: Workload | None = field(default=None, compare=False)
    n_micro_batches: int = 1
    passes_per_traversal: int = UNBOUNDED
    granularity: Granularity = "auto"
    decay_names: Collection[str] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    base_folder: str | None = None
    max_replay_s: float = 600.0
    sync_every: int = 1
    describe: Callable[[Path], None] = field(default=lambda folder: None, compare=False)
    ranks: Ranks = ALONE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and a placement of it that fits the budgets."""

    layout: Layout
    placement: Placement


def plan_again(model: nn.Module, options: EngineOptions, *, current: Placement, leaf_blocks: Collection[str]) -> Plan:
    """Lay out a model whose units have homes already, with these blocks visited by leaf and the others whole.

    Raises:
        BudgetError: see `place_again`.
    """
    layout = _layout_of(model, options)(leaf_blocks=frozenset(leaf_blocks))
    return Plan(layout=layout, placement=place_again(layout, current, options.budgets))


def plan_engine(model: nn.Module, options: EngineOptions) -> Plan:
    """Lay out and place a model without touching its weights.

    Raises:
        BudgetError: the budgets cannot hold one step at any allowed granularity.
    """
    lay_out = _layout_of(model, options)
    by_block, by_leaf = lay_out(), partial(lay_out, leaf_blocks="all")
    if options.budgets.device == "min" and options.granularity != "block":
        return Plan(layout=(layout := by_leaf()), placement=place_units(layout, options))
    try:
        current = place_units(by_block, options)
    except BudgetError:
        if options.granularity == "block":
            raise
        return Plan(layout=(layout := by_leaf()), placement=place_units(layout, options))
    if options.granularity == "leaf":
        # With homes that leave room for whole blocks, those that turn out to need it can be visited whole.
        return Plan(layout=(layout := by_leaf()), placement=place_again(layout, current, options.budgets))
    return Plan(layout=by_block, placement=current)


def _layout_of(model: nn.Module, options: EngineOptions) -> Callable[..., Layout]:
    """`plan_layout` of a model whose parameters keep the numbers they had when it was first laid out."""
    names = [name for name, _ in model.named_parameters()]
    order = _orders_of_models.get(model, names)
    if set(order) != set(names):
        order = names
    _orders_of_models[model] = order
    return partial(plan_layout, model, decay_names=options.decay_names, dtypes=options.dtypes, order=order)


def open_engine(model: nn.Module, options: EngineOptions, *, mode: Mode = "begin", fs: FS = LOCAL) -> Engine:
    """Move a model's parameters into a store and hook its forwards.

    Args:
        mode: "begin" starts a run on the model's weights; "continue" goes on with the run in the folder, of which the
            model is what it began with; "read" looks at that run without writing to the folder or locking it.

    Raises:
        BudgetError, ConfigError: see `plan_engine` and `make_method`.
        StoreError: the store's folder is foreign, locked, damaged, unwritable or too small.
        ConfigError, ParallelError: the processes of `options.ranks` do not open the same run.
    """
    plan = plan_engine(model, options)
    method = _make_method(plan.layout, options)
    run = _run_of(plan, options, method=method, model=model)
    ranks = ALONE if mode == "read" else options.ranks
    run = replace(
        run, store_id=agree_on_run(ranks, header=run.header(), choices=_choices(options), store_id=run.store_id)
    )
    _close_earlier_engines(options.store_dir, model)
    with ExitStack() as undo:
        folder = _open_folder(model, plan, options, mode=mode, fs=fs)
        undo.callback(folder.close)
        named = dict(model.named_parameters(remove_duplicate=False))
        source: Source = lambda spec: named[spec.name].detach().to(spec.dtype)  # noqa: E731
        store = open_store(folder, run, source, mode=mode, fs=fs)
        undo.callback(store.close)
        join_stores(ranks, store)
        _move_buffers(model, options.device)
        engine = Engine(model, store, estimator=method.estimator, seeds=_seeds(options), ranks=ranks)
        undo.pop_all()
    _open_engines[options.store_dir.resolve()] = engine
    return engine


def _choices(options: EngineOptions) -> dict[str, Any]:
    """What makes a step and is in no header."""
    return {
        "zo_eps": options.zo_eps, "num_directions": options.num_directions, "parallelism": options.ranks.parallelism,
    }  # fmt: skip


def has_run(store_dir: Path, *, fs: FS = LOCAL) -> bool:
    """Whether a folder holds a run that could be continued, the one set aside included."""
    return any(fs.exists(store_dir / name) for name in ("journal", "earlier/journal", "journal.moving"))


_open_engines: WeakValueDictionary[Path, Engine] = WeakValueDictionary()
_layouts_of_models: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_orders_of_models: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def _close_earlier_engines(store_dir: Path, model: nn.Module) -> None:
    # A notebook cell that makes a trainer is run again: the first trainer is still alive somewhere in the process,
    # and owns the folder, or hooks blocks of this very model.
    modules = set(model.modules())
    for path, engine in list(_open_engines.items()):
        same_folder, same_model = path == store_dir.resolve(), not modules.isdisjoint(engine.model.modules())
        if engine.store.is_open and (same_folder or same_model):
            what = "on this store" if same_folder else "for this model"
            logger.warning("The engine opened earlier %s (%s) is closed to open a new one.", what, path)
            engine.shutdown()


def _open_folder(model: nn.Module, plan: Plan, options: EngineOptions, *, mode: Mode, fs: FS) -> StoreFolder:
    digest = plan.layout.digest()
    if mode == "read":
        return StoreFolder.look(options.store_dir, layout_digest=digest, fs=fs)
    known = _layouts_of_models.setdefault(model, set())
    folder = StoreFolder.own(options.store_dir, layout_digest=digest, also_ours=known, fs=fs)
    known.add(digest)
    if mode == "continue" and not folder.recall_run():
        folder.close()
        raise StoreForeign(f"`store_dir` {options.store_dir} holds no run to continue. Check the path.")
    return folder


def _run_of(plan: Plan, options: EngineOptions, *, method: Method, model: nn.Module) -> StoreSpec:
    write_schedule = WriteSchedule(
        write_back=write_back_intervals(plan.layout, plan.placement, options),
        snapshot=snapshot_interval(plan.layout, plan.placement, options),
    )
    facts = {
        "decays": sorted(options.decay_names), "seed": options.seed,
        "quantised": quantised_digest(model),
    }  # fmt: skip
    return StoreSpec(
        layout=plan.layout, placement=plan.placement, method=method, write_schedule=write_schedule,
        device=options.device, facts=facts,
        base_folder=options.base_folder, sync_every=options.sync_every,
        describe=partial(_describe, model, also=options.describe), saves_adapter=is_saved_as_adapter(model),
    )  # fmt: skip


def _describe(model: nn.Module, folder: Path, *, also: Callable[[Path], None]) -> None:
    describe_model(model, folder)
    also(folder)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _make_method(layout: Layout, options: EngineOptions) -> Method:
    return make_method(
        options.direction, rounding=options.rounding or _default_rounding(layout), zo_eps=options.zo_eps,
        num_directions=options.num_directions, device_kind=device_kind(options.device),
        tensors=[(tensor.tensor_id, tensor.numel) for tensor in layout.trainable_tensors()],
    )  # fmt: skip


def _seeds(options: EngineOptions) -> Callable[[int], int]:
    """Step number -> seed of the step."""
    if options.direction == "mezo":
        return MezoSeeds(options.seed)
    return lambda step: derive_seed(options.seed, step, 0)


def _default_rounding(layout: Layout) -> Rounding:
    is_16_bit = any(tensor.dtype.itemsize == 2 for tensor in layout.trainable_tensors())
    return "stochastic" if is_16_bit else "nearest"


def n_probes(options: EngineOptions) -> int:
    """Count the probes of a step in this process."""
    estimator = TwoSidedSPSA(zo_eps=options.zo_eps, num_directions=options.num_directions)
    return len(options.ranks.share(estimator.probes()))


def write_back_intervals(layout: Layout, placement: Placement, options: EngineOptions) -> dict[TierName, int]:
    """Steps between two times that a unit's weights are stored at home, by tier.

    Raises:
        ConfigError: `write_back_every` is no number of steps.
    """
    if options.write_back_every != "auto":
        if options.write_back_every < 1:
            raise ConfigError(f'`write_back_every` must be at least 1 step or "auto", got {options.write_back_every}.')
        return dict.fromkeys(("cpu", "disk"), options.write_back_every)
    cost_model = cost_model_of(layout, options)
    if cost_model is None:
        return unmeasured_intervals(options.device.type)
    loads = loads_of(layout, placement.tier_of)
    return cost_model.write_back_intervals(loads, makes_pairs=placement.scratch_copies > 1)


def snapshot_interval(layout: Layout, placement: Placement, options: EngineOptions) -> int:
    """Steps between two snapshots of a unit in memory, so that replay takes about `max_replay_s` at most."""
    cost_model, n_directions = cost_model_of(layout, options), options.num_directions
    if cost_model is None:
        n_weights = n_directions * sum(spec.numel for spec in layout.trainable_tensors())
        return max(unmeasured_steps_replayed_in(options.max_replay_s, n_weights=n_weights), 1)
    loads = loads_of(layout, placement.tier_of)
    return max(cost_model.steps_replayed_in(options.max_replay_s, loads=loads), 1)


def work_of(layout: Layout, options: EngineOptions) -> Work:
    """What a step does with these options; as long as no pass has been counted, by the number of weights."""
    n_tokens = options.tokens_per_step // options.n_micro_batches
    return Work(
        forward=options.forward or rough_workload(layout, n_tokens=n_tokens),
        n_micro_batches=options.n_micro_batches, n_probes=n_probes(options), num_directions=options.num_directions,
        direction=options.direction, rounding=options.rounding or _default_rounding(layout),
        passes_per_traversal=options.passes_per_traversal, checks_every=CHECK_EVERY,
        on_cpu=options.device.type == "cpu",
    )  # fmt: skip


def cost_model_of(layout: Layout, options: EngineOptions) -> CostModel | None:
    """The cost model of these options; None if the rates of the machine are not known."""
    return None if options.rates is None else CostModel(rates=options.rates, work=work_of(layout, options))


def place_units(layout: Layout, options: EngineOptions) -> Placement:
    """Place a layout's units within the budgets of these options.

    Raises:
        BudgetError: see `place`.
    """
    return place(layout, options.budgets, cost_model_of(layout, options))
