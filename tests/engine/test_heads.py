"""Promises about heads: every family's loss without whole logits, and real logits for whoever looks at them."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.support.logits import LogitRows
from tests.support.models import NAMES, VOCABULARY, task_of, tiny_batch, tiny_model
from tests.support.toys import opened
from zo2trl.engine import deferred
from zo2trl.engine.deferred import DeferredRows
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.lockstep import Pass, traverse
from zo2trl.engine.precision import fp32_heads
from zo2trl.errors import TraversalError
from zo2trl.zo.estimators import CLEAN

CHUNK = 4
WITH_LOGITS = [name for name in NAMES if task_of(name) != "classes"]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip


def strongly_capped():
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


def with_aux_loss():
    config = MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=5.0
    )
    return MixtralForCausalLM(config)


def with_adapter(**where):
    model = tiny_model("llama")
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], **where))


def with_adapter_on_the_head():
    model = tiny_model("llama")
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"]))


ODD = {
    "Gemma 2 with a hard softcap": strongly_capped,
    "Cohere, which scales": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
    "Granite, which divides": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=13.0)),
    "Mixtral with an aux loss": with_aux_loss,
    "LoRA": with_adapter,
    "LoRA and a whole head": lambda: with_adapter(modules_to_save=["lm_head"]),
}


def batch_of(name="llama"):
    return tiny_batch(name, 3)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(deferred, "CHUNK_ROWS", CHUNK)


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


@dataclass
class Seen:
    loss: torch.Tensor
    logits: torch.Tensor
    n_rows: int


def whole(model, batch):
    """What the model gives with nothing but fp32 heads."""
    handles = fp32_heads(model)
    with LogitRows(model) as seen:
        outputs = model(**batch)
    for handle in handles:
        handle.remove()
    return Seen(outputs.loss, outputs.logits, seen.n_rows)


def in_chunks(model, batch):
    """The same without whole logits, and the logits for those who look at them later."""
    hook_heads(model)
    with LogitRows(model) as seen, deferring_logits():
        outputs = model(**batch)
        n_rows = seen.n_rows
    return Seen(outputs.loss, outputs.logits.clone(), n_rows)


def assert_same(got, expected):
    assert got.loss.dtype == expected.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    assert torch.equal(got.logits, expected.logits)
    assert expected.n_rows > CHUNK >= got.n_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_every_family_gives_its_loss_without_its_logits(name, dtype):
    model, batch = tiny_model(name, dtype=dtype), batch_of(name)
    assert_same(in_chunks(copy.deepcopy(model), batch), whole(model, batch))


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_a_model_does_to_its_logits_is_done(make):
    torch.manual_seed(0)
    model, batch = make().eval(), batch_of()
    expected = whole(model, batch)
    assert_same(in_chunks(model, batch), expected)


def test_an_aux_loss_is_still_added():
    torch.manual_seed(0)
    model, batch = with_aux_loss().eval(), batch_of()
    loss = in_chunks(model, batch).loss
    model.config.output_router_logits = False
    assert loss - in_chunks(model, batch).loss > 1.0


@pytest.mark.parametrize("n_items", [5, torch.tensor(7)], ids=["int", "tensor"])
def test_a_loss_over_a_given_number_of_items_is_the_same(n_items):
    model, batch = tiny_model("opt"), batch_of() | {"num_items_in_batch": n_items}
    assert_same(in_chunks(copy.deepcopy(model), batch), whole(model, batch))


@pytest.mark.parametrize("ignored", [slice(None), slice(0, 11), slice(3, None)], ids=["all", "most", "the end"])
def test_labels_that_do_not_count_do_not_count(ignored):
    model, batch = tiny_model("gpt2"), batch_of()
    batch["labels"][:, ignored] = -100
    torch.testing.assert_close(
        in_chunks(copy.deepcopy(model), batch).loss, whole(model, batch).loss, rtol=1e-6, atol=0, equal_nan=True
    )


def test_labels_that_are_shifted_already_are_taken_as_they_are():
    model, batch = tiny_model("llama"), batch_of()
    batch["shift_labels"] = batch["labels"].roll(3, 1)
    expected = whole(model, batch)
    assert_same(in_chunks(model, batch), expected)


def test_the_loss_does_not_depend_on_the_chunk(monkeypatch):
    model, batch = tiny_model("opt"), batch_of()
    expected = whole(model, batch).loss
    for chunk in (1, 5, 36, 1000):
        monkeypatch.setattr(deferred, "CHUNK_ROWS", chunk)
        torch.testing.assert_close(in_chunks(model, batch).loss, expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------- who gets real logits


def test_without_labels_the_logits_are_real():
    model, batch = tiny_model("llama"), batch_of()
    del batch["labels"]
    expected = model(**batch).logits
    hook_heads(model)
    with deferring_logits():
        outputs = model(**batch)
        assert torch.equal(outputs.logits.softmax(-1), expected.softmax(-1))
    assert outputs.loss is None and torch.equal(outputs.logits.clone(), expected)


def test_a_loss_of_ones_own_is_computed_from_real_logits():
    model, batch = tiny_model("llama"), batch_of()
    labels = batch.pop("labels")[:, 1:].flatten()

    def loss():
        logits = model(**batch).logits[:, :-1]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, label_smoothing=0.1)

    expected = loss()
    hook_heads(model)
    with deferring_logits():
        assert torch.equal(loss(), expected)


def test_a_hook_on_the_head_sees_real_logits_and_may_change_them():
    model, batch = tiny_model("llama"), batch_of()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.clamp(-0.1, 0.1))
    expected = whole(model, batch)
    got = in_chunks(model, batch)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)


def test_an_adapter_on_the_head_gets_real_hidden_states():
    model, batch = with_adapter_on_the_head().eval(), batch_of()
    expected = whole(model, batch)
    got = in_chunks(model, batch)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)


def test_logits_are_whole_where_they_are_wanted():
    model, batch = tiny_model("llama"), batch_of()
    hook_heads(model)
    with deferring_logits(wanted=False), deferring_logits():
        outputs = model(**batch)
    assert type(outputs.logits) is torch.Tensor


def test_nothing_is_put_off_outside_the_block_or_for_a_backward_pass():
    model, batch = tiny_model("llama"), batch_of()
    hook_heads(model)
    assert type(model(**batch).logits) is torch.Tensor
    with torch.enable_grad(), deferring_logits():
        outputs = model(**batch)
        assert type(outputs.logits) is torch.Tensor
        outputs.loss.backward()
    assert model.lm_head.weight.grad is not None


def test_logits_that_nobody_keeps_are_never_made():
    model, batch = tiny_model("llama"), batch_of()
    hook_heads(model)
    with LogitRows(model) as seen, deferring_logits():
        model(**batch).loss.item()
    assert seen.n_rows == CHUNK


def test_logits_that_are_kept_are_made_before_the_weights_change():
    model, batch = tiny_model("llama"), batch_of()
    expected = model(**batch).logits
    hook_heads(model)
    with deferring_logits():
        outputs = model(**batch)
    model.lm_head.weight.zero_()
    assert torch.equal(outputs.logits.clone(), expected)


def test_logits_of_a_pass_that_failed_are_refused():
    model, batch = tiny_model("llama"), batch_of()
    hook_heads(model)
    kept = []
    with pytest.raises(ZeroDivisionError), deferring_logits():
        kept.append(model(**batch).logits)
        raise ZeroDivisionError
    with pytest.raises(TraversalError, match="never made"):
        kept[0].sum()


def test_generation_inside_the_block_is_what_it_is_outside():
    model = tiny_model("llama")
    ids = batch_of()["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    hook_heads(model)
    with deferring_logits():
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


# --------------------------------------------------------------------------------------------------------- the hooks


def test_hooking_twice_does_no_harm_and_can_be_undone():
    model = tiny_model("opt")
    handles = hook_heads(model)
    assert hook_heads(model) == []
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [lambda: tiny_model("roberta-classes"), lambda: nn.Linear(2, 2)])
def test_a_model_without_a_vocabulary_is_left_alone(make):
    model = make()
    hook_heads(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_hooked_model_is_copied_pickled_and_saved_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # the progress bar of loading would leave a thread
    model, batch = tiny_model("llama"), batch_of()
    expected = model(**batch).loss
    hook_heads(model)
    model.save_pretrained(tmp_path / "saved")
    pickle.dump(model, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.load(file), type(model).from_pretrained(tmp_path / "saved")):
        assert torch.equal(other(**batch).loss, expected)
        assert torch.equal(in_chunks(other, batch).logits, model(**batch).logits)


# ------------------------------------------------------------------------------------------------ inside a traversal


def test_a_block_entered_round_a_traversal_does_not_reach_into_its_passes():
    """A pass has weights of its own: what it has put off must be made before it ends."""
    model, batch = tiny_model("llama"), batch_of()
    hook_heads(model)

    def run():
        return type(model(**batch).logits)

    with deferring_logits():
        assert run() is DeferredRows
        [seen] = traverse([Pass(run, CLEAN, first_point=0)], lambda point, waiting: [one.resume() for one in waiting])
    assert seen is torch.Tensor


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5"])
@pytest.mark.parametrize("tier", ["gpu", "disk"])
def test_losses_and_kept_logits_of_a_step_belong_to_their_probe(tmp_path, name, tier):
    model, batches = tiny_model(name), [tiny_batch(name, 3, seed=seed) for seed in (0, 1)]

    def run(deferring):
        kept = []

        def loss(batch):
            with deferring_logits(wanted=deferring):
                outputs = model(**batch, use_cache=False)
                kept.append(outputs.logits)
            return outputs.loss

        with opened(model, tmp_path / str(deferring), tier=tier) as engine:
            handles = hook_heads(model)
            estimate = engine.step([lambda batch=batch: loss(batch) for batch in batches], step=0)
        for handle in handles:
            handle.remove()
        return estimate, [logits.clone() for logits in kept]

    (plain, plain_logits), (chunked, chunked_logits) = run(False), run(True)
    assert chunked.loss_plus == pytest.approx(plain.loss_plus, rel=1e-6)
    assert chunked.loss_minus == pytest.approx(plain.loss_minus, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(chunked_logits, plain_logits, strict=True))
    assert not torch.equal(chunked_logits[0], chunked_logits[2])
