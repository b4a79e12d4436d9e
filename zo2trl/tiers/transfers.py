"""Transfers: segments on their way from their homes into slots, and from slots back to their homes.

Does not: know the order of a traversal (prefetch.py), decide what is written back (store.py), or keep versions.
Invariant: a home is read only when no write-back of the same segment runs or waits, so a load brings whole segments.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from functools import partial

import torch

from zo2trl.files.tracing import traced
from zo2trl.layout.layout import Segment
from zo2trl.tiers.locations import Locations
from zo2trl.tiers.prefetch import Arrival, Slot
from zo2trl.tiers.read_ahead import ReadAhead
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.tier import Reading
from zo2trl.tiers.uploader import DirectUploader, Uploader
from zo2trl.tiers.writer import Release, Writer

__all__ = ["Transfers"]


class Transfers:
    """Loads in fetch threads, write-backs in the writer's thread.

    Args:
        locations: where the units live.
        writer: the thread that writes homes and files.
        device: where slots are.
        uploader: copies into slots; None: a direct one.
    """

    def __init__(
        self, locations: Locations, writer: Writer, *, device: torch.device, uploader: Uploader | None = None
    ) -> None:
        self._locations, self._writer, self._device = locations, writer, device
        self._uploader = uploader or DirectUploader(device)
        self._invalidated: set[int] = set()  # segments on disk whose views users may have written to
        self.will_write_back: Callable[[Segment], bool] = lambda segment: True  # then a load compares every byte
        self._staging = Staging(0, device=device, uploader=self._uploader)
        self._ahead = ReadAhead(self._staging, self._open)

    def make_staging(self, n_bytes: int) -> None:
        """Make host memory for segments that come from or go to disk, the largest of which has `n_bytes`."""
        self._staging.close()
        layout, placement = self._locations.layout, self._locations.placement
        on_disk = [layout.units[index].stored_bytes for index in placement.units_in("disk")]
        is_uneven = placement.units_in("cpu") or layout.leaf_blocks  # if not, the ring is enough
        ahead_bytes = max(on_disk, default=0) if is_uneven else 0
        self._staging = Staging(
            n_bytes if on_disk else 0, device=self._device, ahead_bytes=ahead_bytes, uploader=self._uploader
        )
        self._ahead = ReadAhead(self._staging, self._open)

    def read_ahead(self, upcoming: Iterable[Segment]) -> None:
        """See `ReadAhead.announce`."""
        self._ahead.announce(upcoming)

    def load(self, segment: Segment, slot: Slot) -> Arrival:
        """Copy a segment from its home into a slot, in a fetch thread."""
        locations, n_bytes = self._locations, segment.stored_bytes
        target = slot.buffer[:n_bytes]
        if locations.is_on_disk(segment):
            reading = self._ahead.load(segment, target, slot)
            locations.count(disk_read=n_bytes, h2d=n_bytes if self._device.type != "cpu" else 0)
            return Arrival(reading.position, reading.was_written_to, reading.is_checked)
        self._wait_for_write(segment)
        position = locations.position(segment)
        self._staging.upload(locations.tiers.cpu.weights(segment), target, slot)
        locations.count(h2d=n_bytes)
        return Arrival(position)

    def _open(self, segment: Segment) -> Reading:
        self._wait_for_write(segment)
        locations = self._locations
        with locations.lock:  # position and home belong together: a new version may be published at any moment
            position, home = locations.ledger.position(segment), locations.tiers.disk.home(segment.unit)
        check_all, beside_view = self.will_write_back(segment), segment.index in self._invalidated
        return home.reading(segment.tensors, position=position, check_all=check_all, beside_view=beside_view)

    def _wait_for_write(self, segment: Segment) -> None:
        if (write := self._writer.get(segment.index)) is not None:
            # A host unit is about to change in place. A failure is raised by the traversal's end.
            wait([write])

    def validate_view(self, segment: Segment) -> None:
        """Note that a load's bytes were taken: the segment's view needs no second look."""
        self._invalidated.discard(segment.index)

    def invalidate_views(self) -> None:
        """Look for changes in the views of units on disk at the next load, because users may now write into them."""
        segments = self._locations.layout.segments
        self._invalidated = {segment.index for segment in segments if self._locations.is_on_disk(segment)}

    def write_back(self, segment: Segment, weights: torch.Tensor, *, position: int) -> Future:
        """Copy a slot to the segment's home, later, in the writer thread; `weights` must stay until the future is
        done."""
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        work = partial(self._write, segment, weights, position=position, ready=ready)
        return self._writer.write_back(segment, work)

    @traced("write back", lambda transfers, segment, *_, **__: segment.unit.name)
    def _write(
        self, segment: Segment, weights: torch.Tensor, release: Release, *, position: int, ready: torch.Event | None
    ) -> None:
        locations, unit, on_disk = self._locations, segment.unit, self._locations.is_on_disk(segment)
        if on_disk:
            pieces = self._staging.download(weights, ready)
            complete = locations.tiers.disk.write_pieces(segment, pieces, version=position)
        else:
            with self._staging.downloaded(weights, ready) as data:
                complete = locations.tier(unit).write(segment, data, version=position)
        release()  # the slot is free while the file is being synced
        make_home = locations.tier(unit).publish(unit) if complete else None
        with locations.lock:
            locations.ledger.draft(segment, position)
            if make_home is not None:
                make_home()
                locations.ledger.publish(unit)
                if on_disk:
                    locations.has_new_view(unit)
        locations.count(
            disk_written=segment.stored_bytes if on_disk else 0,
            d2h=segment.stored_bytes if self._device.type != "cpu" or not on_disk else 0,
        )

    def close(self) -> None:
        """Wait for copies out of pinned homes, and release staging memory."""
        self._staging.close()
