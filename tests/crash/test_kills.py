"""kill -9 at any moment: the store opens again, nothing acknowledged is lost, and it goes on from there.

One store is killed again and again, in the middle of steps, writes, returns to the past and its own recovery.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.durable import Action, Oracle, QuickFS, Setup, act, small_layout, state_of
from tests.support.processes import Child, Report, child, single_threaded
from zo2trl.files.fs import LOCAL

KILLS_PER_STORE = 20
LONGEST_OPENING_S, LONGEST_ACTION_S = 0.02, 0.003
MOST_ACTIONS = 14


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


def random_actions(draw: random.Random, first: int, n_records: int, n_actions: int = 400) -> list[Action]:
    """A life: mostly steps and traversals, now and then something else. `first` is the number of the first step."""
    actions: list[Action] = []
    number, position = first, n_records
    while len(actions) < n_actions:
        chance = draw.random()
        if chance < 0.08:
            actions.append(Action("flush"))
        elif chance < 0.11:
            actions.append(Action(draw.choice(["replace", "change"]), draw.randrange(1, 50)))
        elif chance < 0.15 and position > 3:
            position -= draw.randrange(3)
            actions.append(Action("back", position))
        else:
            kind = "skip" if draw.random() < 0.1 else "step"
            actions += [Action(kind, number, draw.choice([1, 1, 2, 9])), Action("visit")]
            number, position = number + 1, position + 1
    return actions


def live(path: Path, setup: Setup, actions: Sequence[Action], *, quick: bool, report: Report) -> None:
    """What the victim does."""
    store = setup.open(path, mode="continue", fs=QuickFS() if quick else LOCAL)
    report("open")
    for action in actions:
        act(store, action)
        report("done")


def kill_again_and_again(path: Path, setup: Setup, *, seed: int, n_kills: int) -> int:
    """Kill, look, go on; returns how many actions were acknowledged in all."""
    oracle = Oracle(setup)
    setup.open(path).close()
    n_acknowledged = 0
    for kill in range(n_kills):
        draw = random.Random(f"{seed}/{kill}")
        records = oracle.reference.records
        number = max((record.step for record in records), default=0) + 1
        actions = random_actions(draw, number, len(records))
        quick = draw.random() < 0.5
        life = lambda report, actions=actions, quick=quick: live(path, setup, actions, quick=quick, report=report)  # noqa: E731
        with child(life) as victim:
            said = wait_for_a_moment(victim, draw)
            victim.kill()
            said += victim.rest()
            victim.wait()
        assert all(word in ("open", "done") for word in said), said
        n_done = said.count("done")
        for action in actions[:n_done]:
            oracle.do(action)
        oracle = look(path, setup, oracle, actions[n_done], trial=f"seed {seed}, kill {kill} after {n_done} actions")
        n_acknowledged += n_done
    return n_acknowledged


def wait_for_a_moment(victim: Child, draw: random.Random) -> list[str]:
    """Until the victim is somewhere in its opening, or in the middle of its nth action."""
    if draw.random() < 0.2:
        time.sleep(draw.random() * LONGEST_OPENING_S)
        return []
    said = [victim.next() for _ in range(draw.randrange(1, MOST_ACTIONS))]
    time.sleep(draw.random() * LONGEST_ACTION_S)
    return said


def look(path: Path, setup: Setup, oracle: Oracle, in_flight: Action, *, trial: str) -> Oracle:
    """Open the store as its next owner, or as a reader; what is found is what the oracle goes on from."""
    after = oracle.copy()
    after.do(in_flight)
    with setup.opened(path, mode="read") as store:
        found = state_of(store)
    settled = oracle.copy()
    settled.do(Action("reopen"))
    allowed = [settled.states[-1], *after.states[len(oracle.states) :]]
    assert found in allowed, f"{trial} ({in_flight}): {found} is none of {list(map(str, allowed))}"
    if found == allowed[0]:
        return settled
    if found == after.states[-1]:
        after.do(Action("reopen"))
        return after
    back = oracle.copy()
    back.reference = back.current
    back.do(Action("reopen"))
    return back


SETUPS = [
    Setup(),
    Setup(layout=small_layout(by_leaf=True), write_back=1, snapshot=1),
    Setup(layout=small_layout(frozen=True), keep_base=False),
    Setup(tiers=("gpu", "disk", "disk", "disk"), write_back=3),
    Setup(tiers=("gpu", "cpu", "gpu", "cpu"), snapshot=2),
]


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 10))]
)
def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    setup = SETUPS[seed % len(SETUPS)]
    n_acknowledged = kill_again_and_again(tmp_path / "store", setup, seed=seed, n_kills=KILLS_PER_STORE)
    assert n_acknowledged > KILLS_PER_STORE, "hardly anything was done between the kills"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 250))
def test_twenty_more_kills(tmp_path: Path, seed: int) -> None:
    kill_again_and_again(tmp_path / "store", SETUPS[seed % len(SETUPS)], seed=seed, n_kills=KILLS_PER_STORE)
