"""Opening an engine: from a model and a user's choices to units in their tiers, hooks in place.

Does not: run a step. Everything that can be refused is refused here, before a byte is moved.
"""

import logging
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
import transformers
from torch import nn

from zo2trl.amp.codecs import PLAIN
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError, ConfigError
from zo2trl.tiers.cpu import HostTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.folder import StoreFolder
from zo2trl.tiers.fs import FS, LOCAL
from zo2trl.tiers.gpu import DeviceTier
from zo2trl.tiers.journal import Journal
from zo2trl.tiers.layout import Layout, plan_layout
from zo2trl.tiers.placement import Budgets, Placement, TierName, place, place_again, write_back_interval
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import Tier
from zo2trl.zo.estimators import TwoSidedSPSA
from zo2trl.zo.mezo import MezoNoise, MezoSeeds
from zo2trl.zo.noise import Noise, derive_seed, make_noise
from zo2trl.zo.rules import Rounding, UpdateAlong, UpdateRule

__all__ = ["EngineOptions", "Plan", "open_engine", "plan_again", "plan_engine"]

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
        update_along: see `UpdateRule`; an experimenter's choice (benchmarks/noise.py).
        write_back_every: steps between write-backs of a unit, or "auto".
        granularity: "block", "leaf", or "auto": leaves only where blocks do not fit.
        decay_names: parameters that weight decay applies to.
        dtypes: storage dtypes of parameters to cast while adopting.
    """

    budgets: Budgets
    device: torch.device
    store_dir: Path
    seed: int
    zo_eps: float = 1e-3
    num_directions: int = 1
    direction: str = "rademacher"
    rounding: Rounding | None = None
    update_along: UpdateAlong = "drawn"
    write_back_every: int | Literal["auto"] = "auto"
    granularity: Granularity = "auto"
    decay_names: Collection[str] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout and a placement of it that fits the budgets."""

    layout: Layout
    placement: Placement


def plan_again(model: nn.Module, options: EngineOptions, *, homes: Placement, leaf_blocks: Collection[str]) -> Plan:
    """Lay out a model whose units have homes already, with these blocks visited by leaf and the others whole.

    Raises:
        BudgetError: see `place_again`.
    """
    layout = plan_layout(
        model, decay_names=options.decay_names, dtypes=options.dtypes, leaf_blocks=frozenset(leaf_blocks)
    )
    return Plan(layout=layout, placement=place_again(layout, homes, options.budgets))


def plan_engine(model: nn.Module, options: EngineOptions) -> Plan:
    """Lay out and place a model without touching its weights.

    Raises:
        BudgetError: the budgets cannot hold one step at any allowed granularity.
    """
    lay_out = partial(plan_layout, model, decay_names=options.decay_names, dtypes=options.dtypes)
    by_block, by_leaf = lay_out(), partial(lay_out, leaf_blocks="all")
    if options.budgets.device == "min" and options.granularity != "block":
        return Plan(layout=(layout := by_leaf()), placement=place(layout, options.budgets))
    try:
        homes = place(by_block, options.budgets)
    except BudgetError:
        if options.granularity == "block":
            raise
        return Plan(layout=(layout := by_leaf()), placement=place(layout, options.budgets))
    if options.granularity == "leaf":
        # With homes that leave room for whole blocks, those that turn out to need it can be visited whole.
        return Plan(layout=(layout := by_leaf()), placement=place_again(layout, homes, options.budgets))
    return Plan(layout=by_block, placement=homes)


def open_engine(model: nn.Module, options: EngineOptions, *, fs: FS = LOCAL) -> Engine:
    """Move a model's parameters into a new store and hook its forwards.

    Raises:
        BudgetError, ConfigError: see `plan_engine` and `make_noise`.
        StoreError: the store's folder is foreign, locked, unwritable or too small.
    """
    plan = plan_engine(model, options)
    noise, seeds = _make_noise(plan.layout, options)
    rounding = options.rounding or _default_rounding(plan.layout)
    rule = UpdateRule(noise=noise, rounding=rounding, update_along=options.update_along)
    digest = plan.layout.digest()
    _close_earlier_engines(options.store_dir, model)
    with ExitStack() as undo:
        known = _layouts_of_models.setdefault(model, set())
        folder = StoreFolder(options.store_dir, layout_digest=digest, also_ours=known, fs=fs)
        known.add(digest)
        undo.callback(folder.close)
        _check_disk_space(plan, folder, fs)
        start_journal = partial(_start_journal, folder, _header(digest, rule, options), fs=fs)
        journal = start_journal()
        undo.callback(journal.close)
        store = TieredStore(
            plan.layout, plan.placement, journal=journal, rule=rule, device=options.device,
            tiers=_make_tiers(plan, folder, device=options.device, fs=fs),
            write_back_every=_intervals(plan.layout, options), restart_journal=start_journal,
            on_close=folder.close,
        )  # fmt: skip
        undo.callback(store.close)
        _adopt(model, store)
        estimator = TwoSidedSPSA(zo_eps=options.zo_eps, num_directions=options.num_directions)
        engine = Engine(model, store, estimator=estimator, seeds=seeds)
        undo.pop_all()
    _open_engines[options.store_dir.resolve()] = engine
    return engine


_open_engines: WeakValueDictionary[Path, Engine] = WeakValueDictionary()
_layouts_of_models: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


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


def _adopt(model: nn.Module, store: TieredStore) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    store.adopt(lambda spec: named[spec.name].detach().to(spec.dtype))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(store.device)


def _start_journal(folder: StoreFolder, header: dict[str, Any], *, fs: FS) -> Journal:
    folder.retire_journal()
    return Journal.create(folder.journal, header=header, fs=fs)


def _make_noise(layout: Layout, options: EngineOptions) -> tuple[Noise, Callable[[int], int]]:
    if options.direction == "mezo":
        tensors = [(tensor.tensor_id, tensor.numel) for tensor in layout.trainable_tensors()]
        return MezoNoise(tensors), MezoSeeds(options.seed)
    noise: Noise = make_noise(options.direction)
    return noise, lambda step: derive_seed(options.seed, step, 0)


def _default_rounding(layout: Layout) -> Rounding:
    is_16_bit = any(tensor.dtype.itemsize == 2 for tensor in layout.trainable_tensors())
    return "stochastic" if is_16_bit else "nearest"


def _intervals(layout: Layout, options: EngineOptions) -> dict[TierName, int]:
    itemsize = min((tensor.dtype.itemsize for tensor in layout.trainable_tensors()), default=4)
    tiers: Sequence[TierName] = ("cpu", "disk")
    if options.write_back_every != "auto":
        if options.write_back_every < 1:
            raise ConfigError(f'`write_back_every` must be at least 1 step or "auto", got {options.write_back_every}.')
        return dict.fromkeys(tiers, options.write_back_every)
    kind = options.device.type
    return {tier: write_back_interval(tier=tier, device_type=kind, itemsize=itemsize) for tier in tiers}


def _make_tiers(plan: Plan, folder: StoreFolder, *, device: torch.device, fs: FS) -> dict[TierName, Tier]:
    in_cpu = [plan.layout.units[index] for index in plan.placement.units_in("cpu")]
    return {
        "gpu": DeviceTier(device),
        "cpu": HostTier(in_cpu, pinned=device.type == "cuda"),
        "disk": DiskTier(folder.units, fs=fs),
    }


def _check_disk_space(plan: Plan, folder: StoreFolder, fs: FS) -> None:
    on_disk = [plan.layout.units[index].n_bytes for index in plan.placement.units_in("disk")]
    needed = sum(on_disk) + 2 * max(on_disk, default=0)  # new versions are written beside the old ones
    free = fs.free_bytes(folder.path)
    if needed > free:
        raise BudgetError(
            f"`store_dir` {folder.path} must hold {needed:,} bytes on disk, {free:,} are free. Free some space, "
            "choose another `store_dir`, or raise `cpu_memory` or `device_memory` so that fewer units live on disk."
        )


def _header(digest: str, rule: UpdateRule, options: EngineOptions) -> dict[str, Any]:
    return {
        "layout": digest,
        "noise": rule.noise.identity,
        "rule": rule.identity,
        "rounding": rule.rounding,
        "codec": PLAIN.identity,
        "decays": sorted(options.decay_names),
        "seed": options.seed,
        "num_directions": options.num_directions,
        "device": options.device.type,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip
