"""Promises of the probe: it ends within the time it announces, and what it finds can be divided by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zo2trl.forecast import machine_bench, probe
from zo2trl.forecast.probe import announced_s, measure_machine
from zo2trl.forecast.time_share import TimeShare
from zo2trl.planning.rates import MachineRates, TraversalCost

CPU = torch.device("cpu")


class SlowClock:
    """A clock that goes on by so much whenever it is read, as if other processes had run in between."""

    def __init__(self, tick_s: float) -> None:
        self.now_s, self.tick_s = 100.0, tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that draw live as long as the process, and files fill a drive."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine_bench, "MAX_FILE_BYTES", 32 << 20)


@pytest.mark.parametrize("tick_s", [0.04, 0.08])
@pytest.mark.usefixtures("small")
def test_on_a_machine_that_stands_still_most_of_the_time_it_ends_as_announced(tmp_path: Path, tick_s: float) -> None:
    clock = SlowClock(tick_s)
    started_s = clock.now_s
    found = measure_machine(CPU, tmp_path, clock=clock)
    assert clock.now_s - started_s <= announced_s(CPU)
    assert_usable(found)
    assert list(tmp_path.iterdir()) == []


def assert_usable(found: MachineRates) -> None:
    numbers = [*found.flops.values(), found.moved_bytes, found.operation_s, found.upload_bytes, found.download_bytes]
    numbers += [found.disk_read_bytes, found.disk_write_bytes, found.disk_cpu_s, found.new_bytes, found.measured_at]
    numbers += [number for visit in found.visits.values() for number in (visit.alone_s, visit.pair_s)]
    assert min(numbers) > 0
    visit = found.visit(dtype="float32", direction="rademacher", rounding="nearest")
    assert visit.step_s >= 0 and visit.span_s >= 0


def test_slow_work_uses_up_its_share_and_no_more_and_the_rest_is_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = SlowClock(0.0), []

    def slow(name: str) -> Callable[..., Any]:
        def work(*_: Any, share: TimeShare, **__: Any) -> Any:
            seen.append((name, share.left_s))
            clock.now_s += share.left_s / 2  # done early
            return {} if name != "measure_traversals" else TraversalCost(
                resident_visit_s=0.0, streamed_visit_s=0.0, tensor_s=0.0, file_s=0.0, step_s=0.0
            )  # fmt: skip

        return work

    for name in ("measure_traversals", "visit_costs", "product_rates", "memory_rates", "copy_rates", "drive_rates"):
        monkeypatch.setattr(probe, name, slow(name))
    monkeypatch.setattr(probe, "MachineRates", lambda **values: values)
    done: list[float] = []
    measure_machine(CPU, tmp_path, clock=clock, on_part=lambda name, share: done.append(share))
    assert sum(left_s / 2 for _, left_s in seen) < announced_s(CPU)
    first, last = seen[0][1], seen[-1][1]
    assert last > first / 2, "what the others left over"
    assert done == sorted(done) and done[0] == 0 and done[-1] == 1


def test_a_share_that_is_used_up_still_measures_once() -> None:
    calls: list[int] = []
    clock = SlowClock(1.0)
    seconds = machine_bench._seconds(lambda: calls.append(1), CPU, share=TimeShare(ends_s=0.0, clock=clock))
    assert len(calls) == 1 and seconds > 0


def test_a_gpu_is_announced_with_the_time_that_its_kernels_take_to_compile() -> None:
    assert announced_s(torch.device("cuda")) > announced_s(CPU)
