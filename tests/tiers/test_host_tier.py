"""Promises of pinned homes: exactly as much is pinned as there are weights, and all of it is given back."""

import pytest
import torch

from tests.support.stores import synthetic_layout
from zo2trl.errors import StoreError
from zo2trl.tiers import host
from zo2trl.tiers.host import HostTier

UNITS = synthetic_layout([[1, 2], [4], [3]]).units[1:]
PAGE_BYTES = 4096


class Cudart:
    """Takes down what is registered; fails at the nth registration."""

    def __init__(self):
        self.registered: dict[int, int] = {}
        self.n_left = 1 << 30

    def cudaHostRegister(self, address, n_bytes, flags):
        self.n_left -= 1
        if self.n_left < 0:
            return 2
        new = range(address // PAGE_BYTES, (address + n_bytes - 1) // PAGE_BYTES + 1)
        for start, length in self.registered.items():
            old = range(start // PAGE_BYTES, (start + length - 1) // PAGE_BYTES + 1)
            assert not (set(new) & set(old)), "CUDA refuses a page that is registered already"
        self.registered[address] = n_bytes
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


@pytest.fixture
def cudart(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(host, "_cudart", lambda: cudart)
    return cudart


def values(spec):
    return torch.full(spec.shape, float(spec.tensor_id), dtype=spec.dtype)


def test_every_unit_is_pinned_at_exactly_its_size_and_unpinned_in_the_end(cudart):
    tier = HostTier(UNITS, pinned=True)
    assert sorted(cudart.registered.values()) == sorted(unit.n_bytes for unit in UNITS)
    for unit in UNITS:
        tier.add(unit, values)
        assert tier.view(unit).data_ptr() in cudart.registered, "what was reserved is filled in place"
    tier.close()
    tier.close()
    assert cudart.registered == {}


def test_a_unit_that_comes_or_goes_later_is_pinned_and_unpinned_by_itself(cudart):
    tier = HostTier(UNITS[:1], pinned=True)
    tier.add(UNITS[0], values)
    tier.add(UNITS[1], values)
    tier.reserve(UNITS[2]).fill_(7)
    assert len(cudart.registered) == 3 and bool((tier.view(UNITS[2]) == 7).all())
    tier.drop(UNITS[0])
    tier.drop(UNITS[0])
    assert sorted(cudart.registered.values()) == sorted(unit.n_bytes for unit in UNITS[1:])
    tier.close()
    assert cudart.registered == {}


def test_when_memory_cannot_be_pinned_nothing_stays_pinned_and_the_way_out_is_told(cudart):
    cudart.n_left = 2
    with pytest.raises(StoreError, match=rf"could not pin {UNITS[2].n_bytes:,} bytes .* Lower `cpu_memory`"):
        HostTier(UNITS, pinned=True)
    assert cudart.registered == {}


def test_a_unit_that_cannot_be_pinned_leaves_the_others_alone(cudart):
    tier = HostTier(UNITS[:2], pinned=True)
    for unit in UNITS[:2]:
        tier.add(unit, values)
    cudart.n_left = 0
    with pytest.raises(StoreError, match="could not pin"):
        tier.add(UNITS[2], values)
    assert len(cudart.registered) == 2
    with pytest.raises(KeyError):
        tier.view(UNITS[2])
    assert bool((tier.view(UNITS[1]).view(torch.float32) == UNITS[1].tensors[0].tensor_id).all())
    tier.close()


def test_a_unit_without_any_bytes_needs_no_pinning(cudart):
    empty = synthetic_layout([[0]]).units[1]
    tier = HostTier([empty], pinned=True)
    tier.add(empty, values)
    assert tier.view(empty).numel() == 0 and cudart.registered == {}
    tier.close()
