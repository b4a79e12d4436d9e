"""The three tiers of one store, by name."""

from contextlib import ExitStack

from zo2trl.planning.budgets import TierName
from zo2trl.tiers.device import DeviceTier
from zo2trl.tiers.disk import DiskTier
from zo2trl.tiers.host import HostTier

__all__ = ["AnyTier", "Tiers"]

AnyTier = DeviceTier | HostTier | DiskTier


class Tiers:
    """A home for each tier name."""

    def __init__(self, *, gpu: DeviceTier, cpu: HostTier, disk: DiskTier) -> None:
        self.gpu, self.cpu, self.disk = gpu, cpu, disk

    def __getitem__(self, name: TierName) -> AnyTier:
        tiers: dict[TierName, AnyTier] = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}
        return tiers[name]

    def close(self) -> None:
        """Release memory, maps and files."""
        with ExitStack() as everything:
            for tier in (self.gpu, self.cpu, self.disk):
                everything.callback(tier.close)
