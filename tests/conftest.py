"""What holds for every test: no network, honest thread counts, nothing left open.

Environment variables are set before anything imports a Hugging Face library, because those read them once.
"""

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What was measured on this machine (`~/.cache/zo2trl/rates.json`) decides where units live: no test may depend on it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="zo2trl-tests-")

import pytest
import torch

TESTS = Path(__file__).parent
ROOMS_THAT_OWN_HANDLES = [
    TESTS / room for room in ("files", "journal", "tiers", "checkpoints", "engine", "forecast", "crash", "faults")
]
PATIENCE_S = 60.0  # ends a hang only


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers that each start a thread per core fight over the cores and run slower than one thread each.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # accelerate collects garbage at every training, and walks all objects of the libraries each time.
    gc.freeze()


def open_files() -> dict[int, str]:
    """Descriptor -> target of every open file of this process; devices and /proc are the libraries' own business."""
    found: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor that lists the folder is gone by now
            continue
        if target.startswith("/dev/shm/") or not target.startswith(("/dev/", "/proc/")):
            found[int(entry.name)] = target
    return found


def leftovers(files: dict[int, str], threads: set[threading.Thread]) -> list[str]:
    """What is open or alive now and was not when `files` and `threads` were taken."""
    new_files = [f"file {target} (fd {fd})" for fd, target in open_files().items() if files.get(fd) != target]
    new_threads = [f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads]
    return new_files + new_threads


@pytest.fixture(autouse=True)
def nothing_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of a room that owns handles, if it leaves a file open or a thread alive."""
    if not any(room in request.path.parents for room in ROOMS_THAT_OWN_HANDLES):
        yield
        return
    files, threads = open_files(), set(threading.enumerate())
    yield
    deadline_s = time.monotonic() + PATIENCE_S
    # A mapping holds its descriptor until it is collected, and a closed worker needs a moment to return.
    while left := leftovers(files, threads):
        gc.collect()
        if time.monotonic() > deadline_s:
            pytest.fail(f"Left open by this test: {', '.join(left)}.")
        time.sleep(0.02)
