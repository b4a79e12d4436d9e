"""An error at every single call to the disk: it is named, nothing hangs, and the store opens to what was promised.

The same short life of a store is lived again and again, with the fault at call 1, 2, 3 ... until no call is left.
"""

import errno
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.crash_fs import CrashFS
from tests.support.durable import (
    Action,
    Oracle,
    Player,
    QuickFS,
    Setup,
    State,
    digest_of,
    make_record,
    state_of,
    steps,
    visit,
)
from tests.support.faulty_fs import FAULTS, INVISIBLE, FaultyFS
from zo2trl.errors import ZO2TRLError

LIFE = [*steps(1, 1), Action("replace", 1), *steps(2, 2), Action("back", 1), *steps(2, 2), Action("reopen")]
LIFE += [Action("flush")]
SETUP = Setup(write_back=1, snapshot=2)
EVERY = 6  # calls between two trials of one test

one_thread, tmp_path = processes.one_thread, processes.tmp_path_in_memory


class QuickFaultyFS(FaultyFS, QuickFS):
    """Does not wait for the drive."""


class PowerlessFS(FaultyFS, CrashFS):
    """A disk that fails and then loses power."""


def live(fs: FaultyFS, path: Path, done: list[object]) -> tuple[Player | None, ZO2TRLError | None]:
    """One life, to its end or its first error; anything but an error of ours fails the test."""
    player, problem = None, None
    try:
        player = Player(SETUP, path, fs=fs, promised=done.append)
        player.play(LIFE)
    except ZO2TRLError as error:
        problem = error
        if player is not None and player.store.is_open:
            go_on(player, ahead_of(player, done))
    finally:
        if player is not None:
            try:
                player.close()
            except ZO2TRLError as error:
                problem = problem or error
    return player, problem


def ahead_of(player: Player, done: list[object]) -> Oracle:
    """Where the store would be if what failed had worked."""
    ahead = player.oracle.copy()
    if len(done) <= len(LIFE):
        ahead.do(LIFE[len(done) - 1])
    return ahead


def allowed(player: Player, done: list[object]) -> list[State]:
    """What was promised when the life ended, and what was on its way."""
    states, ahead = player.oracle.states, ahead_of(player, done)
    return [*states[player.oracle.promises[-1] :], *ahead.states[len(states) :]]


def go_on(player: Player, ahead: Oracle) -> None:
    """Whoever goes on with the same store after an error gets right weights, or is refused."""
    shown = {digest_of(oracle.current.weights) for oracle in (player.oracle, ahead)}
    shown |= {state.weights for state in ahead.states[len(player.oracle.states) :]}
    with suppress(ZO2TRLError):
        assert digest_of(visit(player.store)) in shown, "going on after the error shows weights that never were"
        player.store.flush()
        assert digest_of(visit(player.store)) in shown, "going on after the error shows weights that never were"


def look_again(path: Path, states: list[State] | None, trial: str, *, deeply: bool = False) -> None:
    """The disk is well again: the store opens, holds what it has to, and takes a step."""
    if states is None:
        SETUP.open(path, fs=QuickFS()).close()
        return
    with SETUP.opened(path, mode="continue", fs=QuickFS()) as store:
        state = state_of(store)
        assert state in states, f"{trial}: {state} is none of {list(map(str, states))}"
        if not deeply:
            return
        store.append(make_record(90))
        visit(store)
        store.flush()
        after = state_of(store)
    with SETUP.opened(path, mode="continue", fs=QuickFS()) as store:
        assert state_of(store) == after, trial


@contextmanager
def listening() -> Iterator[list[str]]:
    """What the package warns of in the block."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("zo2trl").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("zo2trl").removeHandler(handler)


def strike(fault: str, tmp_path: Path, *, at: int, for_ever: bool) -> list[str]:
    """One trial; returns the calls that met the fault."""
    path, done = tmp_path / f"{at}" / "store", []
    trial = f"{fault} at call {at}{' and for ever' if for_ever else ''}"
    fs = QuickFaultyFS(fault, at=at, for_ever=for_ever)
    with listening() as said:
        player, problem = live(fs, path, done)
    struck, trial = list(fs.struck), f"{trial} ({', '.join(fs.struck[:3])})"
    assert fs.retried_syncs == [], trial
    if fault in INVISIBLE:
        assert problem is None, f"{trial}: {problem}"
    elif struck and problem is None:
        # Only what promises nothing may fail without anybody hearing of it.
        loud = [call for call in struck if call.startswith(("sync_data", "sync_folder", "write_some"))]
        assert not loud or said, f"{trial}: not a word"
    if problem is not None:
        code = FAULTS[fault][0]
        assert code is not None and (f"errno {code}" in str(problem) or os.strerror(code) in str(problem)), (
            f"{trial}: {problem}"
        )
        assert any(str(folder) in str(problem) for folder in path.parents), f"{trial}: no path in {problem}"
    if fault not in INVISIBLE or at % 4 == 0:
        look_again(path, allowed(player, done) if player is not None else None, trial, deeply=at % 8 == 0)
    return struck


CASES = [("EIO", False), ("sync", True)]
CASES += [(fault, False) for fault in INVISIBLE]
NIGHTLY = [("EIO", True), ("ENOSPC", False), ("EAGAIN", False), ("EAGAIN", True), ("EROFS", False), ("EROFS", True)]
NIGHTLY += [("ENOSPC", True), ("sync", False), ("short write", True), ("short read", True)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a failing close when a map is freed
@pytest.mark.parametrize(
    ("fault", "for_ever"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)],
    ids=lambda value: value if isinstance(value, str) else ("for ever" if value else "once"),
)
@pytest.mark.parametrize("first", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(2, EVERY + 1))])
def test_whichever_call_fails_the_error_is_named_and_the_store_opens_to_what_was_promised(
    tmp_path: Path, fault: str, for_ever: bool, first: int
) -> None:
    """CI strikes every sixth call of a life, the night each of them."""
    at = first
    while strike(fault, tmp_path, at=at, for_ever=for_ever):
        at += EVERY
    assert at > 10


@pytest.mark.parametrize("first", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(2, EVERY + 1))])
def test_what_a_failed_sync_did_not_write_is_not_missed_after_a_power_cut(tmp_path: Path, first: int) -> None:
    for at in range(first, 1000, EVERY):
        root = tmp_path / f"{at}"
        root.mkdir()
        fs, done = PowerlessFS(root=root, fault="sync", at=at), []
        player, _ = live(fs, root / "store", done)
        if not fs.struck:
            break
        states = allowed(player, done) if player is not None else None
        for image in fs.images(first=len(fs.operations), n_random=2, seed=at):
            path = image.write_to(tmp_path / "image") / "store"
            look_again(path, states, f"sync {at} ({fs.struck[0]}), {image}:\n{fs.story(image.after)}")
    assert at > 10


def test_a_storm_of_signals_is_not_noticed(tmp_path: Path) -> None:
    """Real EINTR: a timer interrupts whatever call the process is in, thousands of times a second."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        done: list[object] = []
        player, problem = live(QuickFaultyFS(), tmp_path / "store", done)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert problem is None and player is not None
    with SETUP.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
        assert state_of(store) == player.oracle.states[-1]


def test_a_full_disk_names_the_bytes(tmp_path: Path) -> None:
    fs = QuickFaultyFS("ENOSPC", at=20, for_ever=True)
    _, problem = live(fs, tmp_path / "store", [])
    assert problem is not None and str(errno.ENOSPC) in str(problem) and "Free some space" in str(problem)
