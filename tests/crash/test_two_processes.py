"""One store, one owner: whoever comes second is told who was first, and a dead owner is out of the way at once."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.covering import few_in_ci
from tests.support.durable import Player, QuickFS, Setup, make_record, state_of, steps
from tests.support.processes import Report, child, single_threaded
from zo2trl.errors import StoreLocked
from zo2trl.files.fs import LOCAL

SETUP = Setup()


class HastyFS(QuickFS):
    """Does not wait long for an owner to go."""

    lock_patience_s = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def race(folder: Path, starts: list[Path], report: Report) -> None:
    """Open the store of every race at its start signal, and keep it until the next one starts."""
    held = None
    for number, start in enumerate(starts):
        while not start.exists():
            time.sleep(0.0002)
        if held is not None:
            held.close()
        try:
            held = SETUP.open(folder / f"{number}", fs=HastyFS())
            report([number, "won", ""])
        except StoreLocked as refusal:
            held = None
            report([number, "lost", str(refusal)])
    time.sleep(30)


@pytest.mark.parametrize("n_races", few_in_ci(30, 200))
def test_of_two_that_open_a_store_at_the_same_moment_exactly_one_gets_it(tmp_path: Path, n_races: int) -> None:
    starts = [tmp_path / f"start-{number}" for number in range(n_races)]
    with (
        child(lambda report: race(tmp_path, starts, report)) as first,
        child(lambda report: race(tmp_path, starts, report)) as second,
    ):
        for number, start in enumerate(starts):
            start.touch()
            results = {racer.pid: racer.next() for racer in (first, second)}
            assert [result[0] for result in results.values()] == [number, number]
            winners = [pid for pid, result in results.items() if result[1] == "won"]
            assert len(winners) == 1, f"race {number}: {results}"
            (refusal,) = (result[2] for result in results.values() if result[1] == "lost")
            assert f"process {winners[0]} on {socket.gethostname()} " in refusal, f"race {number}: {refusal}"


def test_the_same_process_is_refused_too_and_told_so(tmp_path: Path) -> None:
    with SETUP.opened(tmp_path / "store", fs=HastyFS()):
        for mode in ("begin", "continue"):
            with pytest.raises(StoreLocked, match=f"process {os.getpid()} .*this very process"):
                SETUP.open(tmp_path / "store", mode=mode, fs=HastyFS())
    SETUP.open(tmp_path / "store", fs=HastyFS()).close()


def test_a_store_that_is_refused_is_left_as_it_is(tmp_path: Path) -> None:
    player = Player(SETUP, tmp_path / "store", fs=QuickFS())
    player.play(steps(1, 5))

    def intrude(report: Report) -> None:
        for mode in ("begin", "continue"):
            try:
                SETUP.open(tmp_path / "store", mode=mode, fs=HastyFS())
            except StoreLocked as refusal:
                report(str(refusal))

    with child(intrude) as intruder:
        assert len(intruder.rest()) == 2
    player.play(steps(6, 8))
    player.close()
    with SETUP.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        assert state_of(store) == player.oracle.states[-1]


def train_beside_data_workers(path: Path, report: Report) -> None:
    """Own the store, with four data workers alive that were forked afterwards."""
    store = SETUP.open(path, fs=QuickFS())
    data = torch.utils.data.DataLoader(range(10**6), num_workers=4, multiprocessing_context="fork")
    batches = iter(data)
    next(batches)
    report([worker.pid for worker in batches._workers])
    for number in range(1, 10**6):
        store.append(make_record(number))
        report(number)


def test_a_killed_owner_is_out_of_the_way_although_its_data_workers_live(tmp_path: Path) -> None:
    workers: list[int] = []
    try:
        with child(lambda report: train_beside_data_workers(tmp_path / "store", report)) as owner:
            workers = owner.next()
            assert owner.next() == 1
            owner.kill()
            owner.wait()
            assert all(is_alive(pid) for pid in workers)
            acknowledged = [1, *owner.reported_so_far()]
            with SETUP.opened(tmp_path / "store", mode="continue", fs=LOCAL) as store:
                assert len(store.journal.records) in (len(acknowledged), len(acknowledged) + 1)
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
