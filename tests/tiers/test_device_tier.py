"""Device tier: what never leaves lies apart from what may."""

import torch

from tests.support.durable import base_weights
from tests.support.stores import CPU, synthetic_layout
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.tier import tensor_view


def test_units_that_never_leave_share_memory_that_no_other_unit_is_in() -> None:
    layout = synthetic_layout([[2], [1, 1]], root_tiles=3)
    permanent = [unit for unit in layout.units if unit.is_resident]
    tier = DeviceTier(CPU, permanent)
    for unit in layout.units:
        tier.add(unit, base_weights)
    storages = {unit.index: tier.view(unit).untyped_storage() for unit in layout.units}
    together = {storages[unit.index].data_ptr() for unit in permanent}
    assert len(together) == 1
    assert storages[permanent[0].index].nbytes() == sum(unit.n_bytes for unit in permanent)
    for unit in layout.units:
        assert unit.is_resident == (storages[unit.index].data_ptr() in together)
        for spec in unit.tensors:
            assert torch.equal(tensor_view(tier.view(unit), spec), base_weights(spec))
    tier.close()
