"""Products of settings: few combinations in CI, all of them at night.

Most faults show with one value of a setting, or with two values together (Kuhn et al. 2004). So CI runs a covering
array, in which every value (strength 1) or every pair of values (strength 2) occurs, and the night runs the product.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

__all__ = ["covering_rows", "every_pair", "every_value", "few_in_ci"]

Row = tuple[Any, ...]


def covering_rows(axes: Sequence[Sequence[Any]], *, strength: int) -> list[Row]:
    """A few rows of a product in which all combinations of values of any `strength` axes occur.

    The rows are chosen one by one, each the first of those that add the most, so the same axes give the same rows.
    """
    numbers = list(product(*(range(len(axis)) for axis in axes)))
    parts = {row: set(combinations(enumerate(row), strength)) for row in numbers}
    left = set().union(*parts.values())
    chosen: list[tuple[int, ...]] = []
    while left:
        row = max(numbers, key=lambda row: len(parts[row] & left))
        chosen.append(row)
        left -= parts[row]
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in chosen]


def every_value(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes for `parametrize`; CI runs rows with every value, the night runs the others, too."""
    return _sampled([list(axis) for axis in axes], strength=1)


def every_pair(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes for `parametrize`; CI runs rows with every pair of values, the night the others, too."""
    return _sampled([list(axis) for axis in axes], strength=2)


def few_in_ci(few: Any, many: Any) -> list[Any]:
    """Two amounts of the same trial for `parametrize`: the first runs in CI, the second at night."""
    return [few, pytest.param(many, marks=pytest.mark.nightly)]


def _sampled(axes: list[list[Any]], *, strength: int) -> list[Any]:
    in_ci = covering_rows(axes, strength=strength)
    return [row if row in in_ci else pytest.param(*row, marks=pytest.mark.nightly) for row in product(*axes)]
