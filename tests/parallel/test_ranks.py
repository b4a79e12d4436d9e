"""Who computes which losses of a step, and in which order they are summed: pure functions, no processes."""

import json
import random
from typing import Any

import pytest

from zo2trl.engine.join_ranks import _decode
from zo2trl.parallel.ranks import ALONE, Parallelism, Ranks
from zo2trl.zo.estimators import TwoSidedSPSA
from zo2trl.zo.records import SkipRecord, StepRecord

PROBES = TwoSidedSPSA(zo_eps=1e-3, num_directions=4).probes()


def place(rank: int, size: int, parallelism: Parallelism) -> Ranks:
    return Ranks(rank=rank, size=size, parallelism=parallelism)


def said_by_all(size: int, parallelism: Parallelism, n_batches: int) -> list[list[float]]:
    """What each process says when the loss of probe p on global micro-batch b is 100 b + p."""
    said: list[list[float]] = []
    for rank in range(size):
        own = place(rank, size, parallelism).share(PROBES)
        batches = range(rank, n_batches, size) if parallelism == "data" else range(n_batches)
        said.append([100.0 * batch + PROBES.index(probe) for batch in batches for probe in own])
    return said


@pytest.mark.parametrize("parallelism", ["data", "directions"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_are_in_the_order_of_one_process_however_many_there_are(size: int, parallelism: Parallelism) -> None:
    said = said_by_all(size, parallelism, n_batches=8)
    expected = [[100.0 * batch + probe for batch in range(8)] for probe in range(len(PROBES))]
    assert place(0, size, parallelism).by_probe(PROBES, said) == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_directions_are_shared_out_whole_and_each_once(size: int) -> None:
    shares = [place(rank, size, "directions").share(PROBES) for rank in range(size)]
    assert sorted((p for share in shares for p in share), key=PROBES.index) == PROBES
    assert {len(share) for share in shares} == {len(PROBES) // size}
    for share in shares:
        assert [(p.direction, -p.coefficient) for p in share[0::2]] == [
            (p.direction, p.coefficient) for p in share[1::2]
        ]


def test_one_process_answers_itself() -> None:
    assert ALONE.gather("numbers", [0.1, float("inf")]) == [(0.1, float("inf"))]
    assert ALONE.all_gather("value", {"a": [1]}) == [{"a": [1]}]
    assert ALONE.all_true("yes", True) and not ALONE.all_true("no", False)


def test_a_step_that_another_process_copies_is_the_same_to_the_last_bit() -> None:
    draw = random.Random(3)
    steps = [
        StepRecord(
            step=7, seed=2**64 - 1, coefficients=(draw.gauss(0, 1), -0.0, 5e-324), learning_rate=draw.random(),
            weight_decay=0.1, zo_eps=1e-3, losses=(draw.random(), draw.random()), scalars=(draw.random(),),
        ),
        SkipRecord(step=8, seed=5, losses=(float("inf"), 1.0)),
    ]  # fmt: skip
    for step in steps:
        values = step._asdict() if isinstance(step, StepRecord) else vars_of(step)
        copied = _decode(json.loads(json.dumps({"values": values})))
        assert repr(copied) == repr(step)


def vars_of(step: SkipRecord) -> dict[str, Any]:
    return {name: getattr(step, name) for name in ("step", "seed", "losses")}
