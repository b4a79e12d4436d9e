"""Traces of a real GPU: kernels, copies and bytes on their lanes, each with its unit, and nobody waiting."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_batch, tiny_model
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.trace import Trace, read_trace, zo_trace
from zo2trl.planning.budgets import Budgets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N_STEPS = 6


def traced(folder: Path, *, cpu: int, in_loss: Any = None, **options: Any) -> tuple[Trace, dict[str, int], set[str]]:
    """(trace of whole steps, bytes that the store counted meanwhile, names of the streamed units)."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    hook_heads(model)
    # With an attention mask (OPT makes its own), transformers waits for its values at the beginning of every forward.
    batch = {key: value.cuda() for key, value in tiny_batch("llama").items() if key != "attention_mask"}
    settled = {"granularity": "block", "write_back_every": 1, "seed": 0} | options
    budgets = Budgets(device="min", cpu=cpu)
    engine = open_engine(
        model,
        EngineOptions(budgets=budgets, device=torch.device("cuda"), store_dir=folder / "store", **settled),
    )

    def loss() -> torch.Tensor:
        with deferring_logits():
            found = model(**batch).loss
        if in_loss is not None:
            in_loss(found)
        return found

    def run(steps: range) -> None:
        for step in steps:
            engine.step([loss], step=step)
            engine.commit(learning_rate=1e-3, weight_decay=0.0)

    run(range(2))
    engine.store.settle()
    before = engine.store.traffic.copy()
    with zo_trace(engine, folder / "trace.json") as trace:
        run(range(2, 2 + N_STEPS))
        engine.store.settle()
    moved = engine.store.traffic - before
    streamed = {unit.name for unit in engine.store.layout.units if engine.store.tier_of(unit) != "gpu"}
    engine.shutdown()
    return trace, dict(moved), streamed


@pytest.mark.parametrize("cpu", [1 << 34, 0], ids=["from host memory", "from disk"])
def test_every_unit_is_on_every_lane_it_passes(tmp_path: Path, cpu: int) -> None:
    trace, _, streamed = traced(tmp_path, cpu=cpu)
    lanes = trace.timeline.lanes
    on_disk = [] if cpu else ["disk reads", "disk writes"]
    assert list(lanes) == ["visits", "compute", "upload", "download", *on_disk]
    assert len(trace.timeline.traversals) == N_STEPS
    for lane in ("compute", "upload", "download", *on_disk):
        assert {interval.name for interval in lanes[lane]} >= streamed, lane
    assert read_trace(tmp_path / "trace.json") == trace.timeline


def test_copies_have_the_bytes_that_the_store_has_counted(tmp_path: Path) -> None:
    trace, moved, _ = traced(tmp_path, cpu=1 << 34)
    for lane, link in (("upload", "h2d"), ("download", "d2h")):
        copied = sum(interval.n_bytes for interval in trace.timeline.lanes[lane])
        # What was fetched ahead before the trace began and after it ended, and the losses that the host reads.
        assert copied == pytest.approx(moved[link], rel=0.25), lane


def test_nobody_waits_between_units(tmp_path: Path) -> None:
    assert traced(tmp_path, cpu=1 << 34)[0].summary.host_syncs == {}


def test_who_waits_is_found_out_with_the_unit(tmp_path: Path) -> None:
    trace, _, _ = traced(tmp_path, cpu=1 << 34, in_loss=lambda loss: loss.item())
    assert trace.summary.host_syncs == {"cudaStreamSynchronize during root": 2 * N_STEPS}


def test_shares_are_shares(tmp_path: Path) -> None:
    summary = traced(tmp_path, cpu=1 << 34)[0].summary
    assert all(0.0 < share <= 1.0 for share in summary.busy.values())
    assert summary.gb_per_s["upload"] > 0.0
