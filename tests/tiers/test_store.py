"""Promises of the store: lazy equals eager, frozen means untouched, homes are current when asked, nothing leaks."""

import hashlib
import threading

import numpy as np
import pytest
import torch

from tests.conftest import open_files
from tests.support.stores import (
    assert_equal,
    at_home,
    make_store,
    method,
    open_store,
    record,
    source_of,
    visit_all,
)
from tests.support.toys import TIERS, toy, weights_of
from zo2trl.layout.model_layout import plan_layout
from zo2trl.tiers.disk import DiskTier

STEPS = 8


def eager_weights(model, records):
    """Every step applied to every tensor at once, without a store."""
    layout, values = plan_layout(model), source_of(model)
    result = {}
    for segment in layout.segments:
        flat = torch.zeros(segment.n_bytes, dtype=torch.uint8)
        for spec in segment.tensors:
            flat[spec.byte_offset : spec.byte_offset + spec.n_bytes].view(spec.dtype).copy_(values(spec).flatten())
        method().replay(flat, segment.spans, records)
        for spec in segment.tensors:
            piece = flat[spec.byte_offset : spec.byte_offset + spec.n_bytes].view(spec.dtype)
            result[spec.name] = piece.view(spec.shape).clone()
    return result


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "units").iterdir()}


def home_addresses(store):
    """Where units in memory live; a disk unit's map may be made anew at any time."""
    return {u.index: store.view(u)[0].data_ptr() for u in store.layout.units if store.tier_of(u) != "disk"}


def frozen_toy(*, every_other: bool = False):
    """A toy with frozen weights: whole blocks, or the smaller part of every block."""
    model = toy()
    for i, layer in enumerate(model.layers):
        if every_other:
            layer.norm.requires_grad_(False)
        elif i % 2 == 0:
            layer.requires_grad_(False)
    return model


# ----------------------------------------------------------------------------------------------------------- catch-up


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("tier", TIERS)
def test_lazy_write_back_equals_eager_bit_for_bit(tmp_path, tier, every, by_leaf):
    model = toy(tied=True)
    records = [record(step) for step in range(STEPS)]
    with open_store(model, tmp_path, tier=tier, every=every, by_leaf=by_leaf) as store:
        for i, one in enumerate(records):
            store.append(one)
            assert_equal(visit_all(store), eager_weights(model, records[: i + 1]))
        store.flush()
        assert_equal(at_home(store), eager_weights(model, records))


@pytest.mark.parametrize("tier", TIERS)
def test_units_that_nobody_visited_for_many_steps_catch_up_at_once(tmp_path, tier):
    model = toy()
    records = [record(step) for step in range(STEPS)]
    with open_store(model, tmp_path, tier=tier) as store:
        for one in records:
            store.append(one)
        assert_equal(visit_all(store), eager_weights(model, records))


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_flush_makes_every_home_current_even_if_nothing_was_visited(tmp_path, tier, by_leaf):
    model = toy()
    with open_store(model, tmp_path, tier=tier, every=7, by_leaf=by_leaf) as store:
        store.append(record(0))
        store.flush()
        assert_equal(at_home(store), eager_weights(model, [record(0)]))
        store.flush()
        assert_equal(at_home(store), eager_weights(model, [record(0)]))


@pytest.mark.parametrize("tier", TIERS)
def test_reading_inside_a_writing_block_leaves_nothing_to_catch_up(tmp_path, tier):
    model = toy()
    with open_store(model, tmp_path, tier=tier, every=7) as store:
        store.append(record(0))
        with store.writing_back():
            visit_all(store)
        store.settle()
        assert_equal(at_home(store), eager_weights(model, [record(0)]))


def test_an_interval_of_k_writes_each_block_once_in_k_steps(tmp_path):
    model = toy(n_blocks=4)
    with open_store(model, tmp_path, tier="disk", every=4) as store:
        block_bytes = store.layout.units[1].n_bytes
        for step in range(8):
            store.append(record(step))
            visit_all(store)
            store.settle()
            assert store.traffic["disk_written"] == (step + 1) * block_bytes, "a quarter of the blocks each step"


@pytest.mark.parametrize("every", [1, 3])
def test_blocks_visited_in_another_order_or_only_some_of_them_are_right_too(tmp_path, every):
    model = toy(n_blocks=4)
    records = [record(step) for step in range(6)]
    with open_store(model, tmp_path, tier="disk", every=every, by_leaf=True) as store:
        for i, one in enumerate(records):
            store.append(one)
            expected = eager_weights(model, records[: i + 1])
            for point in [*store.layout.points[::-1][i:], *store.layout.points[1:4]]:
                with store.lease_clean(point) as (weights,):
                    (segment,) = point.segments
                    spec = segment.tensors[0]
                    assert torch.equal(weights[: spec.n_bytes].view(torch.float32), expected[spec.name].flatten())
            store.end_traversal()
        store.flush()
        assert_equal(at_home(store), eager_weights(model, records))


class LateReads(DiskTier):
    """A slow reader: once `held`, whoever looks at a home dawdles, until the unit is published anew if that can be."""

    def __init__(self, files, *, fs):
        super().__init__(files, fs=fs)
        self.held, self.published = False, threading.Event()

    def home(self, unit):
        if self.held:
            self.published.wait(0.3)
        return super().home(unit)

    def publish(self, unit):
        make_home = super().publish(unit)
        self.published.set()
        return make_home


def test_a_leaf_read_while_its_unit_is_published_does_not_absorb_a_step_twice(tmp_path):
    model, disks = toy(n_blocks=1), []

    def disk(files, *, fs):
        disks.append(LateReads(files, fs=fs))
        return disks[0]

    with open_store(model, tmp_path, tier="disk", by_leaf=True, disk=disk) as store:
        first, *others = store.layout.points[1:]
        spec = first.segments[0].tensors[0]
        store.append(record(0))
        with store.lease_clean(first):
            disks[0].held = True  # the ring may read this leaf again before the unit's last leaf is written
        for point in others:
            with store.lease_clean(point):
                pass
        expected = eager_weights(model, [record(0)])[spec.name]
        with store.lease_clean(first) as (weights,):
            assert torch.equal(weights[: spec.n_bytes].view(torch.float32), expected.flatten())


# ------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_frozen_blocks_are_never_written(tmp_path, tier, by_leaf):
    model = toy().requires_grad_(False)
    with open_store(model, tmp_path, tier=tier, by_leaf=by_leaf) as store:
        files, residency = hashes(tmp_path), home_addresses(store)
        for step in range(3):
            store.append(record(step))
            assert_equal(visit_all(store), weights_of(model))
        store.flush()
        assert hashes(tmp_path) == files
        assert home_addresses(store) == residency
        assert store.traffic["disk_written"] == store.traffic["d2h"] == 0


def test_frozen_blocks_between_trainable_ones_keep_their_files(tmp_path):
    model = frozen_toy()
    with open_store(model, tmp_path, tier="disk") as store:
        before = hashes(tmp_path)
        for step in range(3):
            store.append(record(step))
            visit_all(store)
        store.flush()
        after = hashes(tmp_path)
        frozen = {name for name in before if name.startswith(("layers.0", "layers.2"))}
        assert len(frozen) == 2 and all(after[name] == before[name] for name in frozen)
        assert {name for name in after if name.startswith("layers.1")} == {"layers.1@3"}


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_frozen_tensors_inside_trainable_blocks_keep_their_values_and_the_others_move(tmp_path, tier, by_leaf):
    model = frozen_toy(every_other=True)
    records = [record(step) for step in range(3)]
    with open_store(model, tmp_path, tier=tier, by_leaf=by_leaf) as store:
        for i, one in enumerate(records):
            store.append(one)
            assert_equal(visit_all(store), eager_weights(model, records[: i + 1]))
        store.flush()
        assert_equal(at_home(store), eager_weights(model, records))


# --------------------------------------------------------------------------------------------------- files and memory


def test_unit_files_hold_the_current_weights_for_any_numpy_reader(tmp_path):
    model = toy(tied=True)
    records = [record(step) for step in range(3)]
    with open_store(model, tmp_path, tier="disk", every=3) as store:
        for one in records:
            store.append(one)
            visit_all(store)
        store.flush()
        layout = store.layout
    expected, names = eager_weights(model, records), {path.name for path in (tmp_path / "units").iterdir()}
    blocks = [unit for unit in layout.units if unit.kind == "block"]
    assert len(names) == len(blocks)
    for unit in blocks:
        (name,) = (name for name in names if name.startswith(f"{unit.name}@"))
        mapped = np.memmap(tmp_path / "units" / name, dtype=np.uint8, mode="r", shape=(unit.n_bytes,))
        for spec in unit.tensors:
            values = mapped[spec.byte_offset : spec.byte_offset + spec.n_bytes].view(np.float32)
            assert np.array_equal(values, expected[spec.name].numpy().ravel())


@pytest.mark.parametrize("tier", TIERS)
def test_closing_leaves_no_thread_and_no_open_file(tmp_path, tier):
    threads, files = set(threading.enumerate()), set(open_files().values())
    store = make_store(toy(), tmp_path, tier=tier)
    for step in range(2):
        store.append(record(step))
        visit_all(store)
    store.close()
    store.close()
    assert set(threading.enumerate()) <= threads
    assert {name for name in open_files().values() if str(tmp_path) in name} <= files


def test_traffic_counts_what_went_over_each_link(tmp_path):
    model = toy()
    with open_store(model, tmp_path, tier="disk") as store:
        streamed = sum(unit.n_bytes for unit in store.layout.units if unit.kind == "block")
        store.append(record(0))
        visit_all(store)
        store.settle()
        assert store.traffic["disk_written"] == streamed
        assert store.traffic["disk_read"] >= streamed


def test_describe_names_every_unit_with_its_tier_and_bytes(tmp_path):
    with open_store(toy(), tmp_path, tier="disk") as store:
        rows = store.describe()
        assert [(name, tier) for name, tier, _ in rows] == [
            ("root", "gpu"), ("layers.0", "disk"), ("layers.1", "disk"), ("layers.2", "disk"),
        ]  # fmt: skip
        assert sum(n for *_, n in rows) == sum(unit.n_bytes for unit in store.layout.units)
        assert "disk: 3 units" in store.summary()


# ------------------------------------------------------------------------------------------------------------ replace


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_replaced_weights_are_lent_and_absorb_only_later_steps(tmp_path, tier, by_leaf):
    model, other = toy(seed=0), toy(seed=1)
    with open_store(model, tmp_path, tier=tier, every=3, by_leaf=by_leaf) as store:
        for step in range(2):
            store.append(record(step))
            visit_all(store)
        for _ in range(2):  # the same step may be replaced again
            store.replace(source_of(other))
            assert_equal(at_home(store), weights_of(other))
            assert_equal(visit_all(store), weights_of(other))
        store.append(record(2))
        assert_equal(visit_all(store), eager_weights(other, [record(2)]))
        store.flush()
        assert_equal(at_home(store), eager_weights(other, [record(2)]))


@pytest.mark.parametrize("snapshot", [1, 3, 1 << 40])
@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_going_back_shows_earlier_weights_and_training_on_continues_from_them(tmp_path, tier, by_leaf, snapshot):
    model = toy()
    records = [record(step) for step in range(6)]
    with open_store(model, tmp_path, tier=tier, every=2, by_leaf=by_leaf, snapshot=snapshot) as store:
        for one in records:
            store.append(one)
            visit_all(store)
        store.go_back(3, base=source_of(model))
        assert_equal(visit_all(store), eager_weights(model, records[:3]))
        assert len(store.journal.records) == 6, "looking back forgets nothing"
        store.append(record(3, grad=0.5))
        again = [*records[:3], record(3, grad=0.5)]
        assert_equal(visit_all(store), eager_weights(model, again))
        assert store.journal.records == again
        store.flush()
        assert_equal(at_home(store), eager_weights(model, again))


@pytest.mark.parametrize("tier", TIERS)
def test_replacing_reaches_frozen_weights_too(tmp_path, tier):
    model, other = frozen_toy(), toy(seed=1)
    with open_store(model, tmp_path, tier=tier) as store:
        store.replace(source_of(other))
        assert_equal(visit_all(store), weights_of(other))
