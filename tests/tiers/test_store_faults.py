"""Promises of the store when drives fail: the old bytes stay usable, the failure is told."""

import pytest

from tests.support.stores import assert_equal, at_home, open_store, record, visit_all
from tests.support.toys import toy, weights_of
from tests.tiers.test_store import eager_weights, hashes
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS
from zo2trl.tiers.disk import DiskTier
from zo2trl.zo.updates import SGD


class FailingWrites(FS):
    broken = False

    def write_some(self, fd, data, offset):
        if self.broken:
            raise OSError(28, "No space left on device")
        return super().write_some(fd, data, offset)


def test_a_failing_write_back_surfaces_and_the_old_bytes_stay_usable(tmp_path):
    fs, model = FailingWrites(), toy()
    before = hashes_of_first = None
    with open_store(model, tmp_path, tier="disk", fs=fs) as store:
        before = at_home(store)
        hashes_of_first = hashes(tmp_path)
        fs.broken = True
        store.append(record(0))
        with pytest.raises(StoreError, match="No space left"):
            visit_all(store)
            store.settle()
        streamed = [name for name in before if name.startswith("layers")]
        assert_equal({k: at_home(store)[k] for k in streamed}, {k: before[k] for k in streamed})
    assert {name: digest for name, digest in hashes(tmp_path).items() if name.endswith("@0")} == hashes_of_first


def test_once_there_is_room_again_the_next_flush_catches_up(tmp_path):
    fs, model = FailingWrites(), toy()
    with open_store(model, tmp_path, tier="disk", fs=fs) as store:
        fs.broken = True
        store.append(record(0))
        with pytest.raises(StoreError, match="No space left"):
            visit_all(store)
            store.settle()
        fs.broken = False
        for _ in range(3):  # every write that failed may say so once
            try:
                store.flush()
                break
            except StoreError:
                continue
        assert_equal(at_home(store), eager_weights(model, [record(0)]))


def test_a_failing_load_surfaces_in_the_lease(tmp_path):
    model = toy()

    class Unreadable(DiskTier):
        broken = False

        def home(self, unit):
            if self.broken:
                raise StoreError("layers.1 cannot be read")
            return super().home(unit)

    disks = []

    def disk(files, *, fs):
        disks.append(Unreadable(files, fs=fs))
        return disks[0]

    with open_store(model, tmp_path, tier="disk", disk=disk) as store:
        visit_all(store)
        disks[0].broken = True
        store.weights_changed()
        with pytest.raises(StoreError, match="cannot be read"):
            visit_all(store)
        disks[0].broken = False
        store.weights_changed()
        assert_equal(visit_all(store), weights_of(model))


def test_a_resident_unit_that_absorbed_half_a_step_is_not_lent_again(tmp_path, monkeypatch):
    model = toy()
    with open_store(model, tmp_path, tier="gpu") as store:
        store.append(record(0))
        real = SGD.apply

        def fail_half_way(self, weights, *args, **named):
            real(self, weights, *args, **named)
            raise MemoryError("no room for the rest of the unit")

        with monkeypatch.context() as patch:
            patch.setattr(SGD, "apply", fail_half_way)
            with pytest.raises(MemoryError):
                visit_all(store)
        with pytest.raises(StoreError, match=r"layers.0.*not known.*resume_from_checkpoint"):
            visit_all(store)
