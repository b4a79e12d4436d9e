"""Promises of stored forms: packed frozen weights take their packed bytes everywhere, and a lease gives them decoded.

One toy form of half the size goes all the way: layout, placement, tiers, files, ring and lease.
"""

import json

import pytest
import torch

from tests.support.packed import HIGH_BYTE, coarse, known
from tests.support.stores import CPU, assert_equal, open_store, placed, record, visit_all
from tests.support.toys import TIERS, toy
from tests.tiers.test_store import eager_weights
from zo2trl.amp.codecs import PLAIN
from zo2trl.errors import StoreCorrupt, TraversalError, UnsupportedError
from zo2trl.layout.layout import ALIGNMENT_BYTES
from zo2trl.layout.layout_file import read_layout, write_layout
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place
from zo2trl.tiers.decoding import DecodeBuffer
from zo2trl.tiers.tier import encoded, put_tensor, stored_part, tensor_view


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    with known(monkeypatch):
        yield


def packed_toy(*, trained: str = "norm"):
    """A model in bfloat16 whose linear layers hold coarse values and are frozen; and what is to be packed of it."""
    model = toy().to(torch.bfloat16)
    stored = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
        if ".up.weight" in name or ".down.weight" in name:
            parameter.data = coarse(parameter.data)
            stored[name] = HIGH_BYTE.identity
    return model, stored


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------- the layout


def test_packed_tensors_have_their_own_sizes_and_offsets_beside_decoded_ones():
    model, stored = packed_toy()
    layout = plan_layout(model, stored=stored)
    plain = plan_layout(model)
    for unit, other in zip(layout.units, plain.units, strict=True):
        assert unit.n_bytes == other.n_bytes == other.stored_bytes
        assert [spec.byte_offset for spec in unit.tensors] == [spec.byte_offset for spec in other.tensors]
        offset = 0
        for spec in unit.tensors:
            assert spec.stored_offset == offset and spec.stored_bytes == spec.n_bytes // (1 if spec.is_plain else 2)
            offset += spec.stored_padded_bytes
            assert spec.is_plain or offset % ALIGNMENT_BYTES == 0
        assert unit.stored_bytes == offset and unit.is_plain == all(spec.is_plain for spec in unit.tensors)
    packed = [unit for unit in layout.units if not unit.is_plain]
    assert packed and all(unit.stored_bytes < unit.n_bytes and not unit.is_trained for unit in packed)
    assert layout.stored_forms == "high-byte+plain" and plain.stored_forms == PLAIN.identity
    assert layout.digest() != plain.digest()


def test_leaves_of_a_packed_block_lie_behind_each_other_in_both_forms():
    model, stored = packed_toy()
    layout = plan_layout(model, leaf_blocks="all", stored=stored)
    for unit in layout.units:
        segments = [segment for segment in layout.segments if segment.unit is unit]
        assert sum(segment.stored_bytes for segment in segments) == unit.stored_bytes
        assert sum(segment.n_bytes for segment in segments) == unit.n_bytes


def test_trained_weights_are_never_stored_in_another_form():
    model, stored = packed_toy(trained="up")
    with pytest.raises(UnsupportedError, match=r"up.weight is trained, and would be stored as high-byte"):
        plan_layout(model, stored=stored)


def test_the_layout_file_names_the_form_of_every_tensor(tmp_path):
    model, stored = packed_toy()
    layout = plan_layout(model, stored=stored)
    crcs = {spec.tensor_id: 0 for unit in layout.units for spec in unit.tensors}
    write_layout(tmp_path / "layout.json", layout, crcs)
    read = read_layout(tmp_path / "layout.json")
    assert read.units == layout.units and read.digest == layout.digest()
    assert read.layout.stored_forms == layout.stored_forms


@pytest.mark.parametrize("form", ["int3", "", "plain "])
def test_a_layout_file_with_an_unknown_form_is_refused(tmp_path, form):
    layout = plan_layout(toy())
    crcs = {spec.tensor_id: 0 for unit in layout.units for spec in unit.tensors}
    path = tmp_path / "layout.json"
    write_layout(path, layout, crcs)
    content = json.loads(path.read_text())
    content["units"][0]["tensors"][0]["stored"] = form
    path.write_text(json.dumps(content))
    with pytest.raises(StoreCorrupt, match="no form of weights"):
        read_layout(path)


def test_a_layout_file_that_packs_a_trained_tensor_is_refused(tmp_path):
    layout = plan_layout(toy())
    crcs = {spec.tensor_id: 0 for unit in layout.units for spec in unit.tensors}
    path = tmp_path / "layout.json"
    write_layout(path, layout, crcs)
    content = json.loads(path.read_text())
    content["units"][0]["tensors"][0]["stored"] = HIGH_BYTE.identity
    path.write_text(json.dumps(content))
    with pytest.raises(StoreCorrupt, match="is stored as it is"):
        read_layout(path)


# ------------------------------------------------------------------------------------------------------- the placement


@pytest.mark.parametrize("tier", TIERS)
def test_budgets_count_packed_bytes_and_the_buffer_that_a_visit_is_decoded_into(tier):
    model, stored = packed_toy()
    layout, plain = plan_layout(model, stored=stored), plan_layout(model)
    placement, before = placed(layout, tier), placed(plain, tier)
    decoded = max(sum(s.n_bytes for s in point.segments if not s.is_plain) for point in layout.points)
    assert placement.decode_bytes == decoded and before.decode_bytes == 0
    saved = sum(unit.n_bytes - unit.stored_bytes for unit in layout.units)
    if tier == "gpu":
        assert placement.device_bytes == before.device_bytes - saved + decoded
    if tier == "cpu":
        assert placement.cpu_bytes == before.cpu_bytes - saved


def test_the_smallest_budget_holds_the_decode_buffer():
    model, stored = packed_toy()
    layout = plan_layout(model, stored=stored)
    least = place(layout, Budgets(device="min", cpu=0))
    assert place(layout, Budgets(device=least.device_bytes, cpu=0)).device_bytes == least.device_bytes
    assert least.device_bytes >= least.ring_bytes + least.decode_bytes + least.scratch_bytes


# ---------------------------------------------------------------------------------------------- tiers, ring and leases


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("by_leaf", [False, True])
def test_leases_give_packed_weights_back_bit_for_bit_while_others_are_trained(tmp_path, tier, by_leaf):
    model, stored = packed_toy()
    records = [record(step) for step in range(3)]
    with open_store(model, tmp_path, tier=tier, by_leaf=by_leaf, stored=stored) as store:
        assert_equal(visit_all(store), weights_of(model))
        for i, step in enumerate(records):
            store.append(step)
            assert_equal(visit_all(store), eager_weights(model, records[: i + 1]))
        for unit in store.layout.units:
            assert store.view(unit)[0].shape == (unit.stored_bytes,)
            for spec, tensor in zip(unit.tensors, store.tensors(unit)[0], strict=True):
                if not spec.is_plain:
                    assert torch.equal(tensor, dict(model.named_parameters())[spec.name])
        assert not store._decode_buffer._lent


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_links_and_files_carry_packed_bytes_only(tmp_path, tier):
    model, stored = packed_toy()
    with open_store(model, tmp_path, tier=tier, stored=stored) as store:
        streamed = [unit for unit in store.layout.units if store.tier_of(unit) == tier]
        n_bytes = sum(unit.stored_bytes for unit in streamed)
        visit_all(store)
        moved = store.traffic["h2d" if tier == "cpu" else "disk_read"]
        assert n_bytes <= moved < sum(unit.n_bytes for unit in streamed) * 2
        assert moved % 1 == 0 and any(not unit.is_plain for unit in streamed)
        if tier == "disk":
            for unit in streamed:
                file = tmp_path / "units" / f"{unit.name}@0"
                assert file.stat().st_size == unit.stored_bytes + 4 * len(unit.tensors)


@pytest.mark.parametrize("start", TIERS)
@pytest.mark.parametrize("to", TIERS)
def test_packed_units_move_between_tiers_as_they_are(tmp_path, start, to):
    model, stored = packed_toy()
    with open_store(model, tmp_path, tier=start, stored=stored) as store:
        before = [store.view(unit)[0].clone() for unit in store.layout.units]
        store.relayout(store.layout, placed(store.layout, to))
        for unit, data in zip(store.layout.units, before, strict=True):
            assert torch.equal(store.view(unit)[0], data)
        assert_equal(visit_all(store), weights_of(model))


def test_a_flipped_byte_of_a_packed_file_is_found_and_named(tmp_path):
    model, stored = packed_toy()
    with open_store(model, tmp_path, tier="disk", stored=stored) as store:
        unit = next(unit for unit in store.layout.units if not unit.is_plain)
        spec = next(spec for spec in unit.tensors if not spec.is_plain)
        with (tmp_path / "units" / f"{unit.name}@0").open("r+b") as file:
            file.seek(spec.stored_offset + 5)
            byte = file.read(1)
            file.seek(spec.stored_offset + 5)
            file.write(bytes([byte[0] ^ 1]))
        store.weights_changed()
        with pytest.raises(StoreCorrupt, match=spec.name):
            visit_all(store)


def test_a_source_may_give_stored_bytes_as_they_are():
    model, stored = packed_toy()
    layout = plan_layout(model, stored=stored)
    unit = next(unit for unit in layout.units if not unit.is_plain)
    spec = next(spec for spec in unit.tensors if not spec.is_plain)
    data = torch.arange(spec.stored_bytes).to(torch.uint8)
    home = torch.zeros(unit.stored_bytes, dtype=torch.uint8)
    put_tensor(home, spec, data)
    assert torch.equal(stored_part(home, spec), data)
    assert torch.equal(encoded(spec, tensor_view(home, spec)), data)


# ------------------------------------------------------------------------------------------------------- decode buffer


def test_a_plain_segment_is_leased_where_it_is_and_costs_no_memory():
    layout = plan_layout(toy())
    buffer = DecodeBuffer(0, device=CPU)
    for segment in layout.segments:
        stored = torch.zeros(segment.stored_bytes, dtype=torch.uint8)
        assert buffer.decoded(segment, stored) is stored
        buffer.give_back(segment)
    assert buffer._memory is None


def test_a_visit_that_the_buffer_cannot_hold_beside_others_is_refused_and_leaves_it_usable():
    model, stored = packed_toy()
    layout = plan_layout(model, stored=stored)
    one, two = [segment for segment in layout.segments if not segment.is_plain][:2]
    buffer = DecodeBuffer(one.n_bytes, device=CPU)
    data = torch.zeros(one.stored_bytes, dtype=torch.uint8)
    first = buffer.decoded(one, data)
    assert buffer.decoded(one, data).data_ptr() == first.data_ptr(), "a shared segment is decoded in one place"
    buffer.give_back(one)
    with pytest.raises(TraversalError, match="no room to decode"):
        buffer.decoded(two, data)
    buffer.give_back(one)
    assert buffer.decoded(two, data).data_ptr() == first.data_ptr()
