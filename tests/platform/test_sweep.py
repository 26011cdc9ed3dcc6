"""Sweeps: grids and their unions."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.sweep import Sweep, grid


def test_a_grid_is_every_combination_in_order():
    assert list(grid(size=["a", "b"], lam=[0.1, 0.2], seed=0)) == [
        {"size": "a", "lam": 0.1, "seed": 0},
        {"size": "a", "lam": 0.2, "seed": 0},
        {"size": "b", "lam": 0.1, "seed": 0},
        {"size": "b", "lam": 0.2, "seed": 0},
    ]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(), max_size=3), max_size=4))
def test_a_grid_against_nested_loops(axes):
    points = [{}]
    for name, values in axes.items():
        points = [{**point, name: value} for point, value in itertools.product(points, values)]
    assert list(grid(**axes)) == points


def test_what_counts_as_one_value():
    """A string is a value, not an axis of letters."""
    assert list(grid(size="0.6m", lam=None)) == [{"size": "0.6m", "lam": None}]
    assert list(grid(seed=range(2))) == list(grid(seed=(n for n in (0, 1)))) == [{"seed": 0}, {"seed": 1}]


def test_a_union_keeps_the_order():
    one, other = grid(seed=[1, 2]), grid(size=["a"], seed=[3])
    assert list(one + other) == [*one, *other]
    assert len(one + other) == 3
    assert list(Sweep(()) + one) == list(one)


def test_an_empty_axis_makes_an_empty_grid():
    assert len(grid(seed=[], size=["a", "b"])) == 0
