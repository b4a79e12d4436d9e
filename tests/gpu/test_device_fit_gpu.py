"""`device_memory` is a ceiling for everything that the allocator hands out, from the least that works upwards."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zo2trl.engine.device_fit import DeviceFit
from zo2trl.engine.heads import deferring_logits, hook_heads
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.errors import BudgetError
from zo2trl.planning.budgets import Budgets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")


def a_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def least_bytes(folder: Path, granularity: str) -> int:
    options = EngineOptions(
        budgets=Budgets(device="min", cpu=1 << 34), device=CUDA, store_dir=folder, seed=0, granularity=granularity
    )
    return plan_engine(a_model(), options).placement.device_bytes


def trained(folder: Path, *, device: int, granularity: str) -> tuple[int, list[float]]:
    """(the allocator's peak over three steps, losses)."""
    model = a_model()
    options = EngineOptions(
        budgets=Budgets(device=device, cpu=1 << 34), device=CUDA, store_dir=folder, seed=3, granularity=granularity
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = open_engine(model, options)
    engine.on_shutdown += [handle.remove for handle in hook_heads(model)]
    try:
        ids = torch.randint(8000, (2, 512), device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))

        def loss() -> torch.Tensor:
            with deferring_logits():
                return model(input_ids=ids, labels=ids).loss

        DeviceFit(engine, options).before_steps(loss, {"input_ids": ids}, n_passes=2)
        torch.cuda.reset_peak_memory_stats()
        losses = []
        for step in range(3):
            losses.append(engine.step([loss], step=step).loss)
            engine.commit(learning_rate=1e-4, weight_decay=0.0)
        return torch.cuda.max_memory_allocated() - before, losses
    finally:
        engine.shutdown()


@pytest.mark.parametrize("granularity", ["block", "leaf", "auto"])
def test_the_allocator_never_exceeds_the_budget_and_the_budget_never_shows_in_the_losses(
    granularity: str, tmp_path: Path
) -> None:
    least = least_bytes(tmp_path, "block" if granularity == "block" else "leaf")
    seen, n_refused = [], 0
    for extra in (*range(16 << 20, 112 << 20, 6 << 20), 120 << 20, 1 << 30):
        try:
            peak, losses = trained(tmp_path / f"{extra}", device=least + extra, granularity=granularity)
        except BudgetError:
            assert not seen, "what fits a budget fits a larger one"
            n_refused += 1
            continue
        assert peak <= least + extra, f"{peak:,} of {least + extra:,} bytes"
        seen.append(losses)
    assert n_refused and len(seen) > 4
    assert all(losses == seen[0] for losses in seen)


def test_a_budget_without_room_for_activations_is_refused_before_a_step(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="activations"):
        trained(tmp_path / "store", device=least_bytes(tmp_path, "block") + (1 << 20), granularity="block")
