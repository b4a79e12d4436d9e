"""Uploaders: how a segment's bytes in host memory reach a slot on the device.

With one GPU, or without a fast link between several, each process copies all of a segment (`DirectUploader`). Where N
processes share one copy in host memory, each may copy its `share` of the bytes and collect the others over the link
between the GPUs in `finish`, after which the slot looks the same.

Does not: choose slots, or read files.
Invariant: all copies into slots are enqueued on one stream, in the order of the calls, so that a load that failed ends
before the load of the slot's next tenant.
"""

from typing import Protocol

import torch

from zo2trl.tiers.ring import Slot

__all__ = ["DirectUploader", "Uploader"]


class Uploader(Protocol):
    """Fills a slot: `begin`, then `copy` for every piece of the process's share, then `finish`.

    Fetch threads call it. Segments in host memory come from one thread, in the order in which they are needed.
    """

    def share(self, n_bytes: int) -> slice:
        """The bytes of a segment of `n_bytes` that this process copies."""
        ...

    def begin(self, slot: Slot) -> None:
        """Let what follows wait for the last kernels that read what was in the slot."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor, *, copied: torch.cuda.Event | None = None) -> None:
        """Copy host bytes, which must stay unchanged until then, into part of a slot, and record `copied` behind."""
        ...

    def finish(self, slot: Slot) -> None:
        """Set the slot's `copied` event: all of the segment is there when it has happened."""
        ...

    def synchronize(self) -> None:
        """Wait until every copy has ended."""
        ...


class DirectUploader:
    """Copies every byte itself, on a stream of its own; without a GPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def share(self, n_bytes: int) -> slice:
        """All of them."""
        return slice(0, n_bytes)

    def begin(self, slot: Slot) -> None:
        """See `Uploader.begin`."""
        for event in slot.released:
            assert self._stream is not None
            self._stream.wait_event(event)

    def copy(self, source: torch.Tensor, target: torch.Tensor, *, copied: torch.cuda.Event | None = None) -> None:
        """See `Uploader.copy`."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            if copied is not None:
                copied.record(self._stream)

    def finish(self, slot: Slot) -> None:
        """See `Uploader.finish`."""
        if self._stream is not None:
            slot.copied = self._stream.record_event()

    def synchronize(self) -> None:
        """See `Uploader.synchronize`."""
        if self._stream is not None:
            self._stream.synchronize()
