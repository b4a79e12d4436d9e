"""Ctrl-C at one function call after the other of a step: whatever it struck, the weights are those of a whole step.

A signal sent from outside strikes mostly where time is spent; this one strikes where little is spent, too.
"""

import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toys import batch, opened, toy, weights_of
from zo2trl.engine.step import Engine

N_MOMENTS, N_MOMENTS_NIGHTLY = 60, 2000
LR = 0.005


def step(engine: Engine, model: Any, number: int) -> None:
    ids = batch(number)
    engine.step([lambda: model(ids)], step=number)
    engine.commit(learning_rate=LR, weight_decay=0.0)


def look(model: Any, number: int) -> None:
    """A forward outside of any traversal, as between two trainings."""
    model(batch(number))


@contextmanager
def struck_at(n_calls: int) -> Iterator[list[int]]:
    """Ctrl-C at the n-th call of a Python function in the block; the list ends up holding how many there were."""
    counted = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            counted[0] += 1
            if counted[0] == n_calls:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setprofile(count)
    try:
        yield counted
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("n_moments", [N_MOMENTS, pytest.param(N_MOMENTS_NIGHTLY, marks=pytest.mark.nightly)])
def test_an_interrupted_step_is_made_or_not_made(tier: str, n_moments: int, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    wanted = [weights_of(toy())]
    with opened(model := toy(), tmp_path / "straight", tier=tier) as engine:
        for number in range(n_moments + 3):
            step(engine, model, number)
            engine.flush()
            wanted.append(weights_of(model))
    with opened(model := toy(), tmp_path / "struck", tier=tier) as engine:
        for number in range(2):
            step(engine, model, number)
        with struck_at(0) as counted:
            step(engine, model, 2)
        n_struck = 0
        for _ in range(n_moments):
            moment = dice.randrange(1, counted[0] + 1)
            number = len(engine.store.records)
            n_struck += was_struck(lambda number=number: step(engine, model, number), moment)
            n_struck += was_struck(lambda number=number: look(model, number), dice.randrange(1, counted[0] // 6))
            n_struck += was_struck(engine.flush, dice.randrange(1, counted[0] // 6))
            engine.flush()
            expected, found = wanted[len(engine.store.records)], weights_of(model)
            wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
            assert not wrong, f"seed {seed}: call {moment} of step {number} made {wrong} others"
        assert n_struck > n_moments // 2
        assert not [mark for mark in engine.store.journal.marks if mark.kind.name == "CHANGED"]


def was_struck(act: Callable[[], Any], moment: int) -> bool:
    try:
        with torch.no_grad(), struck_at(moment):
            act()
    except KeyboardInterrupt:
        return True
    return False
