"""Promises of moving units between tiers in the middle of a run: no bit changes, a move that fails loses nothing."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.durable import Action, Player, QuickFS, Setup, make_record, small_layout, state_of, steps, visit
from tests.support.stores import assert_equal, at_home, open_store, record, visit_all
from tests.support.toys import TIERS, toy
from tests.tiers.test_store import eager_weights
from zo2trl.errors import StoreCorrupt, StoreError
from zo2trl.files.fs import FS
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place_again
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.host import HostTier

PLENTY = 1 << 30


def move(store, moves):
    """Give units (by index) homes in other tiers, as an engine does that has measured its activations."""
    wanted = replace(store.placement, tier_of={**store.placement.tier_of, **moves})
    store.relayout(store.layout, place_again(store.layout, wanted, Budgets(device=PLENTY, cpu=PLENTY)))
    assert all(store.placement.tier_of[index] == tier for index, tier in moves.items())


def blocks(store):
    return [unit.index for unit in store.layout.units if unit.kind == "block"]


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(TIERS, 2)))
def test_training_goes_on_bit_for_bit_when_all_blocks_move(tmp_path, before, after, by_leaf):
    model = toy(tied=True)
    records = [record(step) for step in range(6)]
    with open_store(model, tmp_path, tier=before, every=3, by_leaf=by_leaf) as store:
        for i, one in enumerate(records):
            store.append(one)
            assert_equal(visit_all(store), eager_weights(model, records[: i + 1]))
            if i in (1, 3):
                move(store, dict.fromkeys(blocks(store), after if i == 1 else before))
                assert_equal(at_home(store), eager_weights(model, records[: i + 1]))
        store.flush()
        assert_equal(at_home(store), eager_weights(model, records))


actions = st.lists(
    st.one_of(
        st.just("step"), st.just("visit"), st.just("settle"), st.just("reopen"),
        st.tuples(st.integers(1, 3), st.sampled_from(TIERS)),
    ), max_size=14,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=actions, by_leaf=st.booleans(), frozen=st.booleans(), keep_base=st.booleans())
def test_whatever_moves_between_steps_and_closings_no_weight_changes(
    tmp_path_factory, actions, by_leaf, frozen, keep_base
):
    setup = Setup(layout=small_layout(by_leaf=by_leaf, frozen=frozen), keep_base=keep_base, write_back=2, snapshot=2)
    player = Player(setup, tmp_path_factory.mktemp("store"), fs=QuickFS())
    number = 0
    try:
        for action in actions:
            if isinstance(action, tuple):
                move(player.store, dict([action]))
            elif action == "step":
                number += 1
                player.play(steps(number, number, visits=False))
            else:
                player.play([Action(action)])
            assert state_of(player.store) == player.oracle.reference.state()
    finally:
        player.close()


def test_a_unit_can_be_seen_to_have_moved_and_its_old_view_stays_readable(tmp_path):
    with open_store(toy(), tmp_path, tier="cpu") as store:
        unit = store.layout.units[1]
        view, version = store.view(unit)
        before = view.clone()
        move(store, {1: "gpu"})
        now, later = store.view(unit)
        assert later != version and now.data_ptr() != view.data_ptr()
        assert torch.equal(now, before) and torch.equal(view, before)


def test_a_unit_that_moves_to_disk_survives_without_the_memory_it_came_from(tmp_path):
    setup = Setup(tiers=("gpu", "gpu", "cpu", "disk"), snapshot=1 << 40)
    player = Player(setup, tmp_path, fs=QuickFS())
    player.play(steps(1, 3))
    move(player.store, {1: "disk", 2: "disk"})
    player.play(steps(4, 5))
    player.close()
    with setup.opened(tmp_path, mode="continue", fs=QuickFS()) as store:
        assert state_of(store) == player.oracle.states[-1]
        assert store.residency.files.newest(store.layout.units[1]).position >= 3


# ----------------------------------------------------------------------------------------------------- moves that fail


class NoRoom(Exception):
    pass


@pytest.mark.parametrize(("to", "tier", "start"), [("gpu", DeviceTier, "cpu"), ("cpu", HostTier, "gpu")])
def test_a_unit_stays_where_it_was_if_there_is_no_memory_for_it(tmp_path, monkeypatch, to, tier, start):
    model, records = toy(), [record(step) for step in range(3)]
    with open_store(model, tmp_path, tier=start, every=3) as store:
        store.append(records[0])
        visit_all(store)
        store.flush()
        unit = store.layout.units[2]
        view, version = store.view(unit)

        def fail(self, unit):
            raise NoRoom

        with monkeypatch.context() as patch:
            patch.setattr(tier, "reserve", fail)
            with pytest.raises(NoRoom):
                store.residency.move(unit, to)
        assert store.tier_of(unit) == start and store.view(unit)[1] == version
        assert store.view(unit)[0].data_ptr() == view.data_ptr()
        for i in (1, 2):
            store.append(records[i])
            assert_equal(visit_all(store), eager_weights(model, records[: i + 1]))


class FullDisk(FS):
    full = False

    def write_some(self, fd, data, offset):
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write_some(fd, data, offset)


@pytest.mark.parametrize("start", ["gpu", "cpu"])
def test_a_unit_stays_in_memory_if_the_disk_is_full(tmp_path, start):
    model, fs = toy(), FullDisk()
    with open_store(model, tmp_path, tier=start, fs=fs) as store:
        unit = store.layout.units[1]
        fs.full = True
        with pytest.raises(StoreError, match="No space left"):
            store.residency.move(unit, "disk")
        assert store.tier_of(unit) == start
        assert_equal(visit_all(store), eager_weights(model, []))
        fs.full = False


def test_damage_is_not_moved_into_memory(tmp_path):
    setup = Setup(tiers=("gpu", "disk", "disk", "disk"), write_back=1)
    player = Player(setup, tmp_path, fs=QuickFS())
    player.play(steps(1, 2))
    player.store.flush()
    unit = player.store.layout.units[2]
    path = player.store.residency.files.path(unit, player.store.residency.files.newest(unit))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=unit.name):
        player.store.residency.move(unit, "cpu")
    assert player.store.tier_of(unit) == "disk"
    player.close()


def test_moving_without_anything_to_do_does_nothing(tmp_path):
    setup = Setup()
    player = Player(setup, tmp_path, fs=QuickFS())
    player.play(steps(1, 2))
    before = {unit.index: player.store.view(unit)[1] for unit in player.store.layout.units}
    player.store.flush()
    traffic = dict(player.store.traffic)
    move(player.store, {})
    assert dict(player.store.traffic)["disk_written"] == traffic["disk_written"]
    assert len(before) == len(setup.layout.units)
    player.store.append(make_record(3))
    visit(player.store)
    player.close()
