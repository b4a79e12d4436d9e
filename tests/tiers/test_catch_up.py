"""Promises of catching up: positions follow the bytes, drafts count only once they are home."""

import torch

from tests.support.stores import method, record, streamed_segments, synthetic_layout
from zo2trl.tiers.catch_up import catch_up
from zo2trl.tiers.ledger import Ledger
from zo2trl.zo.tiles import TILE

RECORDS = [record(step) for step in range(4)]


def fresh(segment):
    return (torch.arange(segment.n_bytes // 4, dtype=torch.float32) / 1024).view(torch.uint8)


def test_a_segment_that_is_behind_gets_exactly_the_steps_it_missed():
    (segment,) = streamed_segments(1)
    eager = fresh(segment)
    for position in range(4):
        assert catch_up(eager, segment, RECORDS[: position + 1], position=position, method=method())
    lazy = fresh(segment)
    assert catch_up(lazy, segment, RECORDS, position=0, method=method())
    assert torch.equal(lazy, eager) and not torch.equal(lazy, fresh(segment))


def test_nothing_is_pending_at_the_journals_end():
    (segment,) = streamed_segments(1)
    weights = fresh(segment)
    assert not catch_up(weights, segment, RECORDS, position=4, method=method())
    assert torch.equal(weights, fresh(segment))


def test_frozen_segments_never_have_anything_pending():
    segment = synthetic_layout([[1]], trainable=False).segments[1]
    weights = fresh(segment)
    assert not catch_up(weights, segment, RECORDS, position=0, method=method())
    assert torch.equal(weights, fresh(segment))


def test_the_leaves_of_a_unit_catch_up_like_the_unit():
    layout = synthetic_layout([[2, 1]])
    one, two = layout.segments[1:]
    parts = [fresh(one), fresh(two)]
    for segment, weights in zip((one, two), parts, strict=True):
        catch_up(weights, segment, RECORDS, position=0, method=method())
    assert not torch.equal(parts[0][: TILE * 4], parts[1]), "each tensor has a direction of its own"


def test_the_ledger_starts_at_zero_and_follows_what_is_absorbed():
    one, two = streamed_segments(2)
    ledger = Ledger()
    assert ledger.position(one) == 0
    ledger.absorb(one, 3)
    assert (ledger.position(one), ledger.position(two)) == (3, 0)


def test_a_draft_counts_only_once_it_is_the_home():
    one, two = synthetic_layout([[1, 1]]).segments[1:]
    ledger = Ledger()
    ledger.draft(one, 2)
    assert ledger.position(one) == 0
    ledger.draft(two, 2)
    ledger.publish(two.unit)
    assert (ledger.position(one), ledger.position(two)) == (2, 2)


def test_forgotten_drafts_leave_positions_where_they_were():
    one, two = streamed_segments(2)
    ledger = Ledger()
    ledger.draft(one, 2)
    ledger.draft(two, 2)
    ledger.publish(two.unit)
    assert ledger.forget_drafts() == [one.unit.index]
    assert ledger.forget_drafts() == []
    assert (ledger.position(one), ledger.position(two)) == (0, 2)


def test_a_whole_unit_can_be_placed_at_a_position():
    one, two = synthetic_layout([[1, 1]]).segments[1:]
    ledger = Ledger()
    ledger.absorb(one, 4)
    ledger.place([one, two], 2)
    assert (ledger.position(one), ledger.position(two)) == (2, 2)
    ledger.absorb(two, 5)
    assert (ledger.position(one), ledger.position(two)) == (2, 5)
