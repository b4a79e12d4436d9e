"""This module rebuilds the weights of a store after any number of steps, unit by unit and without the model.

Does not: change the store, lock it, or write anything but scratch files. A training may go on meanwhile.

A unit's bytes at a position are its newest version before it, or an older one back to a base version (weights that no
record leads to), or the base weights, plus the records from there on. The first sound one of these is the start.

Invariant: all bytes were compared with a checksum when they were read, and everything after that is arithmetic.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from zo2trl.checkpoints.stored_run import StoredRun, method_to_repeat
from zo2trl.errors import StoreCorrupt, StoreError, StoreForeign, ZO2TRLError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.journal import UnitRecord
from zo2trl.layout.layout import TensorSpec, Unit
from zo2trl.layout.layout_file import whole_segment
from zo2trl.tiers.tier import encoded, host_bytes, put_tensor, tensor_view
from zo2trl.tiers.unit_files import padded_crc, table_crc, tensor_crcs
from zo2trl.zo.method import Method
from zo2trl.zo.records import Record, StepRecord

__all__ = ["BaseSource", "Progress", "Rebuild"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""It is called with a name, the number of bytes done and their total."""

_READ_ATTEMPTS = 10  # attempts, while a training publishes versions
_PAUSE_S = 0.1
_RECORDS_PER_REPLAY = 64


_Place = np.ndarray | Path | None
"""A unit's bytes at the position are in a version's map, in a scratch file, or (None) in the base weights."""


class BaseSource(Protocol):
    """A BaseSource looks up the weights that a run began with."""

    where: str
    """This is its folder or hub id, for messages."""

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor's values in any dtype; raise a `ZO2TRLError` if there are none."""
        ...


class Rebuild:
    """A Rebuild makes a run's weights at one position.

    Args:
        run: the run in the store.
        position: the number of records that the weights have absorbed.
        base: the weights at position 0, where the store does not hold them.
        device: the device that replays records.
        scratch: a folder for units that no file holds at this position.
        progress: a function that is called with the bytes done.
    """

    def __init__(
        self,
        run: StoredRun,
        position: int,
        *,
        base: BaseSource,
        device: torch.device,
        scratch: Path,
        progress: Progress = lambda what, done, total: None,
        fs: FS = LOCAL,
    ) -> None:
        self._run, self._position, self._base, self._device = run, position, base, device
        self._scratch, self._progress, self._fs = scratch, progress, fs
        self._mapped: dict[int, tuple[UnitRecord, np.ndarray]] = {}
        self._method: Method | None = None
        self._done = self._total = self._largest = 0
        self._buffer: torch.Tensor | None = None

    def hold(self, units: Sequence[Unit]) -> int:
        """Map each unit's start before anything is read, because a training that goes on removes versions.

        Returns how many bytes `tensors` will write to scratch files for these units.
        """
        for _ in range(_READ_ATTEMPTS):
            known = {unit.index: self._run.files.versions(unit) for unit in units}
            missing = [unit for unit in units if not self._map_start(unit)]
            if not missing:
                break
            time.sleep(_PAUSE_S)
            self._run.look_again()
            if all(self._run.files.versions(unit) == known[unit.index] for unit in missing):
                break  # no training removed them just now: they are lost, and an older start must do
        self._total = sum(self._work_bytes(unit) for unit in units)
        replayed = [unit.stored_bytes for unit in units if self._is_replayed(unit)]
        self._largest = max(replayed, default=0)
        return sum(replayed)

    def tensors(self, units: Sequence[Unit]) -> dict[str, torch.Tensor]:
        """Return the units' tensors by name, each with a storage of its own, mapped from files.

        Raises:
            StoreCorrupt: no sound start leads to the position; the message is about the first that was tried.
        """
        # All work comes before the objects that stay: between its allocations they would leave holes in memory.
        places = [self._rebuild(unit) for unit in units]
        tensors: dict[str, torch.Tensor] = {}
        for unit, place in zip(units, places, strict=True):
            if place is None:
                tensors |= {spec.name: self._base.tensor(spec).detach() for spec in unit.tensors}
                continue
            buffer = torch.from_numpy(self._fs.map(place) if isinstance(place, Path) else place)
            tensors |= {spec.name: tensor_view(buffer, spec) for spec in unit.tensors}
        return tensors

    def _rebuild(self, unit: Unit) -> _Place:
        """Rebuild a unit from the first sound start and return where its bytes are."""
        problems: list[ZO2TRLError] = []
        for start in self._starts(unit):
            try:
                place = self._rebuild_from(unit, start)
            except ZO2TRLError as problem:
                problems.append(problem)
                continue
            for problem in problems:
                logger.warning("%s. Its weights were rebuilt from what is older instead.", str(problem).split(". ")[0])
            return place
        if problems:
            raise problems[0]
        raise StoreForeign(
            f"{self._run.path} holds no weights of unit {unit.name} up to there, and no base weights lead there."
        )

    # -- where to start

    def _usable(self, unit: Unit) -> list[UnitRecord]:
        """Return versions at or before the position, oldest first; a rewound run did not publish them in order."""
        usable = [record for record in self._run.files.versions(unit) if record.position <= self._position]
        return sorted(usable, key=lambda record: record.position)

    def _starts(self, unit: Unit) -> Iterator[UnitRecord | None]:
        """Yield versions from the newest to the newest base version, then the base (None) if that has its weights."""
        usable = self._usable(unit)
        while usable:
            yield usable[-1]
            if usable.pop().is_base:
                break
        else:
            yield None
            return
        base_version = next(record for record in reversed(self._usable(unit)) if record.is_base)
        base_crcs = [self._run.stored.base_crcs[spec.tensor_id] for spec in unit.tensors]
        if base_version.position == 0 and base_version.crc == table_crc(base_crcs):
            yield None

    def _map_start(self, unit: Unit) -> bool:
        usable, files = self._usable(unit), self._run.files
        held = self._mapped.get(unit.index)
        if not usable or (held is not None and held[0] == usable[-1]):
            return True
        try:
            self._fs.close(files.open(unit, usable[-1]))  # it refuses a file of another length
            self._mapped[unit.index] = usable[-1], files.map(unit, usable[-1])
        except StoreError:
            return False
        return True

    def _pending(self, unit: Unit, start: UnitRecord | None) -> list[Record]:
        if not unit.is_trained:
            return []
        records = self._run.records[start.position if start else 0 : self._position]
        return [record for record in records if isinstance(record, StepRecord)]

    def _is_replayed(self, unit: Unit) -> bool:
        return bool(self._pending(unit, next(self._starts(unit))))

    def _work_bytes(self, unit: Unit) -> int:
        return unit.stored_bytes * (1 + len(self._pending(unit, next(self._starts(unit)))))

    # -- replay

    def _rebuild_from(self, unit: Unit, start: UnitRecord | None) -> _Place:
        pending = self._pending(unit, start)
        if start is None:
            values = {spec: self._from_base(spec) for spec in unit.tensors}
            is_cast = any(value.data_ptr() != self._base.tensor(spec).data_ptr() for spec, value in values.items())
            if not (pending or is_cast):
                self._advance(unit, unit.stored_bytes)
                return None
            data = self._unit_buffer(unit).zero_()
            for spec, value in values.items():
                put_tensor(data, spec, value)
        else:
            found = self._checked(unit, start)
            if not pending:
                self._advance(unit, unit.stored_bytes)
                return found
            data = self._unit_buffer(unit).copy_(torch.from_numpy(found))
        self._advance(unit, unit.stored_bytes)
        self._replay(unit, data, pending)
        return self._to_scratch(unit, data)

    def _unit_buffer(self, unit: Unit) -> torch.Tensor:
        """Return memory for one unit, the same for all: freed blocks of many sizes never return to the system."""
        if self._buffer is None or len(self._buffer) < unit.stored_bytes:
            self._buffer = None
            largest = max(unit.stored_bytes, self._largest)
            self._buffer = torch.empty(largest, dtype=torch.uint8, device=self._device)
        return self._buffer[: unit.stored_bytes]

    def _checked(self, unit: Unit, record: UnitRecord) -> np.ndarray:
        files = self._run.files
        held = self._mapped.get(unit.index)
        if held is not None and held[0] == record:
            data = held[1]
        else:
            self._fs.close(files.open(unit, record))
            data = files.map(unit, record)
        if table_crc(tensor_crcs(unit, data.data)) != record.crc:
            files.check(unit, record)  # it names the damaged parameter
            raise StoreCorrupt(
                f"{files.path(unit, record)}, unit {unit.name}: its bytes changed while they were read. Nothing was "
                "changed. Try again."
            )
        return data

    def _from_base(self, spec: TensorSpec) -> torch.Tensor:
        value = self._base.tensor(spec).detach().to(spec.dtype).contiguous()
        expected = self._run.stored.base_crcs[spec.tensor_id]
        found = padded_crc(spec, host_bytes(encoded(spec, value))) if tuple(value.shape) == spec.shape else None
        if found != expected:
            raise StoreForeign(
                f"{spec.name} in {self._base.where} is not what {self._run.path} began with: "
                + (f"CRC {found:08x}, then {expected:08x}. " if found is not None else "it has another shape. ")
                + "Name the folder with the base model as it was then, with `--base`."
            )
        return value

    def _replay(self, unit: Unit, data: torch.Tensor, records: Sequence[Record]) -> None:
        self._method = self._method or method_to_repeat(self._run, self._device)
        spans = whole_segment(unit).spans
        for first in range(0, len(records), _RECORDS_PER_REPLAY):
            some = records[first : first + _RECORDS_PER_REPLAY]
            self._method.replay(data, spans, some)
            self._advance(unit, unit.stored_bytes * len(some))

    def _to_scratch(self, unit: Unit, data: torch.Tensor) -> Path:
        path = self._scratch / f"unit-{unit.index}"
        fd = self._fs.create(path, unit.stored_bytes)
        try:
            self._fs.write_at(fd, host_bytes(data), 0)
        finally:
            self._fs.close(fd)
        return path

    def _advance(self, unit: Unit, n_bytes: int) -> None:
        self._done = min(self._done + n_bytes, self._total)
        self._progress(unit.name, self._done, self._total)
