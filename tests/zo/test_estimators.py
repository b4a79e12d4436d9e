"""Promises of the two-sided estimate: exact on quadratics, right on average, honest about infinite losses."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo2trl.zo.estimators import CLEAN, Estimate, Probe, TwoSidedSPSA
from zo2trl.zo.noise import make_direction
from zo2trl.zo.tiles import TILE, TileMap

eighths = st.lists(st.integers(-64, 64), min_size=1, max_size=40).map(lambda values: torch.tensor(values) / 8)


def estimate_from(estimator: TwoSidedSPSA, losses: Sequence[float]) -> Estimate:
    """What the estimator returns for these losses of its probes."""
    estimation = estimator.estimation()
    assert next(estimation) == estimator.probes()
    with pytest.raises(StopIteration) as ended:
        estimation.send(losses)
    return ended.value.value


def test_probes_are_plus_and_minus_of_each_direction_in_order():
    probes = TwoSidedSPSA(zo_eps=0.5, num_directions=2).probes()
    assert probes == [Probe(0, 0.5), Probe(0, -0.5), Probe(1, 0.5), Probe(1, -0.5)]


def test_the_clean_probe_moves_nothing():
    assert CLEAN.coefficient == 0.0


@given(distance=eighths, eps=st.sampled_from([2.0**-3, 2.0**-1, 1.0, 4.0]), seed=st.integers(0, 2**31))
def test_on_a_quadratic_the_slope_is_the_exact_directional_derivative_at_any_eps(distance, eps, seed):
    signs = torch.randint(2, distance.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    losses = [
        0.5 * (distance + probe.coefficient * signs).square().sum() for probe in TwoSidedSPSA(zo_eps=eps).probes()
    ]
    estimate = estimate_from(TwoSidedSPSA(zo_eps=eps), [float(loss) for loss in losses])
    assert estimate.coefficients == (float(distance @ signs),)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_slope_times_direction_is_the_gradient_on_average(kind):
    n, n_draws, eps = 24, 4000, 0.25
    gradient = torch.randn(n, generator=torch.Generator().manual_seed(1))
    total, z = torch.zeros(n), torch.empty(TILE)
    noise, tiles = make_direction(kind), TileMap.for_tensors([(0, n)])
    estimator = TwoSidedSPSA(zo_eps=eps)
    for seed in range(n_draws):
        noise.fill(z, seed, tiles)
        losses = [float(0.5 * (gradient + p.coefficient * z[:n]).square().sum()) for p in estimator.probes()]
        total += estimate_from(estimator, losses).coefficients[0] * z[:n]
    # The variance of one component is at most ||gradient||^2 + gradient_i^2.
    tolerance = 5 * math.sqrt(2 * float(gradient.square().sum()) / n_draws)
    assert torch.allclose(total / n_draws, gradient, atol=tolerance, rtol=0)


def test_slopes_are_computed_in_float64():
    estimate = estimate_from(TwoSidedSPSA(zo_eps=2.0**-10), [1.0 + 2.0**-50, 1.0])
    assert estimate.coefficients == (2.0**-41,)


def test_each_direction_gets_the_slope_of_its_own_losses():
    estimate = estimate_from(TwoSidedSPSA(zo_eps=0.5, num_directions=3), [3.0, 1.0, 1.0, 4.0, 2.0, 2.0])
    assert estimate.coefficients == (2.0, -3.0, 0.0)
    assert estimate.projected_grad == pytest.approx(-1 / 3)
    assert (estimate.loss_plus, estimate.loss_minus) == (2.0, pytest.approx(7 / 3))


def test_the_reported_loss_is_the_mean_of_plus_and_minus():
    assert Estimate(coefficients=(1.0,), losses=(3.0, 1.0)).loss == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_one_loss_that_is_not_finite_spoils_the_whole_estimate(bad, where):
    losses = [1.0, 2.0, 3.0, 4.0]
    losses[where] = bad
    assert not estimate_from(TwoSidedSPSA(zo_eps=1e-3, num_directions=2), losses).is_finite


def test_infinities_of_both_signs_do_not_cancel():
    assert not estimate_from(TwoSidedSPSA(zo_eps=1e-3, num_directions=2), [math.inf, 1.0, -math.inf, 1.0]).is_finite


def test_finite_losses_give_a_finite_estimate():
    assert estimate_from(TwoSidedSPSA(zo_eps=1e-3), [1.0, 2.0]).is_finite
