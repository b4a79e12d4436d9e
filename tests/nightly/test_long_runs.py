"""Long runs under changing conditions: what a week of training would meet, in minutes."""

import random
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_batch, tiny_model
from zo2trl.engine.opening import EngineOptions, open_engine
from zo2trl.engine.step import Engine
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import smallest_device_budget

pytestmark = pytest.mark.nightly

N_STEPS = 150


def run(name: str, folder: Path, *, seed: int, resident: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Steps mixed with evaluations, plain forwards and flushes at random moments, out of random budgets."""
    chance = random.Random(seed)
    model, batch = tiny_model(name), tiny_batch(name)
    engine = open_engine(model, options(folder, model, chance, resident=resident))
    losses: list[float] = []
    what_else = random.Random(seed + 1)
    for step in range(N_STEPS):
        losses.append(engine.step([lambda: model(**batch).loss], step=step).loss)
        engine.commit(learning_rate=1e-3, weight_decay=0.01)
        losses += something_else(engine, batch, what_else.random())
    engine.flush()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    engine.shutdown()
    return losses, weights


def options(folder: Path, model: torch.nn.Module, chance: random.Random, *, resident: bool) -> EngineOptions:
    least = smallest_device_budget(plan_layout(model))
    budgets = Budgets(device=chance.randint(least, 2 * least), cpu=chance.randint(0, 2 * least))
    return EngineOptions(
        budgets=Budgets(device=1 << 34, cpu=0) if resident else budgets, device=torch.device("cpu"),
        store_dir=folder / "store", seed=seed_of(folder), granularity=chance.choice(["auto", "leaf"]),
        write_back_every=chance.choice([1, 2, 5, 17]),
    )  # fmt: skip


def seed_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


@torch.no_grad()
def something_else(engine: Engine, batch: dict[str, torch.Tensor], draw: float) -> list[float]:
    if draw < 0.1:
        return [value.item() for value in engine.run_clean([lambda: engine.model(**batch).loss] * 2)]
    if draw < 0.2:
        return [engine.model(**batch).loss.item()]
    if draw < 0.25:
        engine.flush()
    return []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["opt", "llama-tied", "mixtral", "t5"])
def test_a_long_streamed_run_with_interruptions_equals_the_resident_one(name: str, seed: int, tmp_path: Path) -> None:
    wanted = run(name, tmp_path / f"resident-{seed}", seed=seed, resident=True)
    got = run(name, tmp_path / f"streamed-{seed}", seed=seed, resident=False)
    assert got[0] == wanted[0]
    assert [key for key in wanted[1] if not torch.equal(wanted[1][key], got[1][key])] == []
