"""Promises of the activation bound: at least one pass, fewer of them for longer batches, never more than the limit."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, T5Config

from zo2trl.engine.activations import MAX_PASSES, passes_per_traversal

STORE = SimpleNamespace(device=torch.device("cpu"))  # only the device is looked at


def model(config):
    module = nn.Module()
    module.config = config
    return module


def passes(tokens, *, config=None):
    config = config or LlamaConfig(hidden_size=4096)
    inputs = {"input_ids": torch.empty(1, tokens, device="meta"), "labels": None}
    return passes_per_traversal(STORE, model(config), inputs)


@pytest.fixture(autouse=True)
def one_gigabyte_free(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))


def test_there_is_always_room_for_one_pass():
    assert passes(10**9) == 1


def test_there_is_a_limit_however_small_the_batch():
    assert passes(1) == MAX_PASSES


def test_twice_the_tokens_half_the_passes():
    assert passes(64) // 2 == passes(128) > 1


def test_hidden_states_held_by_all_passes_fit_half_of_what_is_free():
    tokens, width = 128, 4096
    assert passes(tokens) * tokens * width * 4 <= 0.5 * 10**9


@pytest.mark.parametrize(
    "config", [OPTConfig(hidden_size=4096, word_embed_proj_dim=4096), T5Config(d_model=4096)], ids=["opt", "t5"]
)
def test_the_width_is_found_under_every_name(config):
    assert passes(64, config=config) == passes(64)


def test_an_unknown_model_counts_as_a_wide_one():
    inputs = {"x": torch.empty(64, device="meta")}
    assert passes_per_traversal(STORE, nn.Linear(2, 2), inputs) == passes(64)
