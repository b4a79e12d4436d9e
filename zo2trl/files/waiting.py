"""Waiting for work in another thread without being silent about it: a drive may stop answering.

Does not: give up. Only the user can know whether the drive will come back.
"""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["wait_for", "wait_for_all"]

STALL_S = 30.0
"""Seconds of waiting after which the user is told, again and again."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def wait_for(job: Future[T], *, what: str) -> T:
    """The job's result, or its exception. `what` says what is awaited, for people."""
    wait_for_all([job], what=what)
    return job.result()


def wait_for_all(jobs: Iterable[Future], *, what: str) -> None:
    """Until all jobs have ended, well or not."""
    started_s, pending = time.monotonic(), set(jobs)
    while pending:
        _, pending = wait(pending, timeout=STALL_S)
        if pending:
            logger.warning(
                "Waiting for %s since %d s: the drive does not answer. Check the kernel log; this waits on.",
                what, time.monotonic() - started_s,
            )  # fmt: skip
