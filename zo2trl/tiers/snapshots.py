"""Snapshots: versions of units on disk that are not written by streaming, and weights that come from outside a run.

Units in the disk tier are durable by themselves: their home is the newest version. Units in memory get a version
whenever the store asks for a snapshot, so that a restart replays a bounded number of steps. Weights that no record
leads to (written by a user, loaded as a state dict, or rebuilt for an earlier step) become versions at once.

Does not: decide when a snapshot is due, or replay records.
Invariant: units that get weights from outside together are all changed, or none is, also after a crash.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from zo2trl.errors import StoreError
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import Unit
from zo2trl.tiers.locations import Locations
from zo2trl.tiers.tier import Source, copy_pieces, gathered, host_bytes, stored_part
from zo2trl.tiers.unit_files import Draft, UnitFiles
from zo2trl.tiers.writer import Writer

__all__ = ["Snapshots"]


class Snapshots:
    """Writes and reads versions of units.

    Args:
        locations: where the units live.
        files: versions on disk.
        writer: the thread that writes files.
    """

    def __init__(self, locations: Locations, files: UnitFiles, writer: Writer) -> None:
        self._locations, self._files, self._writer = locations, files, writer

    def request(self, unit: Unit) -> None:
        """Write a unit that lives in memory to a new version, later, unless it has that version already."""
        locations = self._locations
        if locations.tier_of(unit) == "cpu":  # changed by the writer thread only, so it is read there
            self._writer.later(self._save_host_unit, unit)
            return
        position = locations.position_of(unit)
        if position is not None and self._is_newer(unit, position):
            copied = locations.view(unit)[0].to("cpu", copy=True)
            self._writer.later(self.save, unit, copied, position=position)

    def save(self, unit: Unit, data: torch.Tensor, *, position: int, is_base: bool = False) -> UnitRecord:
        """Write a unit's bytes to a new version, now."""
        record = self._files.publish(self._draft(unit, data, position=position), is_base=is_base)
        self._locations.count(disk_written=unit.stored_bytes)
        return record

    def version_of(self, unit: Unit, position: int) -> UnitRecord:
        """A version that holds what a unit in memory holds: the newest, or one that is written now."""
        newest = self._files.newest(unit)
        if newest is not None and (newest.position == position or not unit.is_trained):
            return newest
        return self.save(unit, self._locations.view(unit)[0], position=position)

    def replace(self, contents: Iterable[tuple[Unit, torch.Tensor]], *, position: int) -> None:
        """Give units bytes (flat uint8, their own views included) that no record leads to: all of them, or none."""
        locations, drafts = self._locations, list[Draft]()
        try:
            for unit, data in contents:
                locations.tier(unit).abandon(unit)
                drafts.append(self._draft(unit, data, position=position))
            records = self._files.publish_together(drafts)
            for record in records:
                unit = locations.layout.units[record.unit]
                if locations.tier_of(unit) != "disk":
                    copy_pieces(self._files.read_checked(unit, record), locations.view(unit)[0])
            self._open(records)
        except BaseException as error:
            locations.inconsistent_reason = f"weights from outside were being taken over ({error})"
            for draft in drafts:
                with suppress(StoreError):
                    self._files.discard(draft)
            raise

    def replace_by_view(self, unit: Unit, *, position: int) -> None:
        """`replace` with what is in a unit's view, beside write-backs of other units."""
        self._writer.now(self.replace, [(unit, self._locations.view(unit)[0])], position=position)

    def set_back(self, unit: Unit, data: torch.Tensor, *, position: int) -> None:
        """Give one unit the bytes that an earlier part of the journal leads to."""
        locations, newest = self._locations, self._files.newest(unit)
        locations.tier(unit).abandon(unit)
        on_disk = locations.tier_of(unit) == "disk"
        if not on_disk:
            locations.view(unit)[0].copy_(data)
            with locations.lock:
                locations.ledger.place(locations.segments_of([unit]), position)
        if on_disk or (newest is not None and newest.position > position):
            self._open([self._files.publish(self._draft(unit, data, position=position))])

    def earlier(self, unit: Unit, position: int, *, base: Source) -> tuple[torch.Tensor, int]:
        """A unit's bytes at or before a position, in main memory, and where they are: a version, or the base."""
        record = self._files.start_for(unit, position)
        if record is None:
            return gathered(unit, base), 0
        data = torch.zeros(unit.stored_bytes, dtype=torch.uint8)
        copy_pieces(self._files.read_checked(unit, record), data)
        return data, record.position

    def _open(self, records: Sequence[UnitRecord]) -> None:
        """Make published versions the homes of units on disk, and note the positions of all."""
        locations = self._locations
        for record in records:
            unit = locations.layout.units[record.unit]
            with locations.lock:
                if locations.tier_of(unit) == "disk":
                    locations.tiers.disk.open_version(unit, record)
                    locations.has_new_view(unit)
                locations.ledger.place(locations.segments_of([unit]), record.position)
            locations.count(disk_written=unit.stored_bytes)

    def _save_host_unit(self, unit: Unit) -> None:
        position = self._locations.position_of(unit)
        if position is not None and self._is_newer(unit, position):
            self.save(unit, self._locations.view(unit)[0], position=position)

    def _draft(self, unit: Unit, data: torch.Tensor, *, position: int) -> Draft:
        return self._files.draft(unit, lambda spec: host_bytes(stored_part(data, spec)), position=position)

    def _is_newer(self, unit: Unit, position: int) -> bool:
        newest = self._files.newest(unit)
        return position > (newest.position if newest else 0)
