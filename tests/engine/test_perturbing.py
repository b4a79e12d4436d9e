"""Probes get memory of their own, two at a time where there is room, and never that of weights that are kept."""

from dataclasses import replace

import pytest
import torch

from tests.support.stores import open_store, record, visit_all
from tests.support.toys import toy
from zo2trl.engine.perturbing import Perturber
from zo2trl.zo.estimators import CLEAN, Probe

EPS = 1e-2
DIRECTIONS = [Probe(d, sign) for d in range(2) for sign in (EPS, -EPS)]


def sizes_of_rounds(store, point, probes, *, copies=1):
    store.residency.locations.placement = replace(store.placement, scratch_copies=copies)
    with store.lease(point) as leases:
        return [len(round_) for round_ in Perturber(store).rounds(leases, probes, seed=7)]


def weights_of_probes(store, point, *, copies):
    """What each probe is bound to, copied while its round lasts."""
    store.residency.locations.placement = replace(store.placement, scratch_copies=copies)
    seen = {}
    with store.lease(point) as leases:
        for round_ in Perturber(store).rounds(leases, DIRECTIONS, seed=7):
            addresses = [moved.data_ptr() for _, bound in round_ for moved in bound]
            assert len(set(addresses)) == len(addresses)
            seen |= {probe: [moved.clone() for moved in bound] for probe, bound in round_}
    return seen


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_memory_for_two_makes_a_direction_at_once(tmp_path, tier):
    with open_store(toy(), tmp_path, tier=tier) as store:
        assert sizes_of_rounds(store, store.layout.points[1], DIRECTIONS, copies=2) == [2, 2]


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_the_last_direction_of_streamed_weights_needs_memory_for_one_only(tmp_path, tier):
    with open_store(toy(), tmp_path, tier=tier) as store:
        assert sizes_of_rounds(store, store.layout.points[1], DIRECTIONS) == [1, 1, 2]


def test_resident_weights_and_those_written_back_are_never_perturbed_themselves(tmp_path):
    with open_store(toy(), tmp_path / "a", tier="gpu") as store:
        assert sizes_of_rounds(store, store.layout.points[1], DIRECTIONS) == [1, 1, 1, 1]
    with open_store(toy(), tmp_path / "b", tier="cpu") as store:
        store.append(record(1))
        assert sizes_of_rounds(store, store.layout.points[1], DIRECTIONS) == [1, 1, 1, 1]


def test_clean_weights_are_served_before_anything_may_take_their_place(tmp_path):
    with open_store(toy(), tmp_path, tier="cpu") as store:
        assert sizes_of_rounds(store, store.layout.points[1], [*DIRECTIONS, CLEAN]) == [1, 1, 1, 2]


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_how_much_memory_there_is_never_shows_in_a_probe(tmp_path, tier, every):
    found = []
    for copies in (1, 2):
        with open_store(toy(), tmp_path / str(copies), tier=tier, every=every) as store:
            visit_all(store)
            store.append(record(1))
            store.append(record(2))
            found.append(weights_of_probes(store, store.layout.points[1], copies=copies))
            store.settle()
            lent = visit_all(store)
            found.append({0: list(lent.values())})
    for one, two in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], two[key], strict=True))
