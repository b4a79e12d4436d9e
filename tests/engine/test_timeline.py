"""Promises about timelines: shares, bytes and waits are those of whole steps, whatever order events come in."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo2trl.engine.timeline import CUDA_THREAD, GAP_S, LANES, SPAN, Timeline

MAIN, FETCHER, WRITER = 100, 200, 300
MAIN_IN_CUDA, FETCHER_IN_CUDA = 100, 987654  # the profiler knows the thread it was started in by its real name


def span(kind, name, start_ms, end_ms, *, tid=MAIN, cuda_tid=None):
    args = {CUDA_THREAD: tid if cuda_tid is None else cuda_tid}
    return complete(f"{SPAN}{kind}", name, start_ms, end_ms, tid=tid, args=args)


def complete(category, name, start_ms, end_ms, *, tid, args):
    start_us, end_us = start_ms * 1e3, end_ms * 1e3
    return {
        "ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": start_us, "dur": end_us - start_us,
        "args": args,
    }  # fmt: skip


class Gpu:
    """Makes a call and what it starts on the GPU, as the profiler writes them."""

    def __init__(self):
        self.correlation = 0

    def launch(self, category, name, start_ms, end_ms, *, called_ms, tid, call="cudaLaunchKernel", **args):
        self.correlation += 1
        link = {"correlation": self.correlation}
        return [
            complete("cuda_runtime", call, called_ms, called_ms + 0.001, tid=tid, args={"cbid": 1, **link}),
            complete(category, name, start_ms, end_ms, tid=7, args={"stream": 7, "device": 0, **link, **args}),
        ]

    def upload(self, n_bytes, start_ms, end_ms, *, called_ms, tid=FETCHER_IN_CUDA):
        name = "Memcpy HtoD (Pinned -> Device)"
        return self.launch(
            "gpu_memcpy", name, start_ms, end_ms, called_ms=called_ms, tid=tid, call="cudaMemcpyAsync", bytes=n_bytes
        )


def two_steps():
    """Two traversals of 10 ms over units a and b, uploads at 4 GB/s in 8 of every 10 ms, one across the end."""
    gpu, events = Gpu(), [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
    for start in (0, 10):
        events.append(span("traversal", "2 passes", start, start + 9))
        for name, at in (("a", start), ("b", start + 4)):
            events.append(span("visit", name, at, at + 4))
            events += gpu.launch("kernel", "gemm", at + 1, at + 2, called_ms=at + 0.5, tid=MAIN_IN_CUDA)
            events += gpu.launch("kernel", "noise", at + 2.01, at + 3, called_ms=at + 0.6, tid=MAIN_IN_CUDA)
            events.append(span("fetch", name, at + 0.1, at + 0.2, tid=FETCHER, cuda_tid=FETCHER_IN_CUDA))
        events += gpu.upload(16_000_000, start + 1, start + 5, called_ms=start + 0.15)
        events += gpu.upload(16_000_000, start + 7, start + 11, called_ms=start + 4.15)
    return events


def test_lanes_are_those_on_which_something_was_done_in_their_order():
    timeline = Timeline.from_events(two_steps())
    assert list(timeline.lanes) == ["visits", "compute", "upload"]
    assert [i.name for i in timeline.lanes["visits"]] == ["a", "b", "a", "b"]


def test_shares_are_of_whole_steps_from_the_first_traversal_to_the_last():
    timeline = Timeline.from_events(two_steps())
    summary = timeline.summary()
    assert summary.n_traversals == 2
    assert summary.window_s == pytest.approx(0.010)
    assert summary.busy["upload"] == pytest.approx(0.7)
    assert summary.busy["compute"] == pytest.approx(0.4, abs=0.01)
    assert summary.n_bytes == {"upload": pytest.approx(28_000_000)}
    assert summary.gb_per_s["upload"] == pytest.approx(4.0)
    assert "upload 70.0% at 4.0 GB/s" in str(summary) and "synchronisations: none" in str(summary)


def test_one_traversal_is_its_own_window():
    events = [span("traversal", "2 passes", 5, 9), span("visit", "a", 5, 7)]
    summary = Timeline.from_events(events).summary()
    assert summary.window_s == pytest.approx(0.004) and summary.busy["visits"] == pytest.approx(0.5)


def test_kernels_and_copies_carry_the_unit_their_thread_was_busy_with():
    timeline = Timeline.from_events(two_steps())
    assert [i.name for i in timeline.lanes["upload"]] == ["a", "b", "a", "b"]
    assert [i.name for i in timeline.lanes["compute"]] == ["a", "b", "a", "b"]


def test_what_a_reader_copies_carries_the_unit_it_has_just_read():
    read = span("disk read", "c", 1, 2, tid=FETCHER, cuda_tid=FETCHER_IN_CUDA)
    timeline = Timeline.from_events([read, *Gpu().upload(100, 3, 4, called_ms=2.5)])
    assert timeline.lanes["upload"][0].name == "c"


def test_downloads_and_copies_on_the_device_have_lanes_of_their_own():
    gpu = Gpu()
    events = gpu.launch("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 0, 1, called_ms=0, tid=WRITER, bytes=5)
    events += gpu.launch("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 2, 3, called_ms=0, tid=MAIN, bytes=5)
    events += gpu.launch("gpu_memset", "Memset (Device)", 4, 5, called_ms=0, tid=MAIN, bytes=5)
    lanes = Timeline.from_events(events).lanes
    assert [len(lanes[lane]) for lane in ("download", "compute")] == [1, 2]


def test_kernels_in_quick_succession_are_one_interval_unless_the_unit_changes():
    gpu, gap_ms = Gpu(), GAP_S * 1e3
    events = [span("visit", "a", 0, 1), span("visit", "b", 1, 2)]
    for number, called_ms in enumerate((0.1, 0.2, 1.1)):
        start_ms = 3 + number * (1 + gap_ms / 2)
        events += gpu.launch("kernel", "k", start_ms, start_ms + 1, called_ms=called_ms, tid=MAIN)
    assert [i.name for i in Timeline.from_events(events).lanes["compute"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "at_ms", "tid", "is_counted"),
    [
        ("cudaStreamSynchronize", 5, MAIN_IN_CUDA, True),
        ("cudaDeviceSynchronize", 5, MAIN_IN_CUDA, True),
        ("cudaMemcpy_v3020", 5, MAIN_IN_CUDA, True),
        ("cudaMemcpyAsync", 5, MAIN_IN_CUDA, False),
        ("cudaStreamWaitEvent", 5, MAIN_IN_CUDA, False),
        ("cudaStreamSynchronize", 9.5, MAIN_IN_CUDA, False),
        ("cudaEventSynchronize", 5, WRITER, False),
    ],
)
def test_a_wait_counts_if_the_traversing_thread_waits_inside_a_traversal(call, at_ms, tid, is_counted):
    wait = complete("cuda_runtime", call, at_ms, at_ms + 1, tid=tid, args={"correlation": 99})
    summary = Timeline.from_events([*two_steps(), wait]).summary()
    assert summary.host_syncs == ({f"{call.partition('_')[0]} during b": 1} if is_counted else {})


def test_a_traversing_thread_is_recognised_by_its_other_name():
    traversal = span("traversal", "2 passes", 0, 9, tid=MAIN, cuda_tid=777)
    wait = complete("cuda_runtime", "cudaStreamSynchronize", 5, 6, tid=777, args={})
    assert Timeline.from_events([traversal, wait]).summary().host_syncs == {"cudaStreamSynchronize during no unit": 1}


def test_without_a_gpu_fetches_have_a_lane():
    events = [span("traversal", "", 0, 9), span("visit", "a", 0, 4), span("fetch", "b", 1, 3, tid=FETCHER)]
    events += [span("disk read", "b", 1, 2, tid=FETCHER), span("disk write", "a", 5, 6, tid=WRITER)]
    timeline = Timeline.from_events(events)
    assert list(timeline.lanes) == ["visits", "fetches", "disk reads", "disk writes"]
    assert set(timeline.lanes) < set(LANES)


def test_nothing_happened_is_a_timeline_too():
    summary = Timeline.from_events([]).summary()
    assert (summary.n_traversals, summary.window_s, summary.busy) == (0, 0.0, {})


@given(st.randoms(use_true_random=False))
def test_the_order_of_events_does_not_matter(random_: random.Random):
    events = two_steps()
    random_.shuffle(events)
    assert Timeline.from_events(events) == Timeline.from_events(two_steps())


pieces = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12)


@given(copies=pieces, window=st.tuples(st.integers(0, 40), st.integers(1, 30)))
def test_a_lane_is_busy_while_at_least_one_thing_goes_on(copies, window):
    start, length = window
    gpu, events = Gpu(), [span("traversal", "", start, start + length)]
    for at, took in copies:
        events += gpu.upload(took * 1000, at, at + took, called_ms=0)
    summary = Timeline.from_events(events).summary()
    ticks = [any(at <= t < at + took for at, took in copies) for t in range(start, start + length)]
    inside = sum(max(min(at + took, start + length) - max(at, start), 0) for at, took in copies)
    assert summary.busy.get("upload", 0.0) == pytest.approx(sum(ticks) / length)
    assert summary.n_bytes.get("upload", 0) == pytest.approx(inside * 1000, abs=12)
