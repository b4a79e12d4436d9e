"""The ring on a real GPU: the same addresses in every step, and no wrong byte however late a stream is."""

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_batch, tiny_model
from tests.support.stores import synthetic_layout
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.layout.layout import Segment
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import place_again
from zo2trl.tiers.host import HostTier
from zo2trl.tiers.prefetch import Arrival, Fetch, Prefetcher, Slot
from zo2trl.tiers.staging import Staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda", 0)
LATE = 3_000_000  # cycles: between one and two milliseconds
LEAVES = synthetic_layout([[1, 4, 4, 2], [1, 6, 1, 3], [2, 2, 5], [3, 3, 1, 1, 1]]).segments[1:]
LARGEST = max(segment.n_bytes for segment in LEAVES)


class Residency:
    """Pinned bytes that tell their segment and round; uploads may be late."""

    def __init__(self, *, late: int = 0) -> None:
        self.sources = {s.index: torch.full((s.n_bytes,), s.index, dtype=torch.uint8).pin_memory() for s in LEAVES}
        self.up = torch.cuda.Stream(GPU)
        self.late = late

    def load(self, segment: Segment, slot: Slot) -> Arrival:
        with torch.cuda.stream(self.up):
            for event in slot.released:
                self.up.wait_event(event)
            if self.late:
                torch.cuda._sleep(self.late)
            slot.buffer.copy_(self.sources[segment.index], non_blocking=True)
            slot.copied = self.up.record_event()
        return Arrival(0)


class Reader:
    """Takes segments, and looks at what is in the slot late on the compute stream."""

    def __init__(self, fetcher: Prefetcher, *, late: int = 0) -> None:
        self.fetcher, self.late = fetcher, late
        self.wrong = torch.zeros((), dtype=torch.int64, device=GPU)
        self.addresses: dict[int, set[int]] = {segment.index: set() for segment in LEAVES}

    def look(self, segment: Segment, fetch: Fetch) -> None:
        if self.late:
            torch.cuda._sleep(self.late)
        self.wrong += (fetch.stored != segment.index).sum()

    def visit(self, segment: Segment, *, after: Future | None = None) -> None:
        fetch, _ = self.fetcher.take(segment)
        self.addresses[segment.index].add(fetch.stored.data_ptr())
        self.look(segment, fetch)
        self.fetcher.give_back(fetch, after=after)

    def end(self) -> None:
        torch.cuda.synchronize()
        self.fetcher.close()
        assert int(self.wrong) == 0


@pytest.mark.parametrize("size", [1, 2, 2.5, 3])
@pytest.mark.parametrize(("upload", "compute"), [(0, LATE), (LATE, 0), (LATE, LATE), (0, 0)])
def test_late_streams_never_show_a_wrong_byte_and_addresses_stay(size: float, upload: int, compute: int) -> None:
    residency = Residency(late=upload)
    reader = Reader(Prefetcher(LEAVES, residency.load, ring_bytes=int(size * LARGEST), device=GPU), late=compute)
    for _ in range(4):
        for segment in LEAVES:
            reader.visit(segment)
    reader.end()
    assert {len(seen) for seen in reader.addresses.values()} == {1}


@pytest.mark.parametrize(("upload", "compute"), [(0, LATE), (LATE, 0), (LATE, LATE)])
def test_neither_does_asking_in_any_order_or_forgetting_what_was_fetched(upload: int, compute: int) -> None:
    draw = random.Random(7)
    residency = Residency(late=upload)
    reader = Reader(Prefetcher(LEAVES, residency.load, ring_bytes=2 * LARGEST, device=GPU), late=compute)
    for _ in range(120):
        if draw.random() < 0.2:
            reader.fetcher.drop()
        start = draw.randrange(len(LEAVES))
        for segment in LEAVES[start : start + draw.randint(1, 3)]:
            reader.visit(segment)
    reader.end()


def test_a_write_back_that_is_late_reads_what_was_in_the_slot() -> None:
    down, writer = torch.cuda.Stream(GPU), ThreadPoolExecutor(1)
    residency = Residency()
    fetcher = Prefetcher(LEAVES, residency.load, ring_bytes=2 * LARGEST, device=GPU)
    reader = Reader(fetcher)
    written: list[tuple[Segment, torch.Tensor]] = []

    def write(wire: torch.Tensor, ready: torch.Event, into: torch.Tensor) -> None:
        with torch.cuda.stream(down):
            down.wait_event(ready)
            torch.cuda._sleep(LATE)
            into.copy_(wire, non_blocking=True)
            down.synchronize()

    for _ in range(3):
        for segment in LEAVES:
            fetch, _ = fetcher.take(segment)
            reader.look(segment, fetch)
            written.append((segment, torch.zeros(segment.n_bytes, dtype=torch.uint8).pin_memory()))
            ready = torch.cuda.current_stream().record_event()
            fetcher.give_back(fetch, after=writer.submit(write, fetch.stored, ready, written[-1][1]))
    writer.shutdown(wait=True)
    reader.end()
    assert all(bool((into == segment.index).all()) for segment, into in written)


def test_the_host_never_waits_for_the_device_while_segments_pass() -> None:
    residency = Residency()
    reader = Reader(Prefetcher(LEAVES, residency.load, ring_bytes=2 * LARGEST, device=GPU), late=10 * LATE)
    for segment in LEAVES:  # the threads and kernels are there from here on
        reader.visit(segment)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started_s = time.monotonic()
    start.record()
    for segment in LEAVES:
        reader.visit(segment)
    end.record()
    host_s = time.monotonic() - started_s
    torch.cuda.synchronize()
    device_s = start.elapsed_time(end) / 1e3
    reader.end()
    assert device_s > 0.1, "the device had a lot to do"
    assert host_s < 0.3 * device_s, f"host {host_s:.3f} s, device {device_s:.3f} s"


def test_a_new_ring_does_not_overwrite_what_late_kernels_still_read() -> None:
    n_bytes = 64 << 20  # so that the allocator gives the ring the very memory that was freed
    residency = Residency()
    before = torch.full((n_bytes,), 5, dtype=torch.uint8, device=GPU)
    torch.cuda._sleep(50 * LATE)
    total = before.sum()  # reads it without a copy, whose memory the ring might get instead
    address = before.data_ptr()
    del before
    fetcher = Prefetcher(LEAVES, residency.load, ring_bytes=n_bytes, device=GPU)
    fetch, _ = fetcher.take(LEAVES[0])
    assert fetch.stored.data_ptr() == address, "the case this test is about"
    fetcher.give_back(fetch)
    torch.cuda.synchronize()
    assert int(total) == 5 * n_bytes
    fetcher.close()


def test_uploads_that_nobody_took_do_not_reach_whoever_gets_the_rings_memory_next() -> None:
    n_bytes = 64 << 20
    fetcher = Prefetcher(LEAVES, Residency(late=20 * LATE).load, ring_bytes=n_bytes, device=GPU)
    fetch, _ = fetcher.take(LEAVES[0])
    address = fetch.stored.data_ptr()
    fetcher.give_back(fetch)
    del fetch
    fetcher.close()
    after = torch.full((n_bytes,), 9, dtype=torch.uint8, device=GPU)
    assert after.data_ptr() == address, "the case this test is about"
    torch.cuda.synchronize()
    assert bool((after == 9).all())


def test_homes_in_host_memory_are_pinned_each_by_itself_and_feed_the_ring() -> None:
    units = list({segment.unit.index: segment.unit for segment in LEAVES}.values())
    tier = HostTier(units, pinned=True)
    for unit in units:
        tier.add(unit, lambda spec: torch.full(spec.shape, 0.0))
        assert tier.view(unit).is_pinned() and tier.view(unit).numel() == unit.n_bytes
    for segment in LEAVES:
        tier.write(segment, torch.full((segment.n_bytes,), segment.index, dtype=torch.uint8), version=1)
    staging = Staging(0, device=GPU)

    def load(segment: Segment, slot: Slot) -> Arrival:
        staging.upload(tier.weights(segment), slot.buffer, slot)
        return Arrival(0)

    reader = Reader(Prefetcher(LEAVES, load, ring_bytes=2 * LARGEST, device=GPU), late=LATE)
    for _ in range(3):
        for segment in LEAVES:
            reader.visit(segment)
    reader.end()
    staging.close()
    view = tier.view(units[0])
    tier.drop(units[0])
    assert not view.is_pinned()
    tier.add(units[0], lambda spec: torch.full(spec.shape, 1.0))
    assert tier.view(units[0]).is_pinned()
    others = [tier.view(unit) for unit in units]
    tier.close()
    assert not any(view.is_pinned() for view in others)


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("start", ["cpu", "disk", "gpu"])
def test_units_that_move_between_tiers_in_the_middle_of_a_run_change_no_bit(
    start: str, granularity: str, tmp_path: Path
) -> None:
    wanted = _trained(tmp_path / "still", start=start, granularity=granularity, moves={})
    moves = {1: {1: "cpu", 2: "gpu"}, 2: {1: "gpu", 2: "disk"}, 4: {1: "disk", 2: "cpu"}}
    got = _trained(tmp_path / "moving", start=start, granularity=granularity, moves=moves)
    assert got[0] == wanted[0]
    assert [name for name in wanted[1] if not torch.equal(wanted[1][name], got[1][name])] == []


def _trained(
    folder: Path, *, start: str, granularity: str, moves: dict[int, dict[int, str]]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a run; before the steps that `moves` names, units (by index) get homes in other tiers."""
    model = tiny_model("llama")
    batch = {key: value.cuda() for key, value in tiny_batch("llama").items()}
    plenty = Budgets(device=1 << 34, cpu=1 << 34)
    budgets = plenty if start == "gpu" else Budgets(device="min", cpu=1 << 34 if start == "cpu" else 0)
    engine = open_engine(
        model, EngineOptions(budgets=budgets, device=GPU, store_dir=folder, seed=3, granularity=granularity)
    )
    losses = []
    for step in range(6):
        if step in moves:
            layout, placement = engine.store.layout, engine.store.placement
            residency = replace(placement, tier_of={**placement.tier_of, **moves[step]})
            engine.relayout(layout, place_again(layout, residency, plenty))
        estimate = engine.step([lambda: model(**batch).loss], step=step)
        losses += [estimate.loss_plus, estimate.loss_minus]
        engine.commit(learning_rate=1e-2, weight_decay=0.1)
    engine.flush()
    weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    engine.shutdown()
    return losses, weights
