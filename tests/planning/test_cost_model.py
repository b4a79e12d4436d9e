"""Promises of the cost model: write-backs as often as costs nothing, and a step takes what its slowest part takes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rates import H200, TWO_CORES
from tests.support.stores import synthetic_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.cost_model import MAX_WRITE_BACK_INTERVAL, CostModel
from zo2trl.planning.placement import place, smallest_device_budget
from zo2trl.planning.workload import KindLoad, TierLoad, Work, Workload, loads_of

OPT_13B = 25_700_000_000  # bytes in bf16
ONE_BATCH = 2048  # tokens
DTYPES = {2: "bfloat16", 4: "float32"}


def loads(itemsize=2, trained_share=1.0, **n_bytes):
    """Weights in each tier: 40 blocks of nothing else."""
    found = {}
    for tier, n in n_bytes.items():
        kinds = {(DTYPES[itemsize], itemsize): KindLoad(n=int(n * trained_share) // itemsize,
                                                        n_copied=int(n * trained_share) // itemsize)}  # fmt: skip
        found[tier] = TierLoad(
            n_bytes=n, trained_bytes=int(n * trained_share), n_trained_units=40, n_visits=40, n_bound=640, kinds=kinds
        )
    return found


def model(*, of, tokens=ONE_BATCH, itemsize=2, rates=H200, **work):
    """Two probes over so many tokens, of weights of so many bytes."""
    forward = Workload(flops=Counter({DTYPES[itemsize]: 2 * tokens * of // itemsize}))
    return CostModel(rates=rates, work=Work(forward=forward, on_cpu=rates is TWO_CORES, **work))


def interval(tier="cpu", *, share=1.0, itemsize=2, of=OPT_13B, trained_share=1.0, **work):
    here = loads(itemsize, gpu=int(of * (1 - share)), **{tier: int(of * share)})
    return model(of=of, itemsize=itemsize, **work).write_back_intervals(here)[tier]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rates", [H200, TWO_CORES], ids=["H200", "two cores"])
@pytest.mark.parametrize("tokens", [0, 128, 2048, 8192, 1 << 16, 1 << 23])
def test_slower_homes_are_written_less_often_and_never_more_than_the_limit(itemsize, rates, tokens):
    cpu, disk = (interval(tier, rates=rates, itemsize=itemsize, tokens=tokens) for tier in ("cpu", "disk"))
    assert 1 <= cpu <= disk <= MAX_WRITE_BACK_INTERVAL


def test_a_step_that_waits_for_the_link_writes_seldom():
    assert interval() > 4


def test_a_step_that_computes_longer_than_it_moves_writes_often():
    assert interval(n_micro_batches=4) <= 2, "four micro-batches"
    assert interval(n_micro_batches=4, n_probes=8, num_directions=4) <= 2, "four directions"


def test_two_directions_hide_less_replay_than_one():
    assert 1 < interval(n_probes=4, num_directions=2) < interval()


def test_where_most_weights_are_resident_the_streamed_ones_are_written_often():
    assert interval(share=0.2) <= 2


def test_what_a_drive_makes_a_step_wait_for_lets_host_memory_be_written_every_step():
    here = loads(cpu=OPT_13B // 2, disk=OPT_13B // 2)
    every = model(of=OPT_13B).write_back_intervals(here)
    assert every["cpu"] == 1 and every["disk"] == MAX_WRITE_BACK_INTERVAL


@given(
    gpu=st.integers(0, 1 << 36), cpu=st.integers(0, 1 << 36), disk=st.integers(0, 1 << 36),
    tokens=st.integers(1, 1 << 20), num_directions=st.integers(1, 4), trained_share=st.floats(0, 1),
)  # fmt: skip
def test_weights_further_away_and_more_of_them_never_make_a_step_shorter(
    gpu, cpu, disk, tokens, num_directions, trained_share
):
    cost_model = model(of=1 << 34, tokens=tokens, num_directions=num_directions, n_probes=2 * num_directions)

    def step_s(**n_bytes):
        here = loads(trained_share=trained_share, **n_bytes)
        return cost_model.step_time(here, every={"gpu": 1, "cpu": 4, "disk": 4}, makes_pairs=True).step_s

    here = step_s(gpu=gpu, cpu=cpu, disk=disk)
    assert here <= step_s(gpu=gpu, cpu=cpu, disk=disk + 4096) * (1 + 1e-9)
    assert step_s(cpu=cpu + disk, gpu=gpu) <= step_s(gpu=gpu, disk=cpu + disk) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("tier", "n_micro_batches", "bound"),
    [("gpu", 1, "compute"), ("cpu", 1, "upload"), ("cpu", 8, "compute"), ("disk", 1, "disk")],
)
def test_it_says_what_a_step_waits_for(tier, n_micro_batches, bound):
    cost_model = model(of=OPT_13B, n_micro_batches=n_micro_batches)
    time = cost_model.step_time(loads(**{tier: OPT_13B}), every={"cpu": 8, "disk": 32}, makes_pairs=True)
    assert time.bound == bound


def test_frozen_weights_are_neither_written_nor_perturbed():
    every = {"gpu": 1, "cpu": 1, "disk": 1}
    frozen, trained = (
        model(of=OPT_13B).step_time(
            loads(trained_share=share, gpu=OPT_13B, cpu=OPT_13B, disk=OPT_13B), every=every, makes_pairs=True
        )
        for share in (0.0, 1.0)
    )
    assert frozen.compute_s < trained.compute_s and frozen.upload_s < trained.upload_s
    assert frozen.disk_s < trained.disk_s


# benchmarks/results and docs/performance.md: OPT-13B in bf16 on an H200, 2,048 tokens a micro-batch.
@pytest.mark.parametrize(("every", "measured_s"), [(1, 0.502), (2, 0.473), (4, 0.461), (8, 0.459)])
def test_the_preset_of_the_h200_gives_the_steps_that_were_measured_on_one(every, measured_s):
    time = model(of=OPT_13B).step_time(loads(cpu=OPT_13B), every={"cpu": every}, makes_pairs=True)
    assert time.step_s == pytest.approx(measured_s, rel=0.04)


# What is left after as many blocks as fit: for a second perturbed copy where a step computes, for a block where it
# moves.


@pytest.mark.parametrize(("tokens", "copies"), [(ONE_BATCH, 1), (16 * ONE_BATCH, 2)])
def test_device_memory_goes_to_what_bounds_the_step(tokens, copies):
    layout = synthetic_layout([[400]] * 12)
    block = layout.units[1].n_bytes
    budgets = Budgets(device=smallest_device_budget(layout) + 3 * block, cpu=1 << 40)
    placement = place(layout, budgets, model(of=layout.n_bytes, tokens=tokens, itemsize=4))
    assert placement.scratch_copies == copies
    assert len(placement.units_in("gpu")) - 1 == 3 - copies


def test_two_runs_with_the_same_arguments_and_rates_place_alike():
    layout = synthetic_layout([[4, 2]] * 12)
    budgets = Budgets(device=smallest_device_budget(layout) + layout.n_bytes // 3, cpu=layout.n_bytes // 3)
    first, second = (place(layout, budgets, model(of=layout.n_bytes, itemsize=4)) for _ in range(2))
    assert first == second
    every = [model(of=layout.n_bytes).write_back_intervals(loads_of(layout, each.tier_of)) for each in (first, second)]
    assert every[0] == every[1]
