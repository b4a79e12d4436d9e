"""Promises about the folder of a store: one owner, no foreign byte touched, earlier runs' steps kept."""

import contextlib
import json

import pytest

from zo2trl.errors import StoreError, StoreForeign, StoreLocked
from zo2trl.tiers.folder import StoreFolder

DIGEST = "a" * 64


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def used(path, *, digest=DIGEST):
    """A folder as a finished run leaves it."""
    folder = StoreFolder(path, layout_digest=digest)
    folder.journal.write_bytes(b"steps of this run")
    folder.units.mkdir(exist_ok=True)
    (folder.units / "layers.0@3").write_bytes(b"weights")
    folder.close()


def test_a_new_folder_is_made_with_its_parents_and_says_whose_it_is(tmp_path):
    path = tmp_path / "a" / "b"
    folder = StoreFolder(path, layout_digest=DIGEST)
    folder.close()
    assert json.loads((path / "store.json").read_text()) == {"format": 1, "layout": DIGEST}


def test_an_empty_folder_is_taken(tmp_path):
    StoreFolder(tmp_path, layout_digest=DIGEST).close()
    assert (tmp_path / "store.json").exists()


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    first = StoreFolder(tmp_path, layout_digest=DIGEST)
    with pytest.raises(StoreLocked, match="this very process"):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    first.close()
    first.close()
    StoreFolder(tmp_path, layout_digest=DIGEST).close()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(StoreForeign, match=r"thesis.tex.*Nothing was changed"):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


def test_another_models_store_is_refused_and_left_alone(tmp_path):
    used(tmp_path, digest="b" * 64)
    before = tree(tmp_path)
    with pytest.raises(StoreForeign, match="another model"):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"format": 1}', '{"format": 99, "layout": "x"}', '{"format": 1, "layout": 7}'],
)
def test_a_description_that_is_not_ours_is_refused_and_left_alone(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    before = tree(tmp_path)
    with pytest.raises(StoreForeign):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    assert tree(tmp_path) == before


def test_a_description_that_is_not_text_or_far_too_long_is_refused(tmp_path):
    (tmp_path / "store.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    (tmp_path / "store.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(StoreError, match="bytes"):
        StoreFolder(tmp_path, layout_digest=DIGEST)


def test_a_new_run_keeps_the_steps_of_earlier_runs_and_drops_their_weights(tmp_path):
    for _ in range(3):
        used(tmp_path)
    StoreFolder(tmp_path, layout_digest=DIGEST).close()
    kept = [name for name in tree(tmp_path) if name.endswith(".old")]
    assert kept == ["journal-1.old", "journal-2.old", "journal-3.old"]
    assert all(tree(tmp_path)[name] == b"steps of this run" for name in kept)
    assert not (tmp_path / "journal").exists() and list((tmp_path / "units").iterdir()) == []


def test_a_file_somebody_put_among_the_units_survives(tmp_path):
    used(tmp_path)
    (tmp_path / "units" / "my notes.txt").write_text("precious")
    with contextlib.suppress(StoreForeign):
        StoreFolder(tmp_path, layout_digest=DIGEST).close()
    assert (tmp_path / "units" / "my notes.txt").read_text() == "precious"


def test_a_run_that_died_while_making_the_folder_does_not_block_the_next(tmp_path):
    # The lock is taken before the description is written under a temporary name and renamed.
    (tmp_path / "lock").write_text("")
    (tmp_path / "store.json.tmp").write_text('{"form')
    StoreFolder(tmp_path, layout_digest=DIGEST).close()
    assert json.loads((tmp_path / "store.json").read_text())["layout"] == DIGEST


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError):
        StoreFolder(tmp_path / "store", layout_digest=DIGEST)
    assert (tmp_path / "store").read_text() == "a file"


def test_refusals_give_the_lock_back(tmp_path):
    used(tmp_path)
    (tmp_path / "journal").unlink()
    (tmp_path / "units" / "folder").mkdir()  # cannot be unlinked like a unit
    with pytest.raises(StoreError):
        StoreFolder(tmp_path, layout_digest=DIGEST)
    (tmp_path / "units" / "folder").rmdir()
    StoreFolder(tmp_path, layout_digest=DIGEST).close()
