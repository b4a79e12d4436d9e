"""Units on disk reach a GPU's slots: the same bytes, ordered by events alone, through little pinned memory."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.durable import QuickFS, base_weights
from tests.support.stores import synthetic_layout
from zo2trl.errors import ShortRead
from zo2trl.files.fs import FS
from zo2trl.layout.layout import Segment, Unit
from zo2trl.planning.budgets import TierName
from zo2trl.planning.placement import Placement
from zo2trl.tiers import readers, staging
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.prefetch import Prefetcher
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.ring import Region, Slot
from zo2trl.tiers.staging import N_PIECES_DOWN, N_PIECES_UP, Begun, Staging
from zo2trl.tiers.tier import Tiers
from zo2trl.tiers.unit_files import UnitFiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
PIECE = 1 << 16
LONG_CYCLES = 2_000_000_000  # of a kernel that does nothing for about a second
AT_ONCE_S = 0.3


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READ_PIECE_BYTES", PIECE)
    monkeypatch.setattr(staging, "READ_PIECE_BYTES", PIECE)


class Source:
    """A reading of random bytes; `error` is raised at a byte offset."""

    def __init__(self, n_bytes: int, *, seed: int = 0, error: tuple[int, Exception] | None = None) -> None:
        self.data = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        self.error = error

    def fill(self, into: torch.Tensor, start: int) -> None:
        if self.error is not None and start == self.error[0]:
            raise self.error[1]
        into.copy_(self.data[start : start + into.numel()])

    def finish(self) -> None:
        pass

    def begun(self) -> Begun["Source"]:
        return Begun(lambda: self, n_bytes=self.data.numel())


def a_slot(n_bytes: int, *, released: tuple[torch.Event, ...] = ()) -> Slot:
    buffer = torch.zeros(n_bytes, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()  # copies come on another stream, and would not wait for the zeros
    return Slot(Region(0, n_bytes), buffer, released=released)


def load(stage: Staging, source: Source, slot: Slot) -> torch.Tensor:
    """The slot's bytes as a kernel that waits for `copied` sees them."""
    stage.read_and_upload(source.begun(), slot.buffer, slot)
    assert slot.copied is not None
    torch.cuda.current_stream().wait_event(slot.copied)
    return slot.buffer.clone().cpu()


@pytest.fixture
def stage() -> Iterator[Staging]:
    torch.zeros(1, device=CUDA)
    stage = Staging(64 * PIECE, device=CUDA, ahead_bytes=8 * PIECE)
    yield stage
    stage.close()
    stage.close()


@pytest.mark.parametrize("n_bytes", [1, PIECE, PIECE + 1, 64 * PIECE - 5])
def test_every_byte_reaches_the_slot(stage: Staging, n_bytes: int) -> None:
    source = Source(n_bytes)
    assert torch.equal(load(stage, source, a_slot(n_bytes)), source.data)


def test_pinned_memory_is_a_few_pieces_however_large_a_segment_is(stage: Staging) -> None:
    assert stage._memory is not None
    assert stage._memory.numel() == (N_PIECES_UP + N_PIECES_DOWN + 8) * PIECE


def test_many_loads_at_once_through_the_same_pieces_do_not_mix(stage: Staging) -> None:
    sources = [Source(50 * PIECE, seed=seed) for seed in range(10)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda source: load(stage, source, a_slot(50 * PIECE)), sources))
    assert all(torch.equal(one, source.data) for one, source in zip(found, sources, strict=True))


def test_a_slot_is_not_overwritten_while_a_kernel_reads_it_and_nobody_waits_on_the_host(stage: Staging) -> None:
    old, new = Source(4 * PIECE, seed=1), Source(4 * PIECE, seed=2)
    slot = a_slot(4 * PIECE)
    slot.buffer.copy_(old.data)
    seen, after = torch.empty_like(slot.buffer), torch.empty_like(slot.buffer)  # allocating may wait for the device
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    seen.copy_(slot.buffer)
    slot.released = (torch.cuda.current_stream().record_event(),)
    started_s = time.perf_counter()
    stage.read_and_upload(new.begun(), slot.buffer, slot)
    assert time.perf_counter() - started_s < AT_ONCE_S
    assert slot.copied is not None and not slot.copied.query()
    torch.cuda.current_stream().wait_event(slot.copied)
    after.copy_(slot.buffer)
    assert torch.equal(seen.cpu(), old.data) and torch.equal(after.cpu(), new.data)


def test_an_error_leaves_the_pieces_for_the_next_load(stage: Staging) -> None:
    for number in range(40):
        broken = Source(20 * PIECE, error=(number % 20 * PIECE, ValueError("broken")))
        with pytest.raises(ValueError, match="broken"):
            load(stage, broken, a_slot(20 * PIECE))
    source = Source(64 * PIECE)
    assert torch.equal(load(stage, source, a_slot(64 * PIECE)), source.data)
    assert stage._free.qsize() == N_PIECES_UP


def test_what_was_read_ahead_is_uploaded_when_there_is_a_slot(stage: Staging) -> None:
    for seed in range(20):
        source = Source(12 * PIECE, seed=seed)
        begun, slot = source.begun(), a_slot(12 * PIECE)
        assert not stage.read_ahead(begun), "eight pieces of twelve"
        stage.read_and_upload(begun, slot.buffer, slot)
        assert slot.copied is not None
        slot.copied.synchronize()
        assert torch.equal(slot.buffer.cpu(), source.data)


@pytest.mark.parametrize("n_bytes", [4096, PIECE, 2 * PIECE, 33 * PIECE + 4096])
def test_weights_come_down_after_the_kernel_that_wrote_them(stage: Staging, n_bytes: int) -> None:
    wanted = Source(n_bytes).data
    on_gpu = wanted.to(CUDA)
    weights = torch.zeros(n_bytes, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES // 10)
    weights.copy_(on_gpu)
    found = bytearray()
    for start, data in stage.download(weights, torch.cuda.current_stream().record_event()):
        assert start == len(found)
        found += data
    assert bytes(found) == wanted.numpy().tobytes()


def test_unpinning_waits_for_the_copies(stage: Staging) -> None:
    source, slot = Source(4 * PIECE), a_slot(4 * PIECE)
    torch.cuda._sleep(LONG_CYCLES)
    slot.released = (torch.cuda.current_stream().record_event(),)
    stage.read_and_upload(source.begun(), slot.buffer, slot)
    stage.close()
    assert slot.copied is not None and slot.copied.query()
    assert torch.equal(slot.buffer.cpu(), source.data)


# -- homes on disk, between others in host memory


class Rig:
    """Residency of four-tensor units, in the tiers named, and a prefetcher over them."""

    def __init__(self, folder: Path, tiers: str, *, fs: FS | None = None) -> None:
        fs = fs or QuickFS()
        layout = synthetic_layout([[40, 8, 20, 4]] * len(tiers))
        names: dict[str, TierName] = {"d": "disk", "c": "cpu"}
        tier_of: dict[int, TierName] = {0: "gpu", **{i + 1: names[letter] for i, letter in enumerate(tiers)}}
        largest = max(segment.n_bytes for segment in layout.segments)
        placement = Placement(
            tier_of=tier_of, ring_bytes=3 * largest, largest_segment_bytes=largest, scratch_bytes=0, scratch_copies=1,
            device_bytes=0, cpu_bytes=0,
        )  # fmt: skip
        in_cpu = [layout.units[index] for index in placement.units_in("cpu")]
        files = UnitFiles(folder, fs=fs)
        residency = Tiers(gpu=DeviceTier(CUDA), cpu=HostTier(in_cpu, pinned=True), disk=DiskTier(files, fs=fs))
        self.residency = Residency(layout, placement, tiers=residency, files=files, device=CUDA)
        self.residency.populate(base_weights, keep_base=False)
        self.residency.transfers.will_write_back = lambda segment: False
        self.residency.transfers.make_staging(largest)
        self.segments = layout.segments[1:]
        self.fetcher = Prefetcher(
            self.segments, self.residency.transfers.load, ring_bytes=3 * largest, device=CUDA,
            upcoming=self.residency.transfers.read_ahead,
            on_disk=lambda segment: self.residency.locations.tier_of(segment.unit) == "disk",
        )  # fmt: skip

    def traverse(self) -> list[torch.Tensor]:
        """What kernels saw in the slots."""
        seen = []
        for segment in self.segments:
            fetch, _ = self.fetcher.take(segment)
            seen.append(fetch.stored.clone())
            self.fetcher.give_back(fetch)
        return [one.cpu() for one in seen]

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *error: object) -> None:
        self.fetcher.close()
        self.residency.close()


def bytes_of(segment: Segment) -> torch.Tensor:
    (spec,) = segment.tensors
    values = base_weights(spec).view(-1).view(torch.uint8)
    return torch.cat([values, torch.zeros(segment.n_bytes - values.numel(), dtype=torch.uint8)])


@pytest.mark.parametrize("tiers", ["dddd", "dccc", "cdcdcd", "ccdcccdc"])
def test_disk_and_host_units_arrive_traversal_after_traversal(tmp_path: Path, tiers: str) -> None:
    with Rig(tmp_path, tiers) as rig:
        wanted = [bytes_of(segment) for segment in rig.segments]
        for _ in range(6):
            assert all(torch.equal(one, other) for one, other in zip(rig.traverse(), wanted, strict=True))


def test_reading_ahead_is_forgotten_with_what_was_fetched_ahead(tmp_path: Path) -> None:
    with Rig(tmp_path, "dcccd") as rig:
        wanted = [bytes_of(segment) for segment in rig.segments]
        for _ in range(5):
            rig.traverse()
            rig.fetcher.drop()
        assert all(torch.equal(one, other) for one, other in zip(rig.traverse(), wanted, strict=True))
        rig.fetcher.drop()
        deadline_s = time.monotonic() + 5
        n_pieces = max(unit.n_bytes for unit in on_disk(rig)) // min(PIECE, largest_segment(rig))
        while rig.residency.transfers._staging._ahead.qsize() < n_pieces:
            assert time.monotonic() < deadline_s, "pieces of forgotten readings do not come back"
            time.sleep(0.01)


def on_disk(rig: Rig) -> list[Unit]:
    return [unit for unit in rig.residency.layout.units if rig.residency.locations.tier_of(unit) == "disk"]


def largest_segment(rig: Rig) -> int:
    return max(segment.n_bytes for segment in rig.segments)


def test_a_write_back_from_the_device_is_what_the_next_traversal_reads(tmp_path: Path) -> None:
    with Rig(tmp_path, "dcd") as rig:
        rig.traverse()
        units = on_disk(rig)
        for segment in (s for s in rig.segments if s.unit in units):
            weights = torch.full((segment.n_bytes,), segment.index, dtype=torch.uint8, device=CUDA)
            rig.residency.transfers.write_back(segment, weights, position=1).result()
        rig.residency.settle()  # a unit's new version is there when the last of its segments was written
        rig.fetcher.drop()
        for segment, seen in zip(rig.segments, rig.traverse(), strict=True):
            if segment.unit in units:
                assert bool((seen == segment.index).all())
            else:
                assert torch.equal(seen, bytes_of(segment))


def test_a_file_that_somebody_cuts_is_an_error_in_the_traversal_and_not_a_hang(tmp_path: Path) -> None:
    with Rig(tmp_path, "dddd") as rig:
        rig.traverse()
        for path in tmp_path.iterdir():
            os.truncate(path, 4096)
        rig.fetcher.drop()
        with pytest.raises(ShortRead, match="ended too early"):
            rig.traverse()
