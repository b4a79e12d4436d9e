"""The misbehaving disk: it strikes exactly where it is told to, and sees a sync that is tried again."""

import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.crash_fs import CrashFS
from tests.support.faulty_fs import FAULTS, INVISIBLE, FaultyFS
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS


def script(fs: FS, folder: Path) -> bytes:
    """Write a file, make it durable, read it back two ways."""
    path = folder / "f"
    fd = fs.create(path, 8)
    try:
        fs.write_at(fd, b"abcdefgh", 0)
        fs.sync_data(fd)
    finally:
        fs.close(fd)
    fs.sync_folder(folder)
    back = bytearray(8)
    fd = fs.open(path)
    try:
        fs.read_at(fd, back, 0, path=path)
    finally:
        fs.close(fd)
    assert bytes(fs.map(path)) == bytes(back)
    fs.unlink(path)
    return bytes(back)


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_is_struck_in_its_turn_until_none_is_left(tmp_path: Path, fault: str, for_ever: bool) -> None:
    if fault == "EINTR" and for_ever:
        pytest.skip("interrupted for ever is a hang by definition")
    struck: list[str] = []
    for at in range(1, 30):
        (tmp_path / str(at)).mkdir()
        fs = FaultyFS(fault, at=at, for_ever=for_ever)
        try:
            assert script(fs, tmp_path / str(at)) == b"abcdefgh"
        except StoreError as error:
            assert FAULTS[fault][0] is not None, "a short transfer is no error"
            assert f"errno {FAULTS[fault][0]}" in str(error) and str(tmp_path / str(at)) in str(error)
        if not fs.struck:
            break
        struck.append(fs.struck[0].split()[0])
    assert set(struck) <= set(FAULTS[fault][1])
    expected = {"EIO": 12, "sync": 2, "ENOSPC": 3, "short write": 1, "short read": 1}
    assert len(struck) == expected.get(fault, len(struck)) > 0, struck


def test_a_disk_that_fails_for_ever_takes_nothing_more(tmp_path: Path) -> None:
    fs = FaultyFS("ENOSPC", at=2, for_ever=True)
    fd = fs.create(tmp_path / "f", 0)
    for _ in range(3):
        with pytest.raises(StoreError, match="No space left"):
            fs.write_at(fd, bytes(10), 0)
    fs.close(fd)
    assert len(fs.struck) == 3


def test_a_full_disk_takes_what_still_fits(tmp_path: Path) -> None:
    fs = FaultyFS("ENOSPC", at=2)
    fd = fs.create(tmp_path / "f", 0)
    with pytest.raises(StoreError):
        fs.write_at(fd, b"12345678", 0)
    fs.close(fd)
    assert (tmp_path / "f").read_bytes() == b"1234"


@pytest.mark.parametrize("fault", [fault for fault in INVISIBLE if fault != "EINTR"])
def test_short_transfers_stay_short_for_ever_and_still_come_to_an_end(tmp_path: Path, fault: str) -> None:
    fs = FaultyFS(fault, at=1, for_ever=True)
    assert script(fs, tmp_path) == b"abcdefgh"
    assert len(fs.struck) >= 4


def test_a_sync_tried_again_after_a_failure_is_seen(tmp_path: Path) -> None:
    fs = FaultyFS("sync", at=1)
    fd, other = fs.create(tmp_path / "f", 0), fs.create(tmp_path / "g", 0)
    with pytest.raises(StoreError, match="Cannot sync"):
        fs.sync_data(fd)
    fs.sync_data(other)
    assert fs.retried_syncs == []
    fs.sync_data(fd)
    assert len(fs.retried_syncs) == 1 and str(tmp_path / "f") in fs.retried_syncs[0]
    fs.close(fd)
    fs.close(other)


def test_a_stalled_call_waits_until_it_is_released(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    fs, done = FaultyFS(), threading.Event()
    thread = threading.Thread(target=lambda: (fs.map(tmp_path / "f"), done.set()))
    with fs.stalled("map_open"):
        thread.start()
        assert fs.waiting.wait(300) and not done.wait(0.05)
    thread.join(300)
    assert done.is_set()


def test_a_flipped_bit_is_read_and_mapped_but_not_on_disk(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(4))
    fs = FaultyFS()
    fs.flip_bit("f", 17)
    back = bytearray(2)
    fd = fs.open(tmp_path / "f")
    fs.read_at(fd, back, 2, path=tmp_path / "f")
    fs.close(fd)
    assert back == b"\2\0"
    assert np.array_equal(fs.map(tmp_path / "f"), [0, 0, 2, 0])
    assert (tmp_path / "f").read_bytes() == bytes(4)


def test_faults_and_power_cuts_combine(tmp_path: Path) -> None:
    class BothFS(FaultyFS, CrashFS):
        pass

    fs = BothFS(root=tmp_path, fault="sync", at=1)
    fd = fs.create(tmp_path / "f", 0)
    fs.write_at(fd, b"data", 0)
    with pytest.raises(StoreError, match=f"errno {errno.EIO}"):
        fs.sync_data(fd)
    fs.close(fd)
    fs.sync_folder(tmp_path)
    assert {image.files["f"] for image in fs.images(first=len(fs.operations))} == {b"", bytes(4), b"data"}
