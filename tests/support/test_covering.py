"""Promises of the covering arrays that CI runs in place of whole products."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.covering import covering_rows, every_pair, every_value

axes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(lambda sizes: [list(range(size)) for size in sizes])


@given(axes=axes)
def test_every_pair_of_values_occurs_in_some_row(axes):
    rows = covering_rows(axes, strength=2)
    for first, second in combinations(range(len(axes)), 2):
        assert {(row[first], row[second]) for row in rows} == {(a, b) for a in axes[first] for b in axes[second]}


@given(axes=axes)
def test_every_value_occurs_in_as_few_rows_as_the_longest_axis_has_values(axes):
    rows = covering_rows(axes, strength=1)
    assert all({row[i] for row in rows} == set(axis) for i, axis in enumerate(axes))
    assert len(rows) == max(map(len, axes))


def test_the_night_runs_the_rest_of_the_product():
    for chosen in (every_value("abc", [1, 2]), every_pair("abc", [1, 2], "xy")):
        marked = [row for row in chosen if hasattr(row, "marks")]
        assert marked and all(row.marks[0].name == "nightly" for row in marked)
    assert len(every_value("abc", [1, 2])) == 6 and len(every_pair("abc", [1, 2], "xy")) == 12
