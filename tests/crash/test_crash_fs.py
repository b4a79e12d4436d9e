"""The simulated power cut: what it may take, what it must leave, and that it tells safe protocols from unsafe ones."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.crash_fs import SECTOR, CrashFS, CrashImage
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS

RECORDED = {"create", "write_some", "sync_data", "sync_folder", "rename", "unlink", "remove", "make_dir"}
MADE_OF_RECORDED = {"write_at", "write_atomically", "write_text_atomically", "sync_tree"}
CHANGE_NOTHING_THAT_SURVIVES = {
    "read_some", "read_at", "read_text", "list_names", "exists", "free_bytes", "open", "close", "size", "map",
    "map_open", "lock", "open_direct", "can_read_direct", "is_locked",
}  # fmt: skip


@pytest.fixture
def fs(tmp_path: Path) -> CrashFS:
    (tmp_path / "disk").mkdir()
    return CrashFS(tmp_path / "disk")


def save(fs: FS, path: Path, data: bytes, *, sync: bool = True) -> None:
    fd = fs.create(path, len(data))
    fs.write_at(fd, data, 0)
    if sync:
        fs.sync_data(fd)
    fs.close(fd)


def last_images(fs: CrashFS, n_random: int = 200) -> Iterator[CrashImage]:
    return fs.images(first=len(fs.operations), n_random=n_random)


def test_every_method_that_changes_the_disk_is_recorded() -> None:
    methods = {name for name, _ in inspect.getmembers(FS, inspect.isfunction) if not name.startswith("_")}
    assert methods == RECORDED | MADE_OF_RECORDED | CHANGE_NOTHING_THAT_SURVIVES, "teach CrashFS the new method"
    assert vars(CrashFS).keys() >= RECORDED


def test_the_real_folder_holds_what_was_written(fs: CrashFS) -> None:
    fs.make_dir(fs.root / "a" / "b")
    save(fs, fs.root / "a" / "b" / "f", b"one")
    fs.write_text_atomically(fs.root / "t", "text")
    fs.write_text_atomically(fs.root / "t", "newer")
    assert (fs.root / "a" / "b" / "f").read_bytes() == b"one"
    (all_of_it,) = (image for image in last_images(fs) if image.choice == "all")
    assert all_of_it.files == {"a/b/f": b"one", "t": b"newer"}
    assert all_of_it.folders == ("a", "a/b")


def test_unsynced_bytes_survive_sector_by_sector_and_reserved_ones_are_zeros(fs: CrashFS) -> None:
    fd = fs.create(fs.root / "f", 3 * SECTOR)
    fs.sync_data(fd)
    fs.sync_folder(fs.root)
    fs.write_at(fd, b"x" * 3 * SECTOR, 0)
    fs.close(fd)
    seen = {tuple(image.files["f"][i * SECTOR :: SECTOR][:1] for i in range(3)) for image in last_images(fs)}
    assert len(seen) == 8
    assert (b"\0",) * 3 in seen and (b"x",) * 3 in seen


def test_a_sector_written_twice_holds_a_version_it_had_never_an_older_write_over_a_newer(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"....")
    fs.sync_folder(fs.root)
    fd = fs.open(fs.root / "f", write=True)
    fs.write_at(fd, b"a", 0)
    fs.write_at(fd, b"b", 1)
    fs.write_at(fd, b"c", 2)
    fs.close(fd)
    assert {image.files["f"] for image in last_images(fs)} == {b"....", b"a...", b"ab..", b"abc."}


def test_a_length_may_outrun_its_bytes_and_the_other_way_round(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"old")
    fs.sync_folder(fs.root)
    fd = fs.open(fs.root / "f", write=True)
    fs.write_at(fd, b"new" * SECTOR, 3)
    fs.close(fd)
    lengths = {len(image.files["f"]) for image in last_images(fs)}
    assert lengths == {3, 3 + 3 * SECTOR}
    assert any(image.files["f"].endswith(b"\0") for image in last_images(fs))


def test_synced_bytes_survive_but_their_name_needs_its_folder_synced(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"data")
    assert {image.files.get("f") for image in last_images(fs)} == {None, b"data"}
    fs.sync_folder(fs.root)
    assert {image.files.get("f") for image in last_images(fs)} == {b"data"}
    fs.unlink(fs.root / "f")
    fs.unlink(fs.root / "f", missing_ok=True)
    assert {image.files.get("f") for image in last_images(fs)} == {None, b"data"}


def test_a_synced_name_promises_nothing_about_bytes(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"data", sync=False)
    fs.sync_folder(fs.root)
    assert {image.files["f"] for image in last_images(fs)} == {b"", b"\0\0\0\0", b"data"}


def test_a_rename_is_whole_or_not_at_all(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"old")
    save(fs, fs.root / "g", b"new")
    fs.sync_folder(fs.root)
    fs.rename(fs.root / "g", fs.root / "f")
    states = {tuple(sorted(image.files.items())) for image in last_images(fs)}
    assert states == {(("f", b"old"), ("g", b"new")), (("f", b"new"),)}


def test_names_survive_in_order_or_in_any_selection(fs: CrashFS) -> None:
    for name in "abc":
        save(fs, fs.root / name, b"")
    states = {"".join(sorted(image.files)) for image in last_images(fs)}
    assert states >= {"", "a", "ab", "abc", "c", "bc"}


def test_what_others_wrote_is_lost_unless_somebody_syncs_it(fs: CrashFS) -> None:
    (fs.root / "model" / "sub").mkdir(parents=True)
    (fs.root / "model" / "config.json").write_text("{}")
    (fs.root / "model" / "sub" / "f").write_text("x")
    fs.sync_folder(fs.root)
    assert {tuple(image.files) for image in last_images(fs)} == {()}
    fs.sync_tree(fs.root / "model")
    fs.sync_folder(fs.root)
    assert {tuple(image.files.items()) for image in last_images(fs)} == {
        (("model/config.json", b"{}"), ("model/sub/f", b"x"))
    }


def test_a_file_in_a_folder_whose_own_name_was_lost_is_lost(fs: CrashFS) -> None:
    (fs.root / "units").mkdir()  # behind its back: as if somebody forgot to sync the parent
    fs._fresh = [fs.root / "units"]
    fs._note_folder(fs.root / "units")
    save(fs, fs.root / "units" / "f", b"data")
    fs.sync_folder(fs.root / "units")
    assert {tuple(image.files) for image in last_images(fs)} == {(), ("units/f",)}
    fs.sync_folder(fs.root)
    assert {tuple(image.files) for image in last_images(fs)} == {("units/f",)}


def test_folders_made_by_the_file_system_are_durable_with_their_parents(fs: CrashFS) -> None:
    fs.make_dir(fs.root / "a" / "b")
    assert {image.folders for image in last_images(fs)} == {("a", "a/b")}
    assert {image.folders for image in fs.images(n_random=50)} == {(), ("a",), ("a", "a/b")}


def test_a_folder_is_removed_with_what_is_in_it(fs: CrashFS) -> None:
    fs.make_dir(fs.root / "a" / "b")
    save(fs, fs.root / "a" / "f", b"data")
    fs.remove(fs.root / "a")
    fs.remove(fs.root / "a")
    assert {image.folders for image in last_images(fs)} == {(), ("a",), ("a", "a/b")}
    fs.sync_folder(fs.root)
    assert {(image.folders, tuple(image.files)) for image in last_images(fs)} == {((), ())}


def test_a_folder_is_moved_whole_and_for_good_when_both_parents_are_synced(fs: CrashFS) -> None:
    fs.make_dir(fs.root / "a" / "units")
    fs.make_dir(fs.root / "b")
    save(fs, fs.root / "a" / "units" / "f", b"data")
    fs.sync_folder(fs.root / "a" / "units")
    fs.rename(fs.root / "a" / "units", fs.root / "b" / "units")
    fs.sync_folder(fs.root / "b")
    assert {tuple(image.files) for image in last_images(fs)} == {("a/units/f",), ("b/units/f",)}
    fs.sync_folder(fs.root / "a")
    assert {tuple(image.files) for image in last_images(fs)} == {("b/units/f",)}
    save(fs, fs.root / "b" / "units" / "g", b"more")
    fs.sync_folder(fs.root / "b" / "units")
    assert {tuple(image.files) for image in last_images(fs)} == {("b/units/f", "b/units/g")}


def test_what_was_there_before_is_durable_and_notes_tell_how_far_the_workload_was(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f").write_bytes(b"before")
    fs = CrashFS(tmp_path)
    fd = fs.open(tmp_path / "sub" / "f", write=True)
    fs.note("step 1")
    fs.write_at(fd, b"AFTER!", 0)
    fs.note("step 2")
    fs.close(fd)
    images = list(fs.images())
    assert {image.files["sub/f"] for image in images} == {b"before", b"AFTER!"}
    assert {image.notes for image in images} == {("step 1",)}
    assert "write #2 bytes 0 to 6" in fs.story(2)


def test_equal_seeds_give_equal_images_on_disk_too(fs: CrashFS, tmp_path: Path) -> None:
    save(fs, fs.root / "f", b"x" * 4 * SECTOR, sync=False)
    first, again, other = (list(fs.images(seed=seed)) for seed in (1, 1, 2))
    assert [image.digest for image in first] == [image.digest for image in again]
    assert [image.digest for image in first] != [image.digest for image in other]
    with_file = next(image for image in first if image.files)
    folder = with_file.write_to(tmp_path / "image")
    assert (folder / "f").read_bytes() == with_file.files["f"]


# -- does it bite? A toy store: replace the one value in a file, and say "done".

Protocol = Callable[[FS, Path, bytes], None]


def careful(fs: FS, path: Path, data: bytes) -> None:
    draft = path.with_name("draft")
    fs.unlink(draft, missing_ok=True)
    save(fs, draft, data)
    fs.rename(draft, path)
    fs.sync_folder(path.parent)


def without_data_sync(fs: FS, path: Path, data: bytes) -> None:
    draft = path.with_name("draft")
    save(fs, draft, data, sync=False)
    fs.rename(draft, path)
    fs.sync_folder(path.parent)


def without_folder_sync(fs: FS, path: Path, data: bytes) -> None:
    draft = path.with_name("draft")
    save(fs, draft, data)
    fs.rename(draft, path)


def in_place(fs: FS, path: Path, data: bytes) -> None:
    fd = fs.open(path, write=True)
    fs.write_at(fd, data, 0)
    fs.sync_data(fd)
    fs.close(fd)


def broken_images(fs: CrashFS, protocol: Protocol, *, kinds: tuple[str, ...] = ()) -> int:
    """How many images hold neither the old nor the new value, or forget a value that was promised."""
    values = [letter * 2 * SECTOR for letter in (b"a", b"b", b"c", b"d")]
    careful(fs, fs.root / "value", values[0])
    start = len(fs.operations)
    for number, value in enumerate(values[1:], start=1):
        protocol(fs, fs.root / "value", value)
        fs.note(number)
    n_broken = 0
    for image in fs.images(first=start):
        promised = image.notes[-1] if image.notes else 0
        n_broken += image.files.get("value") not in values[promised:] and (not kinds or image.choice in kinds)
    return n_broken


def test_a_careful_protocol_survives_every_image(fs: CrashFS) -> None:
    assert broken_images(fs, careful) == 0


@pytest.mark.parametrize("protocol", [without_data_sync, without_folder_sync, in_place])
def test_a_careless_protocol_is_caught(tmp_path: Path, protocol: Protocol) -> None:
    assert broken_images(CrashFS(tmp_path), protocol) > 0


@pytest.mark.parametrize("protocol", [without_data_sync, without_folder_sync])
def test_kills_alone_would_not_catch_a_missing_sync(tmp_path: Path, protocol: Protocol) -> None:
    assert broken_images(CrashFS(tmp_path), protocol, kinds=("all",)) == 0


def test_errors_come_through_as_they_are(fs: CrashFS) -> None:
    save(fs, fs.root / "f", b"")
    n_operations = len(fs.operations)
    with pytest.raises(StoreError, match="File exists"):
        fs.create(fs.root / "f", 1)
    with pytest.raises(StoreError, match="No such file"):
        fs.unlink(fs.root / "none")
    assert len(fs.operations) == n_operations
