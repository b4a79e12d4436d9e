"""Promises of stored forms: their names are kept, and a plain tensor is used where it is stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.toys import opened, toy
from zo2trl.amp.codecs import PLAIN, Plain, codec_of, is_known

EXACT = [PLAIN]  # every codec that gives back what was encoded, whatever it was


@pytest.mark.parametrize("codec", EXACT, ids=lambda codec: codec.identity)
@given(st.binary(min_size=2, max_size=400))
def test_an_exact_codec_gives_back_every_bit(codec, data):
    values = torch.frombuffer(bytearray(data[: len(data) // 2 * 2]), dtype=torch.uint8).view(torch.bfloat16)
    stored = codec.encode(values)
    assert stored.dtype == torch.uint8 and stored.shape == (codec.stored_bytes(values.shape, values.dtype),)
    decoded = torch.empty_like(values)
    codec.decode(stored, decoded)
    assert torch.equal(decoded.view(torch.int16), values.view(torch.int16))


def test_plain_bytes_are_encoded_without_a_copy():
    values = torch.arange(10.0)
    assert PLAIN.encode(values).data_ptr() == values.data_ptr()


def test_a_form_is_found_by_its_name_and_an_unknown_one_is_not():
    assert isinstance(codec_of("plain"), Plain) and is_known("plain")
    assert not is_known("int3")
    with pytest.raises(KeyError):
        codec_of("int3")


def test_the_journal_says_which_codec_a_run_used(tmp_path):
    with opened(toy(), tmp_path / "store") as engine:
        assert engine.store.journal.header["codec"] == PLAIN.identity
