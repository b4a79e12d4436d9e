"""TimeShare: how long a measurement may go on, so that a probe ends when it was announced to.

Does not: interrupt work. What is measured is cut into small pieces, and the share is looked at between them.
Invariant: shares of a share end before it does; what one part leaves over is divided among those after it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["TimeShare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeShare:
    """The time until a clock shows `ends_s`."""

    ends_s: float
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def of(cls, seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> "TimeShare":
        """So many seconds from now on."""
        return cls(ends_s=clock() + seconds, clock=clock)

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return max(self.ends_s - self.clock(), 0.0)

    @property
    def is_over(self) -> bool:
        """Whether it is used up."""
        return self.clock() >= self.ends_s

    def part(self, fraction: float) -> "TimeShare":
        """A fraction of what is left."""
        now_s = self.clock()
        return TimeShare(ends_s=now_s + max(self.ends_s - now_s, 0.0) * fraction, clock=self.clock)

    def split(self, n: int) -> Iterator["TimeShare"]:
        """Equal parts for `n` measurements, each cut off when it is asked for."""
        for n_left in range(n, 0, -1):
            yield self.part(1 / n_left)
