"""Promises of the normal deviates: rounded as IEEE 754 says, near the true quantiles, the same on every machine."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zo2trl.errors import ZO2TRLError
from zo2trl.zo import gaussian
from zo2trl.zo.gaussian import COEFFICIENTS, FIRST, N_FIELDS, POLE, STEP, fused_multiply_add, gaussian_table


def to_float32(exact):
    """The float32 nearest to a fraction, the even one of two as near."""
    guess = np.float32(float(exact))  # rounded twice, so at most one step off
    near = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


# ---------------------------------------------------------------------------------------------- fused multiply-add

factors = st.floats(width=32, min_value=-(2.0**30), max_value=2.0**30, allow_subnormal=False)


@given(a=factors, b=factors, c=factors)
@example(a=24929.0, b=673 / 2.0**24, c=2.0**-80)  # 1 + 2**-24 is half way between two float32: the addend decides
@example(a=24929.0, b=673 / 2.0**24, c=-(2.0**-80))
@example(a=24929.0, b=673 / 2.0**24, c=0.0)
@example(a=1 + 2.0**-23, b=1 - 2.0**-23, c=-1.0)  # only what a rounded product would have lost
@example(a=1 + 2.0**-23, b=-(1 + 2.0**-23), c=2.0**-100)
@example(a=2.0**-60, b=2.0**-60, c=-1.0)
def test_a_fused_multiply_add_is_rounded_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert fused_multiply_add(np.float32([a]), np.float32(b), np.float32(c)).tolist() == [to_float32(exact)]


@given(a=factors, b=factors, step=st.integers(-3, 3))
def test_a_sum_that_nearly_cancels_is_exact_to_its_last_bit(a, b, step):
    c = -np.float32(a) * np.float32(b)
    for _ in range(abs(step)):
        c = np.nextafter(c, np.float32(math.copysign(np.inf, step)))
    exact = Fraction(a) * Fraction(b) + Fraction(float(c))
    assert fused_multiply_add(np.float32([a]), np.float32(b), c).tolist() == [to_float32(exact)]


# ------------------------------------------------------------------------------------------------------ the formula


def fma(a, b, c):
    return Fraction(float(to_float32(a * b + c)))


def deviate_by_definition(field):
    """The formula on fractions, rounded wherever the definition rounds."""
    u = fma(Fraction(field), Fraction(STEP), Fraction(FIRST))
    assert u == Fraction(2 * field + 1 - N_FIELDS, N_FIELDS)
    v = fma(u, u, -Fraction(POLE))
    for _ in range(3):
        v = fma(v, v, 0)
    exponent = math.frexp(float(v))[1] - 1
    fraction = v / Fraction(2) ** exponent - 1
    y = 1 + Fraction(math.floor((exponent + 127 + fraction) * 2**16), 2**23)
    p = Fraction(COEFFICIENTS[4])
    for coefficient in COEFFICIENTS[3::-1]:
        p = fma(y, p, Fraction(coefficient))
    return to_float32(u * p)


def test_the_table_holds_what_the_formula_says_in_exact_arithmetic():
    fields = [*range(16), *range(0, N_FIELDS, 97), *range(32768 - 8, 32768 + 8), *range(N_FIELDS - 16, N_FIELDS)]
    assert gaussian_table()[fields].tolist() == [deviate_by_definition(field) for field in fields]


def test_every_constant_is_a_float32():
    assert all(float(np.float32(value)) == value for value in (STEP, FIRST, POLE, *COEFFICIENTS))


# -------------------------------------------------------------------------------------------------------- the table


def test_deviates_are_antisymmetric_ascending_and_of_unit_mean_square():
    table = gaussian_table().astype(np.float64)
    assert table.shape == (N_FIELDS,)
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) > 0).all()
    assert math.fsum(table * table) / N_FIELDS == pytest.approx(1, abs=1e-9)


def true_quantiles():
    return np.array([NormalDist().inv_cdf((field + 0.5) / N_FIELDS) for field in range(N_FIELDS)])


def test_every_deviate_is_near_the_quantile_it_stands_for():
    error = gaussian_table() - true_quantiles()
    assert abs(error).max() < 1.95e-3
    assert math.sqrt((error**2).mean()) < 8e-4


@pytest.mark.parametrize(("power", "moment"), [(4, 3), (6, 15), (8, 105)])
def test_higher_moments_are_no_worse_than_those_of_exact_quantiles(power, moment):
    of_table = (gaussian_table().astype(np.float64) ** power).mean()
    of_quantiles = (true_quantiles() ** power).mean()
    assert abs(of_table - moment) < max(abs(of_quantiles - moment), 1e-3 * moment)


def test_the_distribution_function_is_within_six_ten_thousandths_of_the_normals():
    cdf = np.array([NormalDist().cdf(float(z)) for z in gaussian_table()])
    assert abs(cdf - (np.arange(N_FIELDS) + 0.5) / N_FIELDS).max() < 6e-4


def test_other_deviates_than_the_journals_are_refused_with_both_crcs(monkeypatch):
    monkeypatch.setattr(gaussian, "TABLE_CRC32", 0x1234ABCD)
    with pytest.raises(ZO2TRLError, match=r"3ca03cbe.*1234abcd"):
        gaussian_table.__wrapped__()


def test_the_shared_table_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        gaussian_table()[0] = 0.0
