"""Trace: a recording of some steps, for chrome://tracing, Perfetto, a picture, and a few numbers.

Kernels, copies and the main thread's waiting come from torch's profiler, which has them from the driver; visits,
fetches and disk traffic from our own spans. Both use the same clock.

Does not: record the operators of the CPU, which would cost more than it shows.
Invariant: nothing stays switched on behind the `with` block.
"""

import gzip
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from zo2trl.engine.step import Engine
from zo2trl.engine.timeline import CUDA_THREAD, SPAN, Interval, Summary, Timeline
from zo2trl.errors import ConfigError
from zo2trl.files.tracing import TracedInterval, listening

__all__ = ["Trace", "draw_timeline", "read_trace", "zo_trace"]

MIN_LABEL_SHARE = 0.02  # of the picture's width: a name is written where it has room
_COLOURS = {
    "visits": "tab:gray", "fetches": "tab:blue", "compute": "tab:green", "upload": "tab:blue",
    "download": "tab:purple", "disk reads": "tab:orange", "disk writes": "tab:red",
}  # fmt: skip


class Trace:
    """What `zo_trace` recorded; complete behind its block.

    Attributes:
        timeline: what ran when.
        summary: how busy links and GPU were, and where the host waited.
    """

    timeline: Timeline

    @property
    def summary(self) -> Summary:
        """See `Summary`."""
        return self.timeline.summary()


@contextmanager
def zo_trace(engine: Engine, path: str | Path) -> Iterator[Trace]:
    """Record what an engine does inside the block, and write it as a Chrome trace. Two steps or more say most.

    Args:
        engine: of a trainer, `trainer.engine`.
        path: a ".json" or ".json.gz" file, for chrome://tracing or ui.perfetto.dev.

    Raises:
        ConfigError: the file's folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"`path` is {path}, and there is no folder {path.parent}: create it first.")
    trace, spans = Trace(), []
    with listening(spans.append), _profiled(engine.store.device) as profiled:
        yield trace
    base_ns = profiled.get("baseTimeNanoseconds", 0)
    events = [*profiled.get("traceEvents", []), *_own_events(spans, base_ns=base_ns)]
    trace.timeline = Timeline.from_events(events)
    _write(path, {**profiled, "baseTimeNanoseconds": base_ns, "traceEvents": events, "zo2trl": str(trace.summary)})


def read_trace(path: str | Path) -> Timeline:
    """The timeline of a trace that was written earlier."""
    raw = Path(path).read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    return Timeline.from_events(json.loads(text)["traceEvents"])


@contextmanager
def _profiled(device: torch.device) -> Iterator[dict[str, Any]]:
    """Gives a Chrome trace of what the GPU does in the block; filled at the block's end, empty without a GPU."""
    found: dict[str, Any] = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize(device)  # copies fetched ahead belong to it
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        found.update(json.loads(file.read_bytes()))


def _own_events(spans: Iterable[TracedInterval], *, base_ns: int) -> list[dict[str, Any]]:
    pid = os.getpid()
    named = [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": thread.native_id, "args": {"name": thread.name}}
        for thread in threading.enumerate()
    ]
    return named + [
        {
            "ph": "X", "cat": SPAN + span.kind, "name": span.name, "pid": pid, "tid": span.thread_id,
            "ts": (span.start_ns - base_ns) / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3,
            "args": {CUDA_THREAD: _cuda_thread(span.pthread_id)},
        }
        for span in spans
    ]  # fmt: skip


def _cuda_thread(pthread_id: int) -> int:
    """What the profiler calls a thread that has run none of its operators: the lower half, as a positive int32."""
    low = pthread_id & 0xFFFFFFFF
    return low if low < 1 << 31 else (1 << 32) - low


def _write(path: Path, content: dict[str, Any]) -> None:
    raw = json.dumps(content).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def draw_timeline(timeline: Timeline, path: str | Path, *, title: str = "") -> None:
    """Draw a timeline: lanes from top to bottom, milliseconds from left to right, units in two shades by turns.

    Args:
        path: an image; its suffix says which kind (".png", ".svg").
        title: over the picture.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("Drawing a timeline needs matplotlib: `pip install matplotlib`.") from error
    window, lanes = timeline.window, list(timeline.lanes)
    figure = Figure(figsize=(12, 0.6 * len(lanes) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for row, lane in enumerate(reversed(lanes)):
        _draw_lane(axes, timeline.lanes[lane], row=row, colour=_COLOURS[lane], window=window)
    for sync in timeline.syncs:
        axes.axvline((sync.start_s - window.start_s) * 1e3, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
    axes.set_xlim(0, max((window.end_s - window.start_s) * 1e3, 1e-6))
    axes.set_xlabel("ms")
    axes.set_title(title)
    figure.savefig(str(path), dpi=150)


def _draw_lane(axes: Any, intervals: Sequence[Interval], *, row: int, colour: str, window: Interval) -> None:
    shades: dict[str, float] = {}
    width_s = window.end_s - window.start_s
    inside = [i for i in intervals if i.end_s > window.start_s and i.start_s < window.end_s]
    for interval in inside:
        shades.setdefault(interval.name, 0.9 if len(shades) % 2 else 0.5)
    for shade in (0.9, 0.5):
        bars = [
            ((i.start_s - window.start_s) * 1e3, (i.end_s - i.start_s) * 1e3)
            for i in inside
            if shades[i.name] == shade
        ]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, alpha=shade, linewidth=0)
    for i in inside:
        if i.end_s - i.start_s > MIN_LABEL_SHARE * width_s:
            middle_ms = ((i.start_s + i.end_s) / 2 - window.start_s) * 1e3
            axes.text(middle_ms, row, i.name.rpartition(".")[2], ha="center", va="center", fontsize=6, clip_on=True)
