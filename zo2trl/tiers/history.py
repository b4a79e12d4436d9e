"""History: the records that a store's weights have to absorb, and weights that no record of it leads to.

Usually these are the journal's own records. After going back to an earlier step they are the first part of them, until
another step is made, or weights are replaced: then the later ones are forgotten.

Does not: lend weights, or append records.
Invariant: while this changes weights, an error leaves them marked as inconsistent instead of at a wrong position.
"""

from collections.abc import Iterable

import torch

from zo2trl.journal.journal import Journal
from zo2trl.journal.logbook import Logbook
from zo2trl.layout.layout import Unit
from zo2trl.tiers.catch_up import catch_up_unit
from zo2trl.tiers.residency import Residency
from zo2trl.tiers.tier import Source
from zo2trl.zo.method import Method
from zo2trl.zo.records import Record

__all__ = ["History"]


class History:
    """Records of one store, and its ways to leave them.

    Args:
        residency: the homes of all units.
        journal, logbook: where the run is written down.
        method: how a record changes weights.
        device: where records are replayed.
    """

    records: list[Record]
    """What leases catch up with: the journal's own list, or the part of it that leads to an earlier step."""

    def __init__(
        self, residency: Residency, *, journal: Journal, logbook: Logbook, method: Method, device: torch.device
    ) -> None:
        self._residency, self._journal, self._logbook = residency, journal, logbook
        self._method, self._device = method, device
        self.records = journal.records

    def replace(self, contents: Iterable[tuple[Unit, torch.Tensor]]) -> None:
        """Give units bytes that no record leads to, durably, as base versions that later records start from."""
        self._residency.settle()
        self.forget_later()
        self._residency.snapshots.replace(contents, position=len(self.records))

    def forget_later(self) -> None:
        """Remove the records behind the step that was gone back to: the run goes on from there."""
        if self.records is self._journal.records:
            return
        position = len(self.records)
        self._logbook.rewind(position)
        self._journal.rewind(position)
        self._residency.files.forget_after(position)
        self.records = self._journal.records

    def go_back(self, position: int, *, base: Source) -> None:
        """Rebuild the weights after `position` records. `base` gives those at position 0 of units without a version
        that is early enough."""
        assert 0 <= position <= len(self.records)
        self._residency.settle()
        try:
            self.records = self.records[:position]
            for unit in self._residency.layout.units:
                self._set_back(unit, position, base=base)
        except BaseException as error:
            reason = f"weights of an earlier step were being rebuilt ({error})"
            self._residency.locations.inconsistent_reason = reason
            raise

    def _set_back(self, unit: Unit, position: int, *, base: Source) -> None:
        locations, snapshots = self._residency.locations, self._residency.snapshots
        segments = [segment for segment in locations.segments_of([unit]) if segment.is_trainable]
        if max(map(locations.position, segments), default=0) > position:
            weights, start = snapshots.earlier(unit, position, base=base)
            weights = weights.to(self._device)
            catch_up_unit(weights, segments, self.records, position=start, method=self._method)
            snapshots.set_back(unit, weights.cpu(), position=position)
