"""Promises about traces: a file any viewer reads, every unit in it, and nothing left switched on."""

import gzip
import json
import sys
from itertools import pairwise

import pytest

from tests.support.toys import opened, toy, train
from zo2trl.engine.timeline import Timeline
from zo2trl.engine.trace import draw_timeline, read_trace, zo_trace
from zo2trl.errors import ConfigError
from zo2trl.files import tracing

LANES = {
    "gpu": ["visits"],
    "cpu": ["visits", "fetches"],
    "disk": ["visits", "fetches", "disk reads", "disk writes"],
}


def traced(folder, *, tier="disk", n_steps=2, suffix=".json"):
    model = toy()
    with opened(model, folder / "store", tier=tier) as engine:
        train(engine, model, steps=1)
        with zo_trace(engine, folder / f"trace{suffix}") as trace:
            train(engine, model, steps=n_steps, start=1)
            engine.flush()
        return trace, [point.module_name or "root" for point in engine.store.layout.points], len(engine.visited)


@pytest.mark.parametrize("tier", LANES)
def test_every_visit_of_every_step_is_in_it_on_its_lane(tmp_path, tier):
    trace, points, n_visits = traced(tmp_path, tier=tier)
    lanes = trace.timeline.lanes
    assert list(lanes) == LANES[tier]
    assert len(trace.timeline.traversals) == 2 and len(lanes["visits"]) == 2 * n_visits
    assert {visit.name for visit in lanes["visits"]} == set(points)
    for lane in LANES[tier][1:]:
        assert {interval.name for interval in lanes[lane]} >= set(points) - {"root"}


def test_visits_lie_inside_their_traversal_one_after_the_other(tmp_path):
    timeline = traced(tmp_path, tier="cpu", n_steps=1)[0].timeline
    [traversal], visits = timeline.traversals, timeline.lanes["visits"]
    assert traversal.start_s <= visits[0].start_s and visits[-1].end_s <= traversal.end_s
    assert all(a.end_s <= b.start_s for a, b in pairwise(visits))


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_file_is_a_chrome_trace_and_can_be_read_again(tmp_path, suffix):
    trace = traced(tmp_path, suffix=suffix)[0]
    path = tmp_path / f"trace{suffix}"
    raw = path.read_bytes()
    content = json.loads(gzip.decompress(raw) if suffix == ".json.gz" else raw)
    for event in content["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= event.keys()
        assert event["ph"] == "M" or (event["ts"] >= 0 and event["dur"] >= 0)
    threads = {event["args"]["name"] for event in content["traceEvents"] if event["ph"] == "M"}
    assert any(name.startswith("zo2trl-fetch") for name in threads)
    assert content["zo2trl"] == str(trace.summary)
    assert read_trace(path) == trace.timeline == Timeline.from_events(content["traceEvents"])


def test_a_summary_says_how_busy_the_lanes_were_and_that_nobody_waited(tmp_path):
    summary = traced(tmp_path, n_steps=3)[0].summary
    assert summary.n_traversals == 3 and summary.host_syncs == {}
    assert all(0.0 < share <= 1.0 for share in summary.busy.values())


def test_a_trace_changes_no_bit_of_a_step(tmp_path):
    model = toy()
    with opened(model, tmp_path / "plain") as engine:
        expected = train(engine, model, steps=2)
    model = toy()
    with opened(model, tmp_path / "traced") as engine, zo_trace(engine, tmp_path / "trace.json"):
        assert train(engine, model, steps=2) == expected


def test_nobody_listens_behind_the_block_not_even_after_an_error(tmp_path):
    with opened(toy(), tmp_path / "store") as engine:
        with pytest.raises(ZeroDivisionError), zo_trace(engine, tmp_path / "trace.json"):
            assert tracing._listeners
            raise ZeroDivisionError
        assert not tracing._listeners
    assert not (tmp_path / "trace.json").exists()


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    refused = pytest.raises(ConfigError, match=r"`path`.*nowhere.*create it")
    with opened(toy(), tmp_path / "store") as engine, refused, zo_trace(engine, tmp_path / "nowhere" / "trace.json"):
        pytest.fail("it ran")


# -------------------------------------------------------------------------------------------------------- the picture


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Drawn once before: matplotlib keeps its font files open."""
    pytest.importorskip("matplotlib")
    draw_timeline(Timeline(lanes={}, traversals=[]), tmp_path_factory.mktemp("fonts") / "picture.png")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_timeline_can_be_drawn(tmp_path, fonts, suffix):
    trace = traced(tmp_path)[0]
    draw_timeline(trace.timeline, tmp_path / f"picture{suffix}", title="two steps")
    assert (tmp_path / f"picture{suffix}").stat().st_size > 1000


def test_an_empty_timeline_can_be_drawn(tmp_path, fonts):
    draw_timeline(Timeline(lanes={}, traversals=[]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        draw_timeline(Timeline(lanes={}, traversals=[]), tmp_path / "picture.png")
