"""The forecast: what it adds up has reasons, and each shows in the seconds or bytes that it should."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.toys import options, toy
from zo2trl.engine.opening import EngineOptions, plan_engine
from zo2trl.forecast.forecast import Forecast, forecast
from zo2trl.forecast.time_share import TimeShare
from zo2trl.forecast.traversal_bench import measure_traversals
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.rates import MachineRates, TraversalCost, VisitCost
from zo2trl.planning.workload import Workload

FREE_TRAVERSAL = TraversalCost(resident_visit_s=0.0, streamed_visit_s=0.0, tensor_s=0.0, file_s=0.0, step_s=0.0)
FREE = MachineRates(  # a machine on which everything is done in no time
    flops={"float32": 1e30}, moved_bytes=1e30, new_bytes=1e30, operation_s=0.0,
    visits={"float32 rademacher nearest": VisitCost(alone_s=0.0, pair_s=0.0, step_s=0.0)},
    upload_bytes=1e30, download_bytes=1e30, disk_read_bytes=1e30, disk_write_bytes=1e30, disk_cpu_s=0.0,
    traversal=FREE_TRAVERSAL, cores=2,
)  # fmt: skip
N_BLOCKS = 3


@pytest.fixture
def of(tmp_path: Path) -> Callable[..., Forecast]:
    """The forecast of a toy on a machine where only what is named takes time."""

    def made(tier: str = "gpu", *, workload: Workload | None = None, chosen: Any = None, **costs: Any) -> Forecast:
        traversal = replace(
            FREE_TRAVERSAL, **{name: costs.pop(name) for name in [*costs] if name in TraversalCost.__slots__}
        )
        rates = replace(FREE, traversal=traversal, **costs)
        every_step = {"write_back_every": 1}
        mine: EngineOptions = replace(
            options(tmp_path, tier=tier), rates=rates, forward=workload or Workload(), **(every_step | (chosen or {}))
        )
        plan = plan_engine(toy(n_blocks=N_BLOCKS), mine)
        return forecast(plan, mine, tokens=10)

    return made


def test_every_visit_costs_and_what_is_outside_the_blocks_is_visited_on_both_sides(of: Any) -> None:
    assert of(resident_visit_s=1.0).time.visit_s == pytest.approx(N_BLOCKS + 2)
    assert of("cpu", streamed_visit_s=1.0).time.visit_s == pytest.approx(N_BLOCKS)
    assert of("cpu", resident_visit_s=1.0).time.visit_s == pytest.approx(2)
    assert of(step_s=1.0).time.visit_s == pytest.approx(1)


def test_leaves_are_more_visits_with_the_same_tensors(of: Any) -> None:
    blocks, leaves = ({"granularity": granularity} for granularity in ("block", "leaf"))
    one, other = (of("cpu", streamed_visit_s=1.0, chosen=chosen).time.visit_s for chosen in (blocks, leaves))
    assert other > one
    one, other = (of("cpu", tensor_s=1.0, chosen=chosen).time.visit_s for chosen in (blocks, leaves))
    assert one == pytest.approx(other)


def test_weights_between_others_of_another_kind_are_drawn_by_themselves(of: Any) -> None:
    visits = {"float32 rademacher nearest": VisitCost(alone_s=0.0, pair_s=0.0, step_s=0.0, span_s=1.0)}
    weights = [name for name, _ in toy(n_blocks=N_BLOCKS).named_parameters() if name.endswith("weight")]
    assert of(visits=visits).time.visit_s == 0, "the first of a visit is in the visit's own cost"
    assert of(visits=visits, chosen={"decay_names": weights}).time.visit_s > 0


def test_a_version_costs_the_drive_however_small_and_nobody_else(of: Any) -> None:
    assert of("disk", file_s=1.0).time.disk_s == pytest.approx(N_BLOCKS)
    assert of("disk", file_s=1.0, chosen={"write_back_every": 2}).time.disk_s == pytest.approx(N_BLOCKS / 2)
    assert of("cpu", file_s=1.0).time.step_s == pytest.approx(0, abs=1e-9)


def test_passes_pay_for_new_memory_and_attention_at_its_own_rate(of: Any) -> None:
    fresh = of(workload=Workload(peak_bytes=1000), new_bytes=500.0)
    assert fresh.time.forward_s == pytest.approx(2 * 2)
    work = Workload(flops=Counter({"float32": 8, "float32 attention": 8}))
    assert of(workload=work, flops={"float32": 8.0, "float32 attention": 2.0}).time.forward_s == pytest.approx(2 * 5)


def test_what_segments_never_reach_of_the_ring_is_no_memory(of: Any) -> None:
    least = of("cpu", chosen={"granularity": "block"})
    largest = least.plan.placement.largest_segment_bytes
    roomier = {"budgets": Budgets(device=least.plan.placement.device_bytes + largest // 2, cpu=1 << 30)}
    wider = of("cpu", chosen={"granularity": "block", **roomier})
    assert wider.plan.placement.ring_bytes > least.plan.placement.ring_bytes
    assert wider.peaks.device > least.peaks.device and wider.peaks.host == least.peaks.host


def test_traversals_are_dry_run_on_this_machine_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = measure_traversals(torch.device("cpu"), tmp_path / "not" / "there", share=TimeShare.of(0.0))
    assert min(getattr(found, name) for name in TraversalCost.__slots__) >= 0
    assert found.streamed_visit_s >= found.resident_visit_s and list(tmp_path.iterdir()) == []


def test_a_dry_run_model_is_visited_block_by_block() -> None:
    from zo2trl.forecast.traversal_bench import _Chain
    from zo2trl.layout.model_layout import find_stacks

    model: nn.Module = _Chain(4, 2)
    assert [len(stack) for _, stack in find_stacks(model)] == [4]
