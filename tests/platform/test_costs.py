"""Training plus serving: totals, the cheapest model at a loss, and break-even against a search over a grid."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.analysis import costs


def model(method, train, serve, loss=4.0):
    return {"method": method, "size": "1m", "label": method, "runs": 1, "loss": loss, "train": train, "serve": serve}


def test_the_cheapest_model_changes_with_the_tokens_served():
    models = pd.DataFrame([model("a", 1e12, 1e6), model("a", 4e12, 1e5), model("b", 2e12, 5e5), model("b", 1, 1, 9.0)])
    few, many = costs.cheapest(models, 4.5, 1e3), costs.cheapest(models, 4.5, 1e9)
    assert few["method"].tolist() == ["a", "b"]
    assert few["total"].tolist() == [1e12 + 1e9, 2e12 + 5e8]
    assert many["total"].tolist() == [4e12 + 1e14, 2e12 + 5e14]
    assert costs.cheapest(models, 3.0, 1e6).empty


def test_break_even_of_two_models_is_where_their_totals_meet():
    models = pd.DataFrame([model("a", 1e12, 1e6), model("b", 3e12, 5e5)])
    assert costs.break_even(models, 4.5, "a", "b", 1e3, 1e12) == [pytest.approx(4e6)]
    assert costs.break_even(models, 3.0, "a", "b", 1e3, 1e12) == []


PRICES = st.tuples(st.sampled_from(["a", "b"]), st.floats(1e9, 1e13), st.floats(1e3, 1e7))


@given(st.lists(PRICES, min_size=2, max_size=5))
def test_between_break_evens_one_method_stays_the_cheaper(rows):
    models = pd.DataFrame([model(*row) for row in rows])
    found = costs.break_even(models, 4.5, "a", "b", 1e3, 1e12)
    assert found == sorted(found)
    if set(models["method"]) != {"a", "b"}:
        assert found == []
        return
    tokens = np.geomspace(1e3, 1e12, 400)
    best = {
        name: (part["train"].to_numpy()[:, None] + part["serve"].to_numpy()[:, None] * tokens).min(0)
        for name, part in models.groupby("method")
    }
    gap = (best["a"] - best["b"]) / best["b"]
    sure = np.abs(gap) > 1e-9
    for low, high in zip([1e3, *found], [*found, 1e12], strict=True):
        signs = np.sign(gap[sure & (tokens > low) & (tokens < high)])
        assert len(set(signs)) <= 1


def test_candidates_are_means_over_seeds_of_what_is_finished():
    rows = [
        {"key": f"k{seed}", "state": "finished", "method": "a", "size": "1m", "setting": "s", "seed": seed}
        | {"loss": 4.0 + seed, "train": 1e12, "serve": 1e6}
        for seed in (0, 1)
    ]
    rows.append({**rows[0], "key": "tuned", "role": "tuning", "loss": 1.0})
    rows.append({**rows[0], "key": "open", "state": "running", "loss": 1.0})
    found = costs.candidates(pd.DataFrame(rows), "train", "serve")
    assert found[["runs", "loss", "train", "serve"]].to_numpy().tolist() == [[2, 4.5, 1e12, 1e6]]
