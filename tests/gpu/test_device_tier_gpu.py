"""Memory of units that left the device is free for others, whatever small units stay."""

import gc

import pytest
import torch

from tests.support.durable import base_weights
from tests.support.stores import synthetic_layout
from zo2trl.tiers.device import DeviceTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE, SMALL = (
    1280,
    80,
)  # tiles of 16 KiB: 20 MiB, and 1.25 MiB, which fits where the allocator rounds up the large one


def test_small_units_that_stay_keep_nothing_of_large_ones_that_leave() -> None:
    layout = synthetic_layout([size for _ in range(8) for size in ([LARGE + 20], [SMALL])])
    blocks = [unit for unit in layout.units if not unit.is_resident]
    leaving, staying = blocks[::2], blocks[1::2]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    tier = DeviceTier(torch.device("cuda"), staying)
    for unit in blocks:
        tier.add(unit, base_weights)
    for unit in leaving:
        tier.drop(unit)
    gc.collect()
    torch.cuda.empty_cache()
    kept = sum(unit.n_bytes for unit in staying)
    assert torch.cuda.memory_reserved() - before < kept + (22 << 20), "one segment, and what rounds it up"
    tier.close()
