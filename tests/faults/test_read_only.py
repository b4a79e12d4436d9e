"""A store on a read-only file system can be looked at, and cannot be changed by anybody."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.durable import Action, Player, QuickFS, Setup, listing, state_of, steps
from tests.support.processes import (
    Report,
    audited,
    enter_private_mounts,
    in_child,
    mount_read_only,
    paths_opened,
    single_threaded,
)
from zo2trl.errors import StoreError

SETUPS = {
    "in all tiers": Setup(),
    "base elsewhere": Setup(keep_base=False),
    "on disk": Setup(tiers=("gpu", "disk", "disk", "disk")),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def a_store(path: Path, setup: Setup) -> Player:
    player = Player(setup, path, fs=QuickFS())
    player.play([*steps(1, 7), Action("replace", 1), *steps(8, 9)])
    player.close()
    return player


@pytest.mark.parametrize("name", SETUPS)
def test_it_is_read_as_it_is_and_refused_for_writing_with_a_reason(tmp_path: Path, name: str) -> None:
    path, setup = tmp_path / "store", SETUPS[name]
    player = a_store(path, setup)
    before = listing(path)

    def work(report: Report) -> None:
        enter_private_mounts()
        mount_read_only(path)
        with setup.opened(path, mode="read") as store:
            assert state_of(store) == player.oracle.states[-1]
            assert state_of(store) == player.oracle.states[-1]
        for mode in ("continue", "begin"):
            try:
                setup.open(path, mode=mode)
            except StoreError as error:
                report(str(error))
        assert listing(path) == before
        report("the end")

    messages = in_child(work)
    assert messages[-1] == "the end" and len(messages) == 3
    assert all("read-only" in message and str(path) in message for message in messages[:-1]), messages
    assert listing(path) == before


@pytest.mark.parametrize("name", SETUPS)
def test_reading_opens_nothing_for_writing_even_where_it_could(tmp_path: Path, name: str) -> None:
    player = a_store(tmp_path / "store", SETUPS[name])
    before = listing(tmp_path / "store")
    calls = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
    with audited(*calls) as events, SETUPS[name].opened(tmp_path / "store", mode="read") as store:
        assert state_of(store) == player.oracle.states[-1]
        for attempt in (
            lambda: store.append(Action("step", 50).record()),
            lambda: store.replace(lambda spec: pytest.fail("asked for weights")),
            lambda: store.go_back(1, base=lambda spec: pytest.fail("asked for weights")),
            lambda: store.commit_changes(store.layout.units),
        ):
            with pytest.raises(StoreError, match="reading only"):
                attempt()
        store.flush()
    changed = {path for path in paths_opened(events, for_writing=True) if path.is_relative_to(tmp_path)}
    assert not changed
    assert not [event for event in events if event[0] != "open" and str(tmp_path) in os.fspath(event[1][0])]
    assert listing(tmp_path / "store") == before


def test_many_may_read_while_one_writes(tmp_path: Path) -> None:
    setup = Setup(write_back=1, snapshot=1)
    player = Player(setup, tmp_path / "store", fs=QuickFS())
    for number in range(1, 15):
        player.play(steps(number, number))
        player.store.settle()
        with setup.opened(tmp_path / "store", mode="read") as store:
            assert state_of(store) == player.oracle.states[-1]
            with setup.opened(tmp_path / "store", mode="read") as another:
                assert state_of(another) == state_of(store)
    player.close()
