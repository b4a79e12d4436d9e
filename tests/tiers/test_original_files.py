"""Frozen units live in the files they came from, if these hold every byte of them; else the store keeps a copy."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.toys import toy
from zo2trl.errors import ShortRead, StoreCorrupt
from zo2trl.layout.layout import Unit
from zo2trl.layout.model_layout import plan_layout
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.original_files import OriginalFiles, OriginalHome
from zo2trl.tiers.tier import carve
from zo2trl.tiers.unit_files import UnitFiles

PIECE = 10_000  # no multiple of anything


def mapped(folder: Path, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A frozen model whose parameters are maps of a safetensors file."""
    model = toy().to(dtype).requires_grad_(False)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model.safetensors")
    values = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data = values[name]
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "units").mkdir()
    return tmp_path


def adopting(model: torch.nn.Module, folder: Path) -> tuple[DiskTier, OriginalFiles, list[Unit]]:
    layout, originals = plan_layout(model), OriginalFiles()
    named = dict(model.named_parameters())
    tier = DiskTier(UnitFiles(folder / "units"), originals=originals)
    for unit in layout.units:
        originals.note(unit, lambda spec: named[spec.name].detach().to(spec.dtype))
        tier.add(unit, lambda spec: named[spec.name].detach().to(spec.dtype))
    return tier, originals, list(layout.units)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def tier(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[DiskTier, list[Unit], torch.nn.Module]]:
    model = mapped(folder, dtype=request.param)
    tier, _, units = adopting(model, folder)
    yield tier, units, model
    tier.close()


def read(home: OriginalHome, **how: bool) -> tuple[torch.Tensor, bool]:
    """All of a unit in odd pieces, and whether somebody had written into its views."""
    unit = home.unit
    into = torch.full((unit.n_bytes,), 255, dtype=torch.uint8)
    reading = home.reading(unit.tensors, **how)
    for start in range(0, unit.n_bytes, PIECE):
        reading.fill(into[start : start + PIECE], start)
    reading.finish()
    return into, reading.was_written_to


def test_units_are_read_from_the_files_they_came_from_and_nothing_is_written(tier, folder: Path) -> None:
    disk, units, model = tier
    named = dict(model.named_parameters())
    for unit in units:
        home = disk.home(unit)
        assert isinstance(home, OriginalHome)
        found, _ = read(home)
        for spec, shown in zip(unit.tensors, disk.tensors(unit), strict=True):
            assert torch.equal(carve(found, spec), named[spec.name]) and torch.equal(shown, named[spec.name])
            padding = found[spec.byte_offset + spec.n_bytes : spec.byte_offset + spec.n_padded_bytes]
            assert not padding.any(), "padding is zero, as in a version"
        assert torch.equal(disk.view(unit), found)
    assert list((folder / "units").iterdir()) == []


def test_what_is_written_into_a_view_stays_private_and_is_brought_along(tier, folder: Path) -> None:
    disk, units, _ = tier
    before = (folder / "model.safetensors").read_bytes()
    home, spec = disk.home(units[1]), units[1].tensors[0]
    assert read(home, beside_view=True)[1] is False
    disk.tensors(units[1])[0].fill_(3)
    found, was_written_to = read(home, beside_view=True)
    assert was_written_to and bool((carve(found, spec) == 3).all())
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_file_that_is_changed_or_cut_is_an_error_with_its_path(tier, folder: Path) -> None:
    disk, units, _ = tier
    path = folder / "model.safetensors"
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data.tobytes())
    errors = [error for unit in units if (error := _error(disk.home(unit))) is not None]
    assert len(errors) == 1 and str(path) in str(errors[0]) and "was changed since the run began" in str(errors[0])
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShortRead, match=r"model\.safetensors ended too early"):
        read(disk.home(units[-1]))


def _error(home: OriginalHome) -> StoreCorrupt | None:
    try:
        read(home)
    except StoreCorrupt as error:
        return error
    return None


@pytest.mark.parametrize("why", ["changed in memory", "cast", "never in a file", "transposed", "not safetensors"])
def test_a_unit_that_no_file_holds_as_it_is_gets_a_version_of_its_own(why: str, folder: Path) -> None:
    model = mapped(folder)
    weight = model.get_parameter("layers.1.up.weight")
    if why == "changed in memory":
        weight.data[0, 0] += 1
    elif why == "cast":
        weight.data = weight.data.bfloat16()
    elif why == "never in a file":
        weight.data = weight.data.clone()
    elif why == "transposed":
        weight.data = weight.data.T
    else:
        raw = np.memmap(folder / "raw", np.float32, "w+", shape=(weight.numel(),))
        raw[:] = weight.data.numpy().ravel()
        weight.data = torch.from_numpy(raw).view(weight.shape)
    disk, originals, units = adopting(model, folder)
    with_a_file = [unit.name for unit in units if not isinstance(disk.home(unit), OriginalHome)]
    assert with_a_file == ["layers.1"] and [path.name for path in (folder / "units").iterdir()] == ["layers.1@0"]
    disk.close()
    assert originals._files == {}


def test_a_trained_unit_never_lives_in_a_file_of_somebody_else(folder: Path) -> None:
    model = mapped(folder)
    model.layers[0].requires_grad_(True)
    disk, _, units = adopting(model, folder)
    assert [unit.name for unit in units if not isinstance(disk.home(unit), OriginalHome)] == ["layers.0"]
    disk.close()
