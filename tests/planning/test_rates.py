import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.support.rates import H200, TWO_CORES
from zo2trl.errors import StoreError
from zo2trl.forecast.machine_bench import scratch_on_drive
from zo2trl.planning.known_rates import cache_file, identity, load_rates, rates_for, save_rates
from zo2trl.planning.presets import PRESETS, preset_for

CPU = torch.device("cpu")


def test_rates_are_found_again_for_the_same_machine_and_no_other(tmp_path: Path) -> None:
    file, key = tmp_path / "cache" / "rates.json", identity(CPU, tmp_path)
    known, other = replace(TWO_CORES, measured_at=5.0), replace(H200, disk_cpu_s=1.0)
    assert load_rates(key, file=file) is None
    save_rates(key, known, file=file)
    save_rates("another machine", other, file=file)
    assert load_rates(key, file=file) == known and load_rates("another machine", file=file) == other
    assert load_rates("a third", file=file) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"KEY": 3}', '{"KEY": {"flops": {}}}', "{", '{"KEY": {"disk_cpu_s": NaN}}']
)
def test_a_cache_that_makes_no_sense_is_measured_again(tmp_path: Path, text: str) -> None:
    file, key = tmp_path / "rates.json", identity(CPU, tmp_path)
    file.write_text(text.replace("KEY", key))
    assert load_rates(key, file=file) is None
    save_rates(key, TWO_CORES, file=file)
    assert load_rates(key, file=file) == TWO_CORES


@pytest.mark.parametrize(
    "damage",
    [
        {"visits": {}}, {"flops": {}}, {"new_bytes": None}, {"disk_write_bytes": 0}, {"operation_s": "1"},
        {"visits": {"float32 rademacher nearest": {"alone_s": 1.0, "pair_s": "2", "step_s": 1.0, "span_s": 0.0}}},
    ],
    ids=str,
)  # fmt: skip
def test_rates_that_nothing_can_be_divided_by_are_measured_again(tmp_path: Path, damage: dict) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"key": {**asdict(TWO_CORES), **damage}}))
    assert load_rates("key", file=file) is None


def test_a_measured_machine_uses_its_rates_and_an_unknown_one_guesses_none(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    assert rates_for(CPU, tmp_path, file=file) is None
    save_rates(identity(CPU, tmp_path), TWO_CORES, file=file)
    assert rates_for(CPU, tmp_path, file=file) == TWO_CORES


def test_a_known_device_has_a_preset_by_its_name_and_no_other_has() -> None:
    assert preset_for("NVIDIA H200") is H200 is preset_for("NVIDIA H200 NVL")
    assert preset_for("NVIDIA A100-SXM4-80GB") is None and preset_for("NVIDIA GH200 480GB") is None
    assert all(name == rates.name and rates.age_s is None for name, rates in PRESETS.items())


def test_a_file_in_the_stores_place_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="A part of the path is a file"):
            identity(CPU, store)


def test_a_folder_in_which_nothing_can_be_made_is_refused_by_name() -> None:
    with pytest.raises(StoreError, match="Cannot write to /proc"), scratch_on_drive(Path("/proc/store")):
        raise AssertionError("nobody can make a folder there")


def test_a_cache_that_nobody_may_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert load_rates("any") is None


def test_the_drive_is_part_of_the_machine(tmp_path: Path) -> None:
    assert identity(CPU, tmp_path) == identity(CPU, tmp_path / "not" / "there" / "yet")
    assert identity(CPU, Path("/proc")) != identity(CPU, tmp_path)


def test_the_cache_is_where_users_keep_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "zo2trl" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "zo2trl" / "rates.json"


def test_attention_counts_as_products_where_it_was_not_measured() -> None:
    rates = replace(TWO_CORES, flops={"float32": 2.0, "bfloat16": 3.0, "bfloat16 attention": 1.0})
    assert [rates.flops_of(f"{name} attention") for name in ("float32", "bfloat16", "float16")] == [2.0, 1.0, 1.0]
