"""What was freed goes back to the system, whatever small things lie between."""

import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import Report, in_child, single_threaded
from zo2trl.files import malloc_trim
from zo2trl.files.malloc_trim import return_free_pages

N_HOLES, HOLE_BYTES = 64, 2 << 20


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def shrink(report: Report) -> None:
    return_free_pages()
    torch.ones(31 << 20, dtype=torch.uint8)  # freed again, it tells the C library to keep pieces of its size
    kept = []
    for _ in range(N_HOLES):
        hole = torch.ones(HOLE_BYTES, dtype=torch.uint8)
        kept.append(torch.ones(64))  # in the way of giving the end of the heap back
        del hole
    kept += [torch.ones(HOLE_BYTES, dtype=torch.uint8) for _ in range(N_HOLES)]
    between = kept[1::2]
    del kept
    before = resident_bytes()
    return_free_pages()
    report(before - resident_bytes())
    assert all(bool((small == 1).all()) for small in between)


@pytest.mark.skipif(sys.platform != "linux", reason="nobody else has malloc_trim")
def test_pages_of_freed_memory_are_given_back_and_others_keep_their_bytes() -> None:
    with single_threaded():
        assert in_child(shrink)[0] > N_HOLES // 4 * HOLE_BYTES


def test_without_such_a_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    malloc_trim._malloc_trim.cache_clear()
    monkeypatch.setattr(sys, "platform", "nowhere")
    return_free_pages()
    assert malloc_trim._malloc_trim() is None
    malloc_trim._malloc_trim.cache_clear()
