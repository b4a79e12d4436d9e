"""Promises of transfer codecs: what is trained on arrives exactly as it was stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.toys import opened, toy
from zo2trl.amp import codecs
from zo2trl.amp.codecs import PLAIN

EXACT = [PLAIN]  # every codec that trainable segments may use


@pytest.mark.parametrize("codec", EXACT, ids=lambda codec: codec.identity)
@given(st.binary(min_size=1, max_size=400))
def test_an_exact_codec_gives_back_the_stored_bytes(codec, data):
    stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert codec.wire_bytes(len(data)) == len(data)
    assert torch.equal(codec.decode(stored), stored)


def test_plain_bytes_are_decoded_without_a_copy():
    wire = torch.arange(10, dtype=torch.uint8)
    assert PLAIN.decode(wire).data_ptr() == wire.data_ptr()


def test_every_codec_has_a_name_of_its_own():
    names = [value.identity for value in vars(codecs).values() if isinstance(value, codecs.Plain)]
    assert len(set(names)) == len(names) and "plain" in names


def test_the_journal_says_which_codec_a_run_used(tmp_path):
    with opened(toy(), tmp_path / "store") as engine:
        assert engine.store.journal.header["codec"] == PLAIN.identity
