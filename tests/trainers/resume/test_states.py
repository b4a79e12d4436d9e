"""State of generators and schedules in files is restored bit for bit, or is refused by name."""

import json
import random
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torch_schedules
from transformers import SchedulerType, get_scheduler

from zo2trl.errors import CheckpointError
from zo2trl.trainers.resume import states
from zo2trl.trainers.resume.states import decode_state, encode_state


def sgd() -> torch.optim.Optimizer:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9)


# -- random numbers


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)  # the second number of a pair is kept for later
    np.random.randn()
    states.write_rng(tmp_path / "rng.json")
    wanted = draws()
    draws()
    states.read_rng(tmp_path / "rng.json")
    assert draws() == wanted


def break_python(state: dict) -> None:
    state["python"][1][7] = 2**32


def shorten_numpy(state: dict) -> None:
    del state["numpy"][1][600:]


def point_numpy_beyond_its_memory(state: dict) -> None:
    state["numpy"][2] = 10**6


DAMAGED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "a word of more than 32 bits": (break_python, "python"),
    "a fraction for a word": (lambda s: s["python"][1].__setitem__(0, 0.5), "python"),
    "a position beyond the words": (lambda s: s["python"][1].__setitem__(624, 625), "python"),
    "another version": (lambda s: s["python"].__setitem__(0, 2), "python"),
    "a text for a number": (lambda s: s["python"].__setitem__(2, "0.5"), "python"),
    "too few parts": (lambda s: s["python"].pop(), "python"),
    "numpy: too few words": (shorten_numpy, "numpy"),
    "numpy: a position beyond its memory": (point_numpy_beyond_its_memory, "numpy"),
    "numpy: a negative position": (lambda s: s["numpy"].__setitem__(2, -1), "numpy"),
    "numpy: another generator": (lambda s: s["numpy"].__setitem__(0, "PCG64"), "numpy"),
    "torch: no digits": (lambda s: s.__setitem__("torch", "xyz"), "torch"),
    "torch: nothing": (lambda s: s.__setitem__("torch", ""), "torch"),
    "torch: too short": (lambda s: s.__setitem__("torch", s["torch"][:-2]), "torch"),
    "torch: other bytes": (lambda s: s.__setitem__("torch", "ff" * (len(s["torch"]) // 2)), "torch"),
    "torch: missing": (lambda s: s.pop("torch"), "torch"),
    "cuda: no texts": (lambda s: s.__setitem__("cuda", [7]), "cuda"),
    "cuda: no list": (lambda s: s.__setitem__("cuda", {}), "cuda"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_state_names_file_and_generator_and_changes_none(what: str, tmp_path: Path) -> None:
    damage, field = DAMAGED[what]
    path = tmp_path / "rng.json"
    states.write_rng(path)
    state = json.loads(path.read_text())
    draws()
    before = states.rng_state()
    damage(state)
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"field `{field}`") as caught:
        states.read_rng(path)
    assert str(path) in str(caught.value)
    assert states.rng_state() == before


# -- schedules


class Callables:
    """This is a lambda with a state, as in torch's documentation."""

    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, epoch: int) -> float:
        return self.factor**epoch


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return torch_schedules.ChainedScheduler(
        [torch_schedules.ConstantLR(optimizer), torch_schedules.MultiStepLR(optimizer, [3, 3, 6])]
    )


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [torch_schedules.LinearLR(optimizer), torch_schedules.ExponentialLR(optimizer, 0.9)]
    return torch_schedules.SequentialLR(optimizer, parts, milestones=[3])


NEEDED: dict[SchedulerType, dict[str, Any]] = {
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 3},
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr": 1e-5},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr": 1e-5},
    SchedulerType.GREEDY: {"smooth": True, "min_lr": 1e-6},
    SchedulerType.REDUCE_ON_PLATEAU: {"patience": 1},
}
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    **{
        str(kind.value): lambda o, kind=kind: get_scheduler(
            kind, o, num_warmup_steps=2, num_training_steps=12, scheduler_specific_kwargs=NEEDED.get(kind)
        )
        for kind in SchedulerType
    },
    "lambda with a state": lambda o: torch_schedules.LambdaLR(o, [Callables(), Callables()]),
    "plateau, largest": lambda o: torch_schedules.ReduceLROnPlateau(o, mode="max", patience=1),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, 1e-2, total_steps=20),
    "cyclic": lambda o: torch_schedules.CyclicLR(o, 1e-4, 1e-2, step_size_up=3),
    "warm restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "multi step": lambda o: torch_schedules.MultiStepLR(o, [3, 3, 6]),
    "sequential": sequential,
    "chained": chained,
}


def rates(optimizer: Any, schedule: Any, n_steps: int, *, start: int = 0) -> list[list[float]]:
    found = []
    for step in range(start, start + n_steps):
        optimizer.step()
        wants_metric = isinstance(schedule, torch_schedules.ReduceLROnPlateau) or "Greedy" in type(schedule).__name__
        schedule.step(*([1.0 + step % 4] if wants_metric else []))
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_where_it_was_to_the_last_bit(name: str, tmp_path: Path) -> None:
    straight, optimizer = sgd(), sgd()
    schedule = SCHEDULES[name](straight)
    rates(straight, schedule, 4)
    states.write_schedule(tmp_path, straight, schedule)
    wanted = rates(straight, schedule, 8, start=4)

    resumed = SCHEDULES[name](optimizer)
    states.read_schedule(tmp_path, optimizer, resumed)
    assert rates(optimizer, resumed, 8, start=4) == wanted
    assert repr(resumed.state_dict()) == repr(schedule.state_dict())


def test_a_schedule_made_for_another_number_of_groups_is_refused(tmp_path: Path) -> None:
    optimizer = sgd()
    states.write_schedule(tmp_path, optimizer, get_scheduler("linear", optimizer, 2, 10))
    one = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1e-3)
    with pytest.raises(CheckpointError, match=r"optimizer\.json.*1 parameter groups"):
        states.read_schedule(tmp_path, one, get_scheduler("linear", one, 2, 10))


def test_a_schedule_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    optimizer = sgd()
    states.write_schedule(tmp_path, optimizer, get_scheduler("linear", optimizer, 2, 10))
    with pytest.raises(CheckpointError, match=r"scheduler\.json.*LambdaLR.*ReduceLROnPlateau.*lr_scheduler_type"):
        states.read_schedule(tmp_path, optimizer, get_scheduler("reduce_lr_on_plateau", optimizer))


CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a method": ("scheduler", lambda s: s.update(step=0), "'step'"),
    "another kind": ("scheduler", lambda s: s.update(base_lrs=3), "base_lrs"),
    "rates of one group": ("scheduler", lambda s: s.update(base_lrs=[1e-3]), "base_lrs.*1 values for 2"),
    "a text for a rate": ("scheduler", lambda s: s.update(base_lrs=[1e-3, "x"]), "base_lrs"),
    "nothing": ("scheduler", lambda s: s.clear(), "KeyError"),
    "parameters": ("optimizer", lambda g: g[0].update(params=[]), "'params'"),
    "an unknown number": ("optimizer", lambda g: g[1].update(betas=(0.9, 0.99)), "'betas'"),
    "a text for a number": ("optimizer", lambda g: g[0].update(lr="fast"), "lr"),
    "a group that is none": ("optimizer", lambda g: g.__setitem__(0, 7), "no table"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_state_that_does_not_fit_is_refused_with_its_place(what: str, tmp_path: Path) -> None:
    name, change, words = CHANGES[what]
    optimizer = sgd()
    schedule = get_scheduler("linear", optimizer, 2, 10)
    states.write_schedule(tmp_path, optimizer, schedule)
    path = tmp_path / f"{name}.json"
    field = "state" if name == "scheduler" else "param_groups"
    content = json.loads(path.read_text())
    state = decode_state(content[field], where="here")
    change(state)
    path.write_text(json.dumps(content | {field: encode_state(state, where="here")}))
    with pytest.raises(CheckpointError, match=words) as caught:
        states.read_schedule(tmp_path, optimizer, schedule)
    assert str(path) in str(caught.value)


def test_a_schedule_that_only_a_pickle_could_hold_is_named_with_the_way_out(tmp_path: Path) -> None:
    optimizer = sgd()
    schedule = get_scheduler("linear", optimizer, 2, 10)
    schedule.history = {"best": [object()]}
    with pytest.raises(CheckpointError, match=r"LambdaLR\['history'\]\['best'\]\[0\] is a object.*save_strategy='no'"):
        states.write_schedule(tmp_path, optimizer, schedule)


# -- the codec

NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.integers() | TEXTS | st.tuples(st.integers(), TEXTS)
VALUES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_values_come_back_with_their_bits_and_kinds(value: Any) -> None:
    text = json.dumps(encode_state(value, where="x"), allow_nan=False)
    assert repr(decode_state(json.loads(text), where="x")) == repr(value)


def test_numpy_numbers_and_enums_come_back_as_python_s_own() -> None:
    class Kind(StrEnum):
        LINEAR = "linear"

    value = [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), Kind.LINEAR]
    found = decode_state(json.loads(json.dumps(encode_state(value, where="x"))), where="x")
    assert found == [0.1, float(np.float32(0.1)), 3, True, "linear"]
    assert [type(item) for item in found] == [float, float, int, bool, str]


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {"b": object()}]}, r"x\['a'\]\[1\]\['b'\] is a object"),
        (torch.ones(1), "x is a Tensor"),
        ({(1, object()): 1}, "a key of x"),
        (b"bytes", "x is a bytes"),
        ("half a \ud800", "x is a str that no file can hold"),
        (1 << 20_000, "x is a int that no file can hold"),
        (endless(), "nested deeper than 20"),
        ({1, 2}, "x is a set"),
    ],
    ids=["deep", "tensor", "key", "bytes", "half a character", "digits", "endless", "set"],
)
def test_what_cannot_be_written_is_named(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        encode_state(value, where="x")


@pytest.mark.parametrize(
    "value",
    [{}, {"a": 1}, {"float": "1"}, {"float": 1}, {"tuple": 1}, {"dict": [[1]]}, {"dict": [[[], 1]]}, {"dict": {}},
     {"float": "nan", "tuple": []}, [{"tuple": [{"x": 1}]}]],
)  # fmt: skip
def test_a_value_that_was_not_encoded_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"here: .* is no state"):
        decode_state(value, where="here")
