"""The battery bites: ten ways to get our own protocol slightly wrong, each of which it must notice.

A mutant is our code with one thing broken. It is caught if a small part of the battery fails on it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.crash.test_power_cuts import HISTORY, Trial
from tests.faults.test_weights_damage import UNIT, assert_refused, flip, saved
from tests.support.durable import Action, QuickFS, Setup, steps
from tests.support.processes import single_threaded
from zo2trl.errors import ZO2TRLError
from zo2trl.journal import journal as journal_module
from zo2trl.journal.journal import Journal
from zo2trl.tiers import catch_up as catching_up
from zo2trl.tiers import ledger, store, unit_files
from zo2trl.tiers.unit_files import UnitFiles

Patch = pytest.MonkeyPatch
SETUP = Setup(write_back=1, snapshot=2)
SHORT = [*steps(1, 4), Action("flush"), Action("reopen"), *steps(5, 6)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


# -- what has to notice


def power_cuts(tmp_path: Path, actions: list[Action] = SHORT) -> None:
    Trial(SETUP, actions, tmp_path).check_all(n_random=1)


def flipped_bit(tmp_path: Path) -> None:
    files, record = saved(tmp_path, UNIT, fs=QuickFS())
    path = files.path(UNIT, record)
    data = bytearray(path.read_bytes())
    damaged = flip(data, [77])
    path.write_bytes(data)
    assert_refused(files, record, damaged=damaged, trial="bit 77")


def wrong_length(tmp_path: Path) -> None:
    files, record = saved(tmp_path, UNIT, fs=QuickFS())
    path = files.path(UNIT, record)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ZO2TRLError, match="bytes instead of"):
        files.check(UNIT, record)


# -- mutants


class _NoSync:
    """A file system that syncs everything but what it is told not to."""

    def __init__(self, fs: object, missing: str) -> None:
        self._fs, self._missing = fs, missing

    def __getattr__(self, name: str) -> object:
        return (lambda *arguments: None) if name == self._missing else getattr(self._fs, name)


def without(owner: type, missing: str, patch: Patch) -> None:
    """`owner` never calls one of the syncs."""
    original = owner.__init__

    def init(self, *arguments, **named) -> None:
        original(self, *arguments, **named)
        self._fs = _NoSync(self._fs, missing)

    patch.setattr(owner, "__init__", init)


def unit_record_before_its_data(patch: Patch) -> None:
    def publish(self: UnitFiles, draft, *, is_base=False):
        crcs = [draft.crcs[spec.tensor_id] for spec in draft.unit.tensors]
        record = unit_files.UnitRecord(
            unit=draft.unit.index, position=draft.position, revision=draft.revision, n_bytes=draft.unit.n_bytes,
            crc=unit_files.table_crc(crcs), is_base=is_base,
        )  # fmt: skip
        self._commit(record)
        self._seal(draft, is_base=is_base)
        self._fs.sync_folder(self.folder)
        self._replace(draft.unit, record)
        return record

    patch.setattr(UnitFiles, "publish", publish)


def old_version_removed_before_the_new_one_counts(patch: Patch) -> None:
    original = UnitFiles.publish

    def publish(self: UnitFiles, draft, *, is_base=False):
        for old in self.versions(draft.unit):
            if not old.is_base:
                self._fs.unlink(self.path(draft.unit, old))
        return original(self, draft, is_base=is_base)

    patch.setattr(UnitFiles, "publish", publish)


def checksums_of_weights_not_looked_at(patch: Patch) -> None:
    patch.setattr(unit_files, "_compare", lambda *arguments, **named: None)


def replay_from_the_step_before(patch: Patch) -> None:
    original = ledger.Ledger.place
    patch.setattr(
        ledger.Ledger, "place", lambda self, segments, position: original(self, segments, max(position - 1, 0))
    )


def replay_applied_twice(patch: Patch) -> None:
    original = catching_up.catch_up

    def catch_up(weights, segment, records, *, position, method, **probes) -> bool:
        if position < len(records):
            original(weights, segment, records, position=position, method=method)
            position = len(records) - 1
        return original(weights, segment, records, position=position, method=method, **probes)

    patch.setattr(store, "catch_up", catch_up)


def a_record_skipped(patch: Patch) -> None:
    original = catching_up.catch_up

    def catch_up(weights, segment, records, *, position, method, **probes) -> bool:
        return original(
            weights,
            segment,
            records,
            position=min(position + (len(records) > 3), len(records)),
            method=method,
            **probes,
        )

    patch.setattr(store, "catch_up", catch_up)


def length_of_a_file_trusted(patch: Patch) -> None:
    def open_any(self: UnitFiles, unit, record) -> int:
        return self._fs.open(self.path(unit, record))

    patch.setattr(UnitFiles, "open", open_any)


def a_change_of_weights_that_is_not_all_or_nothing(patch: Patch) -> None:
    def publish_together(self: UnitFiles, drafts):
        return [self.publish(draft, is_base=True) for draft in drafts]

    patch.setattr(UnitFiles, "publish_together", publish_together)
    append = Journal.append_unit

    def append_unit(self: Journal, record) -> None:
        append(self, record)
        if record.is_base:
            self.append_mark(journal_module.MarkKind.CHANGED, step=0)

    patch.setattr(Journal, "append_unit", append_unit)


MUTANTS: dict[str, tuple[Callable[[Patch], None], Callable[[Path], None]]] = {
    "data not synced": (partial(without, UnitFiles, "sync_data"), power_cuts),
    "folder not synced": (partial(without, UnitFiles, "sync_folder"), power_cuts),
    "journal not synced": (partial(without, Journal, "sync_data"), power_cuts),
    "published before its data": (unit_record_before_its_data, power_cuts),
    "old version removed too early": (old_version_removed_before_the_new_one_counts, power_cuts),
    "checksums not looked at": (checksums_of_weights_not_looked_at, flipped_bit),
    "replayed from the wrong step": (replay_from_the_step_before, power_cuts),
    "a record applied twice": (replay_applied_twice, power_cuts),
    "a record skipped": (a_record_skipped, power_cuts),
    "length of a file trusted": (length_of_a_file_trusted, wrong_length),
    "weights changed unit by unit": (
        a_change_of_weights_that_is_not_all_or_nothing, partial(power_cuts, actions=HISTORY[:9]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mutate, look = MUTANTS[name]
    with monkeypatch.context() as patch:
        mutate(patch)
        with pytest.raises((AssertionError, ZO2TRLError, pytest.fail.Exception)):
            look(tmp_path)


@pytest.mark.parametrize(
    "look",
    [
        partial(power_cuts, actions=HISTORY[:3]),
        *(
            pytest.param(look, marks=pytest.mark.nightly)
            for look in (power_cuts, partial(power_cuts, actions=HISTORY[:9]))
        ),
        flipped_bit,
        wrong_length,
    ],
)
def test_our_own_code_is_not(tmp_path: Path, look: Callable[[Path], None]) -> None:
    look(tmp_path)


def test_there_are_ten() -> None:
    assert len(MUTANTS) >= 10
