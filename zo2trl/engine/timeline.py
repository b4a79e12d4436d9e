"""Timeline: what ran when on which lane, read from the events of a Chrome trace, and what that says of a step.

Does not: record anything (trace.py), or need the machine that the trace was recorded on.

Lanes of a trace with a GPU: what the main thread visits, kernels, copies up and down, disk reads and writes. Without
one there are no copies, and fetching a unit (reading it, or copying it into its slot) has a lane of its own.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LANES", "Interval", "Summary", "Timeline"]

LANES = ("visits", "fetches", "compute", "upload", "download", "disk reads", "disk writes")

Event = Mapping[str, Any]

SPAN = "zo2trl "  # and a kind: the category of our own events
CUDA_THREAD = "cuda_thread"  # argument of our own events: another name of their thread, which CUDA's may have, too
_LANE_OF_KIND = {"visit": "visits", "fetch": "fetches", "disk read": "disk reads", "disk write": "disk writes"}
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_WAITS = {
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree",
    "cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize",
}  # fmt: skip
GAP_S = 50e-6  # kernels of one visit that follow each other more closely are drawn as one


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that took from `start_s` to `end_s` (seconds since the trace's own zero)."""

    start_s: float
    end_s: float
    name: str = ""
    """The unit that it was about, or the call that was made."""
    n_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a timeline shows about the steps in it.

    Attributes:
        n_traversals: traversals in the trace.
        window_s: what the shares are shares of: from the first traversal's start to the last one's, so that uploads
            that run across the end of a step count where they belong; the traversal itself if there is only one.
        busy: lane -> share of the window in which at least one thing was going on there.
        n_bytes: lane -> bytes moved in the window (copies only).
        gb_per_s: lane -> those bytes over the time the lane was busy, in 1e9 bytes per second.
        host_syncs: "call during unit" -> how often the main thread waited for the GPU inside a traversal.
    """

    n_traversals: int
    window_s: float
    busy: dict[str, float]
    n_bytes: dict[str, int]
    gb_per_s: dict[str, float]
    host_syncs: dict[str, int]

    def __str__(self) -> str:
        lanes = ", ".join(
            f"{lane} {share:.1%}" + (f" at {self.gb_per_s[lane]:.1f} GB/s" if lane in self.gb_per_s else "")
            for lane, share in self.busy.items()
        )
        syncs = ", ".join(f"{n} x {what}" for what, n in self.host_syncs.items()) or "none"
        window = f"{self.n_traversals} traversals, {self.window_s * 1e3:.1f} ms"
        return f"{window}; busy: {lanes}; host synchronisations: {syncs}"


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What ran when.

    Attributes:
        lanes: lane -> what went on there, by start; only lanes on which something did, in the order of `LANES`.
        traversals: the traversals.
        syncs: calls inside a traversal by which its thread waited for the GPU.
    """

    lanes: dict[str, list[Interval]]
    traversals: list[Interval]
    syncs: list[Interval] = field(default_factory=list)

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> "Timeline":
        """Read complete events ("ph": "X", times in microseconds) of a Chrome trace, ours and the profiler's."""
        complete = sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])
        threads = _Threads(complete)
        gpu = [event for event in complete if event.get("cat") in _GPU]
        lanes: dict[str, list[Interval]] = defaultdict(list)
        for event in complete:
            lane = _LANE_OF_KIND.get(str(event.get("cat")).removeprefix(SPAN))
            if lane is not None and not (gpu and lane == "fetches"):
                lanes[lane].append(_interval(event, event["name"]))
        calls = {event["args"]["correlation"]: event for event in complete if _is_call(event)}
        for event in gpu:
            call = calls.get(event.get("args", {}).get("correlation"))
            name = "" if call is None else threads.unit_at(call)
            lanes[_lane_of(event)].append(_interval(event, name))
        lanes["compute"] = list(_merged(lanes["compute"], gap_s=GAP_S))
        return cls(
            lanes={lane: lanes[lane] for lane in LANES if lanes[lane]},
            traversals=[
                _interval(event, event["name"]) for event in complete if event.get("cat") == f"{SPAN}traversal"
            ],
            syncs=list(threads.syncs(complete)),
        )

    @property
    def window(self) -> Interval:
        """Whole steps: see `Summary.window_s`."""
        if not self.traversals:
            everything = [interval for lane in self.lanes.values() for interval in lane] or [Interval(0.0, 0.0)]
            return Interval(min(i.start_s for i in everything), max(i.end_s for i in everything))
        first, last = self.traversals[0], self.traversals[-1]
        return Interval(first.start_s, last.start_s if len(self.traversals) > 1 else last.end_s)

    def summary(self) -> Summary:
        """See `Summary`."""
        window = self.window
        length_s = window.end_s - window.start_s
        busy_s = {lane: _busy_s(intervals, window) for lane, intervals in self.lanes.items()}
        n_bytes = {lane: _bytes_in(intervals, window) for lane, intervals in self.lanes.items()}
        n_bytes = {lane: n for lane, n in n_bytes.items() if n}
        return Summary(
            n_traversals=len(self.traversals),
            window_s=length_s,
            busy={lane: seconds / length_s if length_s else 0.0 for lane, seconds in busy_s.items()},
            n_bytes=n_bytes,
            gb_per_s={lane: n / busy_s[lane] / 1e9 for lane, n in n_bytes.items() if busy_s[lane]},
            host_syncs=dict(Counter(sync.name for sync in self.syncs)),
        )


class _Threads:
    """What each thread was about at any moment, by our own spans."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._spans: dict[int, list[Event]] = defaultdict(list)
        self._traversals: dict[int, list[Event]] = defaultdict(list)
        self._aliases: dict[int, int] = {}
        for event in events:
            category = str(event.get("cat"))
            if category.startswith(SPAN):
                spans = self._traversals if category == f"{SPAN}traversal" else self._spans
                spans[event["tid"]].append(event)
                self._aliases[event.get("args", {}).get(CUDA_THREAD, event["tid"])] = event["tid"]

    def unit_at(self, call: Event) -> str:
        """The unit that a thread was busy with, or had just been: a reader copies what it has read."""
        spans = self._spans[self._thread(call)]
        number = bisect_right(spans, call["ts"], key=lambda span: span["ts"])
        return spans[number - 1]["name"] if number else ""

    def syncs(self, events: Sequence[Event]) -> Iterator[Interval]:
        for event in events:
            name = str(event.get("name")).partition("_")[0]  # some carry the version they were changed in
            if event.get("cat") in _CALLS and name in _WAITS and self._is_in_a_traversal(event):
                yield _interval(event, f"{name} during {self.unit_at(event) or 'no unit'}")

    def _is_in_a_traversal(self, call: Event) -> bool:
        traversals = self._traversals[self._thread(call)]
        number = bisect_right(traversals, call["ts"], key=lambda traversal: traversal["ts"])
        return number > 0 and call["ts"] < traversals[number - 1]["ts"] + traversals[number - 1]["dur"]

    def _thread(self, call: Event) -> int:
        thread: int = call["tid"]
        return self._aliases.get(thread, thread)


def _is_call(event: Event) -> bool:
    return event.get("cat") in _CALLS and "correlation" in event.get("args", {})


def _lane_of(event: Event) -> str:
    if event["cat"] == "gpu_memcpy":
        return {"HtoD": "upload", "DtoH": "download"}.get(event["name"].split()[1], "compute")
    return "compute"


def _interval(event: Event, name: str) -> Interval:
    start_s = event["ts"] / 1e6
    return Interval(start_s, start_s + event["dur"] / 1e6, name, int(event.get("args", {}).get("bytes", 0)))


def _merged(intervals: Iterable[Interval], *, gap_s: float, by_name: bool = True) -> Iterator[Interval]:
    """Intervals in order, joined where they overlap or nearly touch."""
    current: Interval | None = None
    for interval in intervals:
        if current is None:
            current = interval
        elif interval.start_s - current.end_s <= gap_s and (interval.name == current.name or not by_name):
            end_s = max(current.end_s, interval.end_s)
            current = Interval(current.start_s, end_s, current.name, current.n_bytes + interval.n_bytes)
        else:
            yield current
            current = interval
    if current is not None:
        yield current


def _busy_s(intervals: Sequence[Interval], window: Interval) -> float:
    parts = _merged(sorted(intervals, key=lambda i: i.start_s), gap_s=0.0, by_name=False)
    return sum(max(min(p.end_s, window.end_s) - max(p.start_s, window.start_s), 0.0) for p in parts)


def _bytes_in(intervals: Sequence[Interval], window: Interval) -> int:
    """A copy counts with the part of it that lies in the window."""
    total = 0.0
    for interval in intervals:
        inside_s = min(interval.end_s, window.end_s) - max(interval.start_s, window.start_s)
        if interval.n_bytes and inside_s > 0:
            total += interval.n_bytes * inside_s / (interval.end_s - interval.start_s)
    return round(total)
