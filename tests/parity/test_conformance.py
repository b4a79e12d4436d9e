"""MeZO's published algorithm, figure by figure: trajectories printed by the reference implementation on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.support.runs import (
    EVERYTHING_ON_DEVICE,
    STREAMED_FROM_CPU,
    STREAMED_FROM_DISK,
    closing,
    step_logs,
    zo_trainer,
)

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "opt_tiny.json").read_text())

# Later figures differ by the order of floating-point sums; g is quantised at ulp(loss) / (2 eps) = 2.4e-4 here.
LATER_LOSS, LATER_GRAD, WEIGHT_SUMS = 3e-5, 2e-3, 1e-3

PLACES = {
    "on-device": EVERYTHING_ON_DEVICE,
    "from-cpu-by-block": {**STREAMED_FROM_CPU, "granularity": "block"},
    "from-cpu-by-leaf": {**STREAMED_FROM_CPU, "granularity": "leaf"},
    "from-disk-by-block": {**STREAMED_FROM_DISK, "granularity": "block"},
    "from-disk-by-leaf": {**STREAMED_FROM_DISK, "granularity": "leaf"},
}
RUNS = {"mezo": 0.0, "mezo_weight_decay_0.1": 0.1}


def reference_model() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=True, dropout=0.1,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + float(is_norm_scale))
    return model


def reference_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 96, (4, 16), generator=torch.Generator().manual_seed(7))
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PLACES[request.param]


@pytest.mark.parametrize("run", RUNS)
def test_mezo_is_reproduced_from_every_tier(run: str, place: dict[str, Any], tmp_path: Path) -> None:
    batch = reference_batch()
    options = {
        "direction": "mezo", "seed": 0, "max_steps": 5, "weight_decay": RUNS[run], "learning_rate": 1e-3,
        "zo_eps": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4,
    }  # fmt: skip
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    # The reference sums its loss over the rows in one order; ours are shuffled, so the collator puts them back.
    extra = {"data_collator": lambda _: dict(batch)}
    with closing(zo_trainer(tmp_path, reference_model(), rows, extra=extra, **options, **place)) as trainer:
        trainer.train()
        logs, records = step_logs(trainer), list(trainer.engine.store.journal.records)
        parameters = [p.detach().double() for p in trainer.model.parameters()]

    expected = REFERENCE["runs"][run]
    assert [record.seed for record in records] == [row["seed"] for row in expected]
    # To the printed digits: a float64 reference value against the same float32 losses.
    assert logs[0]["zo/loss_plus"] == pytest.approx(expected[0]["l1"], abs=1e-9)
    assert logs[0]["zo/projected_grad"] == pytest.approx(expected[0]["g"], abs=1e-6)
    assert [log["zo/loss_plus"] for log in logs] == pytest.approx([row["l1"] for row in expected], abs=LATER_LOSS)
    assert [log["zo/projected_grad"] for log in logs] == pytest.approx([row["g"] for row in expected], abs=LATER_GRAD)
    assert sum(p.sum().item() for p in parameters) == pytest.approx(expected[-1]["psum"], abs=WEIGHT_SUMS)
    assert sum(p.square().sum().item() for p in parameters) == pytest.approx(expected[-1]["psq"], abs=WEIGHT_SUMS)


def test_the_reference_draws_tensors_in_the_order_ours_are_numbered() -> None:
    ours = [[name, list(p.shape)] for name, p in reference_model().named_parameters()]
    assert ours == REFERENCE["parameter_order"]


def test_the_mean_loss_of_the_first_step_is_the_loss_of_the_untouched_model() -> None:
    with torch.no_grad():
        loss = reference_model().eval()(**reference_batch()).loss.item()
    assert loss == pytest.approx(REFERENCE["runs"]["mezo"][0]["loss0"], abs=1e-6)
