"""The children the battery kills, the disks it fills, and its look at what a process holds."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import (
    Child,
    Held,
    NotPermitted,
    Report,
    audited,
    child,
    enter_private_mounts,
    in_child,
    mount_read_only,
    mount_tmpfs,
    paths_opened,
    unmount,
)  # fmt: skip
from zo2trl.files.fs import LOCAL


def test_a_child_reports_until_it_is_killed_and_its_last_words_are_kept() -> None:
    def work(report: Report) -> None:
        for number in range(10**9):
            report(number)
            time.sleep(0.001)

    with child(work) as process:
        assert [process.next(), process.next()] == [0, 1]
        process.kill()
        assert process.wait() == -signal.SIGKILL
        said = process.rest()
    assert said == list(range(2, 2 + len(said)))


def test_what_goes_wrong_in_a_child_fails_the_test_with_its_traceback() -> None:
    def work(report: Report) -> None:
        report("so far")
        raise ValueError("no good")

    with child(work) as process:
        assert process.next() == "so far"
        assert process.next()["message"] == "no good"
        assert process.wait() == 1
    with pytest.raises(AssertionError, match="no good"):
        in_child(work)
    assert in_child(lambda report: report([1, "two"])) == [[1, "two"]]


def test_a_child_that_hangs_fails_the_test_and_is_gone_afterwards() -> None:
    started: list[Child] = []
    with pytest.raises(pytest.fail.Exception, match="hangs"), child(lambda report: time.sleep(60)) as process:
        started.append(process)
        process.next(timeout_s=0.05)
    assert started[0].status == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_a_small_disk_fills_up_and_is_seen_by_nobody_else(tmp_path: Path) -> None:
    def work(report: Report) -> None:
        enter_private_mounts()
        mount_tmpfs(tmp_path / "disk", 1 << 20)
        report(LOCAL.free_bytes(tmp_path / "disk"))
        (tmp_path / "disk" / "f").touch()
        unmount(tmp_path / "disk")
        report(LOCAL.list_names(tmp_path / "disk"))

    assert in_child(work) == [1 << 20, []]
    assert LOCAL.list_names(tmp_path / "disk") == []


def test_a_read_only_folder_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")

    def work(report: Report) -> None:
        enter_private_mounts()
        mount_read_only(tmp_path)
        report((tmp_path / "f").read_text())
        try:
            (tmp_path / "g").touch()
        except OSError as error:
            report(error.strerror)

    assert in_child(work) == ["x", "Read-only file system"]


def test_without_permission_to_mount_the_test_is_skipped() -> None:
    def work(report: Report) -> None:
        raise NotPermitted("not here")

    with pytest.raises(pytest.skip.Exception, match="not here"):
        in_child(work)


def test_descriptors_threads_and_mappings_are_seen(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8192))
    before, stop = Held.now(), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    data, fd = LOCAL.map(tmp_path / "f"), LOCAL.open(tmp_path / "f")
    held = Held.now()
    assert set(held.files.values()) - set(before.files.values()) == {str(tmp_path / "f")}
    assert held.threads == before.threads + 1
    assert str(tmp_path / "f") in held.mapped_files
    stop.set()
    thread.join()
    LOCAL.close(fd)
    assert isinstance(data, np.ndarray)
    del data
    assert Held.now().mapped_files == before.mapped_files


def test_opened_paths_are_recorded_while_the_block_lasts(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with audited("open") as events:
        (tmp_path / "f").read_text()
        (tmp_path / "g").write_text("y")
        os.close(os.open(tmp_path / "f", os.O_RDONLY))
    (tmp_path / "f").read_text()
    assert paths_opened(events) == {tmp_path / "f", tmp_path / "g"}
    assert paths_opened(events, for_writing=True) == {tmp_path / "g"}
