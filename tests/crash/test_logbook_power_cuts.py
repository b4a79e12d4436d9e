"""The logbook under power cuts: what was synced is there, nothing else than what was put, and lost lines stay lost."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_fs import CrashFS
from tests.support.durable import QuickFS
from zo2trl.journal.logbook import Logbook

Entries = dict[int, Any]
LAST = 40


def entries(book: Logbook) -> Entries:
    """Position -> value."""
    found = {position: book.get("step", position) for position in range(LAST + 50)}
    return {position: value for position, value in found.items() if value is not None}


def value_at(position: int) -> dict[str, Any]:
    """A metric of some length, so that lines lie across sectors."""
    return {"loss": position / 7, "text": "x" * (position * 37 % 300)}


@pytest.fixture
def fs(tmp_path: Path) -> CrashFS:
    (tmp_path / "disk").mkdir()
    return CrashFS(tmp_path / "disk")


def write(fs: CrashFS) -> list[Entries]:
    """Entries, some synced, and one return to the past; the contents after each. Notes: the last synced one."""
    book = Logbook.open(fs.root / "logbook", fs=fs)
    contents, synced = [entries(book)], 0
    fs.note(0)
    for position in range(1, LAST + 1):
        if position == 25:
            book.rewind(11)
            contents.append(entries(book))
            synced = len(contents) - 1
            fs.note(synced)
        sync = position % 6 == 0
        book.put("step", position, value_at(position), sync=sync)
        contents.append(entries(book))
        if sync:
            synced = len(contents) - 1
            fs.note(synced)
    book.close()
    return contents


def test_synced_entries_survive_and_only_the_last_ones_may_be_missing(fs: CrashFS, tmp_path: Path) -> None:
    contents = write(fs)
    for image in fs.images(n_random=6):
        path = image.write_to(tmp_path / "image") / "logbook"
        if not image.notes:
            continue
        book = Logbook.open(path, fs=QuickFS(), read_only=True)
        found = entries(book)
        book.close()
        assert path.read_bytes() == image.files["logbook"]
        newest = image.notes[-1]
        assert isinstance(newest, int)
        assert found in contents[newest:], f"{image}:\n{fs.story(image.after)}"


def test_lines_that_were_given_up_do_not_come_back_after_a_second_power_cut(fs: CrashFS, tmp_path: Path) -> None:
    write(fs)
    n_damaged = 0
    for image in fs.images(n_random=6, seed=1):
        if not image.notes:
            continue
        again = CrashFS(image.write_to(tmp_path / "first"))
        book = Logbook.open(again.root / "logbook", fs=again)
        before, n_damaged = entries(book), n_damaged + (book.damaged_at is not None)
        if book.damaged_at is None:
            book.close()
            continue
        again.note("open")
        book.put("step", LAST + 1, {"loss": 1.0}, sync=True)
        after = entries(book)
        book.close()
        for second in again.images(n_random=6, seed=n_damaged):
            book = Logbook.open(second.write_to(tmp_path / "second") / "logbook", fs=QuickFS())
            found = entries(book)
            book.close()
            allowed = [before, after]
            assert found in allowed or not second.notes, f"{image}, then {second}:\n{again.story(second.after)}"
    assert n_damaged >= 5
