"""Benchmarks judge by what they say: bare reads of whole files, bounds, budgets; and results name no folders."""

import os
from pathlib import Path

import pytest

from benchmarks._floors import MAX_RAW_BYTES, DriveRates, drive_rates, raw_read_s, raw_write_s, spread_over
from benchmarks._report import command
from benchmarks.disk import Model
from benchmarks.step_gpu import BLOCK, MODES, bounds_ms, budgets, drive_floors, judged, line
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place

FLOORS = {"up_gb_s": 50.0, "each_way_gb_s": 40.0, "disk_read_gb_s": 2.0, "disk_write_gb_s": 1.0}


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, int]]:
    made = []
    for number, n_bytes in enumerate((5 << 20, 4096, 3 * 4096 + 100)):
        path = tmp_path / f"unit{number}"
        path.write_bytes(os.urandom(n_bytes))
        made.append((path, n_bytes))
    return made


def test_bare_reads_ask_for_every_block_once(files: list[tuple[Path, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    preadv = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((fd, len(buffers[0])))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    assert raw_read_s(spread_over(files, MAX_RAW_BYTES), threads=3, piece_bytes=1 << 20) > 0
    assert sum(n_bytes for _, n_bytes in asked) == (5 << 20) + 4096 + 3 * 4096, "direct reads end at whole blocks"


def test_of_very_many_bytes_an_even_part_is_read() -> None:
    extents = [(Path(f"unit{i}"), 4096) for i in range(10)]
    assert [path.name for path, _ in spread_over(extents, 5 * 4096)] == [f"unit{i}" for i in range(0, 10, 2)]
    assert len(spread_over(extents, 1 << 30)) == 10


def test_bare_writes_leave_nothing_behind(tmp_path: Path, files: list[tuple[Path, int]]) -> None:
    before = sorted(tmp_path.iterdir())
    assert raw_write_s(tmp_path, 3 * 4096 + 1) > 0
    rates = drive_rates(files)
    assert rates.read > 0 and rates.write > 0
    assert drive_rates(files, like=rates).threads == rates.threads
    assert sorted(tmp_path.iterdir()) == before


def test_a_drive_is_judged_as_if_it_had_been_as_fast_as_before_for_half_of_the_bytes() -> None:
    before, after = (DriveRates(read=rate, write=1.0, threads=8, piece_bytes=1) for rate in (1.0, 3.0))
    assert drive_floors([before, after]) == {"disk_read_gb_s": 1.5, "disk_write_gb_s": 1.0}


def test_bounds_are_bytes_over_rates() -> None:
    n_bytes = {"h2d": 5e9, "d2h": 2e9, "disk_read": 4e9, "disk_written": 1e9}
    assert bounds_ms(n_bytes, FLOORS, compute_ms=30.0) == {
        "compute": 30.0, "upload": 100.0, "both ways": 50.0 + 60.0, "disk read": 2000.0,
        "disk read and written": 3000.0,
    }  # fmt: skip
    nothing_moves = dict.fromkeys(n_bytes, 0.0)
    assert bounds_ms(nothing_moves, FLOORS, compute_ms=30.0) == {"compute": 30.0}


def test_a_step_that_reads_a_drive_is_judged_by_the_mean() -> None:
    row = judged([1.0, 1.0, 4.0], {"disk_read": 2e9}, {"compute": 10.0, "disk read": 1000.0})
    assert row["bound"] == "disk read" and row["over_bound"] == pytest.approx(2.0)
    assert row["step_ms"] == 1000.0 and row["least_over"]["disk read"] == 1.0
    assert row["disk_read_gb_s"] == pytest.approx(1.0)
    row = judged([1.0, 1.0, 4.0], {"disk_read": 0.0}, {"compute": 1000.0})
    assert row["over_bound"] == 1.0
    memory = dict.fromkeys(("allocator_peak_bytes", "reserved_peak_bytes", "device_used_bytes"), 2e9)
    assert line("resident", {**row, **memory, "cpu_cores": 0.5}).startswith("resident: 1000.0 ms (least 1000.0")


def test_the_mixed_mode_has_units_in_all_three_tiers() -> None:
    model = Model(64, 12)
    device, cpu = budgets(model, MODES["mixed"], n_passes=0, cpu=0)
    tiers = list(place(plan_layout(model), Budgets(device=device, cpu=cpu)).tier_of.values())
    assert (tiers.count("gpu"), tiers.count("cpu"), tiers.count("disk")) == (3, 4, 5)


def test_the_disk_mode_streams_every_block_from_disk() -> None:
    model = Model(64, 6)
    assert "granularity" not in MODES["disk"] and BLOCK == "block"
    device, cpu = budgets(model, MODES["disk"], n_passes=0, cpu=1 << 40)
    assert [*place(plan_layout(model), Budgets(device=device, cpu=cpu)).tier_of.values()].count("disk") == 6


def test_commands_name_no_folders_of_the_machine() -> None:
    argv = [
        "/root/x/benchmarks/disk.py",
        "--out",
        "/root/out/disk.json",
        "--folder=/tmp",
        "--modes",
        "disk",
        "a/b.json",
    ]
    assert command(argv) == "python -m benchmarks.disk --out disk.json --folder=tmp --modes disk a/b.json"
