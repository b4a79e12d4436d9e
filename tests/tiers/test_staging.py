"""Promises of staging: the bytes arrive whatever their number, errors are told once all is quiet, no memory is lost.

On the CPU, with `in_pieces=True` as it is on a GPU; tests/gpu has what only a GPU can show.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.stores import CPU, streamed_segments
from zo2trl.tiers import readers, staging
from zo2trl.tiers.read_ahead import ReadAhead
from zo2trl.tiers.ring import Region, Slot
from zo2trl.tiers.staging import N_PIECES_UP, Begun, Staging

PIECE = 4096
PLENTY_S = 300.0  # ends a hang only


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READ_PIECE_BYTES", PIECE)
    monkeypatch.setattr(staging, "READ_PIECE_BYTES", PIECE)


@pytest.fixture
def make() -> Iterator[Callable[..., Staging]]:
    made: list[Staging] = []

    def build(n_bytes: int = 16 * PIECE, *, ahead: int = 0, in_pieces: bool = True) -> Staging:
        made.append(Staging(n_bytes, device=CPU, ahead_bytes=ahead * PIECE, in_pieces=in_pieces))
        return made[-1]

    yield build
    for each in made:
        each.close()
        each.close()


class Source:
    """A reading of random bytes that can be held up, broken at some pieces, or found damaged at its end."""

    def __init__(self, n_bytes: int, *, seed: int = 0) -> None:
        self.data = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        self.gate = threading.Event()
        self.gate.set()
        self.errors: dict[int, BaseException] = {}
        self.damage: BaseException | None = None
        self.starts: list[int] = []
        self.n_running = 0

    def fill(self, into: torch.Tensor, start: int) -> None:
        self.starts.append(start)
        self.n_running += 1
        try:
            assert self.gate.wait(PLENTY_S)
            if start in self.errors:
                raise self.errors[start]
            into.copy_(self.data[start : start + into.numel()])
        finally:
            self.n_running -= 1

    def finish(self) -> None:
        if self.damage is not None:
            raise self.damage

    def begun(self) -> Begun["Source"]:
        return Begun(lambda: self, n_bytes=self.data.numel())


def a_slot(n_bytes: int) -> Slot:
    return Slot(Region(0, n_bytes), torch.zeros(n_bytes, dtype=torch.uint8))


def brought(stage: Staging, source: Source, begun: Begun | None = None) -> bool:
    """Whether a slot holds the source's bytes after a load."""
    slot = a_slot(source.data.numel())
    stage.read_and_upload(begun or source.begun(), slot.buffer, slot)
    return torch.equal(slot.buffer, source.data)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PLENTY_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("in_pieces", [True, False])
@pytest.mark.parametrize("n_bytes", [1, 7, PIECE, PIECE + 1, 5 * PIECE, 40 * PIECE - 3])
def test_every_byte_arrives_whatever_their_number(make, n_bytes: int, in_pieces: bool) -> None:
    stage = make(40 * PIECE, in_pieces=in_pieces)
    assert brought(stage, Source(n_bytes))


def test_loads_at_once_do_not_mix(make) -> None:
    stage = make(20 * PIECE)
    sources = [Source(20 * PIECE - seed, seed=seed) for seed in range(12)]
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda source: brought(stage, source), sources))


def test_a_segment_never_needs_more_staging_memory_than_there_is(make) -> None:
    """A GPU's slots may be a hundred times larger."""
    stage = make(1000 * PIECE)
    assert stage._memory is not None and stage._memory.numel() == (N_PIECES_UP + staging.N_PIECES_DOWN) * PIECE
    assert brought(stage, Source(1000 * PIECE))


@pytest.mark.parametrize("kind", [ValueError, MemoryError, SystemExit, KeyboardInterrupt])
def test_the_first_error_is_raised_when_nobody_reads_any_more(make, kind: type[BaseException]) -> None:
    stage, source = make(), Source(16 * PIECE)
    source.errors = {5 * PIECE: kind("five"), 6 * PIECE: kind("six"), 15 * PIECE: kind("fifteen")}
    with pytest.raises(kind, match="five"):
        brought(stage, source)
    assert source.n_running == 0


def test_after_an_error_what_was_not_begun_is_left(make) -> None:
    stage, source = make(), Source(1000 * PIECE)
    source.errors = {0: ValueError("at once")}
    with pytest.raises(ValueError, match="at once"):
        brought(stage, source)
    assert len(source.starts) < 500


def test_errors_lose_no_memory(make) -> None:
    stage = make(ahead=4)
    for number in range(3 * N_PIECES_UP):
        broken = Source(16 * PIECE)
        broken.errors = {number % 16 * PIECE: ValueError("again")}
        begun = broken.begun()
        stage.read_ahead(begun)
        with pytest.raises(ValueError, match="again"):
            brought(stage, broken, begun)
    until(lambda: stage._ahead.qsize() == 4)
    assert stage._free.qsize() == N_PIECES_UP
    assert brought(stage, Source(16 * PIECE))


def test_damage_that_is_found_at_the_end_is_raised(make) -> None:
    for in_pieces in (True, False):
        source = Source(3 * PIECE)
        source.damage = ValueError("damaged")
        with pytest.raises(ValueError, match="damaged"):
            brought(make(in_pieces=in_pieces), source)


# -- reading ahead


def test_what_was_read_ahead_is_not_read_again(make) -> None:
    stage, source = make(ahead=5), Source(9 * PIECE)
    begun = source.begun()
    assert not stage.read_ahead(begun), "nine do not fit in five"
    until(lambda: len(source.starts) == 5 and source.n_running == 0)
    assert sorted(source.starts) == [i * PIECE for i in range(5)]
    assert brought(stage, source, begun)
    assert sorted(source.starts) == [i * PIECE for i in range(9)]


def test_reading_ahead_goes_on_where_it_stopped_for_want_of_memory(make) -> None:
    stage, first, second = make(ahead=5), Source(3 * PIECE, seed=1), Source(4 * PIECE, seed=2)
    one, two = first.begun(), second.begun()
    assert stage.read_ahead(one) and not stage.read_ahead(two)
    assert brought(stage, first, one)
    assert stage.read_ahead(two)
    assert brought(stage, second, two)


def test_loads_with_a_slot_get_on_while_others_wait_for_theirs(make) -> None:
    stage, waiting = make(ahead=3), Source(16 * PIECE, seed=1)
    begun = waiting.begun()
    stage.read_ahead(begun)
    assert all(brought(stage, Source(16 * PIECE, seed=seed)) for seed in range(5))
    assert brought(stage, waiting, begun)


def test_a_slot_that_comes_while_its_bytes_are_being_read_waits_for_them(make) -> None:
    stage, source = make(ahead=6), Source(6 * PIECE)
    source.gate.clear()
    begun = source.begun()
    stage.read_ahead(begun)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(brought, stage, source, begun)
        time.sleep(0.02)
        assert not job.done()
        source.gate.set()
        assert job.result(PLENTY_S)


def test_readers_are_not_kept_from_other_segments_by_one_that_waits_for_what_is_being_read(make) -> None:
    n_held_up = readers.N_READ_THREADS // 2
    stage, source = make(ahead=n_held_up), Source(n_held_up * PIECE)
    source.gate.clear()
    begun = source.begun()
    stage.read_ahead(begun)
    with ThreadPoolExecutor(2) as pool:
        held_up = pool.submit(brought, stage, source, begun)
        time.sleep(0.02)
        assert pool.submit(brought, stage, Source(16 * PIECE, seed=1)).result(PLENTY_S)
        assert not held_up.done()
        source.gate.set()
        assert held_up.result(PLENTY_S)


def test_of_two_errors_the_one_in_front_is_raised_also_if_it_was_read_ahead(make) -> None:
    stage, source = make(ahead=2), Source(6 * PIECE)
    source.errors = {PIECE: ValueError("one"), 4 * PIECE: ValueError("four")}
    begun = source.begun()
    stage.read_ahead(begun)
    with pytest.raises(ValueError, match="one"):
        brought(stage, source, begun)
    assert source.n_running == 0


def test_what_nobody_wants_any_more_gives_its_memory_back_also_while_it_is_read(make) -> None:
    stage, source = make(ahead=8), Source(16 * PIECE)
    source.gate.clear()
    begun = source.begun()
    stage.read_ahead(begun)
    until(lambda: source.n_running == readers.N_READ_THREADS)
    stage.abandon(begun)
    assert stage._ahead.qsize() == 8 - readers.N_READ_THREADS, "pieces that are being filled are not free"
    source.gate.set()
    until(lambda: stage._ahead.qsize() == 8)
    assert brought(stage, Source(16 * PIECE, seed=1))


class Disk:
    """Segments with numbered bytes."""

    def __init__(self, stage: Staging, count: int, *, tiles: int = 1) -> None:
        self.segments = streamed_segments(count, tiles=tiles)
        self.sources = {s.index: Source(s.n_bytes, seed=s.index) for s in self.segments}
        self.opened: list[int] = []
        self.ahead = ReadAhead(stage, self.open)

    def open(self, segment) -> Source:
        self.opened.append(segment.index)
        return self.sources[segment.index]

    def load(self, segment) -> bool:
        slot = a_slot(segment.n_bytes)
        source = self.ahead.load(segment, slot.buffer, slot)
        return torch.equal(slot.buffer, source.data)


def test_segments_are_read_ahead_in_the_order_of_need_as_far_as_there_is_memory(make) -> None:
    disk = Disk(make(ahead=10), 6)  # four pieces each
    disk.ahead.announce(disk.segments)
    until(lambda: sum(len(source.starts) for source in disk.sources.values()) == 10)
    assert [len(disk.sources[s.index].starts) for s in disk.segments] == [4, 4, 2, 0, 0, 0]
    assert all(disk.load(segment) for segment in disk.segments)
    assert sorted(disk.opened) == sorted(disk.sources), "each was opened once"


def test_announcing_what_was_announced_before_reads_nothing_twice(make) -> None:
    disk = Disk(make(ahead=8), 6)
    for round_ in range(4):
        for i, segment in enumerate(disk.segments):
            upcoming = [*disk.segments[i + 1 :], *disk.segments[:i]]
            disk.ahead.announce(iter(upcoming))
            disk.ahead.announce(iter(upcoming))
            assert disk.load(segment)
            assert len(disk.sources[segment.index].starts) in (4 * (round_ + 1), 4 * (round_ + 2))
    assert max(disk.opened.count(index) for index in disk.sources) <= 5


def test_the_next_segment_is_begun_as_soon_as_there_is_room_and_nobody_has_to_ask(make) -> None:
    """The traversal that would ask is waiting for the segment in front."""
    stage = make(ahead=4)
    disk = Disk(stage, 4)  # four pieces each
    first, second, third, _ = disk.segments
    disk.ahead.announce(disk.segments)
    until(lambda: len(disk.sources[first.index].starts) == 4)
    for begun, upcoming in ((first, second), (second, third)):
        assert disk.sources[upcoming.index].starts == []
        assert disk.load(begun)
        if upcoming is second:
            until(lambda: len(disk.sources[second.index].starts) == 4)
    assert len(disk.sources[first.index].starts) == 4, "what was loaded is not begun again"


def test_announcing_nothing_forgets_what_was_begun(make) -> None:
    stage = make(ahead=8)
    disk = Disk(stage, 3)
    disk.ahead.announce(disk.segments)
    until(lambda: len(disk.opened) == 2)
    disk.ahead.announce(())
    until(lambda: stage._ahead.qsize() == 8)
    assert disk.load(disk.segments[0])
    assert disk.opened.count(disk.segments[0].index) == 2, "homes may have changed: it is opened anew"


def test_without_memory_for_it_nothing_is_read_ahead(make) -> None:
    disk = Disk(make(ahead=0), 3)
    disk.ahead.announce(disk.segments)
    assert disk.opened == []
    assert all(disk.load(segment) for segment in disk.segments)


def test_an_error_while_reading_ahead_is_told_to_whoever_loads_the_segment(make) -> None:
    disk = Disk(make(ahead=8), 2)
    first, second = disk.segments
    disk.sources[first.index].errors = {PIECE: ValueError("cannot be read")}
    disk.ahead.announce(disk.segments)
    with pytest.raises(ValueError, match="cannot be read"):
        disk.load(first)
    assert disk.load(second)
    disk.sources[first.index].errors = {}
    assert disk.load(first)


# -- down


@pytest.mark.parametrize("in_pieces", [True, False])
@pytest.mark.parametrize("n_bytes", [1, PIECE, 2 * PIECE, 7 * PIECE + 5])
def test_weights_come_down_in_order_and_in_pieces_that_fit(make, n_bytes: int, in_pieces: bool) -> None:
    stage = make(8 * PIECE, in_pieces=in_pieces)
    weights = Source(n_bytes).data
    found = bytearray()
    for start, data in stage.download(weights, None):
        assert start == len(found) and (len(data) <= PIECE or not in_pieces)
        found += data
    assert bytes(found) == weights.numpy().tobytes()


def test_a_writer_that_stops_half_way_leaves_the_next_one_alone(make) -> None:
    stage = make(8 * PIECE)
    for _ in range(3):
        next(stage.download(Source(8 * PIECE).data, None))
    other = Source(8 * PIECE, seed=1).data
    assert b"".join(bytes(data) for _, data in stage.download(other, None)) == other.numpy().tobytes()
