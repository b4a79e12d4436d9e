"""This module waits for work in another thread and logs long waits, because a drive may stop answering.

Does not: give up, because only the user can find out whether the drive will respond again.
"""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

__all__ = ["wait_for", "wait_for_all"]

STALL_S = 30.0
"""A warning is logged every time so many seconds of waiting have passed."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def wait_for(job: Future[T], *, what: str) -> T:
    """Wait for a job and return its result, or raise its exception; `what` names the job in warnings."""
    wait_for_all([job], what=what)
    return job.result()


def wait_for_all(jobs: Iterable[Future], *, what: str) -> None:
    """Wait until all jobs have ended, successfully or not."""
    started_s, pending = time.monotonic(), set(jobs)
    while pending:
        _, pending = wait(pending, timeout=STALL_S)
        if pending:
            logger.warning(
                "Waiting for %s since %d s: the drive does not answer. Check the kernel log; this waits on.",
                what, time.monotonic() - started_s,
            )  # fmt: skip
