"""Promises about the model's own face: it looks and behaves like a plain model whenever no traversal is running."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import open_files
from tests.support.toys import (
    TIERS,
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
from zo2trl.engine.opening import open_engine
from zo2trl.errors import StoreError
from zo2trl.files.fs import FS
from zo2trl.planning.budgets import Budgets

SHAPES = [("gpu", "block"), ("cpu", "block"), ("disk", "block"), ("cpu", "leaf"), ("disk", "leaf")]
everywhere = pytest.mark.parametrize(("tier", "granularity"), SHAPES)


def clean_loss(engine, model):
    return engine.run_clean([lambda: model(batch()).item()])[0]


# ------------------------------------------------------------------------------------------------------------- at rest


@everywhere
def test_at_rest_the_model_shows_its_weights_everywhere_a_user_may_look(tmp_path, tier, granularity):
    model = toy(tied=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        for _ in range(2):
            shown = model.state_dict()
            assert shown.keys() == expected.keys()
            assert all(torch.equal(shown[name], expected[name]) for name in expected)
            assert_same_weights(model, {name: expected[name] for name, _ in model.named_parameters()})
            copied = copy.deepcopy(model.layers[0].up)
            assert torch.equal(copied.weight, expected["layers.0.up.weight"])
            engine.step([lambda: model(batch())], step=0)


@everywhere
def test_after_a_flush_the_state_dict_holds_every_finished_step(tmp_path, tier, granularity):
    model = toy()
    _, weights = plain_run(model, steps=2)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=5) as engine:
        train(engine, model, steps=2)
        engine.flush()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@everywhere
def test_parameters_stay_the_same_objects(tmp_path, tier, granularity):
    model = toy(tied=True)
    before = {name: (id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        train(engine, model, steps=2)
        engine.flush()
        model(batch())
    assert {name: (id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.head.weight is model.embed.weight


def test_saved_weights_do_not_look_tied_unless_they_are(tmp_path):
    model = toy(tied=True)
    with opened(model, tmp_path / "store", tier="cpu"):
        storages = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
        assert len(set(storages)) == len(storages) - 1


# -------------------------------------------------------------------------------------------------------- missed hooks


class Peeking(Toy):
    """Reads a block's weight from outside the block."""

    def forward(self, ids):
        return super().forward(ids) + self.layers[1].up.weight.float().mean()


class PeekingInside(Block):
    """Reads a child's weight without calling the child."""

    def forward(self, x):
        return x + self.down(torch.tanh(nn.functional.linear(self.norm(x), self.up.weight, self.up.bias)))


@pytest.mark.parametrize("tier", TIERS)
def test_weights_read_behind_the_hooks_give_nan_not_stale_values(tmp_path, tier):
    model = Peeking([Block() for _ in range(3)])
    with opened(model, tmp_path / "store", tier=tier) as engine:
        assert not engine.step([lambda: model(batch())], step=0).is_finite


def test_a_leaf_hook_that_is_never_called_gives_nan(tmp_path):
    model = Toy([PeekingInside() for _ in range(3)])
    with opened(model, tmp_path / "store", tier="cpu", granularity="leaf") as engine:
        assert not engine.step([lambda: model(batch())], step=0).is_finite


# ------------------------------------------------------------------------------------------------ changes from outside


@everywhere
@pytest.mark.parametrize("way", ["a traversal", "a plain forward"])
def test_loaded_weights_are_used_at_once(tmp_path, tier, granularity, way):
    model, other = toy(seed=0), toy(seed=1)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        clean_loss(engine, model)  # the ring now holds the old weights of what comes next
        model.load_state_dict(other.state_dict())
        seen = clean_loss(engine, model) if way == "a traversal" else model(batch()).item()
        assert seen == other(batch()).item()
        assert_same_weights(model, weights_of(other))


@everywhere
def test_training_goes_on_from_loaded_weights(tmp_path, tier, granularity):
    model, other = toy(seed=0), toy(seed=1)
    losses, weights = plain_run(other, steps=2)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        clean_loss(engine, model)
        model.load_state_dict(other.state_dict())
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=2)] == losses
        engine.flush()
        assert_same_weights(model, weights)


@everywhere
@pytest.mark.parametrize("flushed", [True, False])
def test_weights_loaded_after_some_steps_do_not_absorb_those_steps(tmp_path, tier, granularity, flushed):
    model, other = toy(seed=0), toy(seed=1)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=5) as engine:
        train(engine, model, steps=2)
        if flushed:
            engine.flush()
        model.load_state_dict(other.state_dict())
        assert clean_loss(engine, model) == other(batch()).item()
        engine.flush()
        assert_same_weights(model, weights_of(other))


@everywhere
def test_a_parameter_changed_in_place_after_a_flush_is_adopted(tmp_path, tier, granularity):
    model = toy()
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        train(engine, model, steps=2)
        engine.flush()
        with torch.no_grad():
            model.layers[2].up.weight.mul_(2.0)
            nn.init.zeros_(model.layers[0].down.weight)
        plain = toy()
        plain.load_state_dict(model.state_dict())
        assert clean_loss(engine, model) == plain(batch()).item()


@pytest.mark.parametrize("tier", TIERS)
def test_changes_made_to_frozen_weights_are_adopted_too(tmp_path, tier):
    model, other = toy(seed=0).requires_grad_(False), toy(seed=1)
    model.norm.requires_grad_(True)
    with opened(model, tmp_path / "store", tier=tier) as engine:
        clean_loss(engine, model)
        model.load_state_dict(other.state_dict())
        assert clean_loss(engine, model) == other(batch()).item()


@pytest.mark.parametrize("tier", TIERS)
def test_replaced_weights_are_shown_and_used(tmp_path, tier):
    model, other = toy(seed=0), toy(seed=1)
    values = weights_of(other)
    with opened(model, tmp_path / "store", tier=tier, write_back_every=5) as engine:
        train(engine, model, steps=2)
        engine.replace_weights(lambda spec: values[spec.name])
        assert_same_weights(model, values)
        assert clean_loss(engine, model) == other(batch()).item()


@pytest.mark.parametrize("tier", TIERS)
def test_evaluating_in_inference_mode_does_not_freeze_the_weights(tmp_path, tier):
    model, other = toy(seed=0), toy(seed=1)
    with opened(model, tmp_path / "store", tier=tier) as engine:
        with torch.inference_mode():
            clean_loss(engine, model)
        model.load_state_dict(other.state_dict())
        assert clean_loss(engine, model) == other(batch()).item()


# ------------------------------------------------------------------------------------------------------ plain forwards


@everywhere
def test_a_plain_forward_outside_any_traversal_just_works(tmp_path, tier, granularity):
    model = toy()
    expected = model.logits(batch()).detach()
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity):
        for _ in range(2):
            assert torch.equal(model.logits(batch()), expected)


@everywhere
def test_plain_forwards_between_steps_see_finished_steps_and_disturb_nothing(tmp_path, tier, granularity):
    model = toy()
    losses, weights = plain_run(model, steps=3)
    seen = []
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=5) as engine:
        for step in range(3):
            (estimate,) = train(engine, model, steps=1, start=step)
            seen.append((estimate.loss_plus, estimate.loss_minus))
            model(batch(9))
        engine.flush()
        assert_same_weights(model, weights)
    assert seen == losses


def test_an_exception_in_a_plain_forward_puts_the_parameters_to_rest(tmp_path):
    class Failing(Block):
        armed = False

        def forward(self, x):
            if self.armed:
                raise ValueError("bad batch")
            return super().forward(x)

    model = Toy([Failing() for _ in range(3)])
    before, expected = weights_of(model), model(batch()).item()
    with opened(model, tmp_path / "store") as engine:
        model.layers[1].armed = True
        with pytest.raises(ValueError, match="bad batch"):
            model(batch())
        assert_same_weights(model, before)
        model.layers[1].armed = False
        assert model(batch()).item() == clean_loss(engine, model) == expected


# ------------------------------------------------------------------------------------------------------------- the end


@everywhere
def test_after_shutdown_the_model_is_an_ordinary_model(tmp_path, tier, granularity):
    model = toy()
    _, weights = plain_run(model, steps=2)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=5) as engine:
        train(engine, model, steps=2)
    engine.shutdown()
    assert_same_weights(model, weights)
    assert not any("forward" in vars(module) for module in model.modules()), "no hook is left"
    model(batch()).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.layers[0].up.weight.detach(), weights["layers.0.up.weight"])


def test_a_forward_that_somebody_else_replaced_is_given_back(tmp_path):
    model = toy()
    own = model.layers[1].forward
    calls = []

    def counting(x):
        calls.append(1)
        return own(x)

    model.layers[1].forward = counting
    with opened(model, tmp_path / "store") as engine:
        engine.step([lambda: model(batch())], step=0)
        assert len(calls) == 2
    assert model.layers[1].forward is counting


def test_a_second_engine_over_the_same_model_carries_on(tmp_path):
    model = toy()
    losses, _ = plain_run(model, steps=2)
    for step in range(2):
        with opened(model, tmp_path / f"store{step}", tier=TIERS[2 - step]) as engine:
            (estimate,) = train(engine, model, steps=1, start=step)
            assert (estimate.loss_plus, estimate.loss_minus) == losses[step]


@everywhere
def test_shutting_down_undoes_a_conversion_and_absorbs_every_step(tmp_path, tier, granularity):
    model = toy()
    _, weights = plain_run(model, steps=2)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=5) as engine:
        train(engine, model, steps=2)
        model.half()
    assert not engine.store.is_open
    assert_same_weights(model, weights)
    assert not any("forward" in vars(module) for module in model.modules()), "no hook is left"


class FullDisk(FS):
    full = False

    def write_some(self, fd, data, offset):
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write_some(fd, data, offset)


def test_shutting_down_after_a_failed_write_says_so_and_still_lets_go_of_everything(tmp_path):
    fs, model = FullDisk(), toy()
    engine = open_engine(model, options(tmp_path / "store"), fs=fs)
    train(engine, model, steps=1)
    fs.full = True
    undone = []
    engine.on_shutdown.append(lambda: undone.append(True))
    with pytest.raises(StoreError, match="No space left"):
        engine.shutdown()
    assert undone and not engine.store.is_open
    engine.shutdown()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not [name for name in open_files().values() if name.endswith(("journal", "lock"))]


def test_an_engine_that_cannot_be_opened_leaves_model_and_folder_as_they_were(tmp_path):
    fs, model = FullDisk(), toy()
    before, expected = weights_of(model), model(batch()).item()
    fs.full = True
    with pytest.raises(StoreError, match="No space left"):
        open_engine(model, options(tmp_path / "store"), fs=fs)
    fs.full = False
    assert_same_weights(model, before)
    assert model(batch()).item() == expected
    with opened(model, tmp_path / "store") as engine:
        assert clean_loss(engine, model) == expected


def test_a_refused_budget_touches_neither_model_nor_disk(tmp_path):
    model = toy()
    with pytest.raises(ValueError, match="cannot hold one step"):
        open_engine(model, options(tmp_path / "store", budgets=Budgets(device=10, cpu=0)))
    assert not (tmp_path / "store").exists()
    assert not any("forward" in vars(module) for module in model.modules())
