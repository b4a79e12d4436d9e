"""S3: safetensors files that lie about what they hold. Each is refused by name, at once, and in little memory."""

import copy
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_model
from zo2trl.checkpoints.load import load_mapped
from zo2trl.errors import CheckpointError

MAX_CPU_S = 10.0  # tells a reader that follows a bomb from a slow machine
MAX_EXTRA_BYTES = 100 * 2**20

Header = dict[str, Any]


class Parts:
    """A good file in pieces."""

    def __init__(self, folder: Path) -> None:
        model = tiny_model("llama")
        model.save_pretrained(folder)
        self.config = (folder / "config.json").read_bytes()
        self.whole = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", self.whole[:8])
        self.header: Header = json.loads(self.whole[8 : 8 + length])
        self.data = self.whole[8 + length :]

    def with_header(self, change: Callable[[Header], Any]) -> bytes:
        header = copy.deepcopy(self.header)
        change(header)
        return with_text(json.dumps(header).encode(), self.data)


def with_text(text: bytes, data: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("good"))


FIRST, SECOND = "lm_head.weight", "model.embed_tokens.weight"


def entry(**values: Any) -> Callable[[Header], Any]:
    return lambda header: header[FIRST].update(values)


def n_bytes(header: Header) -> int:
    start, end = header[FIRST]["data_offsets"]
    return end - start


def of_size(dtype: str, bits: int) -> Callable[[Header], Any]:
    """As many elements of another type as fit the bytes."""
    return lambda header: header[FIRST].update(dtype=dtype, shape=[n_bytes(header) * 8 // bits])


def shift_last(header: Header) -> None:
    last = max((row for row in header.values() if "data_offsets" in row), key=lambda row: row["data_offsets"][1])
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]


WHOLE_FILES: dict[str, Callable[[Parts], bytes]] = {
    "nothing": lambda p: b"",
    "seven bytes": lambda p: p.whole[:7],
    "a header of 2^64-1 bytes": lambda p: with_text(b"{}", p.data, length=2**64 - 1),
    "a header of 2^63 bytes": lambda p: with_text(b"{}", p.data, length=2**63),
    "a header longer than the file": lambda p: with_text(b"{}", p.data, length=len(p.whole) + 1),
    "a header longer than allowed": lambda p: with_text(b"{}", p.data, length=100_000_001),
    "a header of no bytes": lambda p: with_text(b"", p.data),
    "a header of zeros": lambda p: with_text(bytes(2000), p.data),
    "a header that is no text": lambda p: with_text(b"\xff" * 2000, p.data),
    "a header 50,000 deep": lambda p: with_text(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, p.data),
    "a header bomb": lambda p: with_text(b'{"__metadata__":{"x":"' + b"x" * 99_000_000 + b'"}}', p.data),
    "a pickle": lambda p: b"\x80\x02" + p.whole,
    "a zip archive": lambda p: b"PK\x03\x04" + p.whole,
    "a pointer of git lfs": lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n",
    "one byte missing": lambda p: p.whole[:-1],
    "half missing": lambda p: p.whole[: len(p.whole) // 2],
    "bytes behind the end": lambda p: p.whole + bytes(8),
}
HEADERS: dict[str, Callable[[Header], Any]] = {
    "an overlap": lambda h: h[SECOND].update(data_offsets=h[FIRST]["data_offsets"]),
    "a gap": shift_last,
    "a hole": lambda h: h.pop(SECOND),
    "an end before its start": lambda h: h[FIRST]["data_offsets"].reverse(),
    "negative offsets": entry(data_offsets=[-4, 0]),
    "a shape that overflows": entry(shape=[2**62, 8]),
    "a shape that overflows to zero": entry(shape=[2**32, 2**32]),
    "a shape of enormous numbers": entry(shape=[10**30]),
    "a negative shape": entry(shape=[-1, 8]),
    "a broken shape": entry(shape=[1.5]),
    "an empty shape": entry(shape=[]),
    "a shape turned round": lambda h: h[FIRST]["shape"].reverse(),
    "a shape without rows": of_size("F32", 32),
    "an unknown dtype": entry(dtype="F31"),
    "no dtype": lambda h: h[FIRST].pop("dtype"),
    "half the dtype": of_size("F16", 16),
    "twice the dtype": of_size("F64", 64),
    "bytes": of_size("U8", 8),
    "truths": of_size("BOOL", 8),
    "complex numbers": of_size("C64", 64),
    "numbers of 8 bits": of_size("F8_E4M3", 8),
    "numbers of 4 bits": of_size("F4", 4),
    "whole numbers of the right size": entry(dtype="I32"),
    "metadata that is no text": lambda h: h.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("name", [*WHOLE_FILES, *HEADERS])
def test_a_lying_file_is_refused_at_once_and_in_little_memory(
    name: str, dtype: torch.dtype | None, parts: Parts, tmp_path: Path
) -> None:
    content = WHOLE_FILES[name](parts) if name in WHOLE_FILES else parts.with_header(HEADERS[name])
    (tmp_path / "config.json").write_bytes(parts.config)
    (tmp_path / "model.safetensors").write_bytes(content)
    del content
    chosen = {} if dtype is None else {"dtype": dtype}
    started_s = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as refusal:
            load_mapped(tmp_path, **chosen)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started_s <= MAX_CPU_S
    assert peak <= MAX_EXTRA_BYTES
    assert str(tmp_path / "model.safetensors") in str(refusal.value) or FIRST in str(refusal.value)


def test_the_good_file_is_loaded(parts: Parts, tmp_path: Path) -> None:
    """Else everything above would pass for the wrong reason."""
    (tmp_path / "config.json").write_bytes(parts.config)
    (tmp_path / "model.safetensors").write_bytes(parts.with_header(lambda header: None))
    model = load_mapped(tmp_path).model
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


CONFIGS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "more layers than numbers": {"num_hidden_layers": 2**70},
    "heads that do not divide": {"num_attention_heads": 7},
    "no heads": {"num_attention_heads": 0},
    "negative sizes": {"hidden_size": -32},
    "a text for a size": {"hidden_size": "32"},
    "another size": {"hidden_size": 64},
    "an unknown kind": {"model_type": "no-such-model"},
    "a kind that is a path": {"model_type": "../../x"},
    "a class that is none": {"architectures": [7]},
    "code from the hub for attention": {"attn_implementation": "somebody/kernel"},
    "code that comes with it": {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
    "an unknown dtype": {"dtype": "float17"},
    "a number for a dtype": {"dtype": 16},
    "a pickle for the weights": {"transformers_weights": "pytorch_model.bin"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lying_configuration_is_refused_at_once(name: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(parts.config) | CONFIGS[name]))
    (tmp_path / "model.safetensors").write_bytes(parts.whole)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    started_s = time.process_time()
    with pytest.raises(CheckpointError):
        load_mapped(tmp_path)
    assert time.process_time() - started_s <= MAX_CPU_S
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["__doc__", "Trainer", "pipeline", "utils", "NoSuchModel"])
def test_an_architecture_that_is_no_model_is_not_called(name: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(parts.config) | {"architectures": [name]}))
    (tmp_path / "model.safetensors").write_bytes(parts.whole)
    assert type(load_mapped(tmp_path).model).__name__ == "LlamaForCausalLM"
