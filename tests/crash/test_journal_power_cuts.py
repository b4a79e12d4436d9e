"""The journal under power cuts: whatever survives, it opens to what was promised, and goes on from there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.crash_fs import CrashFS, CrashImage
from tests.support.durable import QuickFS
from zo2trl.errors import ZO2TRLError
from zo2trl.files.fs import FS, LOCAL
from zo2trl.journal.journal import GROWTH, RECORD_BYTES, Journal, MarkKind, UnitRecord
from zo2trl.zo.records import Record, SkipRecord, StepRecord

Operation = Callable[[Journal], None]
State = tuple[list[Record], list[tuple], list[list[tuple]]]
N_UNITS = 3
HEADER = {"method": "toy-1"}


def step(number: int, *, directions: int = 1, decay: float = 0.0) -> Operation:
    record = StepRecord(
        step=number, seed=number * 7, coefficients=tuple(float(number + d) for d in range(directions)),
        learning_rate=0.5, weight_decay=decay, zo_eps=1e-3, losses=(2.0, 1.0), scalars=(3.0,),
    )  # fmt: skip
    return lambda journal: journal.append(record)


def skip(number: int) -> Operation:
    record = SkipRecord(step=number, seed=number * 7, losses=(float("inf"), 1.0))
    return lambda journal: journal.append(record)


def publish(unit: int, *, is_base: bool = False) -> Operation:
    def work(journal: Journal) -> None:
        position = len(journal.records)
        journal.append_unit(
            UnitRecord(unit=unit, position=position, revision=0, n_bytes=4096, crc=position, is_base=is_base)
        )

    return work


def mark(kind: MarkKind, number: int) -> Operation:
    return lambda journal: journal.append_mark(kind, step=number)


def rewind(position: int) -> Operation:
    return lambda journal: journal.rewind(position)


# Groups of 1 to 6 records with and without settings, at every place in a sector; history that is taken back.
STORY: list[Operation] = [
    publish(0, is_base=True), publish(1, is_base=True),
    step(1), mark(MarkKind.STARTED, 1), step(2, decay=0.1), step(3, directions=7, decay=0.1), publish(0),
    skip(4), step(5, directions=24, decay=0.2), publish(1), mark(MarkKind.EVALUATED, 5), step(6, directions=2),
    mark(MarkKind.SAVED, 6), rewind(3), step(4, directions=12), publish(0), step(5, directions=12), step(6),
    publish(2), rewind(5), step(6, decay=0.3), skip(7), mark(MarkKind.SAVED, 7),
]  # fmt: skip


def state(journal: Journal) -> State:
    return list(journal.records), list(journal.marks), [list(journal.versions(unit)) for unit in range(N_UNITS)]


def play(fs: CrashFS, story: Sequence[Operation], *, sync_every: int = 1, journal: Journal | None = None) -> list:
    """Run a story; the states it went through. Notes say which is durable, and which are the last two it may be in."""
    path = fs.root / "journal"
    if journal is None:
        journal = Journal.create(path, header=HEADER, fs=fs, sync_every=sync_every)
    states, durable = [state(journal)], 0
    fs.note((0, 1))
    with journal:
        for number, operation in enumerate(story, start=1):
            before = len(journal.records)
            operation(journal)
            states.append(state(journal))
            is_step = len(journal.records) == before + 1
            # Steps are synced together; when a record begins another sector, those before it are synced earlier.
            durable = max(durable, number - (sync_every - 1)) if is_step else number
            fs.note((durable, number + 1))
    return states


def check(image: CrashImage, fs: CrashFS, folder: Path, states: list[State]) -> None:
    """The image opens to a state that is allowed, read-only and for writing, and takes further steps."""
    path = image.write_to(folder) / "journal"
    what = f"{image}:\n{fs.story(image.after)}"
    if not image.notes:
        if path.exists():
            with Journal.open(path, fs=QuickFS()) as journal:
                assert state(journal) == states[0], what
        return
    oldest, newest = image.notes[-1]
    with Journal.open(path, read_only=True) as journal:
        seen = state(journal)
    assert path.read_bytes() == image.files["journal"], f"looking changed something; {what}"
    assert seen in states[oldest : newest + 1], what
    with Journal.open(path, fs=QuickFS()) as journal:
        assert state(journal) == seen, what
        last = journal.records[-1].step if journal.records else 0
        step(last + 1, directions=9)(journal)
        expected = state(journal)
    with Journal.open(path, fs=QuickFS()) as journal:
        assert state(journal) == expected, what
        assert journal.repaired is None


def check_all(fs: CrashFS, folder: Path, states: list[State], **choice: int) -> tuple[int, int]:
    """Check every image; images made, and different ones among them."""
    n_images, seen = 0, set()
    for image in fs.images(**choice):
        n_images += 1
        key = (image.digest, image.notes[-1:])
        if key not in seen:
            seen.add(key)
            check(image, fs, folder, states)
    return n_images, len(seen)


@pytest.fixture
def fs(tmp_path: Path) -> CrashFS:
    (tmp_path / "disk").mkdir()
    return CrashFS(tmp_path / "disk")


def test_every_power_cut_leaves_the_history_before_or_after_the_operation(fs: CrashFS, tmp_path: Path) -> None:
    states = play(fs, STORY)
    n_images, n_different = check_all(fs, tmp_path / "image", states)
    assert n_images >= 500
    assert n_different >= 50


def test_synced_every_third_step_at_most_the_steps_since_the_last_sync_are_lost(fs: CrashFS, tmp_path: Path) -> None:
    story = [step(number, directions=1 + number % 9, decay=number // 4 / 10) for number in range(1, 25)]
    states = play(fs, [*story[:10], publish(0), *story[10:]], sync_every=3)
    check_all(fs, tmp_path / "image", states)


def test_a_journal_that_grows_loses_nothing(fs: CrashFS, tmp_path: Path) -> None:
    path = fs.root / "journal"
    with Journal.create(path, header=HEADER, sync_every=0) as journal:
        room = (GROWTH - path.read_bytes().find(b"\0" * RECORD_BYTES * 2)) // RECORD_BYTES
        for number in range(1, room - 4):
            step(number)(journal)
    grown = CrashFS(fs.root)
    story = [step(number, directions=7) for number in range(room, room + 6)]
    states = play(grown, story, journal=Journal.open(path, fs=grown))
    assert path.stat().st_size == 2 * GROWTH
    check_all(grown, tmp_path / "image", states, n_random=4)


def test_a_second_power_cut_during_the_recovery_from_the_first_is_no_worse(fs: CrashFS, tmp_path: Path) -> None:
    play(fs, STORY)
    n_repairs = 0
    for image in fs.images(n_random=2, seed=1):
        if not image.notes:
            continue
        again = CrashFS(image.write_to(tmp_path / "first"))
        with Journal.open(again.root / "journal", fs=again) as journal:
            if journal.repaired is None:
                continue
            seen, n_repairs = state(journal), n_repairs + 1
            again.note("open")
            step(90)(journal)
            after = state(journal)
        for second in again.images(n_random=4, seed=n_repairs):
            with Journal.open(second.write_to(tmp_path / "second") / "journal", fs=QuickFS()) as journal:
                assert state(journal) in (seen, after), f"{image}, then {second}:\n{again.story(second.after)}"
    assert n_repairs >= 5


class Forgetful(FS):
    """Says it synced."""

    def sync_data(self, fd: int) -> None:
        pass


class ForgetfulCrashFS(Forgetful, CrashFS):
    pass


def test_a_journal_whose_syncs_do_nothing_is_caught(tmp_path: Path) -> None:
    fs = ForgetfulCrashFS(tmp_path)
    states = play(fs, STORY)
    with pytest.raises((AssertionError, ZO2TRLError)):
        check_all(fs, tmp_path / "image", states)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_many_more_power_cuts(fs: CrashFS, tmp_path: Path, seed: int) -> None:
    states = play(fs, STORY, sync_every=1 + seed % 3)
    check_all(fs, tmp_path / "image", states, n_random=60, seed=seed)


def test_the_local_disk_tells_the_same_story(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal", header=HEADER, fs=LOCAL) as journal:
        for operation in STORY:
            operation(journal)
        expected = state(journal)
    with Journal.open(tmp_path / "journal") as journal:
        assert state(journal) == expected
