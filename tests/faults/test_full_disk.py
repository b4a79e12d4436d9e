"""Full disks, for real: small file systems of many sizes, and one that somebody else fills during the run."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.durable import Action, Oracle, Player, Setup, make_record, state_of, steps, visit
from tests.support.processes import Report, enter_private_mounts, in_child, mount_tmpfs, single_threaded, unmount
from zo2trl.errors import BudgetError, StoreError

PAGE = 4096
N_SIZES = 50
ROOMY = 8 << 20
SETUP = Setup(write_back=1, snapshot=2)
LIFE = [*steps(1, 10), Action("flush"), Action("settle"), Action("reopen"), *steps(11, 12), Action("settle")]
BOTH_NUMBERS = re.compile(r"[\d,]+ bytes.* [\d,]+ are free")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def live_on(disk: Path) -> str:
    """A life on this disk: "refused" before its first step, "whole", or where it stopped."""
    done: list[object] = []
    try:
        player = Player(SETUP, disk / "store", promised=done.append)
    except (BudgetError, StoreError) as error:
        assert BOTH_NUMBERS.search(str(error)), f"not both numbers in: {error}"
        return "refused"
    try:
        player.play(LIFE)
    except (BudgetError, StoreError) as error:
        return f"stopped after {len(done) - 1} of {len(LIFE)} actions: {error}"
    finally:
        player.close()
    return "whole"


def test_a_disk_of_any_size_is_refused_before_the_first_step_or_holds_the_whole_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def work(report: Report) -> None:
        enter_private_mounts()

        def on(n_pages: int) -> str:
            mount_tmpfs(disk, n_pages * PAGE)
            try:
                return live_on(disk)
            finally:
                unmount(disk)

        low, high = 1, ROOMY // PAGE  # the smallest disk that is not refused, by bisection
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if on(middle) == "refused" else (low, middle)
        report(high)
        for n_pages in range(max(high - N_SIZES // 2, 1), high + N_SIZES // 2):
            report([n_pages, on(n_pages)])

    _, *results = in_child(work)
    ends = Counter(end for _, end in results)
    assert len(results) >= N_SIZES - 1
    assert set(ends) == {"refused", "whole"}, ends


@pytest.mark.parametrize("fill_at", [1, 4, 7, 12])
def test_a_disk_that_somebody_fills_during_the_run_stops_it_and_loses_nothing(tmp_path: Path, fill_at: int) -> None:
    disk = tmp_path / "disk"
    actions = [*steps(1, 30), Action("settle")]

    def work(report: Report) -> None:
        enter_private_mounts()
        mount_tmpfs(disk, ROOMY)
        done: list[object] = []
        player = Player(SETUP, disk / "store", promised=done.append)
        player.play(actions[:fill_at])
        fill(disk / "somebody else's")
        try:
            player.play(actions[fill_at:])
        except StoreError as error:
            report(str(error))
        finally:
            player.close()
        n_done = len(done) - 1
        (disk / "somebody else's").unlink()
        oracle = Oracle(SETUP)
        for action in actions[:n_done]:
            oracle.do(action)
        after = oracle.copy()
        after.do(actions[n_done])
        with SETUP.opened(disk / "store", mode="continue") as store:
            assert state_of(store) in (oracle.states[-1], after.states[-1])
            store.append(make_record(100))
            visit(store)
            store.flush()
        report(n_done)

    message, n_done = in_child(work)
    assert "No space left on device" in message and BOTH_NUMBERS.search(message), message
    assert n_done >= fill_at


def fill(path: Path) -> None:
    """Take all the room that is left."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(fd, bytes(PAGE)) == PAGE:
            pass
    except OSError:
        pass
    finally:
        os.close(fd)
