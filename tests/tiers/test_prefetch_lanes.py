"""Promises of fetching from two kinds of homes: uploads never wait behind reads, and drives learn early what comes."""

import itertools
import threading
from concurrent.futures import Future

from tests.support.stores import CPU
from tests.tiers.test_prefetch import SEGMENTS, Residency, Ring
from tests.tiers.test_staging import until
from zo2trl.tiers.prefetch import Prefetcher

# --------------------------------------------------------------------------------------------------------- two lanes


def test_an_upload_does_not_wait_behind_a_read_from_disk():
    with Ring(3, on_disk=lambda segment: segment.index == 2) as ring:
        ring.residency.gates[2] = threading.Event()
        fetch, _ = ring.fetcher.take(SEGMENTS[0])
        ring.fetcher._ahead[1].job.result(timeout=300)  # number 3 is there, though number 2 is still being read
        assert ring.residency.loaded == [1, 3]
        ring.residency.gates[2].set()
        ring.fetcher.give_back(fetch)
        for segment in SEGMENTS[1:]:
            ring.visit(segment)


def test_reads_from_disk_overlap():
    with Ring(3, on_disk=lambda segment: True) as ring:
        ring.residency.gates[2] = threading.Event()
        fetch, _ = ring.fetcher.take(SEGMENTS[0])
        ring.fetcher._ahead[1].job.result(timeout=300)
        ring.residency.gates[2].set()
        ring.fetcher.give_back(fetch)
        ring.visit(SEGMENTS[1])


def test_uploads_are_begun_in_the_order_of_need():
    with Ring(4) as ring:
        for _ in range(20):
            for segment in SEGMENTS:
                ring.visit(segment)
        ring.settle()
        assert ring.residency.loaded == [1 + i % 6 for i in range(len(ring.residency.loaded))]


def test_what_nobody_wants_any_more_is_not_loaded_if_it_has_not_begun():
    with Ring(5) as ring:
        ring.residency.gates[2] = threading.Event()
        ring.visit(SEGMENTS[0])  # number 2 is stuck; 3, 4, 5 and 6 wait behind it
        until(lambda: 2 in ring.residency.begun)
        ring.fetcher.drop()
        ring.residency.gates[2].set()
        ring.visit(SEGMENTS[5])
        assert ring.residency.loaded[:3] == [1, 2, 6]


def test_a_dropped_load_passes_on_whom_it_should_have_waited_for():
    """A write-back still reads slot 1; the load that was to follow it there is dropped before it has begun."""
    with Ring(1) as ring:
        fetch, _ = ring.fetcher.take(SEGMENTS[0])
        written: Future = Future()
        ring.fetcher.give_back(fetch, after=written)
        ring.fetcher.drop()
        threading.Timer(0.05, written.set_result, [None]).start()
        other, _ = ring.fetcher.take(SEGMENTS[3])
        assert written.done() and bool((other.stored == 4).all())
        ring.fetcher.give_back(other)


# ------------------------------------------------------------------------------------------------ what comes from disk


class Listener:
    """Hears which segments on disk come next; asks for at most `n` of them."""

    def __init__(self, n=100):
        self.n, self.heard = n, []

    def __call__(self, segments):
        self.heard.append([segment.index for segment in itertools.islice(segments, self.n)])


def listened(n_slots, on_disk, listener):
    n_bytes = SEGMENTS[0].n_bytes
    return Prefetcher(
        SEGMENTS, Residency(), ring_bytes=n_slots * n_bytes, device=CPU,
        on_disk=lambda segment: segment.index in on_disk, upcoming=listener,
    )  # fmt: skip


def test_what_is_on_disk_and_has_no_room_yet_is_announced_in_the_order_of_need():
    listener = Listener()
    fetcher = listened(2, {2, 5, 6}, listener)
    expected = {1: [5, 6], 2: [5, 6], 3: [5, 6, 2], 4: [6, 2], 5: [2], 6: [2, 5]}
    for _ in range(2):
        for segment in SEGMENTS:
            fetch, _ = fetcher.take(segment)
            assert listener.heard[-1] == expected[segment.index]
            fetcher.give_back(fetch)
    fetcher.close()
    assert listener.heard[-1] == [], "nothing comes any more"


def test_dropping_what_was_fetched_takes_back_what_was_announced():
    listener = Listener(1)
    fetcher = listened(2, {4, 5}, listener)
    fetch, _ = fetcher.take(SEGMENTS[0])
    fetcher.give_back(fetch)
    assert listener.heard[-1] == [4]
    fetcher.drop()
    assert listener.heard[-1] == []
    fetcher.close()


def test_nothing_is_announced_when_nothing_is_on_disk():
    listener = Listener()
    fetcher = listened(2, set(), listener)
    for segment in SEGMENTS:
        fetcher.give_back(fetcher.take(segment)[0])
    assert not any(listener.heard)
    fetcher.close()
