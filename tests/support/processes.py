"""Processes to kill, disks to fill, and a look at what a process holds.

Does not: know what the work in a child is.
Invariant: a child that a test started is dead and reaped when its block ends, also when the test fails.

Children are forked from the warm test process, because importing torch takes longer than a whole trial. They must not
touch CUDA, and torch must run single-threaded on both sides of the fork (`single_threaded`): OpenMP's threads are not
there in the child.
"""

import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tqdm.std import tqdm

Report = Callable[[Any], None]
PATIENCE_S = 300.0  # ends a hang only: a loaded machine may need a minute for what takes a second

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2


class NotPermitted(Exception):
    """NotPermitted means that the system does not permit mounts."""


@contextmanager
def single_threaded() -> Iterator[None]:
    """torch without threads of its own, progress bars with a lock of their own: forked children may compute.

    tqdm's lock is shared between processes. A child that is killed while it holds it would keep it for ever.
    """
    threads_before, lock_before = torch.get_num_threads(), tqdm.get_lock()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    try:
        yield
    finally:
        tqdm.set_lock(lock_before)
        torch.set_num_threads(threads_before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """`single_threaded` for every test of a module that has this fixture."""
    with single_threaded():
        yield


def running_cpu_s(pid: int) -> float:
    """CPU time that a process which has not been reaped has used, and that of the children that it waited for."""
    after_the_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_the_name[11:15])) / os.sysconf("SC_CLK_TCK")


class Child:
    """A forked process and what it reported, one JSON value a line."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid, self._pipe = pid, pipe
        self._rest = b""
        self.status: int | None = None
        self._ended_cpu_s = 0.0

    def next(self, timeout_s: float = PATIENCE_S) -> Any:
        """The next value it reports; None when it has ended. Fails the test if it says nothing for so long."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._pipe], [], [], max(deadline_s - time.monotonic(), 0))
            if not ready:
                pytest.fail(f"Process {self.pid} said nothing for {timeout_s} s: it hangs.")
            more = os.read(self._pipe, 65536)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def rest(self, timeout_s: float = PATIENCE_S) -> list[Any]:
        """Everything it reports until it ends."""
        said = []
        while (value := self.next(timeout_s)) is not None:
            said.append(value)
        return said

    def reported_so_far(self) -> list[Any]:
        """Everything it has reported by now; for when its own children keep the pipe open."""
        said = []
        while b"\n" in self._rest or select.select([self._pipe], [], [], 0)[0]:
            if (value := self.next()) is None:
                break
            said.append(value)
        return said

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child if it still runs."""
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code (minus the number of the signal that ended it). Fails the test if it does not end."""
        deadline_s = time.monotonic() + timeout_s
        while self.status is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self._ended_cpu_s = used.ru_utime + used.ru_stime
            elif time.monotonic() > deadline_s:
                pytest.fail(f"Process {self.pid} did not end within {timeout_s} s: it hangs.")
            else:
                time.sleep(0.001)
        return self.status

    def cpu_s(self) -> float:
        """CPU time that it has used, of children that it waited for too; all of it once it has been waited for."""
        return running_cpu_s(self.pid) if self.status is None else self._ended_cpu_s

    def end(self) -> None:
        """Kill the child and reap it."""
        self.kill()
        self.wait()
        os.close(self._pipe)


def fork(work: Callable[[Report], None]) -> Child:
    """Run `work(report)` in a child; it exits with 0, or with 1 after reporting {"error": type, "message": text}."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return Child(pid, read_end)
    code = 1
    try:
        os.close(read_end)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

        def report(value: object) -> None:
            os.write(write_end, json.dumps(value).encode() + b"\n")

        try:
            work(report)
            code = 0
        except BaseException as error:
            where = traceback.format_exception(error)
            report({"error": type(error).__name__, "message": str(error), "where": "".join(where)[-3000:]})
    finally:
        os._exit(code)


@contextmanager
def child(work: Callable[[Report], None]) -> Iterator[Child]:
    """A forked child that does not outlive the block."""
    process = fork(work)
    try:
        yield process
    finally:
        process.end()


def in_child(work: Callable[[Report], None], *, timeout_s: float = PATIENCE_S) -> list[Any]:
    """Run `work` to its end in a child: what it reported. Its exception fails the test; so does taking too long."""
    with child(work) as process:
        said = process.rest(timeout_s)
        code = process.wait(timeout_s)
    errors = [value for value in said if isinstance(value, dict) and "error" in value]
    if errors and errors[0]["error"] == NotPermitted.__name__:
        pytest.skip(errors[0]["message"])
    assert not errors and code == 0, f"exit code {code}: {errors[0]['where'] if errors else said}"
    return said


# -- disks


@contextmanager
def in_memory(instead_of: Path) -> Iterator[Path]:
    """A folder in memory where that is possible: for tests that write thousands of folders and need no drive."""
    if not os.access("/dev/shm", os.W_OK):
        yield instead_of
        return
    with TemporaryDirectory(dir="/dev/shm", prefix="zo2trl-tests-") as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path_in_memory(tmp_path: Path) -> Iterator[Path]:
    """To be called `tmp_path` in a module: `in_memory` for its tests."""
    with in_memory(tmp_path) as folder:
        yield folder


def enter_private_mounts() -> None:
    """From now on, this process's mounts are its own and end with it. For a fresh child: it must be one thread."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    elif _libc.unshare(_CLONE_NEWNS) != 0:
        raise NotPermitted(f"private mounts are not permitted here: {os.strerror(ctypes.get_errno())}")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def mount_tmpfs(path: Path, n_bytes: int) -> None:
    """An empty file system of that many bytes (whole pages)."""
    path.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", str(path), "tmpfs", 0, f"size={n_bytes}")


def mount_read_only(path: Path) -> None:
    """Mount the folder read-only with its content."""
    _mount(str(path), str(path), None, _MS_BIND | _MS_REC)
    _mount("none", str(path), None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def unmount(path: Path) -> None:
    """Unmount a folder, even if a process still uses it."""
    if _libc.umount2(str(path).encode(), _MNT_DETACH):
        raise OSError(ctypes.get_errno(), f"umount {path}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() if kind else None, flags, options.encode())
    if _libc.mount(*arguments):
        raise NotPermitted(f"mounting {kind or 'a bind'} on {target}: {os.strerror(ctypes.get_errno())}")


# -- what a process holds


@dataclass(frozen=True)
class Held:
    """What this process holds, apart from what libraries map for themselves."""

    files: dict[int, str]
    threads: int
    mapped_files: list[str]
    n_maps: int

    @classmethod
    def now(cls) -> "Held":
        """Look."""
        n_threads = _n_threads()
        while (n_now := _n_threads(after_s=0.01)) != n_threads:  # the kernel may show a joined thread for a moment
            n_threads = n_now
        files: dict[int, str] = {}
        for entry in Path("/proc/self/fd").iterdir():
            try:
                files[int(entry.name)] = str(entry.readlink())
            except FileNotFoundError:  # the descriptor that lists the folder is gone by now
                continue
        maps = Path("/proc/self/maps").read_text().splitlines()
        paths = [line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6]
        mapped = sorted(path for path in paths if path.startswith("/") and ".so" not in path)
        return cls(files, n_threads, mapped, len(maps))


def _n_threads(*, after_s: float = 0.0) -> int:
    time.sleep(after_s)
    return len(list(Path("/proc/self/task").iterdir()))


# -- what was opened

_audits: list[tuple[tuple[str, ...], list[tuple[str, tuple[Any, ...]]]]] = []
_is_auditing = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for wanted, seen in _audits:
        if event in wanted:
            seen.append((event, arguments))


@contextmanager
def audited(*events: str) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The interpreter's audit events of these names ("open", "pickle.find_class", "socket.connect") in the block."""
    global _is_auditing
    if not _is_auditing:
        sys.addaudithook(_audit)  # there is no way to take it back
        _is_auditing = True
    seen: list[tuple[str, tuple[Any, ...]]] = []
    entry = (events, seen)
    _audits.append(entry)
    try:
        yield seen
    finally:
        _audits[:] = [other for other in _audits if other is not entry]


def paths_opened(events: list[tuple[str, tuple[Any, ...]]], *, for_writing: bool = False) -> set[Path]:
    """Paths of the "open" events; only those that could change something if `for_writing`."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    return {
        Path(os.fsdecode(arguments[0]))
        for event, arguments in events
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike)
        and (not for_writing or (arguments[2] or 0) & writing)
    }  # fmt: skip
