"""Writer: the one thread that writes homes and files, and the jobs whose outcome was not looked at yet.

Does not: write by itself; a job is a function.
Invariants:
- Jobs run one after the other, in the order they were submitted.
- A job's failure is raised by the end of a traversal or by settling, or else logged when the writer closes.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from zo2trl.files.waiting import wait_for_all
from zo2trl.layout.layout import Segment

__all__ = ["Release", "Writer", "raise_first"]

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

Release = Callable[[], None]
"""A job calls it when it does not need the bytes it was given any more."""


class Writer:
    """The thread and its jobs."""

    _newest: dict[int, tuple[Segment, Future]]  # segment index -> its newest write-back
    _others: list[Future]  # snapshots, and write-backs that a newer one of the same segment has followed

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zo2trl-write")
        self._newest = {}
        self._others = []

    def write_back(self, segment: Segment, work: Callable[[Release], None]) -> Future[None]:
        """Write a segment, later; `get` finds the job from here on.

        The future returned is done when the job releases the bytes that it was given, at its end at the latest.
        """
        left: Future[None] = Future()
        job = self._thread.submit(work, partial(left.set_result, None))
        job.add_done_callback(lambda _: left.done() or left.set_result(None))  # it may have failed, or never begun
        _, before = self._newest.get(segment.index, (segment, None))
        self._newest[segment.index] = segment, job
        if before is not None:
            self._others.append(before)
        return left

    def later(self, work: Callable[P, object], *args: P.args, **named: P.kwargs) -> None:
        """Run something else, later."""
        self._others.append(self._thread.submit(work, *args, **named))

    def now(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run something between the jobs that are there and those to come, and wait for it."""
        return self._thread.submit(work, *args, **named).result()

    def get(self, segment_index: int) -> Future[None] | None:
        """A segment's newest write-back, if it may not have ended yet."""
        _, job = self._newest.get(segment_index, (None, None))
        return job

    def take_ended(self) -> list[Future]:
        """Jobs that have ended; they are forgotten here."""
        ended = [index for index, (_, job) in self._newest.items() if job.done()]
        others = [job for job in self._others if job.done()]
        self._others = [job for job in self._others if job not in others]
        return [*(self._newest.pop(index)[1] for index in ended), *others]

    def take_all(self) -> list[Future]:
        """Wait until every job has ended; they are forgotten here."""
        newest, others = dict(self._newest), self._others
        names = sorted({segment.unit.name for segment, _ in newest.values()}) or ["snapshots"]
        jobs = [*(job for _, job in newest.values()), *others]
        wait_for_all(jobs, what=f"writes of {', '.join(names)}")
        # Only now: a fetch thread that still loads one of these segments must find the write it has to wait for.
        for index in newest:
            del self._newest[index]
        self._others = []
        return jobs

    def close(self) -> None:
        """Let the running job end and drop those that wait; a failure that was not raised goes to the log."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        jobs, self._newest, self._others = [*(job for _, job in self._newest.values()), *self._others], {}, []
        for job in jobs:
            if not job.cancelled() and (error := job.exception()) is not None:
                logger.warning("A unit was not written, and an older version of it is kept: %s", str(error))


def raise_first(jobs: Iterable[Future]) -> None:
    """Raise what the first job that failed has raised."""
    for job in jobs:
        job.result()
