"""Readers: threads that bring a segment from disk in pieces, several at once, and aligned memory for them to land in.

Does not: know files, devices or checksums; what is to be done with a piece is the caller's work.
Invariant: when `run` returns or raises, no thread works on its pieces any more.

A drive needs some ten MB under way to be busy all the time: four threads with 8 MiB each are enough for one NVMe
drive, and what Python costs per piece is nothing beside it.
"""

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

__all__ = ["N_READERS", "PIECE_BYTES", "Readers", "aligned_bytes"]

N_READERS = 4
PIECE_BYTES = 8 << 20


class Readers:
    """The threads. What comes first is begun first."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(N_READERS, thread_name_prefix="zo2trl-read")

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Call `work` in one of the threads."""
        return self._pool.submit(work)

    def run(self, work: Callable[[int, int], None], *, n_bytes: int) -> None:
        """Call `work(first, last)` for every piece of `n_bytes` bytes, and wait until all have ended.

        Raises what the first piece, in the order of bytes, that failed has raised; pieces not begun by then are left.
        """
        has_failed = threading.Event()

        def bring(first: int) -> None:
            if has_failed.is_set():
                return
            try:
                work(first, min(first + PIECE_BYTES, n_bytes))
            except BaseException:
                has_failed.set()
                raise

        jobs = [self._pool.submit(bring, first) for first in range(0, n_bytes, PIECE_BYTES)]
        try:
            wait(jobs)
            for job in jobs:
                job.result()
        finally:
            del jobs  # an error's traceback leads here, and a job leads to its error: a cycle would keep the memory

    def close(self) -> None:
        """Stop the threads, without what was not begun; idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def aligned_bytes(n_bytes: int) -> torch.Tensor:
    """Flat uint8 host memory, all zeros, at an address that reads past the page cache can fill.

    Shared with forked children: a private page that is being read into while the process forks (a data loader starts
    its workers) would be copied under the drive's hands, and the bytes might arrive in the child only; see open(2).
    """
    return torch.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), dtype=torch.uint8)[:n_bytes]
