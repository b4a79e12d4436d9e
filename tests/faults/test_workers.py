"""Worker threads that fail or hang: whoever waits for them gets the error at once, or is told what it waits for."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.support.durable import Action, Oracle, Player, QuickFS, Setup, make_record, state_of, steps
from tests.support.faulty_fs import FAULTS, FaultyFS
from tests.support.processes import single_threaded
from zo2trl.errors import StoreError
from zo2trl.files import waiting
from zo2trl.tiers.disk import DiskReading
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.unit_files import UnitFiles

AT_ONCE = 2  # actions of a training that may still pass: a step does not look at every worker
SETUP = Setup(write_back=1, snapshot=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


class QuickFaultyFS(FaultyFS, QuickFS):
    """Does not wait for the drive."""


def train_until_it_fails(player: Player, first: int, *, is_struck: Callable[[], bool]) -> tuple[BaseException, int]:
    """Steps and traversals; the first error and how many good actions were begun after the fault."""
    n_passed = 0
    for number in range(first, first + 5):
        for action in [*steps(number, number), Action("settle")]:
            was_struck = is_struck()
            try:
                player.play([action])
            except BaseException as error:
                return error, n_passed
            n_passed += was_struck
    pytest.fail("nobody heard of the fault")


def allowed_after(player: Player) -> list[object]:
    """Promised, or with the step that was journaled when a worker failed beside it."""
    oracle: Oracle = player.oracle
    ahead = oracle.copy()
    ahead.do(Action("step", max(record.step for record in oracle.reference.records) + 1, 1))
    number = ahead.reference.records[-1].step
    further = oracle.copy()
    further.do(steps(number, number)[0])
    return [oracle.states[-1], further.states[-1]]


@pytest.mark.parametrize("call", ["read_some", "create", "write_some", "sync_data", "sync_folder", "unlink"])
def test_an_error_of_any_disk_call_in_a_worker_reaches_the_trainer_at_once(tmp_path: Path, call: str) -> None:
    assert call in FAULTS["EIO"][1]
    for nth in (1, 2, 3):
        fs = QuickFaultyFS("EIO")
        player = Player(SETUP, tmp_path / f"{nth}", fs=fs)
        player.play([*steps(1, 2), Action("settle")])
        fetched = [fetch.job for fetch in player.store._prefetcher._ahead]
        player.store.weights_changed()  # what was fetched ahead would not be read again
        wait(fetched)  # nobody would hear of a fault in a read whose bytes are dropped
        fs.only(call, nth)
        error, n_passed = train_until_it_fails(player, 3, is_struck=lambda fs=fs: bool(fs.struck))
        assert isinstance(error, StoreError) and "errno 5" in str(error), f"{call} {nth}: {error!r}"
        assert n_passed <= AT_ONCE
        fs.only(call, 0)
        player.close()
        with SETUP.opened(tmp_path / f"{nth}", mode="continue", fs=QuickFS()) as store:
            assert state_of(store) in allowed_after(player)


WORK: dict[str, tuple[type, str]] = {
    "reading": (DiskReading, "fill"),
    "uploading": (Staging, "upload"),
    "drafting": (UnitFiles, "create"),
    "writing": (UnitFiles, "write_pieces"),
    "publishing": (QuickFS, "sync_folder"),
}


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("work", WORK)
def test_whatever_else_a_worker_raises_reaches_the_trainer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, kind: type[BaseException]
) -> None:
    player = Player(SETUP, tmp_path / "store", fs=QuickFS())
    player.play([*steps(1, 2), Action("settle")])
    player.store.weights_changed()
    owner, name = WORK[work]
    struck: list[str] = []

    def fail(*arguments: object, **named: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        struck.append(work)
        raise kind("from a worker")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        raised, n_passed = train_until_it_fails(player, 3, is_struck=lambda: bool(struck))
    assert type(raised) is kind and str(raised) == "from a worker"
    assert n_passed <= AT_ONCE
    player.close()
    with SETUP.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        assert state_of(store) in allowed_after(player)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


@pytest.mark.parametrize("call", ["read_some", "create"])
def test_a_drive_that_does_not_answer_is_waited_for_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    monkeypatch.setattr(waiting, "STALL_S", 0.05)
    fs = QuickFaultyFS()
    player = Player(SETUP, tmp_path / "store", fs=fs)
    player.play([*steps(1, 2), Action("settle")])
    player.store.weights_changed()
    with caplog.at_level(logging.WARNING, "zo2trl"):
        with fs.stalled(call):
            thread, _ = in_thread(lambda: player.play([*steps(3, 3), Action("settle")]))
            assert fs.waiting.wait(300)
            time.sleep(0.3)
            assert thread.is_alive(), "did not wait"
        thread.join(300)
    assert not thread.is_alive()
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Waiting for")]
    assert len(told) >= 2, told
    assert any(unit.name in told[0] for unit in player.store.layout.units) and " s: the drive" in told[0], told
    player.play([*steps(4, 5), Action("settle")])
    player.close()
    with SETUP.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        assert state_of(store) == player.oracle.states[-1]


def test_a_worker_that_is_told_to_stop_stops_although_work_is_queued(tmp_path: Path) -> None:
    player = Player(SETUP, tmp_path / "store", fs=QuickFS())
    player.play(steps(1, 3))
    player.store.append(make_record(4))
    before = set(threading.enumerate())
    player.close()
    assert not [thread for thread in before & set(threading.enumerate()) if thread.name.startswith("zo2trl")]
