"""Layouts and stores without an engine: for tests of the rooms below it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.journal import Journal
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout import Layout, Segment, TensorSpec, Unit, VisitPoint
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import Placement, place
from zo2trl.planning.write_schedule import WriteSchedule
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.store import TieredStore
from zo2trl.tiers.tier import Tiers
from zo2trl.tiers.unit_files import UnitFiles
from zo2trl.zo.method import Method, make_method
from zo2trl.zo.records import StepRecord
from zo2trl.zo.rounding import Rounding
from zo2trl.zo.tiles import TILE, Span, TileMap

CPU = torch.device("cpu")


def synthetic_layout(blocks: Sequence[Sequence[int]], *, root_tiles: int = 1, trainable: bool = True) -> Layout:
    """A layout of blocks given as tiles per leaf (fp32), visited leaf by leaf; no model behind it."""
    units, points, next_id = [], [], 0
    for index, leaves in enumerate([[root_tiles], *blocks]):
        specs, offset = [], 0
        for n_tiles in leaves:
            specs.append(
                TensorSpec(name=f"t{next_id}", tensor_id=next_id, shape=(n_tiles * TILE,), dtype=torch.float32,
                           byte_offset=offset, stored_offset=offset, trainable=trainable, decays=False)
            )  # fmt: skip
            next_id, offset = next_id + 1, offset + specs[-1].n_padded_bytes
        kind = "block" if index else "root"
        units.append(Unit(index=index, name=f"block{index}" if index else "root", kind=kind, tensors=tuple(specs)))
        points += [(units[-1], spec) for spec in specs]
    return Layout(
        units=tuple(units), points=tuple(_point(i, unit, spec) for i, (unit, spec) in enumerate(points)),
        stack_ends=frozenset(), leaf_blocks=frozenset(),
    )  # fmt: skip


def _point(index: int, unit: Unit, spec: TensorSpec) -> VisitPoint:
    tiles = TileMap.for_tensors([(spec.tensor_id, spec.numel)])
    span = Span(dtype=spec.dtype, byte_start=0, tiles=tiles, decays=False)
    segment = Segment(index=index, unit=unit, byte_start=spec.byte_offset, n_bytes=spec.n_padded_bytes,
                      tensors=(spec,), spans=(span,) if spec.trainable else ())  # fmt: skip
    return VisitPoint(index=index, module_name=spec.name, block_name=unit.name, segments=(segment,))


def streamed_segments(count: int, *, tiles: int = 1) -> list[Segment]:
    """Segments of as many one-leaf blocks."""
    return synthetic_layout([[tiles]] * count).segments[1:]


def method(rounding: Rounding = "nearest", direction: str = "rademacher") -> Method:
    return make_method(direction, rounding=rounding)


def record(
    step: int, *, grad: float = 0.25, lr: float = 0.125, wd: float = 0.0, seed: int | None = None
) -> StepRecord:
    return StepRecord(
        step=step, seed=1000 + step if seed is None else seed, coefficients=(grad,), learning_rate=lr,
        weight_decay=wd, zo_eps=1e-3, losses=(2.0 + grad * 1e-3, 2.0 - grad * 1e-3), scalars=(abs(grad),),
    )  # fmt: skip


def source_of(model: nn.Module) -> Callable[[TensorSpec], torch.Tensor]:
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lambda spec: values[spec.name].to(spec.dtype)


def placed(layout: Layout, tier: str) -> Placement:
    plenty = sum(unit.n_bytes for unit in layout.units) * 10
    return place(layout, Budgets(device=plenty if tier == "gpu" else "min", cpu=plenty if tier == "cpu" else 0))


def make_store(
    model: nn.Module,
    folder: Path,
    *,
    tier: str = "disk",
    every: int = 1,
    snapshot: int = 1 << 40,
    by_leaf: bool = False,
    stored: Mapping[str, str] | None = None,
    fs: FS = LOCAL,
    disk: Callable[..., DiskTier] = DiskTier,
) -> TieredStore:
    """A filled store with every block in one tier."""
    layout = plan_layout(model, leaf_blocks="all" if by_leaf else (), stored=stored)
    placement = placed(layout, tier)
    in_cpu = [layout.units[index] for index in placement.units_in("cpu")]
    fs.make_dir(folder / "units")
    files = UnitFiles(folder / "units", fs=fs)
    tiers = Tiers(gpu=DeviceTier(CPU), cpu=HostTier(in_cpu, pinned=False), disk=disk(files, fs=fs))
    residency = Residency(layout, placement, tiers=tiers, files=files, device=CPU)
    residency.populate(source_of(model), keep_base=False)
    journal = Journal.create(folder / "journal", header={}, units=files.first_records, sync_every=0)
    files.attach(journal, layout.units)
    return TieredStore(
        residency, journal=journal, logbook=Logbook.open(folder / "logbook"), method=method(), device=CPU,
        write_schedule=WriteSchedule(write_back={"cpu": every, "disk": every}, snapshot=snapshot),
    )  # fmt: skip


@contextmanager
def open_store(model: nn.Module, folder: Path, **choices) -> Iterator[TieredStore]:
    store = make_store(model, folder, **choices)
    try:
        yield store
    finally:
        store.close()


def visit_all(store: TieredStore) -> dict[str, torch.Tensor]:
    """One traversal's visits; copies of the tensors that were lent."""
    lent: dict[str, torch.Tensor] = {}
    for point in store.layout.points:
        with store.lease_clean(point) as weights:
            for segment, buffer in zip(point.segments, weights, strict=True):
                for spec in segment.tensors:
                    start = spec.byte_offset - segment.byte_start
                    flat = buffer[start : start + spec.n_bytes].view(spec.dtype)
                    lent[spec.name] = flat.view(spec.shape).clone()
    store.end_traversal()
    return lent


def at_home(store: TieredStore) -> dict[str, torch.Tensor]:
    """The tensors as their homes show them."""
    shown: dict[str, torch.Tensor] = {}
    for unit in store.layout.units:
        buffer, _ = store.view(unit)
        for spec in unit.tensors:
            flat = buffer[spec.byte_offset : spec.byte_offset + spec.n_bytes].view(spec.dtype)
            shown[spec.name] = flat.view(spec.shape).clone()
    return shown


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
