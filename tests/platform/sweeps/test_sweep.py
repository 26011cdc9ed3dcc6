"""Sweeps: grids and their unions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.sweeps.sweep import (
    Control,
    Sweep,
    choice,
    controls,
    grid,
    integers,
    ladder,
    log_uniform,
    sample,
    uniform,
    zip_,
)

FIRST_DRAWS = [0.01768, 0.2001, 0.02299]


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


# ---- the other constructs -------------------------------------------------------------------------------------------

names = st.sampled_from("abcd")
axes = st.dictionaries(names, st.lists(st.integers(), min_size=1, max_size=3), max_size=3)


def test_zip_pairs_values_and_repeats_single_ones():
    assert list(zip_(size=["a", "b"], lr=[1, 2], seed=0)) == [
        {"size": "a", "lr": 1, "seed": 0},
        {"size": "b", "lr": 2, "seed": 0},
    ]
    assert list(zip_(size="a")) == [{"size": "a"}]
    with pytest.raises(ValueError, match="size has 2, lr has 1"):
        zip_(size=["a", "b"], lr=[1])


@given(axes, axes)
def test_a_product_is_the_grid_of_both(one, other):
    if set(one) & set(other):
        with pytest.raises(ValueError, match="both sides"):
            grid(**one) * grid(**other)
    else:
        assert list(grid(**one) * grid(**other)) == list(grid(**one, **other))


@given(axes, axes, axes)
def test_a_product_distributes_over_a_union(one, other, third):
    left, right = {f"l{name}": value for name, value in one.items()}, {f"r{n}": v for n, v in other.items()}
    both = grid(**left) + grid(**right)
    assert list(both * grid(**third)) == list(grid(**left) * grid(**third)) + list(grid(**right) * grid(**third))


def test_conditions_keep_what_holds():
    kept = grid(size=["a", "b"], lam=[0.1, 0.9]).where(lambda p: p["size"] == "a" or p["lam"] < 0.5)
    assert [(p["size"], p["lam"]) for p in kept] == [("a", 0.1), ("a", 0.9), ("b", 0.1)]


def test_options_go_where_the_method_has_them_and_nowhere_else():
    sweep = grid(method=["vanilla", "adaptive", "fixed"], seed=[0, 1]).with_options(lam=[0.1, 1.0], l_max=2)
    assert len(sweep) == 2 + 4 + 2
    assert all(("lam" in point) == (point["method"] == "adaptive") for point in sweep)
    with pytest.raises(ValueError, match="'lamda'; did you mean 'lam'"):
        grid(method=["vanilla", "adaptive"]).with_options(lamda=1)
    with pytest.raises(ValueError, match="no method of this sweep has the option 'lam'"):
        grid(method="vanilla").with_options(lam=1)
    with pytest.raises(ValueError, match="give method="):
        grid(seed=0).with_options(lam=1)


def test_the_ladder_between_two_sizes():
    assert ladder("4m", "17m") == ["4m", "8m", "17m"]
    with pytest.raises(ValueError, match=r"did you mean .1\.4b."):
        ladder("4m", "1.3b")
    with pytest.raises(ValueError, match="smaller size first"):
        ladder("17m", "4m")


@given(st.integers(0, 5), st.integers(1, 40))
def test_draws_stay_within_and_do_not_move(seed, n):
    drawn = sample(
        n, seed=seed, lam=log_uniform(0.01, 1), beta=uniform(-1, 2), l_max=integers(1, 3), t=choice("a", "b")
    )
    for point in drawn:
        assert 0.01 <= point["lam"] <= 1
        assert -1 <= point["beta"] <= 2
        assert point["l_max"] in (1, 2, 3)
        assert point["t"] in ("a", "b")
    longer = sample(n + 3, seed=seed, lam=log_uniform(0.01, 1), method="adaptive")
    assert [p["lam"] for p in longer][:n] == [p["lam"] for p in drawn]


def test_draws_are_the_same_for_ever_and_spread():
    """Written down once: a draw that moves asks for new runs."""
    assert [p["lam"] for p in sample(3, lam=log_uniform(0.01, 1.0))] == FIRST_DRAWS
    many = [p["x"] for p in sample(2000, x=uniform(0, 1))]
    assert abs(sum(many) / 2000 - 0.5) < 0.03
    counts = [p["l"] for p in sample(3000, l=integers(1, 3))]
    assert all(850 < counts.count(value) < 1150 for value in (1, 2, 3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: sample(2, lam=[0.1, 0.2]), "choice"),
        (lambda: grid(lam=uniform(0, 1)), "sample"),
        (lambda: uniform(1, 1), "smaller"),
        (lambda: log_uniform(0, 1), "above 0"),
        (lambda: choice(), "at least one"),
        (lambda: controls(of=grid(method="adaptive"), kinds=["denze"]), "one of dense, wider, fixed, shuffled"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_controls_go_with_their_subjects():
    learned = grid(method="adaptive", lam=[0.1, 1.0])
    both = (learned + controls(of=learned, kinds=["dense", "fixed"])) * grid(seed=[0, 1])
    assert len(both) == 2 * 2 + 2 * 2 * 2
    assert {point.of["seed"] for point in both if isinstance(point, Control)} == {0, 1}
    assert all(point.of in list(both) for point in both if isinstance(point, Control))
    assert len(both.where(lambda p: p["seed"] == 0)) == 6
