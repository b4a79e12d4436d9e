"""Write jobs: bytes are free when they are not needed any more, and however a job ends, nobody waits for ever."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
import torch

from tests.support.durable import QuickFS, base_weights
from tests.support.stores import CPU, placed, streamed_segments, synthetic_layout
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.tier import Tiers
from zo2trl.tiers.unit_files import UnitFiles
from zo2trl.tiers.writer import Release, Writer

PLENTY_S = 300.0  # ends a hang only


@pytest.fixture
def jobs() -> Iterator[Writer]:
    jobs = Writer()
    yield jobs
    jobs.close()


def ended(job: Future[None]) -> bool:
    return bool(wait([job], PLENTY_S).done)


def test_bytes_are_free_before_the_job_that_wrote_them_has_ended(jobs: Writer) -> None:
    (segment,) = streamed_segments(1)
    gate = threading.Event()

    def work(release: Release) -> None:
        release()
        assert gate.wait(PLENTY_S)

    left = jobs.write_back(segment, work)
    assert ended(left)
    job = jobs.get(segment.index)
    assert job is not None and not job.done(), "whoever wants to read what is written still waits"
    gate.set()
    assert ended(job)


def test_bytes_are_free_also_if_the_job_fails_or_is_dropped(jobs: Writer) -> None:
    first, second = streamed_segments(2)
    gate = threading.Event()

    def fail(_: Release) -> None:
        assert gate.wait(PLENTY_S)
        raise ValueError("the drive is gone")

    failed, dropped = jobs.write_back(first, fail), jobs.write_back(second, fail)
    job = jobs.get(first.index)
    threading.Timer(0.02, gate.set).start()
    jobs.close()
    assert ended(failed) and ended(dropped)
    assert job is not None and isinstance(job.exception(), ValueError)


class SlowToSync(QuickFS):
    """Holds every sync up until the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def sync_data(self, fd: int) -> None:
        assert self.gate.wait(PLENTY_S)


def test_a_slot_is_free_while_the_drive_syncs_what_was_in_it(tmp_path: Path) -> None:
    fs, layout = SlowToSync(), synthetic_layout([[2]] * 6)
    files = UnitFiles(tmp_path, fs=fs)
    tiers = Tiers(gpu=DeviceTier(CPU), cpu=HostTier([], pinned=False), disk=DiskTier(files, fs=fs))
    residency = Residency(layout, placed(layout, "disk"), tiers=tiers, files=files, device=CPU)
    residency.populate(base_weights, keep_base=False)
    segment = layout.segments[1]
    weights = torch.ones(segment.n_bytes, dtype=torch.uint8)
    fs.gate.clear()
    try:
        assert ended(residency.transfers.write_back(segment, weights, position=1))
        weights.fill_(9)  # the next tenant
        assert residency.locations.position(segment) == 0, "it does not count before it is durable"
    finally:
        fs.gate.set()
        residency.settle()
    assert residency.locations.position(segment) == 1
    assert bool((residency.locations.view(segment.unit)[0][: segment.n_bytes] == 1).all())
    residency.close()
