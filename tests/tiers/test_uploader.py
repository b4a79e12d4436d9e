"""Promises of uploaders: a slot holds the whole segment however its bytes are shared out among uploads."""

import pytest
import torch

from tests.support.stores import CPU
from zo2trl.tiers.ring import Region, Slot
from zo2trl.tiers.staging import Staging
from zo2trl.tiers.uploader import DirectUploader, Uploader

N_BYTES = 1000


class Halves(DirectUploader):
    """Copies the first half; the other one comes in `finish`, as from another process."""

    def __init__(self, other: torch.Tensor) -> None:
        super().__init__(CPU)
        self._other = other
        self.n_copied = 0

    def share(self, n_bytes: int) -> slice:
        return slice(0, n_bytes // 2)

    def copy(self, source: torch.Tensor, target: torch.Tensor, *, copied: torch.cuda.Event | None = None) -> None:
        self.n_copied += source.numel()
        super().copy(source, target, copied=copied)

    def finish(self, slot: Slot) -> None:
        slot.buffer[N_BYTES // 2 :].copy_(self._other[N_BYTES // 2 :])
        super().finish(slot)


@pytest.mark.parametrize("kind", ["direct", "halves"])
def test_a_segment_arrives_whole_through_any_uploader(kind):
    source = torch.arange(N_BYTES).to(torch.uint8)
    halves = Halves(source.clone())
    uploader: Uploader = DirectUploader(CPU) if kind == "direct" else halves
    staging = Staging(0, device=CPU, uploader=uploader)
    slot = Slot(Region(0, N_BYTES), torch.zeros(N_BYTES, dtype=torch.uint8))
    staging.upload(source, slot.buffer, slot)
    assert torch.equal(slot.buffer, source)
    assert kind == "direct" or halves.n_copied == N_BYTES // 2
    staging.close()
