"""Several processes that train together, forked from the warm test process: what a launcher starts, without its wait.

Does not: launch anything by command line; tests/trainers/test_torchrun.py does.
Invariant: as for every child, none outlives its block.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

from tests.support.processes import Child, Report, child

RankWork = Callable[[int, Report], None]

PATIENCE_S = 600.0  # ends a hang only


@contextmanager
def ranks(n_ranks: int, work: RankWork) -> Iterator[list[Child]]:
    """So many processes that find each other over gloo, each running `work(rank, report)`."""
    port = free_port()

    def as_rank(rank: int) -> Callable[[Report], None]:
        def run(report: Report) -> None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for state in (AcceleratorState, PartialState, GradientState):
                state._reset_state()
            work(rank, report)

        return run

    with ExitStack() as children:
        yield [children.enter_context(child(as_rank(rank))) for rank in range(n_ranks)]


def in_ranks(n_ranks: int, work: RankWork) -> list[list[Any]]:
    """What each process reported, in rank order; an exception in any of them fails the test."""
    with ranks(n_ranks, work) as processes:
        said = [process.rest(PATIENCE_S) for process in processes]
        codes = [process.wait(PATIENCE_S) for process in processes]
    errors = [value for values in said for value in values if isinstance(value, dict) and "error" in value]
    assert not errors and not any(codes), f"exit codes {codes}: {errors[0]['where'] if errors else said}"
    return said


def free_port() -> int:
    """Find a port that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Telling(TrainerCallback):
    """Reports every step that was made."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report({"step": state.global_step})


class Waiting(TrainerCallback):
    """Waits in C, as NCCL would."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report("waits")
        torch.distributed.barrier()


class Sleeping(TrainerCallback):
    """Stay away from the collective that the other ranks wait in."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(60.0)
