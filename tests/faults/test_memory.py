"""Memory that runs out: the error comes through, nothing hangs, and what goes on is right or refuses.

Every operation of torch that allocates, in the thread that trains, is made to fail in its turn.
"""

import gc
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.covering import few_in_ci
from tests.support.durable import Action, Player, QuickFS, Setup, make_record, small_layout, state_of, steps, visit
from tests.support.processes import Report, in_child, single_threaded
from zo2trl.errors import ZO2TRLError
from zo2trl.zo import chunks

SETUP = Setup(write_back=1, snapshot=2)
LIFE = [*steps(1, 1), Action("replace", 1), *steps(2, 2), Action("back", 1), *steps(2, 2), Action("flush"),
        Action("reopen"), *steps(3, 3)]  # fmt: skip
NO_ROOM = "can't allocate memory: you tried to allocate 12345 bytes"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


class NoRoomAt(TorchDispatchMode):
    """The nth operation that makes new memory fails."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.n_left, self.failed_in = nth, ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = function._schema
        makes_memory = not any(returned.alias_info is not None for returned in schema.returns)
        if makes_memory and schema.returns and "Tensor" in str(schema.returns[0].type):
            self.n_left -= 1
            if self.n_left == 0:
                self.failed_in = str(function)
                raise torch.OutOfMemoryError(NO_ROOM)
        return function(*args, **(kwargs or {}))


def live(path: Path, nth: int, done: list[object]) -> tuple[Player | None, BaseException | None, str]:
    """A life whose nth allocation fails, to its end or to its first error."""
    player, problem, mode = None, None, NoRoomAt(nth)
    try:
        player = Player(SETUP, path, fs=QuickFS(), promised=done.append, around=lambda: mode)
        player.play(LIFE)
    except (torch.OutOfMemoryError, ZO2TRLError) as error:
        problem = error
    return player, problem, mode.failed_in


@pytest.mark.parametrize("every", few_in_ci(3, 1))
def test_whichever_allocation_fails_the_error_comes_through_and_the_store_opens_to_what_was_promised(
    tmp_path: Path, every: int
) -> None:
    n_trials = 0
    for nth in range(1, 10_000, every):
        done: list[object] = []
        player, problem, where = live(tmp_path / f"{nth}", nth, done)
        if not where:
            assert player is not None and problem is None
            player.close()
            break
        n_trials += 1
        trial = f"allocation {nth} ({where})"
        assert problem is not None and NO_ROOM in str(problem), f"{trial}: {problem!r}"
        if player is None:
            SETUP.open(tmp_path / f"{nth}", fs=QuickFS()).close()
            continue
        player.close()
        allowed = promised(player, done)
        with SETUP.opened(tmp_path / f"{nth}", mode="continue", fs=QuickFS()) as store:
            assert state_of(store) in allowed, trial
    assert n_trials > 50 // every


def promised(player: Player, done: list[object]) -> list[object]:
    oracle = player.oracle
    ahead = oracle.copy()
    if len(done) <= len(LIFE):
        ahead.do(LIFE[len(done) - 1])
    return [*oracle.states[oracle.promises[-1] :], *ahead.states[len(oracle.states) :]]


def test_whoever_goes_on_after_it_gets_right_weights_or_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that halves its batch when memory runs out goes on with the same store."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_TILES", 1)  # so that a resident unit is brought forward in several pieces
    setup = Setup(layout=small_layout(root_tiles=3), write_back=1, snapshot=2)
    n_trials = 0
    for nth in range(1, 10_000):
        player = Player(setup, tmp_path / f"{nth}", fs=QuickFS())
        player.play(steps(1, 2))
        mode = NoRoomAt(nth)
        record = make_record(3, directions=2)
        n_before = len(player.store.records)
        try:
            with mode:
                player.store.append(record)
                visit(player.store)
        except torch.OutOfMemoryError:
            n_trials += 1
        if len(player.store.records) > n_before:
            player.oracle.reference.append(record)
        try:
            for number in (4, 5):
                player.store.append(make_record(number))
                player.oracle.reference.append(make_record(number))
                visit(player.store)
            player.store.flush()
            assert state_of(player.store) == player.oracle.reference.state(), f"allocation {nth} ({mode.failed_in})"
        except ZO2TRLError:
            pass
        player.close()
        with setup.opened(tmp_path / f"{nth}", mode="continue", fs=QuickFS()) as store:
            found = state_of(store)
            assert found == player.oracle.reference.state(), f"allocation {nth} ({mode.failed_in}), opened again"
        if not mode.failed_in:
            break
    assert n_trials > 10


def test_an_address_space_that_is_too_small_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """For real: the process may not grow any further."""

    def work(report: Report) -> None:
        setup = Setup()
        player = Player(setup, tmp_path / "store", fs=QuickFS())
        player.play(steps(1, 3))
        gc.collect()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        hoard = []
        try:
            while True:
                hoard.append(bytearray(1 << 16))
        except MemoryError:
            pass
        try:
            for number in range(4, 200):
                player.play(steps(number, number))
                hoard.append(torch.zeros(1 << 14))
        except (MemoryError, RuntimeError, ZO2TRLError) as error:
            hoard.clear()
            report(f"{type(error).__name__}: {error}"[:200])
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        n_records = len(player.oracle.reference.records)
        player.close()
        with setup.opened(tmp_path / "store", mode="continue", fs=QuickFS()) as store:
            found = state_of(store)
        assert len(found.records) in (n_records, n_records + 1)
        if len(found.records) == n_records:
            assert found == player.oracle.reference.state()
        report("reopened")

    said = in_child(work, timeout_s=600)
    assert len(said) == 2 and said[-1] == "reopened", said
