"""What a journal's records, units and marks amount to: the same in memory, after reopening, and from any thread."""

import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.journals import exact, header_bytes, skip, step, unit, written
from zo2trl.journal.journal import RECORD_BYTES, Journal, MarkKind, MarkRecord, UnitRecord
from zo2trl.zo.records import Record

UNITS = range(3)


class Action(NamedTuple):
    """One thing done to a journal. `number` is reduced to what makes sense at that moment."""

    kind: str
    number: int = 0
    unit: int = 0


@dataclass
class Model:
    """The history as its definition says it: nothing is kept but what was done, and everything is worked out anew."""

    records: list[Record] = field(default_factory=list)
    marks: list[MarkRecord] = field(default_factory=list)
    units: list[UnitRecord] = field(default_factory=list)  # that count, in order
    waiting: list[UnitRecord] = field(default_factory=list)
    next_revision: int = 0

    def versions(self, index: int) -> list[UnitRecord]:
        mine = [record for record in self.units if record.unit == index]
        return [record for i, record in enumerate(mine) if record.is_base or i == len(mine) - 1]

    def rewind(self, position: int) -> None:
        # What was replaced is gone from the disk, so only the versions that are there can stay.
        there = {record for index in UNITS for record in self.versions(index)}
        self.units = [record for record in self.units if record in there and record.position <= position]
        self.waiting = [record for record in self.waiting if record.position <= position]
        self.records = self.records[:position]
        self.marks = [mark for mark in self.marks if mark.position <= position]
        last = self.records[-1].step if self.records else 0
        self.marks.append(MarkRecord(MarkKind.REWOUND, last, position))


def do(action: Action, journal: Journal, model: Model) -> None:
    """The same to both."""
    n_records = len(model.records)
    position = action.number % (n_records + 1)
    last = model.records[-1].step if model.records else 0
    if action.kind in ("step", "skip"):
        n_directions, decay = 1 + action.number % 12, action.number % 3 / 10
        number = last + 1 + action.number % 2
        new = skip(number) if action.kind == "skip" else step(number, *[0.25] * n_directions, weight_decay=decay)
        journal.append(new)
        model.records.append(new)
    elif action.kind in ("unit", "origin"):
        is_base = action.kind == "origin"
        record = unit(action.unit, n_records if is_base else position, model.next_revision, is_base=is_base)
        model.next_revision += 1
        journal.append_unit(record)
        (model.waiting if is_base else model.units).append(record)
    elif action.kind == "mark":
        kind = (MarkKind.STARTED, MarkKind.EVALUATED, MarkKind.SAVED, MarkKind.CHANGED)[action.number % 4]
        journal.append_mark(kind, step=last)
        model.marks.append(MarkRecord(kind, last, n_records))
        if kind == MarkKind.CHANGED:
            model.units += model.waiting
            model.waiting = []
    else:
        journal.rewind(position)
        model.rewind(position)


def check(journal: Journal, model: Model) -> None:
    assert exact(journal.records) == exact(model.records)
    assert journal.marks == model.marks
    assert [journal.versions(index) for index in UNITS] == [model.versions(index) for index in UNITS]


KINDS = ["step"] * 6 + ["unit"] * 4 + ["skip", "origin", "origin", "mark", "mark", "rewind", "reopen"]
ACTIONS = st.builds(Action, st.sampled_from(KINDS), st.integers(0, 50), st.sampled_from(UNITS))


@settings(deadline=None, max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_a_reopened_journal_has_the_history_that_was_made(actions: list[Action]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, model = Path(folder) / "journal", Model()
        model.units = [unit(index, 0, 200, is_base=True) for index in UNITS[1:]]
        journal = Journal.create(path, header={}, units=model.units, sync_every=0)
        for action in [*actions, Action("reopen")]:
            if action.kind == "reopen":
                prints = [journal.fingerprint(n) for n in range(len(model.records) + 1)]
                journal.close()
                model.waiting = []  # a change that was not finished never will be
                with Journal.open(path, read_only=True) as reader:
                    check(reader, model)
                    assert [reader.fingerprint(n) for n in range(len(model.records) + 1)] == prints
                journal = Journal.open(path, sync_every=0)
            else:
                do(action, journal, model)
            check(journal, model)
        journal.close()


def test_a_change_from_outside_counts_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    base = [unit(index, 0, is_base=True) for index in UNITS]
    changed = [unit(index, 2, is_base=True) for index in UNITS]
    with Journal.create(path, header={}, units=base, sync_every=0) as journal:
        journal.append(step(1))
        journal.append_unit(unit(0, 1))
        journal.append(step(2))
        for record in changed:
            journal.append_unit(record)
            assert journal.versions(0) == [base[0], unit(0, 1)], "the file it replaces must stay until then"
            assert journal.versions(1) == [base[1]]
        journal.append_mark(MarkKind.CHANGED, step=2)
        assert [journal.versions(index) for index in UNITS] == [
            [old, new] for old, new in zip(base, changed, strict=True)
        ]


def test_a_change_that_a_crash_interrupted_is_not_finished_by_a_later_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal.create(path, header={}, units=[unit(0, 0, is_base=True)], sync_every=0) as journal:
        journal.append_unit(unit(0, 0, 1, is_base=True))
    with Journal.open(path, sync_every=0) as journal:
        assert journal.versions(0) == [unit(0, 0, is_base=True)]
        journal.append_unit(unit(1, 0, is_base=True))
        journal.append_mark(MarkKind.CHANGED, step=0)
    with Journal.open(path, sync_every=0) as journal:
        assert journal.versions(0) == [unit(0, 0, is_base=True)]
        assert journal.versions(1) == [unit(1, 0, is_base=True)]


def test_a_file_published_again_under_its_name_counts_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    again = unit(0, 0, is_base=True)._replace(crc=1)
    with Journal.create(path, header={}, units=[unit(0, 0, is_base=True)], sync_every=0) as journal:
        journal.append_unit(again)
        journal.append_mark(MarkKind.CHANGED, step=0)
        assert journal.versions(0) == [again]


def test_rewinding_does_not_bring_back_a_version_that_was_replaced(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal", header={}, sync_every=0) as journal:
        for number in range(1, 5):
            journal.append(step(number))
            journal.append_unit(unit(0, number))
        journal.append_unit(unit(1, 2))
        journal.rewind(2)
        assert journal.records == [step(1), step(2)]
        assert journal.versions(0) == [], "the file of position 2 was removed when that of position 3 was published"
        assert journal.versions(1) == [unit(1, 2)]
        journal.append(step(3, 2.0))
        assert journal.records[2] == step(3, 2.0)


def test_what_lies_in_the_future_or_is_no_mark_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1))
    raw = path.read_bytes()
    with Journal.open(path, sync_every=0) as journal:
        for refused in (
            lambda: journal.append_unit(unit(0, 2)),
            lambda: journal.append_unit(unit(0, -1)),
            lambda: journal.rewind(2),
            lambda: journal.fingerprint(2),
            lambda: journal.append_mark(MarkKind.REWOUND, step=1),
        ):
            with pytest.raises(ValueError):
                refused()
        assert path.read_bytes() == raw
    with pytest.raises(ValueError, match="position 0 only"):
        Journal.create(tmp_path / "other", header={}, units=[unit(0, 1)])


def test_a_fingerprint_names_one_history_and_no_other(tmp_path: Path) -> None:
    """Also when the last steps alone would not tell: ten skips in a row look the same in every run."""
    changes: list[dict[str, Any]] = [{name: 0.75} for name in ("learning_rate", "weight_decay", "zo_eps")]
    changes += [{"losses": (0.75, 3.0)}, {"losses": (2.5, 0.75)}, {"scalars": (0.75,)}, {"scalars": ()}]
    firsts = [step(1), step(2), step(1, 0.5, 0.5), step(1, -0.5), *(step(1, **change) for change in changes)]
    histories = [[], *([first] for first in firsts), *([first, *map(skip, range(3, 13))] for first in firsts)]
    histories += [[step(1), step(2)], [*map(skip, range(3, 13))]]
    names = set()
    for number, history in enumerate(histories):
        path = written(tmp_path / f"journal{number}", *history, header={"number": number})
        with Journal.open(path, read_only=True) as journal:
            names.add(journal.fingerprint(len(history)))
    assert len(names) == len(histories)


def test_a_fingerprint_is_that_of_the_steps_alone(tmp_path: Path) -> None:
    """A resumed run, or another process of the same one, published other units at other times."""
    path = written(tmp_path / "straight", *map(step, range(1, 9)), header={"store": "a"})
    with (
        Journal.open(path, sync_every=0) as straight,
        Journal.create(tmp_path / "resumed", header={"store": "b"}, sync_every=0) as resumed,
    ):
        for number in range(1, 6):
            resumed.append(step(number, weight_decay=float(number == 5)))
            resumed.append_unit(unit(0, number))
        resumed.rewind(4)
        for number in range(5, 9):
            resumed.append_mark(MarkKind.STARTED, step=number)
            resumed.append(step(number))
        for position in range(9):
            assert straight.fingerprint(position) == resumed.fingerprint(position)


def test_a_writer_thread_may_publish_units_while_steps_are_appended(tmp_path: Path) -> None:
    path, n_steps = tmp_path / "journal", 400
    with Journal.create(path, header={}, sync_every=0) as journal:

        def publish() -> None:
            for _ in range(n_steps):
                journal.append_unit(unit(1, len(journal.records)))
                assert journal.versions(1)

        writers = [threading.Thread(target=publish) for _ in range(3)]
        for writer in writers:
            writer.start()
        for number in range(n_steps):
            journal.append(step(number, 1.0, 2.0, weight_decay=number % 2))
        for writer in writers:
            writer.join()
        newest = journal.versions(1)
    with Journal.open(path, read_only=True) as journal:
        assert [record.step for record in journal.records] == list(range(n_steps))
        assert journal.versions(1) == newest


def test_a_step_with_one_direction_costs_64_bytes(tmp_path: Path) -> None:
    """The promise is 100; the time that appending and opening take is measured by benchmarks/journal.py."""
    path = written(tmp_path / "journal", *map(step, range(1000)))
    used = len(path.read_bytes().rstrip(b"\0"))
    assert header_bytes(path) + 1000 * RECORD_BYTES < used <= header_bytes(path) + 1001 * RECORD_BYTES


def test_a_change_on_top_of_steps_that_are_taken_back_never_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", step(1), step(2))
    with Journal.open(path, sync_every=0) as journal:
        journal.append_unit(unit(0, 2, is_base=True))
        journal.append_unit(unit(1, 1, is_base=True))
        journal.rewind(1)
        journal.append_mark(MarkKind.CHANGED, step=1)
        assert (journal.versions(0), journal.versions(1)) == ([], [unit(1, 1, is_base=True)])
    with Journal.open(path, sync_every=0) as journal:
        assert (journal.versions(0), journal.versions(1)) == ([], [unit(1, 1, is_base=True)])
