"""Losses without whole logits on a GPU: the number, the memory, and no waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from zo2trl.engine.heads import deferring_logits, hook_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N_TOKENS, VOCABULARY, MIB = 2048, 50272, 1 << 20
WHOLE_FP32 = N_TOKENS * VOCABULARY * 4


def model(dtype: torch.dtype) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=256, ffn_dim=512, num_hidden_layers=1, num_attention_heads=4,
        word_embed_proj_dim=256, max_position_embeddings=N_TOKENS, use_cache=False, init_std=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = OPTForCausalLM(config).to(dtype).eval()
    hook_heads(made)
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, VOCABULARY, (1, N_TOKENS), generator=torch.Generator().manual_seed(0)).cuda()
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 7 == 0, -100)}


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Memory allocated on top of what was there, at most."""
    found: list[int] = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found.append(torch.cuda.max_memory_allocated() - before)


# In 16 bit a matrix multiplication of fewer rows may round a logit the other way.
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)])
def test_the_loss_is_that_of_whole_logits_in_a_quarter_of_the_memory(dtype: torch.dtype, rel: float) -> None:
    opt, inputs = model(dtype), batch()
    with torch.no_grad():
        opt(**inputs)  # warm: libraries take workspaces
        with peak_bytes() as whole:
            expected = opt(**inputs).loss.item()
        with deferring_logits(), peak_bytes() as chunked:
            loss = opt(**inputs).loss.item()
    assert loss == pytest.approx(expected, rel=rel)
    assert whole[0] > 1.9 * WHOLE_FP32
    assert chunked[0] < 0.25 * whole[0]


def test_the_loss_is_the_same_every_time() -> None:
    opt, inputs = model(torch.bfloat16), batch()
    with torch.no_grad(), deferring_logits():
        assert len({opt(**inputs).loss.item() for _ in range(5)}) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_the_host_never_waits_for_the_gpu_between_hidden_states_and_loss(autocast: bool) -> None:
    opt, inputs = model(torch.float32 if autocast else torch.bfloat16), batch()
    with torch.no_grad():
        hidden = opt.model(inputs["input_ids"]).last_hidden_state

    def loss() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast), deferring_logits():
            return opt.loss_function(opt.lm_head(hidden), inputs["labels"], vocab_size=VOCABULARY)

    expected = loss()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loss()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.item() == expected.item()
