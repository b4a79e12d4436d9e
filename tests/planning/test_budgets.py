"""Promises of "auto": a stated share of what is free, and never the same memory twice."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from zo2trl.errors import ConfigError
from zo2trl.planning.budgets import Budgets, free_device_bytes, resolve_budgets

CPU = torch.device("cpu")
FREE = 10_000_000_000


@pytest.fixture
def ten_gigabytes_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))


def budgets(device_memory, cpu_memory):
    return resolve_budgets(device_memory=device_memory, cpu_memory=cpu_memory, device=CPU)


def test_sizes_are_taken_at_their_word():
    assert budgets("2GB", "1GiB") == Budgets(device=2_000_000_000, cpu=1 << 30)
    assert budgets(5, 0) == Budgets(device=5, cpu=0)


@pytest.mark.usefixtures("ten_gigabytes_free")
def test_auto_on_a_cpu_only_machine_shares_the_free_memory_between_device_and_homes():
    assert budgets("auto", "auto") == Budgets(device=5_000_000_000, cpu=2_000_000_000)


@pytest.mark.usefixtures("ten_gigabytes_free")
@pytest.mark.parametrize("device_memory", ["0", "1GB", "6GB", "9GB", "auto"])
def test_auto_host_memory_leaves_room_for_the_device_budget(device_memory):
    chosen = budgets(device_memory, "auto")
    assert chosen.cpu >= 0
    assert chosen.cpu == 0 or chosen.cpu + chosen.device <= 0.7 * FREE


@pytest.mark.usefixtures("ten_gigabytes_free")
def test_min_is_left_to_the_planner():
    assert budgets("min", "auto") == Budgets(device="min", cpu=7_000_000_000)


def test_min_host_memory_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"cpu_memory.*0"):
        budgets("auto", "min")


@pytest.mark.parametrize("argument", ["device_memory", "cpu_memory"])
def test_a_wrong_size_is_refused_by_its_own_name(argument):
    with pytest.raises(ConfigError, match=f"`{argument}`"):
        resolve_budgets(**{"device_memory": "1GB", "cpu_memory": "1GB", argument: "much"}, device=CPU)


def test_the_device_of_a_cpu_only_machine_is_its_available_memory():
    assert 0 < free_device_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.gpu
def test_auto_on_a_gpu_leaves_a_tenth_of_its_free_memory():
    device = torch.device("cuda")
    chosen = resolve_budgets(device_memory="auto", cpu_memory="0", device=device)
    assert chosen.device == pytest.approx(0.9 * torch.cuda.mem_get_info(device)[0], rel=0.05)
