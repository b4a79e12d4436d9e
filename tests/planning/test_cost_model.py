"""Promises of the pace: write-backs as often as costs nothing, and a step takes what its slowest part takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stores import synthetic_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.cost_model import MAX_WRITE_BACK_INTERVAL, CostModel, Work
from zo2trl.planning.placement import place, smallest_device_budget

OPT_13B = 25_700_000_000  # bytes in bf16
ONE_BATCH = 2 * 2048  # tokens of two probes


def interval(tier="cpu", *, device="cuda", share=1.0, **work):
    """For a bf16 model streamed to a GPU, two probes of 2,048 tokens."""
    return CostModel.on(device, Work(**{"token_passes": ONE_BATCH, **work})).write_back_interval(tier, share=share)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("token_passes", [0, 256, 4096, 16384, 1 << 17, 1 << 24])
def test_slower_homes_are_written_less_often_and_never_more_than_the_limit(itemsize, device, token_passes):
    cpu, disk = (
        interval(tier, device=device, itemsize=itemsize, token_passes=token_passes) for tier in ("cpu", "disk")
    )
    assert 1 <= cpu <= disk <= MAX_WRITE_BACK_INTERVAL


def test_a_step_that_waits_for_the_link_writes_seldom():
    assert interval() > 4


def test_a_step_that_computes_longer_than_it_moves_writes_often():
    assert interval(token_passes=4 * ONE_BATCH) <= 2, "four micro-batches"
    assert interval(token_passes=4 * ONE_BATCH, num_directions=4) <= 2, "four directions"


def test_two_directions_hide_less_replay_than_one():
    assert 1 < interval(token_passes=2 * ONE_BATCH, num_directions=2) < interval()


def test_where_most_weights_are_resident_the_streamed_ones_are_written_often():
    assert interval(share=0.2) <= 2


def test_steps_that_cost_more_to_replay_are_replayed_less():
    assert interval("gpu", direction="gaussian") <= interval("gpu", direction="rademacher") <= 2


@given(
    gpu=st.integers(0, 1 << 36), cpu=st.integers(0, 1 << 36), disk=st.integers(0, 1 << 36),
    token_passes=st.integers(1, 1 << 20), num_directions=st.integers(1, 4), trained_share=st.floats(0, 1),
)  # fmt: skip
def test_weights_further_away_and_more_of_them_never_make_a_step_shorter(
    gpu, cpu, disk, token_passes, num_directions, trained_share
):
    cost_model = CostModel.on(
        "cuda", Work(token_passes=token_passes, num_directions=num_directions, trained_share=trained_share)
    )

    def step_s(**n_bytes):
        return max(cost_model.step_time(n_bytes, every={"gpu": 1, "cpu": 4, "disk": 4}, makes_pairs=True))

    here = step_s(gpu=gpu, cpu=cpu, disk=disk)
    assert here <= step_s(gpu=gpu, cpu=cpu, disk=disk + 4096) * (1 + 1e-9)
    assert step_s(gpu=gpu + cpu + disk) <= here * (1 + 1e-9)
    assert step_s(gpu=gpu, cpu=cpu + disk) <= here * (1 + 1e-9)


@pytest.mark.parametrize(
    ("n_bytes", "token_passes", "bound"),
    [
        ({"gpu": OPT_13B}, ONE_BATCH, "compute"),
        ({"cpu": OPT_13B}, ONE_BATCH, "upload"),
        ({"cpu": OPT_13B}, 8 * ONE_BATCH, "compute"),
        ({"disk": OPT_13B}, ONE_BATCH, "disk"),
    ],
)
def test_it_says_what_a_step_waits_for(n_bytes, token_passes, bound):
    cost_model = CostModel.on("cuda", Work(token_passes=token_passes))
    assert cost_model.step_time(n_bytes, every={"cpu": 8, "disk": 32}, makes_pairs=True).bound == bound


def test_frozen_weights_are_neither_written_nor_perturbed():
    n_bytes, every = {"gpu": OPT_13B, "cpu": OPT_13B, "disk": OPT_13B}, {"gpu": 1, "cpu": 1, "disk": 1}
    frozen, trained = (
        CostModel.on("cuda", Work(trained_share=share)).step_time(n_bytes, every=every, makes_pairs=True)
        for share in (0.0, 1.0)
    )
    assert all(a < b for a, b in zip(frozen, trained, strict=True))


# What is left after as many blocks as fit: for a second perturbed copy where a step computes, for a block where it
# moves.


@pytest.mark.parametrize(("token_passes", "copies"), [(ONE_BATCH, 1), (16 * ONE_BATCH, 2)])
def test_device_memory_goes_to_what_bounds_the_step(token_passes, copies):
    layout = synthetic_layout([[4]] * 12)
    block = layout.units[1].n_bytes
    budgets = Budgets(device=smallest_device_budget(layout) + 3 * block, cpu=1 << 40)
    placement = place(layout, budgets, CostModel.on("cuda", Work(token_passes=token_passes, itemsize=4)))
    assert placement.scratch_copies == copies
    assert len(placement.units_in("gpu")) - 1 == 3 - copies
