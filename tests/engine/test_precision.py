"""Promises about losses: heads of 16-bit models answer in fp32, and a 16-bit loss is refused with the reason."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.toys import assert_same_weights, batch, opened, plain_run, toy
from zo2trl.engine.precision import fp32_heads
from zo2trl.errors import LossPrecisionError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=20))


def classifier():
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, vocab_size=20, num_labels=2, pad_token_id=0))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, vocab_size=20, num_labels=2))


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    )


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])


def inputs(make):
    labels = torch.tensor([0, 1]) if make in (classifier, roberta) else IDS
    return {"input_ids": IDS, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [llama, classifier, roberta, t5])
def test_the_loss_of_a_16_bit_model_is_fp32(make, dtype):
    model = make().to(dtype).eval()
    fp32_heads(model)
    loss = model(**inputs(make)).loss
    assert loss.dtype == torch.float32
    assert loss.item() != loss.to(dtype).item(), "and has more digits than a 16-bit loss could"


@pytest.mark.parametrize("make", [llama, classifier, roberta, t5])
def test_an_fp32_model_gives_the_loss_it_always_gave(make):
    model = make().eval()
    before = model(**inputs(make)).loss
    fp32_heads(model)
    assert torch.equal(model(**inputs(make)).loss, before)


def test_widening_twice_does_no_harm():
    model = roberta().to(torch.bfloat16).eval()
    fp32_heads(model)
    n_hooks = sum(len(m._forward_hooks) for m in model.modules())
    fp32_heads(model)
    assert sum(len(m._forward_hooks) for m in model.modules()) == n_hooks


def test_a_model_without_a_head_is_left_alone():
    fp32_heads(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_loss_is_refused_with_its_dtype_and_the_cure(tmp_path, dtype):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        with pytest.raises(LossPrecisionError, match=rf"{dtype}.*float32"):
            engine.step([lambda: model(batch()).to(dtype)], step=0)
        assert engine.store.journal.records == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_losses_are_taken(tmp_path, dtype):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        assert engine.step([lambda: model(batch()).to(dtype)], step=0).is_finite


# ------------------------------------------------------------------------------------------------------------ autocast


@contextmanager
def bf16(*, cache: bool):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        yield


@contextmanager
def nested():
    with bf16(cache=False), bf16(cache=True):
        yield


CASTS = {"with cache": partial(bf16, cache=True), "without cache": partial(bf16, cache=False), "nested": nested}


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "a linear before the blocks"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_bf16_autocast_inside_a_pass_gives_the_losses_of_separate_forwards(tmp_path, cast, projected, granularity):
    model = toy(projected=projected, tied=True)
    losses, weights = plain_run(model, steps=3, around=cast)

    def loss(step):
        with cast():
            return model(batch(step))

    with opened(model, tmp_path / "store", tier="cpu", granularity=granularity) as engine:
        seen = []
        for step in range(3):
            estimate = engine.step([lambda step=step: loss(step)], step=step)
            engine.commit(learning_rate=0.005, weight_decay=0.0)
            seen.append((estimate.loss_plus, estimate.loss_minus))
        assert seen == losses
        engine.flush()
        assert_same_weights(model, weights)
    assert losses != plain_run(toy(projected=projected, tied=True), steps=3)[0], "autocast did change something"


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_bf16_autocast_around_a_whole_traversal_gives_the_same_losses(tmp_path, cast):
    model = toy(projected=True)
    losses, _ = plain_run(model, steps=2, around=cast)
    with opened(model, tmp_path / "store", tier="cpu") as engine:
        for step in range(2):
            with cast():
                model(batch())  # fills the cache with clean weights
                estimate = engine.step([lambda step=step: model(batch(step))], step=step)
            engine.commit(learning_rate=0.005, weight_decay=0.0)
            assert (estimate.loss_plus, estimate.loss_minus) == losses[step]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_many_batches_under_autocast_do_not_see_each_others_weights(tmp_path, cast):
    model = toy(projected=True)

    def loss(i):
        with cast():
            return model(batch(i))

    with opened(model, tmp_path / "store", tier="cpu", num_directions=2) as engine:
        together = engine.step([lambda i=i: loss(i) for i in range(3)], step=0)
        alone = engine.step([lambda i=i: loss(i) for i in range(3)], step=0, passes_per_traversal=1)
        assert together == alone
