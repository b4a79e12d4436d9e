"""Readers: several pieces at once, all of them over at the end; and memory that drives and forks can live with."""

import os
import threading

import pytest
import torch

from zo2trl.files.fs import DIRECT_ALIGNMENT
from zo2trl.tiers import readers
from zo2trl.tiers.readers import N_READ_THREADS, Readers, aligned_bytes


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "READ_PIECE_BYTES", 10)
    crew = Readers()
    yield crew
    crew.close()
    crew.close()


@pytest.mark.parametrize("n_bytes", [0, 1, 10, 11, 95, 1000])
def test_the_pieces_cover_every_byte_once(crew: Readers, n_bytes: int) -> None:
    seen: list[tuple[int, int]] = []
    crew.run(lambda first, last: seen.append((first, last)), n_bytes=n_bytes)
    assert [byte for first, last in sorted(seen) for byte in range(first, last)] == list(range(n_bytes))


def test_several_are_under_way_at_once(crew: Readers) -> None:
    together = threading.Barrier(N_READ_THREADS, timeout=300)
    crew.run(lambda first, last: together.wait() and None, n_bytes=10 * N_READ_THREADS)


def test_run_returns_only_when_all_have_ended_also_after_an_error(crew: Readers) -> None:
    go_on, running = threading.Event(), set()

    def work(first: int, last: int) -> None:
        if first == 0:
            go_on.set()
            raise OSError("broken")
        running.add(first)
        go_on.wait(300)
        running.discard(first)

    with pytest.raises(OSError, match="broken"):
        crew.run(work, n_bytes=10 * N_READ_THREADS)
    assert not running


def test_a_closed_crew_leaves_what_was_not_begun() -> None:
    crew, gate, done = Readers(), threading.Event(), []
    jobs = [crew.submit(lambda: gate.wait(300) and done.append(1)) for _ in range(20)]
    threading.Timer(0.05, gate.set).start()
    crew.close()
    assert len(done) <= 2 * N_READ_THREADS and all(job.done() for job in jobs)


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, 1_000_001])
def test_memory_is_aligned_and_zero(n_bytes: int) -> None:
    memory = aligned_bytes(n_bytes)
    assert memory.shape == (n_bytes,) and memory.dtype == torch.uint8 and not memory.any()
    assert memory.data_ptr() % DIRECT_ALIGNMENT == 0 or n_bytes == 0
    memory.fill_(7)


def test_memory_stays_the_same_pages_when_the_process_forks() -> None:
    """What a drive writes into it while a child is born arrives here, too."""
    memory = aligned_bytes(4096)
    pid = os.fork()
    if pid == 0:
        memory.numpy()[:] = 9
        os._exit(0)
    os.waitpid(pid, 0)
    assert bool((memory == 9).all())
