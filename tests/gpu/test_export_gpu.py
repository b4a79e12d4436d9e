"""A run made on a GPU is exported on machines with and without one: the same file, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.made_store import assert_same_files, make_run, saver
from tests.support.models import tiny_model
from zo2trl.checkpoints.export import export_store
from zo2trl.errors import StoreForeign

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def made_on(device: str, folder: Path, *, dtype: torch.dtype, **choices: Any) -> Path:
    """A run of ten steps, without versions of units but the first, and the model after it."""
    model = tiny_model("llama-tied", dtype=dtype)
    chosen = {"device": device, "tier": "cpu", "max_replay_s": 1e9} | choices
    make_run(model, folder / "store", steps=range(10), each=saver(model, folder), **chosen)
    return folder / "store"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize(
    ("dtype", "choices"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.float16, {"rounding": "nearest"}),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def test_cpu_and_gpu_export_the_same_file(
    tmp_path: Path, device: str, direction: str, dtype: torch.dtype, choices: dict[str, Any]
) -> None:
    store = made_on(device, tmp_path, dtype=dtype, direction=direction, **choices)
    for where in ("cpu", "cuda"):
        export_store(store, tmp_path / where, device=where)
        assert_same_files(tmp_path / where, tmp_path / "saved-10")


def test_the_stream_of_torchs_generators_is_repeated_on_its_own_device_only(tmp_path: Path) -> None:
    store = made_on("cuda", tmp_path, dtype=torch.float32, direction="mezo")
    export_store(store, tmp_path / "out", device="cuda")
    assert_same_files(tmp_path / "out", tmp_path / "saved-10")
    with pytest.raises(StoreForeign, match="--device cuda"):
        export_store(store, tmp_path / "other", device="cpu", step=5)
