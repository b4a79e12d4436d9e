"""Ranks: the processes of one training, what they exchange, and which part of a step each of them computes.

Does not: know what the numbers mean that go round, start processes, or run anything in the background.

Every message names what it is about, so that processes which have come to different places find out instead of taking
one number for another. Waiting is a loop in Python: a signal ends it at once, and the connection of a process that has
died is closed by its system, and every process that waits for it sees that.

Invariant: every process gets the same answers, in rank order.
"""

import json
import logging
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import distributed

from zo2trl.errors import ConfigError, RankLost, RanksDiverged
from zo2trl.zo.estimators import Probe

__all__ = ["ALONE", "Parallelism", "Ranks", "join_ranks"]

logger = logging.getLogger(__name__)

Parallelism = Literal["data", "directions"]

FRAME_BYTES = 1024  # one message of this size goes round; what does not fit follows in a second one
_LENGTHS = struct.Struct("<II")  # the lengths of a message's subject and of its content
_FIRST_WAIT_S, _LONGEST_WAIT_S = 20e-6, 2e-3  # between two looks at whether a message has come


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among the processes of a training.

    Args:
        rank: of this process, counted from 0.
        size: how many there are.
        n_local: how many of them run on this machine.
        parallelism: "data": each has its own micro-batches and evaluates all probes on them. "directions": all have
            the same micro-batches, and each evaluates the probes of its own directions.
        group: carries CPU tensors; None if there is one process only.
    """

    rank: int = 0
    size: int = 1
    n_local: int = 1
    parallelism: Parallelism = "data"
    group: Any = None

    # -- who computes what

    @property
    def n_shares_of_data(self) -> int:
        """Into how many parts the micro-batches of a step are split."""
        return self.size if self.parallelism == "data" else 1

    def share(self, probes: Sequence[Probe], *, rank: int | None = None) -> list[Probe]:
        """The probes that a process evaluates (this one by default), in order."""
        if self.parallelism == "data":
            return list(probes)
        rank = self.rank if rank is None else rank
        return [probe for probe in probes if probe.direction % self.size == rank]

    def by_probe(self, probes: Sequence[Probe], losses: Sequence[Sequence[float]]) -> list[list[float]]:
        """The losses of each probe, in the order of the global micro-batches, however many processes there are.

        Args:
            losses: of each rank: those of its first micro-batch's probes, then of its second's. The global number of
                rank r's i-th micro-batch is i * size + r: data loaders deal batches out like cards.
        """
        found: dict[Probe, list[tuple[int, int, float]]] = {probe: [] for probe in probes}
        for rank, values in enumerate(losses):
            share = self.share(probes, rank=rank)
            for number, value in enumerate(values):
                batch, index = divmod(number, len(share))
                found[share[index]].append((batch, rank, value))
        return [[value for *_, value in sorted(found[probe], key=lambda row: row[:2])] for probe in probes]

    # -- what ranks exchange

    def exchange(self, about: str, message: bytes) -> list[bytes]:
        """Every rank's message, in rank order. All ranks have to ask about the same.

        Raises:
            RankLost: another process has ended, or has not answered within the group's patience.
            RanksDiverged: another process asks about something else.
        """
        if self.group is None:
            return [message]
        subject = about.encode()
        whole = _LENGTHS.pack(len(subject), len(message)) + subject + message
        firsts = self._gather(whole[:FRAME_BYTES].ljust(FRAME_BYTES, b"\0"), about)
        lengths = [_LENGTHS.unpack_from(first) for first in firsts]
        n_left = max(_LENGTHS.size + sum(pair) for pair in lengths) - FRAME_BYTES
        if n_left > 0:
            rests = self._gather(whole[FRAME_BYTES:].ljust(n_left, b"\0"), about)
            firsts = [first + rest for first, rest in zip(firsts, rests, strict=True)]
        answers: list[bytes] = []
        for rank, (text, (n_subject, n_message)) in enumerate(zip(firsts, lengths, strict=True)):
            start = _LENGTHS.size + n_subject
            if text[_LENGTHS.size : start] != subject:
                raise RanksDiverged(
                    f"Rank {self.rank} has come to {about!r}, and rank {rank} to "
                    f"{text[_LENGTHS.size : start].decode(errors='replace')!r}: they do not do the same. Call "
                    "`train`, `evaluate` and `predict` in all of them, with the same arguments and datasets."
                )
            answers.append(text[start : start + n_message])
        return answers

    def gather(self, about: str, values: Sequence[float]) -> list[tuple[float, ...]]:
        """Every rank's numbers (float64, bit for bit), in rank order. Raises as `exchange`."""
        answers = self.exchange(about, struct.pack(f"<{len(values)}d", *values))
        return [struct.unpack(f"<{len(message) // 8}d", message) for message in answers]

    def all_gather(self, about: str, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order. Raises as `exchange`."""
        return [json.loads(message) for message in self.exchange(about, json.dumps(value).encode())]

    def all_min(self, about: str, value: int) -> int:
        """The smallest of the ranks' whole numbers (below 2**53). Raises as `exchange`."""
        return int(min(row[0] for row in self.gather(about, [value])))

    def all_true(self, about: str, answer: bool) -> bool:
        """Whether `answer` is true in every rank. Raises as `exchange`."""
        return bool(self.all_min(about, int(answer)))

    def agree_on(self, what: str, facts: Mapping[str, Any]) -> None:
        """Compare facts (JSON) that have to be the same everywhere. Raises as `exchange`.

        Raises:
            ConfigError: one differs; names it, both values and the way out.
        """
        if self.group is None:
            return
        gathered = self.all_gather(what, dict(facts))
        for rank, other in enumerate(gathered):
            for name in sorted(gathered[0].keys() | other.keys()):
                if other.get(name) != gathered[0].get(name):
                    raise ConfigError(
                        f"{what}: `{name}` is {_short(gathered[0].get(name))} in rank 0 and {_short(other.get(name))} "
                        f"in rank {rank}, but has to be the same in all {self.size} processes. Make model, datasets "
                        "and arguments alike in each (`transformers.set_seed` before anything random, such as new "
                        "adapters or a new head)."
                    )

    def lost(self, about: str, error: BaseException) -> RankLost:
        """What to raise if waiting for the others has failed."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = (
            f"Rank {self.rank} of {self.size} waited for the others ({about}), and one of them has ended or does not "
            f"answer ({reason[:200]}). Every finished step is in the journals. Look for the first error above, then "
            "launch the same processes again with `resume_from_checkpoint=True`."
        )
        logger.error(message)  # now: a launcher that has noticed may end this process before the traceback is out
        return RankLost(message)

    def _gather(self, frame: bytes, about: str) -> list[bytes]:
        mine = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        wait_s = _FIRST_WAIT_S
        try:
            work: Any = distributed.all_gather(theirs, mine, group=self.group, async_op=True)
            while not work.is_completed():
                time.sleep(wait_s)
                wait_s = min(1.5 * wait_s, _LONGEST_WAIT_S)
            work.wait()
        except RuntimeError as error:
            raise self.lost(about, error) from error
        return [tensor.numpy().tobytes() for tensor in theirs]


ALONE = Ranks()
"""One process."""

_groups: dict[Any, Any] = {}  # of the default group that was there when it was made -> ours


def join_ranks(parallelism: Parallelism, *, patience_s: float) -> Ranks:
    """This process among those that a launcher has started; all of them have to call this.

    Args:
        patience_s: seconds to wait for a process that is alive and sends nothing.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return Ranks(parallelism=parallelism)
    world = distributed.group.WORLD
    if world not in _groups:
        # A few numbers a step: over the network's sockets they wait for no stream of the device.
        _groups[world] = distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
    place = Ranks(
        rank=distributed.get_rank(), size=distributed.get_world_size(), parallelism=parallelism, group=_groups[world]
    )
    machine = socket.gethostname()
    n_local = place.all_gather("names of machines", machine).count(machine)
    return Ranks(rank=place.rank, size=place.size, n_local=n_local, parallelism=parallelism, group=place.group)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
