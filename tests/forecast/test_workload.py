from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from zo2trl.forecast.workload import count_pass, fake_tensors, make_fake
from zo2trl.planning.workload import Workload

N_TOKENS, WIDTH = 64, 32


class Block(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def count(make: Any, inputs: Any, **how: Any) -> Workload:
    mode = fake_tensors()
    with torch.device("meta"):
        model = make().eval()
    make_fake(model, mode=mode)
    with mode:
        given = inputs()
    return count_pass(model, lambda: model(given), mode=mode, **how)


def test_products_and_what_is_alive_are_counted_by_hand() -> None:
    found = count(Model, lambda: torch.randn(N_TOKENS, WIDTH))
    assert found.flops == {"float32": 3 * 2 * 2 * N_TOKENS * WIDTH * 4 * WIDTH}
    state = N_TOKENS * WIDTH * 4
    # Inside a block: what came in, both sides of the activation; between blocks what came in and its successor.
    assert found.peak_bytes == pytest.approx(state + 2 * 4 * state, rel=0.35)
    assert state <= found.held_bytes <= 2 * state
    assert found.activation_bytes(n_passes=4) == found.peak_bytes + 3 * found.held_bytes


def test_a_transformer_takes_two_operations_a_weight_and_token() -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    found = count(lambda: LlamaForCausalLM(config), lambda: torch.zeros(2, 16, dtype=torch.long))
    n_weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) - 512 * 64  # looked up, not multiplied
    attention = 2 * 2 * (2 * 2 * 16 * 16 * 64)
    assert found.flops["float32"] == pytest.approx(2 * 32 * n_weights, rel=0.02)
    assert found.flops["float32 attention"] == attention


def test_sixteen_bit_products_are_counted_apart() -> None:
    found = count(lambda: Model().bfloat16(), lambda: torch.randn(N_TOKENS, WIDTH, dtype=torch.bfloat16))
    assert set(found.flops) == {"bfloat16"}


def test_autocast_is_counted_as_a_trainer_runs_it() -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    given = lambda: torch.zeros(2, 16, dtype=torch.long)  # noqa: E731
    whole = count(lambda: LlamaForCausalLM(config), given)
    cast = count(lambda: LlamaForCausalLM(config), given, autocast=torch.bfloat16)
    rotary = cast.flops["float32"]  # switches autocast off for its angles
    assert cast.flops["bfloat16"] + rotary == whole.flops["float32"] and rotary < 0.01 * whole.flops["float32"]
    n_cast = sum(p.numel() for p in LlamaForCausalLM(config).model.layers.parameters())
    assert cast.moved_bytes > whole.moved_bytes
    assert cast.peak_bytes < whole.peak_bytes + 2 * n_cast  # no copy of a weight outlives its use


def test_memory_that_is_only_reserved_does_not_count() -> None:
    class Reserving(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            reserved = torch.empty(1 << 20)
            torch.add(x, 1, out=reserved[: x.numel()].view(x.shape))
            return super().forward(x)

    assert count(Reserving, lambda: torch.randn(N_TOKENS, WIDTH)).peak_bytes < 1 << 20
