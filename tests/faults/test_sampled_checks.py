"""Reads are compared with their checksums by sampling, and still no damage comes back as sound weights.

A drive begins to lie about one bit at some moment. Steps made before that is noticed used a wrong loss, but the
weights are what the journal leads to: nothing that was damaged is ever written.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.covering import few_in_ci
from tests.support.durable import Action, Oracle, QuickFS, Setup, act, small_layout, state_of, steps, visit
from tests.support.faulty_fs import FaultyFS
from tests.support.processes import single_threaded
from zo2trl.errors import StoreCorrupt, ZO2TRLError
from zo2trl.tiers.disk import CHECK_EVERY
from zo2trl.tiers.store import TieredStore

SEVERAL = 2 * CHECK_EVERY + 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


class QuickFaultyFS(FaultyFS, QuickFS):
    """Does not wait for the drive."""


def a_setup(*, write_back: int, by_leaf: bool = False, frozen: bool = False) -> Setup:
    layout = small_layout(by_leaf=by_leaf, frozen=frozen)
    return Setup(layout=layout, tiers=("gpu", "disk", "disk", "disk"), write_back=write_back, snapshot=1000)


def until_refused(store: TieredStore, oracle: Oracle, actions: list[Action]) -> StoreCorrupt | None:
    """Play actions until damage is noticed; the oracle knows every step that was journaled."""
    for action in actions:
        try:
            act(store, action)
        except StoreCorrupt as error:
            return error
        oracle.do(action)
    return None


def n_bits(setup: Setup, unit: int) -> int:
    return 8 * setup.layout.units[unit].n_bytes


@pytest.mark.parametrize("n_trials", few_in_ci(2, 6))
@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("write_back", [1, 2, 5, 8, 32])
def test_a_drive_that_begins_to_lie_is_noticed_and_nothing_damaged_is_written(
    tmp_path: Path, write_back: int, by_leaf: bool, n_trials: int
) -> None:
    setup, draw = a_setup(write_back=write_back, by_leaf=by_leaf), random.Random(write_back)
    for trial in range(n_trials):
        path, fs, oracle = tmp_path / f"{trial}", QuickFaultyFS(), Oracle(setup)
        unit = draw.choice([1, 2, 3])
        with setup.opened(path, fs=fs) as store:
            assert until_refused(store, oracle, steps(1, 1 + trial)) is None
            fs.flip_bit(f"{setup.layout.units[unit].name}@", draw.randrange(n_bits(setup, unit)))
            error = until_refused(store, oracle, steps(2 + trial, SEVERAL + trial))
            assert error is not None, f"trial {trial}: {SEVERAL} visits and not a word"
            assert f"unit {setup.layout.units[unit].name}: " in str(error)
        with setup.opened(path, mode="continue", fs=QuickFS()) as store:
            assert state_of(store) == oracle.reference.state(), f"trial {trial}"
            store.flush()
            assert state_of(store) == oracle.reference.state(), f"trial {trial}"


def test_weights_that_were_fetched_before_anybody_thought_of_writing_them_are_not_written_unchecked(
    tmp_path: Path,
) -> None:
    """A flush finds segments in the ring that were compared by sampling only."""
    setup = a_setup(write_back=32)
    for trial in range(8):
        path, fs, oracle = tmp_path / f"{trial}", QuickFaultyFS(), Oracle(setup)
        with setup.opened(path, fs=fs) as store:
            assert until_refused(store, oracle, steps(1, 2)) is None
            for unit in (1, 2, 3):
                fs.flip_bit(f"{setup.layout.units[unit].name}@", 7919 * trial % n_bits(setup, unit))
            actions = [*steps(3, 3), Action("step", 4), Action("flush")]
            assert until_refused(store, oracle, actions) is not None
        with setup.opened(path, mode="continue", fs=QuickFS()) as store:
            assert state_of(store).records == tuple(oracle.reference.records)
            assert state_of(store) == oracle.reference.state()


def test_damage_to_weights_that_are_never_written_is_noticed_within_n_visits(tmp_path: Path) -> None:
    setup = a_setup(write_back=4, frozen=True)
    setup.open(tmp_path, fs=QuickFS()).close()
    for mode in ("continue", "read"):
        fs = QuickFaultyFS()
        with setup.opened(tmp_path, mode=mode, fs=fs) as store:
            visit(store)
            visit(store)  # the ring runs ahead: what was fetched before the drive began to lie is used up
            fs.flip_bit(f"{setup.layout.units[1].name}@", 4321)
            with pytest.raises(StoreCorrupt):
                for _ in range(CHECK_EVERY + 1):
                    visit(store)


def test_sound_weights_are_not_read_twice_for_their_checksums(tmp_path: Path) -> None:
    setup = a_setup(write_back=4)
    with setup.opened(tmp_path, fs=QuickFS()) as store:
        for action in steps(1, 40):
            act(store, action)
        per_traversal = sum(s.n_bytes for s in setup.layout.segments if store.tier_of(s.unit) == "disk")
        assert store.traffic["disk_read"] <= per_traversal * 42, (
            "40 traversals, and what was fetched ahead of the next one"
        )


def test_after_damage_was_refused_a_drive_that_is_well_again_goes_on(tmp_path: Path) -> None:
    setup, fs = a_setup(write_back=8), QuickFaultyFS()
    oracle = Oracle(setup)
    with setup.opened(tmp_path, fs=fs) as store:
        assert until_refused(store, oracle, steps(1, 3)) is None
        fs.flip_bit(f"{setup.layout.units[2].name}@", 99)
        assert until_refused(store, oracle, steps(4, 40)) is not None
        fs._flips.clear()
        for _ in range(3):  # a fetch that had failed may be heard of once more
            try:
                store.flush()
                break
            except ZO2TRLError:
                continue
        assert state_of(store) == oracle.reference.state()
