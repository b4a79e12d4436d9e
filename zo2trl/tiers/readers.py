"""Readers: threads that read a segment from disk in several pieces at once, and aligned memory for these.

Does not: open files, copy to devices or compare checksums: the caller passes the work on a piece.
Invariant: when `run` returns or raises, no thread works on its pieces any more.

A drive needs some ten MB under way to be busy all the time. More does not help it, and costs: memory that is filled
again before it has left the processor's cache is filled faster. A virtual drive gave 2.8 GB/s into 16 MiB in turns
and 2.4 into 96 MiB, with four threads as with eight (docs/performance.md).
"""

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

__all__ = ["N_READ_THREADS", "READ_PIECE_BYTES", "Batch", "Readers", "aligned_bytes"]

N_READ_THREADS = 4
READ_PIECE_BYTES = 4 << 20


class Readers:
    """The threads, which begin pieces in the order of their submission."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(N_READ_THREADS, thread_name_prefix="zo2trl-read")

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Call `work` in one of the threads."""
        return self._pool.submit(work)

    def begin(self, work: Callable[[int, int], None], *, first: int = 0, n_bytes: int) -> "Batch":
        """Have `work(start, stop)` called for every piece of the bytes from `first` up to `n_bytes`."""
        batch = Batch(work)
        for start in range(first, n_bytes, READ_PIECE_BYTES):
            batch.jobs.append(self._pool.submit(batch.run, start, min(start + READ_PIECE_BYTES, n_bytes)))
        return batch

    def run(self, work: Callable[[int, int], None], *, n_bytes: int) -> None:
        """The same, and wait until all have ended; see `Batch.end`."""
        self.begin(work, n_bytes=n_bytes).end()

    def close(self) -> None:
        """Stop the threads, without what was not begun; idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Batch:
    """Pieces that threads work on. The caller that began them has to `end` them."""

    def __init__(self, work: Callable[[int, int], None]) -> None:
        self.jobs: list[Future[None]] = []
        self._work = work
        self._is_given_up = threading.Event()

    def run(self, start: int, stop: int) -> None:
        """Work on one piece."""
        if self._is_given_up.is_set():
            return
        try:
            self._work(start, stop)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Do not begin further pieces."""
        self._is_given_up.set()

    def end(self) -> None:
        """Wait until all have ended.

        Raises what the first piece, in the order of bytes, that failed has raised; pieces not begun by then are left.
        """
        jobs, self.jobs = self.jobs, []
        try:
            wait(jobs)
            for job in jobs:
                job.result()
        finally:
            del jobs  # an error's traceback leads here, and a job leads to its error: a cycle would keep the memory


def aligned_bytes(n_bytes: int) -> torch.Tensor:
    """Flat uint8 host memory, all zeros, at an address that reads past the page cache can fill.

    Shared with forked children: a private page that is being read into while the process forks (a data loader starts
    its workers) would be copied under the drive's hands, and the bytes might arrive in the child only; see open(2).
    """
    return torch.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), dtype=torch.uint8)[:n_bytes]
