"""Promises about the folder of a store: one owner, no foreign byte touched, earlier runs' steps kept."""

import contextlib
import json

import pytest

from tests.support.stores import record
from zo2trl.errors import StoreError, StoreForeign, StoreLocked
from zo2trl.files.fs import FS
from zo2trl.journal.journal import Journal
from zo2trl.tiers.folder import StoreFolder

DIGEST = "a" * 64


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def begin_run(folder, *, n_steps):
    """What founding and training leave in a folder."""
    with Journal.create(folder.journal, header={}, sync_every=0) as journal:
        for step in range(n_steps):
            journal.append(record(step))
    (folder.units / "layers.0@3").write_bytes(b"weights")
    folder.logbook.write_bytes(b"")
    folder.layout.write_text("{}")


def n_steps_in(path):
    with Journal.open(path, read_only=True) as journal:
        return len(journal.records)


def used(path, *, digest=DIGEST, n_steps=2):
    """A folder as a finished run leaves it."""
    folder = StoreFolder.own(path, layout_digest=digest)
    folder.set_run_aside()
    begin_run(folder, n_steps=n_steps)
    if n_steps:
        folder.drop_earlier_run()
    folder.close()


def test_a_new_folder_is_made_with_its_parents_and_says_whose_it_is(tmp_path):
    path = tmp_path / "a" / "b"
    folder = StoreFolder.own(path, layout_digest=DIGEST)
    folder.close()
    assert json.loads((path / "store.json").read_text()) == {"format": 2, "layout": DIGEST}


def test_an_empty_folder_is_taken(tmp_path):
    StoreFolder.own(tmp_path, layout_digest=DIGEST).close()
    assert (tmp_path / "store.json").exists()


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    first = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    with pytest.raises(StoreLocked, match="this very process"):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)
    first.close()
    first.close()
    StoreFolder.own(tmp_path, layout_digest=DIGEST).close()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(StoreForeign, match=r"thesis.tex.*Nothing was changed"):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


def test_another_models_store_is_refused_and_left_alone(tmp_path):
    used(tmp_path, digest="b" * 64)
    before = tree(tmp_path)
    with pytest.raises(StoreForeign, match="another model"):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"format": 2}', '{"format": 99, "layout": "x"}', '{"format": 2, "layout": 7}'],
)
def test_a_description_that_is_not_ours_is_refused_and_left_alone(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    before = tree(tmp_path)
    with pytest.raises(StoreForeign):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


def test_a_description_that_is_not_text_or_far_too_long_is_refused(tmp_path):
    (tmp_path / "store.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)
    (tmp_path / "store.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(StoreError, match="bytes"):
        StoreFolder.own(tmp_path, layout_digest=DIGEST)


def test_a_new_run_keeps_the_steps_of_earlier_runs_and_drops_their_weights(tmp_path):
    for n_steps in (1, 2, 3, 4):
        used(tmp_path, n_steps=n_steps)
    kept = [name for name in tree(tmp_path) if name.endswith(".old")]
    assert kept == ["journal-1.old", "journal-2.old", "journal-3.old"]
    for name, n_steps in zip(kept, (1, 2, 3), strict=True):
        assert n_steps_in(tmp_path / name) == n_steps
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["layers.0@3"]


def test_looking_at_the_model_before_resuming_loses_nothing(tmp_path):
    used(tmp_path)
    before = {name: content for name, content in tree(tmp_path).items() if name != "lock"}
    for _ in range(3):
        folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
        assert folder.set_run_aside() in (0, 2)
        begin_run(folder, n_steps=0)
        folder.close()
    folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert folder.recall_run()
    folder.close()
    assert {name: content for name, content in tree(tmp_path).items() if name != "lock"} == before


def test_a_run_with_steps_is_not_replaced_by_the_one_before_it(tmp_path):
    used(tmp_path, n_steps=5)
    folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    folder.set_run_aside()
    begin_run(folder, n_steps=1)  # the machine stopped before the earlier run was dropped
    folder.close()
    folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert folder.recall_run()
    folder.close()
    assert n_steps_in(tmp_path / "journal") == 1


class StopsAfter(FS):
    """A process that dies at its n-th rename."""

    def __init__(self, n_renames):
        self.n_left = n_renames

    def rename(self, old, new):
        if not self.n_left:
            raise StoreError("killed")
        self.n_left -= 1
        super().rename(old, new)


@pytest.mark.parametrize("n_renames", range(1, 7))
@pytest.mark.parametrize("direction", ["aside", "back"])
def test_a_move_that_a_crash_interrupted_is_finished(tmp_path, direction, n_renames):
    used(tmp_path, n_steps=2)
    if direction == "back":
        folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
        folder.set_run_aside()
        folder.close()
    fs = StopsAfter(n_renames)
    with pytest.raises(StoreError, match="killed"):
        folder = StoreFolder.own(tmp_path, layout_digest=DIGEST, fs=fs)
        try:
            folder.set_run_aside() if direction == "aside" else folder.recall_run()
            raise StoreError("killed")  # there are fewer renames than that
        finally:
            folder.close()
    folder = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    assert folder.recall_run()
    assert n_steps_in(folder.journal) == 2
    assert (folder.units / "layers.0@3").read_bytes() == b"weights" and folder.layout.exists()
    folder.close()


def test_a_file_somebody_put_among_the_units_survives(tmp_path):
    used(tmp_path)
    (tmp_path / "units" / "my notes.txt").write_text("precious")
    with contextlib.suppress(StoreForeign):
        StoreFolder.own(tmp_path, layout_digest=DIGEST).close()
    assert (tmp_path / "units" / "my notes.txt").read_text() == "precious"


def test_a_run_that_died_while_making_the_folder_does_not_block_the_next(tmp_path):
    # The lock is taken before the description is written under a temporary name and renamed.
    (tmp_path / "lock").write_text("")
    (tmp_path / "store.json.tmp").write_text('{"form')
    StoreFolder.own(tmp_path, layout_digest=DIGEST).close()
    assert json.loads((tmp_path / "store.json").read_text())["layout"] == DIGEST


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError):
        StoreFolder.own(tmp_path / "store", layout_digest=DIGEST)
    assert (tmp_path / "store").read_text() == "a file"


def test_refusals_give_the_lock_back(tmp_path):
    class Unwritable(FS):
        def write_text_atomically(self, path, text):
            raise StoreError("no room")

    with pytest.raises(StoreError, match="no room"):
        StoreFolder.own(tmp_path, layout_digest=DIGEST, fs=Unwritable())
    StoreFolder.own(tmp_path, layout_digest=DIGEST).close()


def test_a_reader_neither_locks_nor_changes_a_folder(tmp_path):
    used(tmp_path)
    owner = StoreFolder.own(tmp_path, layout_digest=DIGEST)
    before = tree(tmp_path)
    StoreFolder.look(tmp_path, layout_digest=DIGEST).close()
    StoreFolder.look(tmp_path).close()
    assert tree(tmp_path) == before
    owner.close()


def test_a_reader_of_nothing_or_of_another_models_store_is_refused(tmp_path):
    with pytest.raises(StoreForeign, match="no store with a run"):
        StoreFolder.look(tmp_path)
    used(tmp_path)
    with pytest.raises(StoreForeign, match="another model"):
        StoreFolder.look(tmp_path, layout_digest="c" * 64)
