"""The engine on a real GPU: the same bits out of every tier, and the same weights on a machine without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.models import tiny_batch, tiny_model
from zo2trl.engine.opening import EngineOptions, open_engine, plan_engine
from zo2trl.engine.precision import fp32_heads
from zo2trl.planning.budgets import Budgets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EVERYTHING = Budgets(device=1 << 34, cpu=0)
FAMILIES = ("opt", "opt-post-norm", "llama-tied", "qwen3", "gemma2", "gpt2", "mixtral", "roberta-classes", "t5")


def run(
    name: str,
    folder: Path,
    *,
    budgets: Budgets,
    device: str = "cuda",
    dtype: torch.dtype = torch.float32,
    n_steps: int = 4,
    **options: Any,
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Losses of a few steps and the weights after them."""
    model = tiny_model(name, dtype=dtype)
    fp32_heads(model)
    batch = {key: value.to(device) for key, value in tiny_batch(name).items()}
    engine = open_engine(
        model,
        EngineOptions(budgets=budgets, device=torch.device(device), store_dir=folder / "store", seed=3, **options),
    )
    losses = []
    for step in range(n_steps):
        estimate = engine.step([lambda: model(**batch).loss], step=step)
        losses.append((estimate.loss_plus, estimate.loss_minus))
        engine.commit(learning_rate=1e-2, weight_decay=0.1)
    engine.flush()
    weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    engine.shutdown()
    return losses, weights


def some_in_every_tier(model: nn.Module, folder: Path, *, granularity: str) -> Budgets:
    """Budgets with which units sit on the device, in host memory and on disk."""
    options = EngineOptions(
        budgets=Budgets(device="min", cpu=0), device=torch.device("cuda"), store_dir=folder, seed=0,
        granularity=granularity,
    )  # fmt: skip
    plan = plan_engine(model, options)
    block = max(unit.n_bytes for unit in plan.layout.units if not unit.is_resident)
    return Budgets(device=plan.placement.device_bytes + plan.placement.largest_segment_bytes + block, cpu=2 * block)


def assert_same(one: tuple, other: tuple) -> None:
    assert one[0] == other[0]
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tier_and_granularity_gives_the_same_bits_on_a_gpu(name: str, tmp_path: Path) -> None:
    wanted = run(name, tmp_path / "all", budgets=EVERYTHING)
    for number, granularity in enumerate(("block", "leaf")):
        mixed = some_in_every_tier(tiny_model(name), tmp_path / "plan", granularity=granularity)
        for which, budgets in {
            "cpu": Budgets(device="min", cpu=1 << 34), "disk": Budgets(device="min", cpu=0), "mixed": mixed,
        }.items():  # fmt: skip
            folder = tmp_path / f"{which}{number}"
            assert_same(run(name, folder, budgets=budgets, granularity=granularity), wanted)


@pytest.mark.parametrize("every", [1, 3, "auto"])
def test_lazy_write_back_gives_the_same_bits_on_a_gpu(every: Any, tmp_path: Path) -> None:
    wanted = run("llama", tmp_path / "all", budgets=EVERYTHING, n_steps=9)
    for which, cpu in (("cpu", 1 << 34), ("disk", 0)):
        budgets = Budgets(device="min", cpu=cpu)
        assert_same(run("llama", tmp_path / which, budgets=budgets, n_steps=9, write_back_every=every), wanted)


@pytest.mark.parametrize("direction", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_journal_written_on_a_gpu_replays_to_the_same_weights_on_the_cpu(
    direction: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=dtype)
    batch = {key: value.cuda() for key, value in tiny_batch("llama").items()}
    on_gpu = EngineOptions(
        budgets=Budgets(device="min", cpu=1 << 30), device=torch.device("cuda"), store_dir=tmp_path / "gpu", seed=3,
        direction=direction,
    )  # fmt: skip
    engine = open_engine(model, on_gpu)
    for step in range(5):
        engine.step([lambda: model(**batch).loss], step=step)
        engine.commit(learning_rate=1e-2, weight_decay=0.1)
    engine.flush()
    wanted = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    records = list(engine.store.journal.records)
    engine.shutdown()

    twin = tiny_model("llama", dtype=dtype)
    on_cpu = EngineOptions(
        budgets=Budgets(device=1 << 30, cpu=0), device=torch.device("cpu"), store_dir=tmp_path / "cpu", seed=3,
        direction=direction,
    )  # fmt: skip
    replayed = open_engine(twin, on_cpu)
    for record in records:
        replayed.store.append(record)
    replayed.flush()
    got = dict(twin.state_dict())
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    replayed.shutdown()


def test_the_model_runs_and_generates_outside_a_traversal_on_a_gpu(tmp_path: Path) -> None:
    model = tiny_model("opt")
    batch = {key: value.cuda() for key, value in tiny_batch("opt").items()}
    wanted = tiny_model("opt").cuda().generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    options = EngineOptions(
        budgets=Budgets(device="min", cpu=0), device=torch.device("cuda"), store_dir=tmp_path / "store", seed=0
    )
    engine = open_engine(model, options)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False), wanted)
    engine.shutdown()


def test_streaming_keeps_the_allocator_under_device_memory(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=512, ffn_dim=2048, num_hidden_layers=12, num_attention_heads=8, word_embed_proj_dim=512,
        vocab_size=512, use_cache=False,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    ids = torch.randint(0, 512, (1, 16), device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = EngineOptions(
        budgets=Budgets(device=64_000_000, cpu=80_000_000), device=torch.device("cuda"), store_dir=tmp_path / "store",
        seed=0,
    )  # fmt: skip
    engine = open_engine(model, options)
    for step in range(4):
        engine.step([lambda: model(input_ids=ids, labels=ids).loss], step=step)
        engine.commit(learning_rate=1e-4, weight_decay=0.0)
    held = torch.cuda.max_memory_allocated() - before
    engine.shutdown()
    # Noise temporaries and activations come on top of what the budget plans: weights, ring and scratch.
    assert held < 64_000_000 + 80_000_000
