"""What activations take is kept free on the device, and where units move to for that never shows in a bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_batch, tiny_model
from tests.support.rates import H200, TWO_CORES
from zo2trl.engine.device_fit import DeviceFit
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.precision import fp32_heads
from zo2trl.engine.step import Engine
from zo2trl.errors import BudgetError
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.workload import Workload

NAME = "llama"


def least(model, folder: Path) -> int:
    options = EngineOptions(
        budgets=Budgets(device="min", cpu=1 << 34),
        device=torch.device("cpu"),
        store_dir=folder,
        seed=0,
        granularity="block",
    )
    return plan_engine(model, options).placement.device_bytes


def trained(
    folder: Path, *, device: int, cpu: int = 1 << 34, measured: int | None, n_steps: int = 3, counted=None, **chosen
):
    """(units of each tier, losses, weights) of a run whose traversals take `measured` bytes beside weights."""
    model = tiny_model(NAME)
    fp32_heads(model)
    batch = tiny_batch(NAME)
    options = EngineOptions(
        budgets=Budgets(device=device, cpu=cpu), device=torch.device("cpu"), store_dir=folder / "store", seed=3,
        granularity="block", **chosen,
    )  # fmt: skip
    losses = []
    with closing_engine(open_engine(model, options)) as engine:
        fit = DeviceFit(engine, options, count=lambda inputs: counted)
        for step in range(n_steps):
            if measured is not None:
                fit.before_steps(lambda: model(**batch).loss, batch, n_passes=2)
            estimate = engine.step([lambda: model(**batch).loss], step=step)
            losses.append((estimate.loss_plus, estimate.loss_minus))
            engine.commit(learning_rate=1e-2, weight_decay=0.1)
        engine.flush()
        tiers = [engine.store.tier_of(unit) for unit in engine.store.layout.units]
        weights = {key: value.clone() for key, value in model.state_dict().items()}
    return tiers, losses, weights


@contextmanager
def closing_engine(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.shutdown()


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch):
    """Let the CPU be a device whose activations can be measured: so many bytes."""

    def measure(n_bytes: int) -> None:
        monkeypatch.setattr(DeviceFit, "_is_wanted", True)
        monkeypatch.setattr(DeviceFit, "_measured", lambda self, loss, *, n_passes: n_bytes)
        monkeypatch.setattr("zo2trl.engine.device_fit.SPARE_BYTES", 0)
        monkeypatch.setattr("zo2trl.engine.device_fit.SPARE_SHARE", 1.0)

    return measure


@pytest.mark.parametrize("cpu", [1 << 34, 0], ids=["to host memory", "to disk"])
def test_units_make_room_for_activations_and_the_weights_are_the_same(tmp_path: Path, measuring, cpu: int) -> None:
    everything = 1 << 30
    wanted = trained(tmp_path / "wanted", device=everything, measured=None)
    assert set(wanted[0]) == {"gpu"}
    block = max(unit.n_bytes for unit in plan_units(tmp_path))
    measuring(everything - least(tiny_model(NAME), tmp_path) - block)
    tiers, losses, weights = trained(tmp_path / "fitted", device=everything, cpu=cpu, measured=1)
    assert set(tiers) == {"gpu", "cpu" if cpu else "disk"}
    assert losses == wanted[1]
    assert all(torch.equal(weights[name], wanted[2][name]) for name in weights)


def plan_units(folder: Path):
    options = EngineOptions(budgets=Budgets(device="min", cpu=0), device=torch.device("cpu"), store_dir=folder, seed=0)
    return plan_engine(tiny_model(NAME), options).layout.units


def test_what_can_not_fit_is_refused_with_the_bytes_that_activations_take(tmp_path: Path, measuring) -> None:
    device = least(tiny_model(NAME), tmp_path) * 3
    measuring(device)
    with pytest.raises(BudgetError, match=r"device_memory.*activations"):
        trained(tmp_path, device=device, measured=1)


def test_a_batch_no_larger_than_one_before_is_not_measured_again(tmp_path: Path, measuring, monkeypatch) -> None:
    measuring(0)
    n_measured = []
    monkeypatch.setattr(DeviceFit, "_measured", lambda self, loss, *, n_passes: n_measured.append(n_passes) or 0)
    trained(tmp_path, device=1 << 30, measured=1, n_steps=4)
    assert n_measured == [2]


def test_how_often_units_are_written_follows_the_tokens_of_a_step(tmp_path: Path) -> None:
    model = tiny_model(NAME)
    batch = tiny_batch(NAME)
    options = EngineOptions(
        budgets=Budgets(device=1 << 30, cpu=0), device=torch.device("cpu"), store_dir=tmp_path / "store", seed=3
    )
    with closing_engine(open_engine(model, options)) as engine:
        fit = DeviceFit(engine, options)
        fit.before_steps(lambda: model(**batch).loss, batch, n_passes=4)
        assert fit.options.tokens_per_step == 2 * batch["input_ids"].numel()


@pytest.mark.parametrize("cpu", [1 << 34, 0], ids=["host memory", "disk"])
def test_rates_of_the_machine_never_show_in_a_bit(tmp_path: Path, measuring, cpu: int) -> None:
    model = tiny_model(NAME)
    device = least(model, tmp_path) + sum(p.numel() * p.element_size() for p in model.parameters()) // 3
    measuring(0)
    runs = [
        trained(tmp_path / name, device=device, cpu=cpu, measured=1, n_steps=5, rates=rates)
        for name, rates in (("unknown", None), ("fast", H200), ("slow", TWO_CORES))
    ]
    for _, losses, weights in runs[1:]:
        assert losses == runs[0][1]
        assert all(torch.equal(weights[name], runs[0][2][name]) for name in weights)


def test_counted_bytes_are_kept_free_as_a_plan_does_and_more_only_if_more_is_measured(
    tmp_path: Path, measuring, caplog: pytest.LogCaptureFixture
) -> None:
    everything = 1 << 30
    block = max(unit.n_bytes for unit in plan_units(tmp_path))
    n_bytes = everything - least(tiny_model(NAME), tmp_path) - 2 * block
    counted = Workload(peak_bytes=n_bytes)
    measuring(n_bytes // 2)
    planned = trained(tmp_path / "counted", device=everything, measured=1, counted=counted)[0]
    assert "cpu" in planned and not caplog.records
    measuring(n_bytes)
    assert trained(tmp_path / "measured", device=everything, measured=1)[0] == planned
    measuring(n_bytes + block)
    more = trained(tmp_path / "more", device=everything, measured=1, counted=counted)[0]
    assert more.count("gpu") < planned.count("gpu")
    assert "more is kept free than `zo2trl plan` foresees" in caplog.text
