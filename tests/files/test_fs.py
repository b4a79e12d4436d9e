"""The seam to the disk: what it promises about bytes, names, locks and maps, and how it says no."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from zo2trl.errors import CheckpointError, ShortRead, StoreCorrupt, StoreError, StoreLocked
from zo2trl.files.fs import FS, LOCAL
from zo2trl.files.paths import inside

ROOT = Path(__file__).resolve().parents[2]


class ShortFS(FS):
    """Moves at most three bytes a call, as a signal or a full pipe might."""

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        return super().write_some(fd, data[:3], offset)

    def read_some(self, fd: int, into: memoryview, offset: int) -> int:
        return super().read_some(fd, into[:3], offset)


class BrokenFS(FS):
    """Writes fail with one error."""

    def __init__(self, code: int) -> None:
        self.code = code

    def write_some(self, fd: int, data: memoryview, offset: int) -> int:
        raise OSError(self.code, os.strerror(self.code))


class HastyFS(FS):
    """Does not wait for the holder of a lock."""

    lock_patience_s = 0.0


@contextmanager
def limited_file_size(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def child(work: Callable[[Callable[[str], None]], None]) -> Iterator[tuple[int, str]]:
    """A forked process that runs `work(report)` and then sleeps until killed: its pid and what it reported first."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            work(lambda text: os.write(write_end, text.encode()) and None)
            time.sleep(60)
        except Exception as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        yield pid, os.read(read_end, 4096).decode()
    finally:
        os.close(read_end)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("fs", [FS(), ShortFS()], ids=["whole", "short"])
def test_bytes_come_back_however_short_the_calls_are(tmp_path: Path, fs: FS) -> None:
    data = np.arange(1000, dtype=np.uint8).reshape(10, 100)
    path = tmp_path / "f"
    fd = fs.create(path, 0)
    fs.write_at(fd, data, 7)
    back = np.empty_like(data)
    fs.read_at(fd, back, 7, path=path)
    fs.write_at(fd, b"", 0)
    fs.read_at(fd, bytearray(), 5000, path=path)
    assert fs.size(fd) == 1007
    fs.close(fd)
    assert (back == data).all()


def test_reading_past_the_end_names_file_offset_and_both_lengths(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    fd = LOCAL.open(path)
    with pytest.raises(ShortRead, match=rf"{path} .* wanted 8 bytes from offset 4, got 6"):
        LOCAL.read_at(fd, bytearray(8), 4, path=path)
    LOCAL.close(fd)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_bytes_needed_and_free(tmp_path: Path, code: int) -> None:
    fd = LOCAL.create(tmp_path / "f", 0)
    with pytest.raises(StoreError, match=rf"Cannot write {tmp_path}/f: .* 5,000 bytes are needed, [\d,]+ are free"):
        BrokenFS(code).write_at(fd, bytes(5000), 0)
    with pytest.raises(StoreError, match="check the kernel log"):
        BrokenFS(errno.EIO).write_at(fd, b"x", 0)
    LOCAL.close(fd)


def test_a_write_that_makes_no_progress_ends(tmp_path: Path) -> None:
    class StuckFS(FS):
        def write_some(self, fd: int, data: memoryview, offset: int) -> int:
            return 0

    fd = LOCAL.create(tmp_path / "f", 0)
    with pytest.raises(StoreError, match="no progress"):
        StuckFS().write_at(fd, b"x", 0)
    LOCAL.close(fd)


def test_a_failed_sync_is_an_error_with_a_cure(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()  # the kernel cannot sync a pipe
    with pytest.raises(StoreError, match="Cannot sync"):
        LOCAL.sync_data(write_end)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(StoreError, match=f"Cannot sync the folder {tmp_path}/none"):
        LOCAL.sync_folder(tmp_path / "none")


def test_a_new_file_is_zeros_that_are_reserved_on_disk(tmp_path: Path) -> None:
    fd = LOCAL.create(tmp_path / "f", 1 << 20)
    assert os.fstat(fd).st_blocks * 512 >= 1 << 20
    assert not os.get_inheritable(fd)
    LOCAL.close(fd)
    assert (tmp_path / "f").read_bytes() == bytes(1 << 20)
    with pytest.raises(StoreError, match=rf"Cannot create {tmp_path}/f: File exists"):
        LOCAL.create(tmp_path / "f", 1)
    assert (tmp_path / "f").stat().st_size == 1 << 20


def test_a_file_that_does_not_fit_is_refused_with_both_numbers_and_leaves_no_name(tmp_path: Path) -> None:
    with limited_file_size(1 << 20), pytest.raises(StoreError, match=r"2,097,152 bytes are needed, [\d,]+ are free"):
        LOCAL.create(tmp_path / "f", 2 << 20)
    assert LOCAL.list_names(tmp_path) == []


def test_a_full_file_system_is_refused_with_both_numbers(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom zo2trl.errors import StoreError\nfrom zo2trl.files.fs import LOCAL\n"
        f"try: LOCAL.create(Path({str(tmp_path)!r}) / 'f', 8 << 20)\n"
        f"except StoreError as error: print(error, LOCAL.list_names(Path({str(tmp_path)!r})))"
    )
    shell = f'mount -t tmpfs -o size=1m none "{tmp_path}" || exit 77; exec "{sys.executable}" -c "$0"'
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", shell, script], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("no user namespaces here")
    assert "8,388,608 bytes are needed, 1,048,576 are free. Free some space" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_only_regular_files_are_opened_and_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(StoreError, match=f"{path} is not a regular file"):
            LOCAL.open(path)
        with pytest.raises(StoreError, match=f"{path} is not a regular file"):
            LOCAL.map(path)
    with pytest.raises(StoreError, match="No such file"):
        LOCAL.open(tmp_path / "none")


def test_links_are_read_through_but_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    LOCAL.close(LOCAL.open(tmp_path / "link"))
    LOCAL.close(LOCAL.open(tmp_path / "real", write=True))
    with pytest.raises(StoreError, match="symbolic link"):
        LOCAL.open(tmp_path / "link", write=True)
    with pytest.raises(StoreError, match="symbolic link"):
        LOCAL.lock(tmp_path / "link")


def test_folders_are_made_with_parents_and_each_is_made_durable(tmp_path: Path) -> None:
    class NotingFS(FS):
        def __init__(self) -> None:
            self.synced: list[Path] = []

        def sync_folder(self, path: Path) -> None:
            self.synced.append(path)
            super().sync_folder(path)

    fs = NotingFS()
    fs.make_dir(tmp_path / "a" / "b")
    fs.make_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert fs.synced == [tmp_path, tmp_path / "a"]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=f"Cannot make the folder {path}: .*choose another folder"):
            fs.make_dir(path)


def test_names_can_be_listed_moved_and_removed(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / name).write_text(name)
    LOCAL.rename(tmp_path / "c", tmp_path / "a")
    LOCAL.unlink(tmp_path / "b")
    LOCAL.unlink(tmp_path / "b", missing_ok=True)
    assert LOCAL.list_names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "c"
    assert LOCAL.free_bytes(tmp_path) > 0
    for failing in (LOCAL.unlink, LOCAL.list_names, LOCAL.free_bytes):
        with pytest.raises(StoreError, match=f"{tmp_path}/b"):
            failing(tmp_path / "b")


def test_what_cannot_be_looked_up_is_not_taken_for_absent(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert LOCAL.exists(tmp_path)
    assert not LOCAL.exists(tmp_path / "none")
    with pytest.raises(StoreError, match="loop"):
        LOCAL.exists(tmp_path / "loop")


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t"
    LOCAL.write_text_atomically(path, "old ü")
    with pytest.raises(StoreError):
        BrokenFS(errno.ENOSPC).write_text_atomically(path, "new")
    assert LOCAL.read_text(path, max_bytes=6) == "old ü"
    LOCAL.write_text_atomically(path, "new")
    assert LOCAL.read_text(path, max_bytes=6) == "new"
    assert LOCAL.list_names(tmp_path) == ["t"]


def test_texts_that_are_too_long_or_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"ab\xff")
    with pytest.raises(StoreError, match="3 bytes where at most 2"):
        LOCAL.read_text(tmp_path / "t", max_bytes=2)
    with pytest.raises(StoreCorrupt, match="offset 2"):
        LOCAL.read_text(tmp_path / "t", max_bytes=3)


def test_a_stray_write_into_a_map_neither_crashes_nor_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    array = LOCAL.map(path)
    assert array.flags.writeable
    array[0] = 0
    assert path.read_bytes() == b"abc"
    path.write_bytes(b"")
    assert LOCAL.map(path).shape == (0,)


def test_a_file_larger_than_memory_and_swap_can_be_mapped(tmp_path: Path) -> None:
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    n_bytes = sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal")) * 1024 + (1 << 30)
    with (tmp_path / "f").open("wb") as file:
        file.truncate(n_bytes)  # sparse
    array = LOCAL.map(tmp_path / "f")
    assert array.shape == (n_bytes,)
    assert array[-1] == 0
    del array


def test_a_lock_names_its_holder_and_is_free_once_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    fd = LOCAL.lock(path)
    assert path.read_text() == f"{os.getpid()} {socket.gethostname()}"
    with pytest.raises(StoreLocked, match=f"process {os.getpid()} on {socket.gethostname()}, this very process "):
        LOCAL.lock(path)
    LOCAL.close(fd)
    assert path.read_text() == ""
    LOCAL.close(LOCAL.lock(path))


def test_a_lock_of_another_process_names_its_pid_host_and_path_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def hold(report: Callable[[str], None]) -> None:
        LOCAL.lock(path)
        report("held")

    with child(hold) as (pid, said):
        assert said == "held"
        with pytest.raises(StoreLocked, match=rf"process {pid} on {socket.gethostname()} .*{path}"):
            HastyFS().lock(path)
    LOCAL.close(LOCAL.lock(path))


def test_a_forked_child_neither_keeps_the_lock_nor_can_free_it(tmp_path: Path) -> None:
    fd = LOCAL.lock(tmp_path / "lock")

    def close_and_try(report: Callable[[str], None]) -> None:
        LOCAL.close(fd)  # as a forked copy of a store would, when it is collected
        with pytest.raises(StoreLocked, match=f"process {os.getppid()} "):
            HastyFS().lock(tmp_path / "lock")
        report("still the parent's")

    with child(close_and_try) as (_, said):
        assert said == "still the parent's"
    with child(lambda report: report("born")):
        LOCAL.close(fd)
        LOCAL.close(LOCAL.lock(tmp_path / "lock"))  # although the child lives


def test_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path: Path) -> None:
    def hold_and_fork(report: Callable[[str], None]) -> None:
        LOCAL.lock(tmp_path / "lock")
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        report(str(worker))

    with child(hold_and_fork) as (pid, worker):
        os.kill(pid, signal.SIGKILL)
        LOCAL.close(LOCAL.lock(tmp_path / "lock"))
        os.kill(int(worker), signal.SIGKILL)


def test_a_lock_held_without_a_name_is_refused_after_a_moment(tmp_path: Path) -> None:
    fd = LOCAL.lock(tmp_path / "lock")
    (tmp_path / "lock").write_text("")
    with pytest.raises(StoreLocked, match="did not leave its name"):
        HastyFS().lock(tmp_path / "lock")
    LOCAL.close(fd)


BAD_NAMES = ["", ".", "./", "..", "../x", "a/../../b", "a/..", "/etc/passwd", "//x", "a\0b", "\ud800", "x" * 5000]
BAD_NAMES += [
    "..\\x",
    "‥/x",
    "．．/x",
    "／etc/passwd",
    "out",
    "out/passwd",
    "dangling",
    "loop",
    "pipe",
    "null",
    "up/x",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leads_outside_is_refused_before_anything_is_opened(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "out").symlink_to("/etc")
    (root / "dangling").symlink_to(tmp_path / "not there")
    (root / "loop").symlink_to("loop")
    (root / "null").symlink_to("/dev/null")
    (root / "up").symlink_to("..")
    os.mkfifo(root / "pipe")
    with pytest.raises(StoreError, match="not a safe file name below"):
        inside(root, name)
    with pytest.raises(CheckpointError):
        inside(root, name, error=CheckpointError)


def test_names_below_the_folder_are_fine_also_through_links_that_stay(tmp_path: Path) -> None:
    root, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for folder in (root / "sub", blobs):
        folder.mkdir(parents=True)
    (blobs / "1234").touch()
    (root / "hub").symlink_to("../blobs/1234")
    (root / "link").symlink_to("sub")
    for name in ("new", "sub", "sub/new", "link/new", "./sub/new", "a..b", "...", "模型.safetensors"):
        assert inside(root, name) == root / name
    with pytest.raises(StoreError):
        inside(root, "hub")
    assert inside(root, "hub", links_into=(blobs,)) == root / "hub"
