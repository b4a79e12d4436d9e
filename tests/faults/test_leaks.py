"""Nothing piles up: descriptors, threads, mappings and memory after a thousand openings, and files after crashes."""

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.covering import few_in_ci
from tests.support.durable import (
    Action,
    Player,
    QuickFS,
    Setup,
    act,
    make_record,
    small_layout,
    state_of,
    steps,
    visit,
)
from tests.support.processes import Held, child, single_threaded

ROOM_FOR_NOISE_BYTES = 24 << 20


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.mark.parametrize("n_cycles", few_in_ci(300, 1000))
def test_many_times_open_lease_close_leaves_nothing_behind(tmp_path: Path, n_cycles: int) -> None:
    setup = Setup(layout=small_layout(by_leaf=True))
    Player(setup, tmp_path / "store", fs=QuickFS()).close()

    def cycle(number: int) -> None:
        mode = "read" if number % 3 == 1 and number % 50 else "continue"
        with setup.opened(tmp_path / "store", mode=mode, fs=QuickFS()) as store:
            with store.lease_clean(store.layout.points[number % 4 + 1]):
                pass
            if number % 50 == 0:
                store.append(make_record(number + 1))
                visit(store)
            store.view(store.layout.units[number % 4])

    for number in range(50):
        cycle(number)
    gc.collect()
    before, peak = Held.now(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(50, n_cycles + 50):
        cycle(number)
    gc.collect()
    after = Held.now()
    assert after.files == before.files
    assert after.threads == before.threads
    assert after.mapped_files == before.mapped_files
    assert after.n_maps <= before.n_maps + 16
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < ROOM_FOR_NOISE_BYTES
    assert len(list((tmp_path / "store" / "units").iterdir())) <= 2 * len(setup.layout.units)


def test_files_do_not_pile_up_over_kills(tmp_path: Path) -> None:
    setup = Setup(write_back=1, snapshot=1)
    setup.open(tmp_path / "store", fs=QuickFS()).close()
    for number in range(20):
        with child(lambda report, first=1000 * number + 1: _train(tmp_path / "store", setup, first, report)) as victim:
            for _ in range(3 + number % 5):
                assert isinstance(victim.next(), int)
            victim.kill()
            victim.wait()
    with setup.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        assert len(store.journal.records) >= 20 * 3
    names = sorted(path.name for path in (tmp_path / "store" / "units").iterdir())
    assert len(names) == 2 * len(setup.layout.units), names
    assert len(list((tmp_path / "store").iterdir())) <= 10, "drafts or copies pile up"


def _train(path: Path, setup: Setup, first: int, report) -> None:
    store = setup.open(path, mode="continue", fs=QuickFS())
    for action in steps(first, first + 500):
        act(store, action)
        if action.kind != "visit":
            report(action.number)


def test_closing_after_a_failure_leaves_nothing_open(tmp_path: Path) -> None:
    gc.collect()
    before = Held.now()
    for number in range(5):
        player = Player(Setup(), tmp_path / f"{number}", fs=QuickFS())
        with pytest.raises(ValueError, match="step 1 after step 3"):
            player.play([*steps(1, 3), Action("step", 1)])
        player.close()
        player.close()
    del player
    gc.collect()
    assert Held.now().files == before.files
    assert Held.now().threads == before.threads


def test_the_state_of_a_closed_store_is_what_the_next_one_opens(tmp_path: Path) -> None:
    player = Player(Setup(), tmp_path / "store", fs=QuickFS())
    for first in range(1, 40, 4):
        player.play([*steps(first, first + 3), Action("reopen")])
        assert state_of(player.store) == player.oracle.states[-1]
    player.close()
