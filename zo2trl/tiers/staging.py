"""Staging: the last hop between host memory and device slots, in both directions.

On a CPU-only machine a slot is host memory: reads land in it directly and nothing is staged. With a GPU, a segment
from disk goes through a few pinned pieces, each uploaded as soon as it is full, and likewise one that goes to disk;
copies run on streams of their own and are ordered by events only.

Does not: open files or compare checksums; a `Reading` does.
Invariants:
- A staging piece is reused only after the copy that reads or fills it has finished.
- All copies into slots run on one stream: that of a load that failed ends before that of the slot's next tenant.
- Pieces that wait for a slot are others than those that loads with a slot need, so that these always get on.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, TypeVar

import torch

from zo2trl.tiers.host import pin, unpin
from zo2trl.tiers.readers import N_READ_THREADS, READ_PIECE_BYTES, Readers, aligned_bytes
from zo2trl.tiers.ring import Slot
from zo2trl.tiers.tier import Reading, host_bytes
from zo2trl.tiers.uploader import DirectUploader, Uploader

__all__ = ["Begun", "Staging"]

N_PIECES_UP = N_READ_THREADS + 2  # those that are being filled, and others whose copies wait for their slot
N_PIECES_DOWN = 2  # one is written to disk while the next one comes


R = TypeVar("R", bound=Reading)


class _Piece:
    """Staging memory, and the last copy from or to it. Waiting for that sleeps instead of spinning."""

    def __init__(self, memory: torch.Tensor, *, on_gpu: bool) -> None:
        self.memory = memory
        self.copied = torch.cuda.Event(blocking=True) if on_gpu else None

    def fill_from(self, source: torch.Tensor, *, stream: torch.cuda.Stream | None) -> None:
        """Copy device memory into the beginning of this piece."""
        target = self.memory[: source.numel()]
        if stream is None or self.copied is None:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            self.copied.record(stream)

    def wait(self) -> None:
        """Wait for the last copy."""
        if self.copied is not None:
            self.copied.synchronize()


class _Part(NamedTuple):
    piece: _Piece
    job: Future[None]  # fills it


class Begun(Generic[R]):
    """A segment that is being read from disk; parts of it may be read before there is a slot. `open` starts it."""

    def __init__(self, open: Callable[[], R], *, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.parts: dict[int, _Part] = {}  # byte offset -> what is, or will be, in staging memory
        self._open, self._lock = open, threading.Lock()
        self._reading: R | None = None

    @property
    def reading(self) -> R:
        """The reading, which the first thread that needs it opens."""
        with self._lock:
            if self._reading is None:
                self._reading = self._open()
            return self._reading


class Staging:
    """Copies between host and device.

    Args:
        n_bytes: the largest segment that comes from or goes to disk (0: none).
        device: where slots are.
        ahead_bytes: staging memory for what is read before it has a slot.
        in_pieces: whether what comes from disk is staged. None: if slots are on a GPU.
        uploader: copies into slots; None: a direct one.
    """

    def __init__(
        self,
        n_bytes: int,
        *,
        device: torch.device,
        ahead_bytes: int = 0,
        in_pieces: bool | None = None,
        uploader: Uploader | None = None,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self.ahead_bytes = ahead_bytes
        self._uploader = uploader or DirectUploader(device)
        self._down = torch.cuda.Stream(device) if self._on_gpu else None
        self._readers = Readers()
        self.on_room: Callable[[], object] = lambda: None  # called, in any thread, when more can be read ahead
        self._memory: torch.Tensor | None = None
        self._free: SimpleQueue[_Piece] = SimpleQueue()
        self._ahead: SimpleQueue[_Piece] = SimpleQueue()
        self._down_pieces: list[_Piece] = []
        self._in_pieces = self._on_gpu if in_pieces is None else in_pieces
        if n_bytes and self._in_pieces:
            self._make_pieces(min(n_bytes, READ_PIECE_BYTES), ahead_bytes=ahead_bytes)

    def _make_pieces(self, n_bytes: int, *, ahead_bytes: int) -> None:
        self._memory = aligned_bytes((N_PIECES_DOWN + N_PIECES_UP + ahead_bytes // n_bytes) * n_bytes)
        if self._on_gpu:
            pin(self._memory)
        pieces = [_Piece(memory, on_gpu=self._on_gpu) for memory in self._memory.split(n_bytes)]
        self._down_pieces = pieces[:N_PIECES_DOWN]
        for number, piece in enumerate(pieces[N_PIECES_DOWN:]):
            (self._free if number < N_PIECES_UP else self._ahead).put(piece)

    # -- up

    def upload(self, source: torch.Tensor, target: torch.Tensor, slot: Slot) -> None:
        """Host -> slot. `source` must stay unchanged until the slot's `copied` event."""
        uploader, share = self._uploader, self._uploader.share(target.numel())
        uploader.begin(slot)
        uploader.copy(source[share], target[share])
        uploader.finish(slot)

    def read_ahead(self, begun: Begun) -> bool:
        """Read on before there is a slot, as far as there is memory for that; False if it does not reach the end."""
        for start in range(len(begun.parts) * READ_PIECE_BYTES, begun.n_bytes, READ_PIECE_BYTES):
            try:
                piece = self._ahead.get_nowait()
            except Empty:
                return False
            staged = piece.memory[: begun.n_bytes - start]
            job = self._readers.submit(partial(self._fill, begun, piece, staged, start=start))
            begun.parts[start] = _Part(piece, job)
        return True

    def abandon(self, begun: Begun) -> None:
        """Give back the memory of parts that were read ahead and are not needed."""
        while begun.parts:
            _, part = begun.parts.popitem()
            part.job.cancel()
            part.job.add_done_callback(lambda job, piece=part.piece: self._give_back_ahead(piece))

    def read_and_upload(self, begun: Begun, target: torch.Tensor, slot: Slot) -> None:
        """Disk -> slot. On return every byte was read and found right, and its copy is enqueued."""
        reading = begun.reading
        if not self._in_pieces:
            self._readers.run(lambda start, stop: reading.fill(target[start:stop], start), n_bytes=begun.n_bytes)
        else:
            self._uploader.begin(slot)
            first = len(begun.parts) * READ_PIECE_BYTES
            others = self._readers.begin(
                lambda start, stop: self._read_and_upload_piece(begun, target[start:stop], start),
                first=first,
                n_bytes=begun.n_bytes,
            )
            try:
                self._upload_parts(begun, target)
            except BaseException:
                others.give_up()
                with suppress(BaseException):  # the first failure, in the order of bytes, is raised
                    others.end()
                raise
            finally:
                self.abandon(begun)
            others.end()
            self._uploader.finish(slot)
        reading.finish()

    def _fill(self, begun: Begun, piece: _Piece, staged: torch.Tensor, *, start: int) -> None:
        piece.wait()
        begun.reading.fill(staged, start)

    def _upload_parts(self, begun: Begun, target: torch.Tensor) -> None:
        """Upload what was read ahead, in the fetch thread: a reader that waited for another one would not read."""
        for start in sorted(begun.parts):
            part = begun.parts.pop(start)
            staged = part.piece.memory[: min(READ_PIECE_BYTES, begun.n_bytes - start)]
            try:
                part.job.result()
                self._uploader.copy(staged, target[start : start + staged.numel()], copied=part.piece.copied)
            finally:
                self._give_back_ahead(part.piece)

    def _read_and_upload_piece(self, begun: Begun, target: torch.Tensor, start: int) -> None:
        piece = self._free.get()
        try:
            staged = piece.memory[: target.numel()]
            self._fill(begun, piece, staged, start=start)
            self._uploader.copy(staged, target, copied=piece.copied)
        finally:
            self._free.put(piece)

    def _give_back_ahead(self, piece: _Piece) -> None:
        self._ahead.put(piece)
        self.on_room()

    # -- down

    @contextmanager
    def downloaded(self, weights: torch.Tensor, ready: torch.Event | None) -> Iterator[torch.Tensor]:
        """Slot -> wherever the block copies them: on the download stream, after `ready`, which marks the last kernel
        that wrote the slot; complete at the end of the block.
        """
        if self._down is None:
            yield weights
            return
        assert ready is not None
        with torch.cuda.stream(self._down):
            self._down.wait_event(ready)
            yield weights
            self._down.synchronize()

    def download(self, weights: torch.Tensor, ready: torch.Event | None) -> Iterator[tuple[int, memoryview]]:
        """Slot -> host memory: (byte offset, bytes that are valid until the next piece), for one writer at a time.

        The next piece is on its way while the last one is looked at. `ready` is as in `downloaded`.
        """
        if not self._in_pieces:
            yield 0, host_bytes(weights)
            return
        if self._down is not None:
            assert ready is not None
            self._down.wait_event(ready)
        sent = [weights[start : start + READ_PIECE_BYTES] for start in range(0, weights.numel(), READ_PIECE_BYTES)]
        self._send(sent, 0)
        for number, part in enumerate(sent):
            self._send(sent, number + 1)
            piece = self._down_pieces[number % N_PIECES_DOWN]
            piece.wait()
            yield number * READ_PIECE_BYTES, host_bytes(piece.memory[: part.numel()])

    def _send(self, parts: list[torch.Tensor], number: int) -> None:
        if number < len(parts):
            piece = self._down_pieces[number % N_PIECES_DOWN]
            piece.fill_from(parts[number], stream=self._down)

    def close(self) -> None:
        """Stop the threads and unpin the memory, when no copy uses it any more; idempotent."""
        self._readers.close()
        self._uploader.synchronize()
        if self._down is not None:
            self._down.synchronize()
        memory, self._memory = self._memory, None
        if memory is not None and self._on_gpu:
            unpin(memory)
