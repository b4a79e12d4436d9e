"""What no step can beat: bare forwards and raw copies of this machine, measured in the run that is judged by them."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks._report import median_seconds
from zo2trl.tiers.cpu import pin, unpin

__all__ = ["copy_rates", "two_forwards_s"]

COPY_BYTES = 1 << 30


def two_forwards_s(model: Any, ids: torch.Tensor, *, repeats: int) -> float:
    """Two forwards with a loss, nothing else; `ids` are [batch, tokens] on the device."""

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=ids, labels=ids)

    return median_seconds(forwards, repeats=repeats, warm_up=2)


def copy_rates() -> dict[str, float]:
    """GB/s between pinned host memory and the device: up, down, and each way with both at once."""
    hosts = [torch.zeros(COPY_BYTES, dtype=torch.uint8) for _ in range(2)]
    for host in hosts:
        pin(host)
    devices = [torch.empty_like(host, device="cuda") for host in hosts]
    streams = [torch.cuda.Stream() for _ in hosts]

    def copying(up: bool, down: bool) -> Callable[[], None]:
        def run() -> None:
            if up:
                with torch.cuda.stream(streams[0]):
                    devices[0].copy_(hosts[0], non_blocking=True)
            if down:
                with torch.cuda.stream(streams[1]):
                    hosts[1].copy_(devices[1], non_blocking=True)

        return run

    rates = {
        name: COPY_BYTES / median_seconds(copying(up, down), repeats=7, warm_up=2) / 1e9
        for name, up, down in (("up_gb_s", True, False), ("down_gb_s", False, True), ("each_way_gb_s", True, True))
    }
    for host in hosts:
        unpin(host)
    return rates
