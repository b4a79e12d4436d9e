"""Promises of layout.json: the units come back as they were, and nothing that cannot be is believed."""

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.support.models import NAMES, tiny_model
from tests.support.stores import method
from zo2trl.errors import StoreCorrupt
from zo2trl.layout.layout import Layout, Unit
from zo2trl.layout.layout_file import base_digest, read_layout, write_layout
from zo2trl.layout.model_layout import plan_layout
from zo2trl.zo.records import StepRecord
from zo2trl.zo.tiles import TILE

RECORDS = [
    StepRecord(
        step=step, seed=77 + step, coefficients=(0.5, -0.25), learning_rate=0.01, weight_decay=0.1, zo_eps=1e-3,
        losses=(1.0, 0.5), scalars=(0.1,),
    )
    for step in range(3)
]  # fmt: skip


class Mixed(nn.Module):
    """Blocks whose tensors differ in dtype, trainability, size and decay, in an order that breaks spans apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.block(i) for i in range(3))
        self.head = nn.Parameter(torch.zeros(TILE + 5, dtype=torch.bfloat16))
        self.count = nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(0, 4))

    def block(self, index: int) -> nn.Module:
        block = GradientCheckpointingLayer()
        for i, (dtype, trainable) in enumerate(
            [(torch.float32, True), (torch.float32, index != 1), (torch.float16, True), (torch.float32, False)]
        ):
            leaf = nn.Module()
            leaf.w = nn.Parameter(torch.zeros(TILE // 2 * (i + 1), dtype=dtype), requires_grad=trainable)
            block.add_module(f"leaf{i}", leaf)
        return block


def layout_of(model: nn.Module, *, by_leaf: bool = False) -> Layout:
    decays = [name for name, p in model.named_parameters() if p.dim() != 1 or p.numel() > TILE]
    return plan_layout(model, decay_names=decays, leaf_blocks="all" if by_leaf else ())


def crcs_of(layout: Layout) -> dict[int, int]:
    return {t.tensor_id: crc32(t.name.encode()) for unit in layout.units for t in unit.tensors}


def written(tmp_path: Path, layout: Layout) -> Path:
    write_layout(tmp_path / "layout.json", layout, crcs_of(layout))
    return tmp_path / "layout.json"


def spans(layout: Layout, unit: Unit) -> list[tuple[int, torch.dtype, bool, list, list, list]]:
    """A unit's spans, joined over its segments."""
    return [
        (segment.byte_start + span.byte_start, span.dtype, span.decays, span.tiles.tensor_ids.tolist(),
         span.tiles.tile_indices.tolist(), span.tiles.n_valid.tolist())
        for segment in layout.segments if segment.unit is unit for span in segment.spans
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_units_of_every_family_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    layout = layout_of(tiny_model(name), by_leaf=True)
    stored = read_layout(written(tmp_path, layout))
    assert stored.units == layout.units
    assert stored.layout.digest() == stored.digest == layout.digest()
    assert stored.base_crcs == crcs_of(layout)
    assert base_digest(stored, stored.base_crcs) == base_digest(layout, crcs_of(layout))


def test_whole_units_have_the_spans_of_a_layout_by_blocks(tmp_path: Path) -> None:
    layout = layout_of(Mixed())
    stored = read_layout(written(tmp_path, layout)).layout
    assert [spans(stored, unit) for unit in stored.units] == [spans(layout, unit) for unit in layout.units]
    assert [segment.unit for segment in stored.segments] == list(stored.units)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_replay_on_whole_units_gives_the_bits_of_replay_leaf_by_leaf(tmp_path: Path, rounding: Any) -> None:
    layout = layout_of(Mixed(), by_leaf=True)
    stored = read_layout(written(tmp_path, layout)).layout
    arithmetic = method(rounding)
    for unit, segment in zip(layout.units, stored.segments, strict=True):
        whole = torch.randint(0, 64, (unit.n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        by_leaf = whole.clone()
        arithmetic.replay(whole, segment.spans, RECORDS)
        for part in (s for s in layout.segments if s.unit is unit):
            arithmetic.replay(by_leaf[part.byte_start : part.byte_start + part.n_bytes], part.spans, RECORDS)
        assert torch.equal(whole, by_leaf), unit.name


def test_base_digests_tell_weights_and_names_apart() -> None:
    layout = layout_of(Mixed())
    crcs = crcs_of(layout)
    other = layout_of(nn.ModuleDict({"a": Mixed()}))
    assert base_digest(layout, crcs) != base_digest(layout, crcs | {2: crcs[2] ^ 1})
    assert base_digest(layout, crcs) != base_digest(other, crcs)


# -- what cannot be


def with_tensor(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["units"][1]["tensors"][1].update(changes)


def with_unit(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["units"][1].update(changes)


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (lambda content: content.update(format=1), "format 1"),
    "no units": (lambda content: content.update(units=[]), "`id`s"),
    "units that are no list": (lambda content: content.update(units={}), "`units`"),
    "a unit that is no table": (lambda content: content["units"].append(7), r"units\[\d\]"),
    "an unknown kind": (with_unit(kind="blob"), "`kind`"),
    "a unit without tensors": (with_unit(tensors=[]), "`tensors`"),
    "a unit called like another": (with_unit(name="root"), "two units are called 'root'"),
    "half a character": (with_unit(name="\ud800"), "half a character"),
    "a tensor called like another": (with_tensor(name="head"), "two tensors are called 'head'"),
    "an id twice": (with_tensor(id=0), "`id`s of"),
    "an id out of range": (with_tensor(id=2**32), "`id`"),
    "a number that is a truth": (with_tensor(id=True), "`id`"),
    "a shape below zero": (with_tensor(shape=[-1]), "`shape`"),
    "a shape of text": (with_tensor(shape=["4"]), "`shape`"),
    "a shape of 2^60 elements": (with_tensor(shape=[2**20, 2**20, 2**20]), "`shape`"),
    "a shape of a digit after the other": (with_tensor(shape=[10**4000]), "`shape`"),
    "an unknown dtype": (with_tensor(dtype="float31"), "`dtype`"),
    "a function as dtype": (with_tensor(dtype="load"), "`dtype`"),
    "an offset between tiles": (with_tensor(offset=8), "`offset`"),
    "an offset below zero": (with_tensor(offset=-8), "`offset`"),
    "a trainable integer": (with_tensor(dtype="int32", trainable=True, offset=TILE * 4), "`trainable`|`offset`"),
    "a truth that is a number": (with_tensor(trainable=1), "`trainable`"),
    "no decay": (lambda content: content["units"][1]["tensors"][1].pop("decays"), "`decays`"),
    "a checksum of 33 bits": (with_tensor(crc=2**32), "`crc`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_naming_file_and_field(tmp_path: Path, what: str) -> None:
    path = written(tmp_path, layout_of(Mixed()))
    change, message = WRONG[what]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreCorrupt, match=message) as refused:
        read_layout(path)
    assert str(path) in str(refused.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_field_with_anything_else_is_refused_or_means_what_it_says(tmp_path: Path, data: st.DataObject) -> None:
    path = written(tmp_path, layout_of(Mixed()))
    before = json.loads(path.read_text())
    content = copy.deepcopy(before)
    unit = data.draw(st.sampled_from(content["units"]))
    where = data.draw(st.sampled_from([content, unit, *unit["tensors"]]))
    field = data.draw(st.sampled_from(sorted(where)))
    where[field] = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(0, 2**20)),
    )
    path.write_text(json.dumps(content))
    try:
        stored = read_layout(path)
    except StoreCorrupt:
        return
    write_layout(path, stored.layout, stored.base_crcs)
    assert json.loads(path.read_text()) == content


def test_claims_take_no_memory(tmp_path: Path) -> None:
    path = written(tmp_path, layout_of(Mixed()))
    content = json.loads(path.read_text())
    content["units"] = content["units"][:1]
    content["units"][0]["tensors"] = [content["units"][0]["tensors"][0] | {"id": 0, "shape": [2**44], "offset": 0}]
    path.write_text(json.dumps(content))
    tracemalloc.start()
    try:
        assert read_layout(path).digest
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
