"""One contract for every tier, and what the disk tier promises on top: plain files, published whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.packed import HIGH_BYTE, coarse, known
from tests.support.stores import CPU, source_of
from tests.support.toys import TIERS, toy
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS
from zo2trl.layout.model_layout import plan_layout
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.tier import stored_part, tensor_view
from zo2trl.tiers.unit_files import UnitFiles


def make_tier(name, units, folder, fs=None):
    if name == "gpu":
        return DeviceTier(CPU)
    if name == "cpu":
        return HostTier(units, pinned=False)
    fs = fs or FS()
    fs.make_dir(folder / "units")
    return DiskTier(UnitFiles(folder / "units", fs=fs), fs=fs)


class Rig:
    """A tier that holds the blocks of a toy model, cut in leaves."""

    def __init__(self, name, folder, *, fs=None, dtype=torch.float32, frozen=None):
        self.model = toy().to(dtype)
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in parameter_name)
        self.layout = plan_layout(self.model, leaf_blocks="all")
        self.units = [unit for unit in self.layout.units if unit.kind == "block"]
        self.tier = make_tier(name, self.units, folder, fs)
        for unit in self.units:
            self.tier.add(unit, source_of(self.model))

    def segments(self, unit):
        return [segment for segment in self.layout.segments if segment.unit is unit]

    def read(self, segment):
        return self.tier.view(segment.unit)[segment.byte_start : segment.byte_start + segment.n_bytes].clone()

    def write(self, segment, fill, version):
        """Write one segment, and publish if that may be; whether it was."""
        complete = self.tier.write(segment, torch.full((segment.n_bytes,), fill, dtype=torch.uint8), version=version)
        if complete:
            self.tier.publish(segment.unit)()
        return complete

    def write_unit(self, unit, fill, version):
        return [self.write(segment, fill, version) for segment in self.segments(unit)]


@pytest.fixture(params=TIERS)
def rig(request, tmp_path):
    rig = Rig(request.param, tmp_path)
    yield rig
    rig.tier.close()


@pytest.fixture
def disk(tmp_path):
    rig = Rig("disk", tmp_path)
    yield rig
    rig.tier.close()


def files(folder):
    return sorted(path.name for path in (folder / "units").iterdir())


# ------------------------------------------------------------------------------------------------------ every tier


def test_a_home_shows_the_adopted_tensors_and_zero_padding(rig):
    parameters = dict(rig.model.named_parameters())
    for unit in rig.units:
        home = rig.tier.view(unit)
        assert home.dtype == torch.uint8 and home.shape == (unit.n_bytes,)
        for spec in unit.tensors:
            assert torch.equal(tensor_view(home, spec), parameters[spec.name])
            padding = home[spec.byte_offset + spec.n_bytes : spec.byte_offset + spec.n_padded_bytes]
            assert torch.count_nonzero(padding) == 0


@pytest.mark.parametrize("backwards", [False, True])
def test_written_segments_become_the_home_with_the_last_of_them(rig, backwards):
    unit = rig.units[1]
    segments = rig.segments(unit)[:: -1 if backwards else 1]
    answers = [rig.write(segment, 7, 1) for segment in segments]
    assert answers[-1] is True
    assert bool((rig.tier.view(unit) == 7).all())
    assert all(bool((rig.read(segment) == 7).all()) for segment in segments)


def test_a_segment_counts_as_written_only_once_it_is_at_home(rig):
    segment, *_ = rig.segments(rig.units[0])
    before = rig.read(segment)
    published = rig.write(segment, 7, 1)
    now = rig.read(segment)
    assert torch.equal(now, torch.full_like(now, 7) if published else before)


def test_writing_one_unit_leaves_the_others_alone(rig):
    before = [rig.tier.view(unit).clone() for unit in rig.units]
    rig.write_unit(rig.units[1], 7, 1)
    for i in (0, 2):
        assert torch.equal(rig.tier.view(rig.units[i]), before[i])


def test_an_abandoned_version_leaves_whole_segments_and_the_next_one_works(rig):
    unit = rig.units[0]
    segments = rig.segments(unit)
    old = {segment.index: rig.read(segment) for segment in segments}
    rig.write(segments[0], 7, 1)
    rig.tier.abandon(unit)
    for segment in segments:
        now = rig.read(segment)
        assert torch.equal(now, old[segment.index]) or bool((now == 7).all())
    rig.tier.abandon(unit)
    assert rig.write_unit(unit, 8, 2)[-1] is True
    assert bool((rig.tier.view(unit) == 8).all())


def test_many_versions_follow_each_other(rig):
    for version in range(1, 6):
        for unit in rig.units:
            rig.write_unit(unit, version, version)
    assert all(bool((rig.tier.view(unit) == 5).all()) for unit in rig.units)


def test_the_same_step_can_be_written_again_with_other_bytes(rig):
    for fill in (3, 4, 5):
        assert rig.write_unit(rig.units[0], fill, 1)[-1] is True
        assert bool((rig.tier.view(rig.units[0]) == fill).all())


def test_a_view_outlives_the_tier(rig):
    view = rig.tier.view(rig.units[0])
    before = view.clone()
    rig.tier.close()
    rig.tier.close()
    assert torch.equal(view, before)


def test_a_dropped_unit_is_gone_its_views_stay_readable_and_it_may_come_back(rig):
    unit, other = rig.units[:2]
    view, others = rig.tier.view(unit), rig.tier.view(other).clone()
    before = view.clone()
    rig.tier.drop(unit)
    rig.tier.drop(unit)
    with pytest.raises(KeyError):
        rig.tier.view(unit)
    assert torch.equal(view, before) and torch.equal(rig.tier.view(other), others)
    if isinstance(rig.tier, DiskTier):
        rig.tier.open_version(unit, rig.tier._files.newest(unit))
    else:
        rig.tier.add(unit, source_of(rig.model))
    assert torch.equal(rig.tier.view(unit), before)


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_units_are_kept_bit_for_bit(name, dtype, tmp_path):
    rig = Rig(name, tmp_path, dtype=dtype)
    parameters = dict(rig.model.named_parameters())
    for unit in rig.units:
        for spec in unit.tensors:
            assert torch.equal(tensor_view(rig.tier.view(unit), spec), parameters[spec.name])
    rig.tier.close()


@pytest.mark.parametrize("name", TIERS)
def test_scalars_and_transposed_sources_are_adopted_by_value(name, tmp_path):
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(3.5))
    model.turned = nn.Parameter(torch.arange(12.0).view(3, 4).t())
    (unit,) = plan_layout(model).units
    tier = make_tier(name, [unit], tmp_path)
    tier.add(unit, lambda spec: getattr(model, spec.name).detach())
    for spec in unit.tensors:
        assert torch.equal(tensor_view(tier.view(unit), spec), getattr(model, spec.name))
    tier.close()


@pytest.mark.parametrize("name", TIERS)
def test_packed_units_are_kept_in_their_stored_form_and_shown_decoded(name, tmp_path, monkeypatch):
    model = toy().to(torch.bfloat16)
    stored = {}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.data = coarse(parameter.data)
        stored[parameter_name] = HIGH_BYTE.identity
    with known(monkeypatch):
        units = [unit for unit in plan_layout(model, stored=stored).units if unit.kind == "block"]
        tier = make_tier(name, units, tmp_path)
        for unit in units:
            tier.add(unit, source_of(model))
            home, tensors = tier.view(unit), tier.tensors(unit)
            assert home.shape == (unit.stored_bytes,) and unit.stored_bytes < unit.n_bytes
            for spec, tensor in zip(unit.tensors, tensors, strict=True):
                value = source_of(model)(spec)
                assert torch.equal(stored_part(home, spec), HIGH_BYTE.encode(value)) and torch.equal(tensor, value)
        tier.close()


def test_tensors_of_one_home_do_not_look_tied(rig):
    unit = rig.units[0]
    storages = [tensor_view(rig.tier.view(unit), spec).untyped_storage().data_ptr() for spec in unit.tensors]
    assert len(set(storages)) == len(storages)


# ------------------------------------------------------------------------------------------------- the disk tier's own


def test_a_unit_is_one_plain_file_that_numpy_can_map(disk, tmp_path):
    parameters = dict(disk.model.named_parameters())
    for unit in disk.units:
        mapped = np.memmap(tmp_path / "units" / f"{unit.name}@0", dtype=np.uint8, mode="r")
        assert mapped.size == unit.n_bytes + 4 * len(unit.tensors), "its bytes, and a checksum for each tensor"
        for spec in unit.tensors:
            flat = mapped[spec.byte_offset : spec.byte_offset + spec.n_bytes].view(np.float32)
            assert np.array_equal(flat, parameters[spec.name].detach().numpy().ravel())


def test_an_incomplete_version_is_invisible_and_gone_after_closing(disk, tmp_path):
    unit = disk.units[0]
    before = disk.tier.view(unit).clone()
    assert disk.write(disk.segments(unit)[0], 7, 1) is False
    assert torch.equal(disk.tier.view(unit), before)
    disk.tier.close()
    assert files(tmp_path) == [f"{unit.name}@0" for unit in disk.units]


def test_a_new_version_replaces_the_old_file_and_old_readers_keep_their_bytes(disk, tmp_path):
    unit = disk.units[0]
    old = disk.tier.view(unit)
    before = old.clone()
    disk.write_unit(unit, 7, 3)
    assert torch.equal(old, before)
    assert files(tmp_path) == sorted([f"{unit.name}@3", *(f"{u.name}@0" for u in disk.units[1:])])
    assert (tmp_path / "units" / f"{unit.name}@3").read_bytes()[: unit.n_bytes] == bytes([7]) * unit.n_bytes


def test_a_newer_version_pushes_out_an_unfinished_one(disk, tmp_path):
    unit = disk.units[0]
    disk.write(disk.segments(unit)[0], 7, 1)
    disk.write_unit(unit, 8, 2)
    assert bool((disk.tier.view(unit) == 8).all())
    assert f"{unit.name}@1" not in files(tmp_path)


def test_a_stray_write_into_a_disk_view_never_reaches_the_file(disk, tmp_path):
    unit = disk.units[0]
    path = tmp_path / "units" / f"{unit.name}@0"
    before = path.read_bytes()
    disk.tier.view(unit).fill_(255)
    assert path.read_bytes() == before


class FullDisk(FS):
    full = False

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write_some(fd, data, offset)


def test_a_full_disk_is_an_error_and_the_old_version_stays(tmp_path: Path):
    fs = FullDisk()
    rig = Rig("disk", tmp_path, fs=fs)
    unit = rig.units[0]
    before = rig.tier.view(unit).clone()
    fs.full = True
    with pytest.raises(StoreError, match="bytes are needed"):
        rig.write_unit(unit, 7, 1)
    assert torch.equal(rig.tier.view(unit), before)
    fs.full = False
    assert rig.write_unit(unit, 8, 1)[-1] is True
    rig.tier.close()
