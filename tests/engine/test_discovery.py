"""Promises of discovery: blocks are cut in leaves only where that is right, found out before the first step."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tests.support.toys import (
    Block,
    Toy,
    assert_same_weights,
    batch,
    opened,
    options,
    plain_run,
    toy,
    train,
    weights_of,
)
from zo2trl.engine.discovery import settle_granularity
from zo2trl.engine.opening import open_engine, plan_engine
from zo2trl.errors import BudgetError, TraversalError
from zo2trl.layout.model_layout import plan_layout
from zo2trl.planning.budgets import Budgets
from zo2trl.planning.placement import smallest_device_budget


class ReadsItsChild(Block):
    """The parent uses the child's weight without calling the child."""

    def forward(self, x):
        return x + self.down(torch.tanh(nn.functional.linear(self.norm(x), self.up.weight, self.up.bias)))


class PeeksAtItsChild(Block):
    """Calls every child, and looks at a weight of one of them as well."""

    def forward(self, x):
        return super().forward(x) * self.up.weight.abs().mean()


class CallsTwice(Block):
    def forward(self, x):
        return super().forward(self.norm(x))


class SharesALeaf(Block):
    """One module under two names, in two parents: both names lead to one leaf."""

    def __init__(self):
        super().__init__()
        self.second = nn.ModuleDict({"again": self.up})

    def forward(self, x):
        return x + self.down(torch.tanh(self.second["again"](self.norm(x))))


class Choosy(Block):
    """Uses one of two leaves, as experts do."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(48, 96)

    def forward(self, x):
        return super().forward(x)


def leaf_blocks_after(model, folder, *, budgets=None, calls=1):
    """Which blocks are visited by leaf once discovery has settled."""
    chosen = options(folder, tier="cpu", granularity="leaf")
    if budgets is not None:
        chosen = replace(chosen, budgets=budgets)
    engine = open_engine(model, chosen)
    try:
        settle_granularity(engine, lambda: sum(model(batch(i)) for i in range(calls)), options=chosen)
        assert engine.store.journal.records == []
        return engine.store.layout.leaf_blocks
    finally:
        engine.shutdown()


def names(n, *, but=()):
    return {f"layers.{i}" for i in range(n)} - {f"layers.{i}" for i in but}


def test_ordinary_blocks_are_visited_by_leaf(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert leaf_blocks_after(toy(), tmp_path / "store") == names(3)
    assert caplog.records == []


@pytest.mark.parametrize("odd", [ReadsItsChild, PeeksAtItsChild, CallsTwice])
def test_blocks_that_cannot_be_cut_are_kept_whole_and_the_user_is_told(tmp_path, caplog, odd):
    model = Toy([odd() for _ in range(3)])
    with caplog.at_level(logging.WARNING):
        assert leaf_blocks_after(model, tmp_path / "store") == set()
    assert "visited whole" in caplog.text and "layers.0" in caplog.text


@pytest.mark.parametrize("odd", [ReadsItsChild, PeeksAtItsChild, CallsTwice])
def test_only_the_odd_blocks_are_kept_whole(tmp_path, odd):
    model = Toy([Block(), odd(), Block(), odd()])
    assert leaf_blocks_after(model, tmp_path / "store") == names(4, but=(1, 3))


def test_a_leaf_under_two_names_does_not_break_anything(tmp_path):
    model = Toy([SharesALeaf() for _ in range(3)])
    losses, _ = plain_run(model, steps=2)
    chosen = options(tmp_path / "store", tier="cpu", granularity="leaf")
    with opened(model, tmp_path / "store", tier="cpu", granularity="leaf") as engine:
        settle_granularity(engine, lambda: model(batch()), options=chosen)
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=2)] == losses


def test_leaves_that_a_batch_does_not_use_do_not_count_against_a_block(tmp_path):
    assert leaf_blocks_after(Toy([Choosy() for _ in range(3)]), tmp_path / "store") == names(3)


def test_a_loss_that_calls_the_model_twice_is_no_repeated_leaf(tmp_path):
    assert leaf_blocks_after(toy(), tmp_path / "store", calls=2) == names(3)


@pytest.mark.parametrize("odd", [Block, ReadsItsChild, PeeksAtItsChild, CallsTwice])
def test_whatever_was_decided_training_equals_the_textbook_loop(tmp_path, odd):
    model = toy(block=odd)
    losses, weights = plain_run(model, steps=2)
    chosen = options(tmp_path / "store", tier="disk", granularity="leaf")
    with opened(model, tmp_path / "store", tier="disk", granularity="leaf") as engine:
        settle_granularity(engine, lambda: model(batch()), options=chosen)
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=2)] == losses
        engine.flush()
        assert all(torch.equal(p.detach(), weights[name]) for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------- where whole blocks do not fit


def tight(model):
    """A budget that holds leaves and not whole blocks."""
    by_leaf = smallest_device_budget(plan_layout(model, leaf_blocks="all"))
    assert by_leaf < smallest_device_budget(plan_layout(model))
    return Budgets(device=by_leaf, cpu=10**9)


def test_auto_cuts_blocks_only_where_they_do_not_fit(tmp_path):
    model = toy()
    chosen = options(tmp_path / "store", granularity="auto")
    whole = smallest_device_budget(plan_layout(model))
    assert plan_engine(model, replace(chosen, budgets=Budgets(device=whole, cpu=0))).layout.leaf_blocks == set()
    assert plan_engine(model, replace(chosen, budgets=Budgets(device=whole - 1, cpu=0))).layout.leaf_blocks == names(3)
    with pytest.raises(BudgetError):
        plan_engine(model, replace(chosen, budgets=Budgets(device=whole - 1, cpu=0), granularity="block"))


def test_ordinary_blocks_pass_without_a_comparison(tmp_path):
    model = toy()
    assert leaf_blocks_after(model, tmp_path / "store", budgets=tight(model)) == names(3)


@pytest.mark.parametrize("odd", [ReadsItsChild, CallsTwice])
def test_a_budget_that_holds_whole_blocks_is_enough_to_keep_them_whole(tmp_path, odd):
    # By leaf this budget keeps more blocks resident; they must not take the room that whole blocks need.
    model = Toy([odd() for _ in range(6)])
    whole = smallest_device_budget(plan_layout(model))
    assert leaf_blocks_after(model, tmp_path / "store", budgets=Budgets(device=whole, cpu=10**9)) == set()


def test_a_block_that_must_stay_whole_and_does_not_fit_is_refused_with_the_way_out(tmp_path):
    model = Toy([ReadsItsChild() for _ in range(3)])
    with pytest.raises(TraversalError, match='raise `device_memory` and set `granularity="block"`'):
        leaf_blocks_after(model, tmp_path / "store", budgets=tight(model))


def test_a_leaf_called_twice_that_cannot_stay_whole_is_refused(tmp_path):
    model = Toy([CallsTwice() for _ in range(3)])
    with pytest.raises(BudgetError):
        leaf_blocks_after(model, tmp_path / "store", budgets=tight(model))


# -------------------------------------------------------------------------------------------------------------- timing


def test_discovery_in_the_middle_of_a_run_changes_no_weight(tmp_path):
    model, other = toy(), toy()
    chosen = options(tmp_path / "store", tier="cpu", granularity="leaf")
    with opened(other, tmp_path / "plain", tier="cpu", granularity="leaf") as engine:
        train(engine, other, steps=2)
        engine.flush()
        expected = weights_of(other)
    with opened(model, tmp_path / "store", tier="cpu", granularity="leaf") as engine:
        train(engine, model, steps=2)
        settle_granularity(engine, lambda: model(batch()), options=chosen)
        assert_same_weights(model, expected)


def test_whole_blocks_need_no_discovery(tmp_path):
    model = toy()
    chosen = options(tmp_path / "store", tier="cpu")
    with opened(model, tmp_path / "store", tier="cpu") as engine:
        settle_granularity(engine, lambda: pytest.fail("no forward is needed"), options=chosen)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_real_decoders_are_visited_by_leaf(tmp_path, family):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=20, word_embed_proj_dim=16)).eval()
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=20)).eval()
    chosen = options(tmp_path / "store", tier="cpu", granularity="leaf")
    with opened(model, tmp_path / "store", tier="cpu", granularity="leaf") as engine:
        settle_granularity(engine, lambda: model(batch(), labels=batch()).loss, options=chosen)
        assert len(engine.store.layout.leaf_blocks) == 3
