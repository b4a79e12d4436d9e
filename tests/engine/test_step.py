"""Promises of one step: exact on a quadratic, equal to the textbook loop bit for bit, weights clean on any error."""

import math

import pytest
import torch
from torch import nn

from tests.support.toys import (
    TIERS,
    Block,
    Quadratic,
    assert_same_weights,
    batch,
    direction,
    opened,
    plain_run,
    toy,
    train,
    weights_of,
)
from zo2trl.engine.step import MAX_SKIPS_IN_A_ROW
from zo2trl.errors import TrainingDiverged, TraversalError
from zo2trl.zo.mezo import MezoSeeds
from zo2trl.zo.records import SkipRecord, StepRecord
from zo2trl.zo.seeds import derive_seed, direction_seed

EXACT = {"zo_eps": 2.0**-3}  # with weights in eighths every fp32 operation of the quadratic is exact


def slope_along(model, gradients, seed):
    """The directional derivative of the quadratic, exactly."""
    ids = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    return math.fsum(float(g @ direction(ids[name], g.shape, seed=seed)) for name, g in gradients.items())


# ------------------------------------------------------------------------------------------------- the analytic model


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("num_directions", [1, 3])
def test_the_projected_gradient_of_a_quadratic_is_its_directional_derivative(tmp_path, tier, num_directions):
    model = Quadratic()
    gradients = model.gradients()
    with opened(model, tmp_path / "store", tier=tier, num_directions=num_directions, **EXACT) as engine:
        for step in range(4):
            estimate = engine.step([model], step=step)
            seed = derive_seed(7, step, 0)
            expected = [slope_along(model, gradients, direction_seed(seed, d)) for d in range(num_directions)]
            assert list(estimate.coefficients) == expected


@pytest.mark.parametrize("tier", TIERS)
def test_every_small_step_leads_down_the_bowl(tmp_path, tier):
    model = Quadratic()
    with opened(model, tmp_path / "store", tier=tier) as engine:
        losses = []
        for step in range(40):
            losses.append(engine.step([model], step=step).loss)
            engine.commit(learning_rate=1e-3, weight_decay=0.0)
        # Along a line the loss falls by lr g^2 (1 - lr n / 2), n = 350 weights: at this rate never upwards.
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]


def test_one_update_moves_every_weight_by_lr_times_slope_along_the_direction(tmp_path):
    model = Quadratic()
    before = weights_of(model)
    with opened(model, tmp_path / "store", **EXACT) as engine:
        slope = engine.step([model], step=0).coefficients[0]
        engine.commit(learning_rate=2.0**-6, weight_decay=0.0)
        engine.flush()
        for i, (name, parameter) in enumerate(model.named_parameters()):
            z = direction(i, parameter.shape, seed=derive_seed(7, 0, 0))
            assert torch.equal(parameter.detach(), before[name] - z * slope * 2.0**-6)


# --------------------------------------------------------------------------------------------------- the textbook loop


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kinds", [{}, {"tied": True}], ids=["untied", "tied"])
def test_a_run_equals_the_textbook_loop_bit_for_bit(tmp_path, tier, granularity, kinds):
    model = toy(**kinds)
    losses, weights = plain_run(model, steps=4)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity, write_back_every=3) as engine:
        estimates = train(engine, model, steps=4)
        assert [(e.loss_plus, e.loss_minus) for e in estimates] == losses
        engine.flush()
        assert_same_weights(model, weights)


@pytest.mark.parametrize("tier", TIERS)
def test_tied_weights_get_one_direction_and_one_update(tmp_path, tier):
    model = toy(tied=True)
    model.layers[2].up.weight = model.layers[0].up.weight
    _, weights = plain_run(model, steps=3)
    with opened(model, tmp_path / "store", tier=tier) as engine:
        train(engine, model, steps=3)
        engine.flush()
        assert_same_weights(model, weights)
        assert model.head.weight is model.embed.weight and model.layers[2].up.weight is model.layers[0].up.weight


def with_a_block_twice():
    model = toy()
    model.layers.insert(2, model.layers[0])
    return model


def with_a_module_in_two_blocks():
    class Hybrid(Block):
        def forward(self, x):
            return super().forward(self.shared(x))

    model = toy(n_blocks=4, block=Hybrid)
    shared, spare = Block(), [Block(), Block()]
    for layer, module in zip(model.layers, [shared, spare[0], shared, spare[1]], strict=True):
        layer.shared = module
    return model


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("make", [with_a_block_twice, with_a_module_in_two_blocks])
@pytest.mark.parametrize("tier", TIERS)
def test_a_module_that_is_used_at_two_places_is_one_module(tmp_path, tier, make, granularity):
    model = make()
    losses, weights = plain_run(model, steps=2)
    with opened(model, tmp_path / "store", tier=tier, granularity=granularity) as engine:
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=2)] == losses
        engine.flush()
        assert_same_weights(model, weights)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_run_rounded_to_nearest_equals_the_textbook_loop(tmp_path, tier, dtype):
    model = toy(tied=True).to(dtype)
    losses, weights = plain_run(model, steps=3)
    with opened(model, tmp_path / "store", tier=tier, rounding="nearest", write_back_every=2) as engine:
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=3)] == losses
        engine.flush()
        assert_same_weights(model, weights)


def test_weight_decay_shrinks_the_named_weights_only(tmp_path):
    model = toy()
    before = weights_of(model)
    with opened(model, tmp_path / "store", decay_names=["layers.0.up.weight"]) as engine:
        engine.step([lambda: model(batch())], step=0)
        engine.commit(learning_rate=0.5, weight_decay=0.5, coefficients=[0.0])
        engine.flush()
    for name, parameter in model.named_parameters():
        shrunk = before[name] - before[name] * 0.5 * 0.5 if name == "layers.0.up.weight" else before[name]
        assert torch.equal(parameter.detach(), shrunk), name


@pytest.mark.parametrize("granularity", ["block", "leaf"])
def test_frozen_weights_see_no_perturbation_and_no_update(tmp_path, granularity):
    model = toy()
    model.layers[0].requires_grad_(False)
    model.layers[1].norm.requires_grad_(False)
    model.embed.requires_grad_(False)
    before = weights_of(model)
    losses, weights = plain_run(model, steps=3)
    with opened(model, tmp_path / "store", granularity=granularity) as engine:
        estimates = train(engine, model, steps=3)
        assert [(e.loss_plus, e.loss_minus) for e in estimates] == losses
        engine.flush()
        assert_same_weights(model, weights)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.detach(), before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("tier", TIERS)
def test_a_mezo_run_equals_mezos_own_loop(tmp_path, tier):
    model = toy()
    mine, eps, lr = weights_of(model), 1e-3, 0.005
    seeds, reference, losses = MezoSeeds(7), toy(), []
    with torch.no_grad():
        for step in range(2):
            generator = torch.Generator().manual_seed(seeds(step))
            z = [torch.normal(0, 1, p.shape, generator=generator) for p in reference.parameters()]
            clean, pair = [p.clone() for p in reference.parameters()], []
            for scale in (eps, -eps):
                for p, w, one in zip(reference.parameters(), clean, z, strict=True):
                    p.copy_(w + one * scale)
                pair.append(float(reference(batch(step))))
            losses.append(tuple(pair))
            grad = (pair[0] - pair[1]) / (2 * eps)
            for p, w, one in zip(reference.parameters(), clean, z, strict=True):
                p.copy_(w - one * grad * lr)
    assert_same_weights(model, mine)
    with opened(model, tmp_path / "store", tier=tier, direction="mezo") as engine:
        assert [(e.loss_plus, e.loss_minus) for e in train(engine, model, steps=2)] == losses
        engine.flush()
        assert_same_weights(model, weights_of(reference))


# ------------------------------------------------------------------------------------------------------- micro-batches


def test_a_probes_loss_is_the_sum_over_micro_batches_however_they_are_traversaled(tmp_path):
    model = toy()
    closures = [lambda i=i: model(batch(i)) for i in range(5)]
    with opened(model, tmp_path / "store") as engine:
        whole = engine.step(closures, step=3)
        for passes in (1, 2, 3, 4, 7):
            assert engine.step(closures, step=3, passes_per_traversal=passes) == whole
        singles = [engine.step([closure], step=3) for closure in closures]
        assert whole.loss_plus == pytest.approx(math.fsum(e.loss_plus for e in singles), rel=1e-12)


def test_each_point_is_visited_once_for_all_passes(tmp_path):
    model = toy(n_blocks=4)
    with opened(model, tmp_path / "store", num_directions=2) as engine:
        engine.step([lambda i=i: model(batch(i)) for i in range(3)], step=0)
        assert engine.visited == [0, 1, 2, 3, 4, 0]


def test_the_same_step_twice_gives_the_same_estimate(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        assert engine.step([lambda: model(batch())], step=5) == engine.step([lambda: model(batch())], step=5)
        assert engine.step([lambda: model(batch())], step=6) != engine.step([lambda: model(batch())], step=5)


def test_directions_of_a_step_differ(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store", num_directions=4) as engine:
        assert len(set(engine.step([lambda: model(batch())], step=0).coefficients)) == 4


# ---------------------------------------------------------------------------------------------------- clean and finite


@pytest.mark.parametrize("tier", TIERS)
def test_estimating_and_evaluating_change_no_weight(tmp_path, tier):
    model = toy()
    before, loss = weights_of(model), model(batch()).item()
    with opened(model, tmp_path / "store", tier=tier) as engine:
        for step in range(3):
            engine.step([lambda: model(batch())], step=step)
            assert engine.run_clean([lambda: model(batch()).item()] * 2) == [loss, loss]
        engine.flush()
        assert_same_weights(model, before)
        assert engine.store.journal.records == []


@pytest.mark.parametrize("tier", TIERS)
def test_evaluation_sees_every_finished_step(tmp_path, tier):
    model = toy()
    _, weights = plain_run(model, steps=3)
    plain = toy()
    plain.load_state_dict(weights, strict=False)
    with opened(model, tmp_path / "store", tier=tier, write_back_every=7) as engine:
        train(engine, model, steps=3)
        assert engine.run_clean([lambda: model(batch()).item()]) == [plain(batch()).item()]
        assert model(batch()).item() == plain(batch()).item(), "and so does a plain forward"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_recorded_and_skipped(tmp_path, bad):
    model = toy()
    before = weights_of(model)
    with opened(model, tmp_path / "store") as engine:
        estimate = engine.step([lambda: model(batch()) + bad], step=0)
        assert not estimate.is_finite
        engine.commit(learning_rate=0.1, weight_decay=0.0)
        (skip,) = engine.store.journal.records
        assert isinstance(skip, SkipRecord) and skip.step == 0
        engine.flush()
        assert_same_weights(model, before)


def test_ten_skips_in_a_row_stop_the_run_and_a_good_step_starts_the_count_anew(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        finite = [False] * (MAX_SKIPS_IN_A_ROW - 1) + [True] + [False] * (MAX_SKIPS_IN_A_ROW - 1)
        for step, good in enumerate(finite):
            engine.step([lambda good=good: model(batch()) + (0.0 if good else math.nan)], step=step)
            engine.commit(learning_rate=0.01, weight_decay=0.0)
        engine.step([lambda: model(batch()) + math.nan], step=len(finite))
        with pytest.raises(TrainingDiverged, match="10 steps in a row"):
            engine.commit(learning_rate=0.01, weight_decay=0.0)


def test_committing_without_a_step_records_nothing(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        engine.commit(learning_rate=0.1, weight_decay=0.0)
        train(engine, model, steps=1)
        engine.commit(learning_rate=0.1, weight_decay=0.0)
        assert len(engine.store.journal.records) == 1


def test_the_record_holds_what_was_applied(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store", zo_eps=1e-2) as engine:
        estimate = engine.step([lambda: model(batch())], step=4)
        engine.commit(learning_rate=0.1, weight_decay=0.2, coefficients=[0.5], grad_norm=0.75)
        assert engine.store.journal.records == [
            StepRecord(
                step=4, seed=derive_seed(7, 4, 0), coefficients=(0.5,), learning_rate=0.1, weight_decay=0.2,
                zo_eps=1e-2, losses=(estimate.loss_plus, estimate.loss_minus), scalars=(0.75,),
            )
        ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("tier", TIERS)
def test_an_exception_in_one_closure_leaves_model_and_engine_usable(tmp_path, tier):
    model = toy()
    before = weights_of(model)

    def failing():
        model.layers[0](model.embed(batch()))
        raise ValueError("bad batch")

    with opened(model, tmp_path / "store", tier=tier) as engine:
        expected = engine.step([lambda: model(batch())], step=0)
        with pytest.raises(ValueError, match="bad batch"):
            engine.step([lambda: model(batch()), failing, lambda: model(batch())], step=1)
        assert torch.is_grad_enabled()
        assert_same_weights(model, before)
        assert engine.step([lambda: model(batch())], step=0) == expected


def test_a_step_that_failed_cannot_be_committed(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        engine.step([lambda: model(batch())], step=0)
        with pytest.raises(ZeroDivisionError):
            engine.step([lambda: 1 / 0], step=1)
        engine.commit(learning_rate=0.1, weight_decay=0.0)
        assert engine.store.journal.records == [], "the losses of step 0 must not be recorded after step 1 began"


def test_a_traversal_inside_a_traversal_is_refused(tmp_path):
    model = toy()
    with opened(model, tmp_path / "store") as engine:
        with pytest.raises(TraversalError, match="inside another traversal"):
            engine.step([lambda: engine.run_clean([lambda: model(batch())])[0]], step=0)
        assert engine.step([lambda: model(batch())], step=0).is_finite


def test_a_model_without_blocks_trains_too(tmp_path):
    model = nn.Linear(4, 3)
    x = torch.ones(2, 4)
    with opened(model, tmp_path / "store", tier="gpu") as engine:
        engine.step([lambda: model(x).square().sum()], step=0)
        engine.commit(learning_rate=1e-3, weight_decay=0.0)
        assert isinstance(engine.store.journal.records[0], StepRecord)
