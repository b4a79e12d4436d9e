"""First weights: notes the checksums of the weights a run begins with, and compares them when the run goes on.

Does not: keep the checksums (layout/layout_file.py does).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from zo2trl.errors import StoreCorrupt, StoreForeign
from zo2trl.layout.layout import TensorSpec, Unit
from zo2trl.tiers.tier import Source, encoded, host_bytes
from zo2trl.tiers.unit_files import padded_crc

__all__ = ["comparing", "noting", "refuse_lost_base"]


def noting(source: Source, crcs: dict[int, int]) -> Source:
    """The source, which puts tensor id -> CRC32 of the padded bytes of all it gives into `crcs`."""

    def noted(spec: TensorSpec) -> torch.Tensor:
        value = encoded(spec, source(spec))
        crcs[spec.tensor_id] = padded_crc(spec, host_bytes(value))
        return value

    return noted


def comparing(source: Source, crcs: Mapping[int, int], store: Path) -> Source:
    """The source, which raises `StoreForeign` where it gives other weights than those the store began with."""

    def compared(spec: TensorSpec) -> torch.Tensor:
        value = encoded(spec, source(spec))
        found = padded_crc(spec, host_bytes(value))
        if found != crcs[spec.tensor_id]:
            raise StoreForeign(
                f"{spec.name} is not what it was when the run in {store} began (CRC {found:08x}, then "
                f"{crcs[spec.tensor_id]:08x}), and the run continues from those weights. Load the same model as then, "
                "or start anew with another `store_dir`."
            )
        return value

    return compared


def refuse_lost_base(unit: Unit, store: Path) -> None:
    """For a unit without a version, whose first weights no checkpoint holds, if they have moved since."""
    if unit.is_trained:
        raise StoreCorrupt(
            f"The journal in {store} names no version of unit {unit.name}, whose first weights are nowhere else: it "
            "was cut or replaced. Restore the journal from a copy."
        )
