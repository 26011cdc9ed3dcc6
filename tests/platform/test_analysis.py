"""The analysis against data with known laws, known optima and known variances."""

import itertools
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haltscale.platform import analysis
from haltscale.platform.analysis import Refusal, fitting, laws
from haltscale.platform.analysis.compare import _either_way, _inputs_at
from haltscale.platform.analysis.estimates import interval, resamples
from haltscale.platform.analysis.form import Form
from haltscale.platform.analysis.runs import BUDGET_SPREAD, budgets, budgets_of, levels, ordered, usable

E, A, ALPHA = 1.8, 4.0, 0.15
"""L(C) = E + A (C / 1e15)^-alpha."""
CHINCHILLA = {"E": 1.81722, "A": 477.83, "B": 2143.4, "a": 0.34731, "b": 0.36717}
NOISE = 0.004


def frame(loss, **columns) -> pd.DataFrame:
    """Finished vanilla runs with these losses."""
    loss = np.asarray(loss, dtype=float)
    rows = {"key": [f"run-{i}" for i in range(len(loss))], "state": "finished", "method": "vanilla", "loss": loss}
    return pd.DataFrame(rows | columns)


def compute_runs(seed=0, *, budgets=8, per_budget=3, noise=NOISE, cheaper=1.0) -> pd.DataFrame:
    """Runs on the law of compute; ``cheaper`` times less compute for the same loss."""
    random = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e17, 1e20, budgets), per_budget)
    loss = E + A * (cheaper * flops / 1e15) ** -ALPHA
    return frame(loss * np.exp(random.normal(0, noise, len(flops))), flops_realised=flops)


def surface_loss(parameters, tokens):
    c = CHINCHILLA
    return c["E"] + c["A"] * parameters ** -c["a"] + c["B"] * tokens ** -c["b"]


def surface_runs(seed=0, *, count=60, noise=NOISE) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    parameters = np.exp(random.uniform(np.log(7e7), np.log(1.6e10), count))
    tokens = np.exp(random.uniform(np.log(6e18), np.log(3e21), count)) / 6 / parameters
    loss = surface_loss(parameters, tokens) * np.exp(random.normal(0, noise, count))
    return frame(loss, parameters=parameters, tokens=tokens)


def recurrence_runs(seed=0, *, noise=0.001, tokens=(2e9, 8e9, 32e9)) -> pd.DataFrame:
    """Vanilla runs, and three looped methods with different exponents at the same passes."""
    random = np.random.default_rng(seed)
    rows = []
    for method, phi in (("vanilla", 0.0), ("adaptive", 0.6), ("adaptive/fixed", 0.3)):
        for size in np.geomspace(1e7, 1e9, 4):
            for seen in tokens:
                for passes in (1.0,) if method == "vanilla" else (2.0, 4.0):
                    once, recurrent = 0.2 * size, 0.8 * size
                    effective = once + passes**phi * recurrent
                    loss = 1.7 + 400 * effective**-0.34 + 1500 * seen**-0.36
                    rows.append(
                        {"method": method, "parameters": size, "parameters_once": once, "tokens": seen}
                        | {"parameters_recurrent": recurrent, "passes_per_token": passes, "loss": loss}
                    )
    table = pd.DataFrame(rows)
    noisy = table.pop("loss") * np.exp(random.normal(0, noise, len(table)))
    return frame(noisy, **{name: table[name] for name in table})


# ---- laws ----------------------------------------------------------------------------------------


def test_a_law_without_noise_is_found_exactly():
    law = analysis.fit_power_law(compute_runs(noise=0.0), bootstraps=50)
    found = law.estimates
    assert found["E"].value == pytest.approx(E, rel=1e-3)
    assert found["alpha"].value == pytest.approx(ALPHA, rel=1e-3)
    assert found["A"].value == pytest.approx(A * 1e15**ALPHA, rel=2e-2)
    assert law.objective < 1e-9


def test_a_surface_without_noise_is_found_exactly():
    law = analysis.fit_surface(surface_runs(noise=0.0), bootstraps=20)
    for name, value in CHINCHILLA.items():
        assert law.estimates[name].value == pytest.approx(value, rel=1e-2), name
    assert law.starts >= 2
    assert np.abs(law.residuals).max() < 1e-4


def covered(fits, truth) -> dict[str, int]:
    """In how many fits each true value lies inside its interval."""
    return {
        name: sum(law.estimates[name].low <= value <= law.estimates[name].high for law in fits)
        for name, value in truth.items()
    }


def test_intervals_of_the_surface_cover_the_truth_as_often_as_they_say():
    fits = [analysis.fit_surface(surface_runs(seed), bootstraps=100) for seed in range(25)]
    # 95 % intervals: fewer than 20 of 25 have a probability of 1e-3.
    assert all(count >= 20 for count in covered(fits, {n: CHINCHILLA[n] for n in "Eab"}).values())


@pytest.mark.parametrize("per_budget", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_intervals_of_the_law_of_compute_cover_the_truth_as_often_as_they_say(per_budget):
    fits = [analysis.fit_power_law(compute_runs(seed, per_budget=per_budget), bootstraps=100) for seed in range(25)]
    assert all(count >= 20 for count in covered(fits, {"E": E, "alpha": ALPHA}).values())
    widths = [law.estimates["alpha"].high - law.estimates["alpha"].low for law in fits]
    assert np.median(widths) < ALPHA  # an interval that covers because it says nothing would not do


def test_the_batch_reaches_the_minimum_that_lbfgs_reaches():
    """Each replicate of the bootstrap is the optimiser's own answer for its weights."""
    from scipy.optimize import minimize

    runs = surface_runs(3)
    form = Form(
        inputs=("parameters", "tokens"), centres=(np.log(runs["parameters"]).mean(), np.log(runs["tokens"]).mean())
    )
    points, log_loss = form.points(runs), np.log(runs["loss"].to_numpy())
    start = fitting.fit(form, points, log_loss).theta
    weights = resamples(6, len(runs), 0, least=5)
    found = fitting.refine(form, points, log_loss, weights, start)
    for weight, theta in zip(weights, found, strict=True):

        def objective(vector, weight=weight):
            value, jacobian = form.evaluate(vector[None], points)
            residuals = value[0] - log_loss
            slope = weight * np.clip(residuals / fitting.DELTA, -1, 1) / fitting.DELTA
            return float((weight * fitting.huber(residuals)).sum()), slope @ jacobian[0]

        best = min(
            minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=form.bounds(log_loss)).fun
            for begin in (start, theta)
        )
        assert objective(theta)[0] <= best * (1 + 1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1.5, 1.5), min_size=7, max_size=7),
    st.integers(0, 2**32 - 1),
)
def test_the_jacobian_is_the_derivative(shift, seed):
    runs = recurrence_runs(seed % 7)
    form = Form(inputs=("parameters", "tokens"), centres=(17.0, 22.0), phis=("adaptive", "fixed"))
    points = form.points(runs)
    theta = np.array([[0.5, 1.0, 1.0, 0.4, 0.4, 0.5, 0.3]]) + 0.2 * np.array([shift])
    _, jacobian = form.evaluate(theta, points)
    for index in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, index] = 1e-6
        numeric = (form.evaluate(theta + step, points)[0] - form.evaluate(theta - step, points)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[0, :, index], numeric[0], rtol=1e-4, atol=1e-7)


def test_outliers_do_not_move_a_fit_much():
    runs = compute_runs(1, noise=0.001)
    runs.loc[5, "loss"] *= 1.2
    assert analysis.fit_power_law(runs, bootstraps=20).estimates["alpha"].value == pytest.approx(ALPHA, rel=0.1)


def test_units_do_not_matter():
    runs = compute_runs(2)
    other = runs.assign(flops_realised=runs["flops_realised"] / 1e12)
    first, second = (analysis.fit_power_law(f, bootstraps=40).estimates["alpha"] for f in (runs, other))
    assert first.value == pytest.approx(second.value, rel=1e-4)
    assert first.low == pytest.approx(second.low, rel=1e-3)


def test_the_same_seed_gives_the_same_interval():
    first, second = (analysis.fit_power_law(compute_runs(), bootstraps=40, seed=4).estimates for _ in range(2))
    assert first == second


def test_a_slice_of_the_surface_is_the_surface():
    surface = analysis.fit_surface(surface_runs(), bootstraps=30)
    law = surface.slice(tokens=1e10)
    sizes = np.geomspace(1e8, 1e10, 5)
    np.testing.assert_allclose(
        law.predict(law.form.at({"parameters": sizes})),
        surface.predict(surface.form.at({"parameters": sizes, "tokens": np.array(1e10)})),
        rtol=1e-9,
    )


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (compute_runs(budgets=5, per_budget=1), "5 of the 6 runs"),
        (compute_runs(budgets=2, per_budget=6), "2 of the 3 values of flops_realised"),
        (compute_runs().query("flops_realised < 3.5e17"), "of the 3 values"),
        (compute_runs().assign(state="running"), "0 of the 6 runs that a fit needs (left out: 24 not finished)"),
        (compute_runs().assign(role="tuning"), "24 tuning"),
        (compute_runs().assign(loss=np.nan), "24 diverged"),
        (compute_runs().assign(flops_realised=None), "24 without flops_realised"),
        (compute_runs().drop(columns="flops_realised"), "24 without flops_realised"),
        (compute_runs().head(0), "0 of the 6 runs"),
    ],
)
def test_too_little_is_refused_with_its_reason(runs, reason):
    found = analysis.fit_power_law(runs)
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_too_narrow_a_range_is_refused():
    flops = np.geomspace(1e18, 3e18, 12)
    found = analysis.fit_power_law(frame(E + A * (flops / 1e15) ** -ALPHA, flops_realised=flops))
    assert isinstance(found, Refusal)
    assert "spans a factor of 3, a fit needs 4" in found.reason


def test_parameters_alone_are_refused_where_the_tokens_differ():
    found = analysis.fit_power_law(surface_runs(), "parameters")
    assert isinstance(found, Refusal)
    assert "fit L(N, D)" in found.reason


def test_a_failing_optimiser_is_a_refusal(monkeypatch):
    def fails(*_, **__):
        raise fitting.FitError("none of 4 starts of L-BFGS converged")

    monkeypatch.setattr(laws, "fit", fails)
    found = analysis.fit_power_law(compute_runs())
    assert isinstance(found, Refusal)
    assert "the optimiser failed" in found.reason


def test_losses_that_do_not_fall_identify_no_exponent():
    random = np.random.default_rng(0)
    flops = np.repeat(np.geomspace(1e17, 1e20, 8), 2)
    law = analysis.fit_power_law(frame(3 * np.exp(random.normal(0, 0.01, 16)), flops_realised=flops), bootstraps=200)
    assert not law.estimates["alpha"].identifiable
    assert law.estimates["alpha"].problem.startswith("not identifiable")


def test_a_straight_power_law_has_no_identifiable_floor():
    flops = np.repeat(np.geomspace(1e17, 1e18, 6), 2)
    random = np.random.default_rng(0)
    runs = frame(30 * (flops / 1e15) ** -0.1 * np.exp(random.normal(0, 0.01, 12)), flops_realised=flops)
    law = analysis.fit_power_law(runs, bootstraps=200)
    assert not law.estimates["E"].identifiable


def test_left_out_runs_are_counted_and_change_nothing():
    runs = compute_runs()
    extra = runs.head(4).assign(
        loss=[99.0, np.nan, 99.0, 99.0], state=["running", "finished", "finished", "diverged"],
        role=["result", "result", "tuning", "result"],
    )  # fmt: skip
    every = pd.concat([runs.assign(role="result"), extra], ignore_index=True)
    law = analysis.fit_power_law(every, bootstraps=30)
    assert law.left_out == "2 diverged, 1 not finished, 1 tuning"
    np.testing.assert_array_equal(law.theta, analysis.fit_power_law(runs, bootstraps=30).theta)
    assert set(analysis.usable(every, []).left_out["reason"]) == {"diverged", "not finished", "tuning"}


# ---- phi -----------------------------------------------------------------------------------------


def test_phi_is_found_for_every_method_and_their_difference_is_certain():
    found = analysis.fit_recurrence(recurrence_runs(), bootstraps=200)
    assert found.note == ""
    assert set(found.phi) == {"adaptive", "adaptive/fixed"}
    for name, value in (("adaptive", 0.6), ("adaptive/fixed", 0.3)):
        assert found.phi[name].low <= value <= found.phi[name].high
        assert found.phi[name].value == pytest.approx(value, abs=0.1)
    advantage = found.advantage("adaptive", "adaptive/fixed")
    assert advantage.low <= 0.3 <= advantage.high
    assert advantage.excludes(0.0)
    for other in ("fixed", "shuffled", "vanilla", "adaptive"):
        with pytest.raises(ValueError, match=f"{other} is not a replay control of adaptive"):
            found.advantage("adaptive", other)


@pytest.mark.slow
def test_phi_covers_the_truth():
    fits = [analysis.fit_recurrence(recurrence_runs(seed, noise=0.003), bootstraps=100) for seed in range(25)]
    inside = sum(fit.phi["adaptive"].low <= 0.6 <= fit.phi["adaptive"].high for fit in fits)
    assert inside >= 20


def test_phi_at_one_number_of_tokens_says_what_it_leaves_out():
    found = analysis.fit_recurrence(recurrence_runs(tokens=(8e9,)), bootstraps=100)
    assert "part of E" in found.note
    assert found.phi["adaptive"].value == pytest.approx(0.6, abs=0.15)


def test_phi_needs_runs_of_a_single_pass_and_of_more():
    runs = recurrence_runs()
    single = analysis.fit_recurrence(runs[runs["method"] == "vanilla"])
    several = analysis.fit_recurrence(runs[runs["method"] != "vanilla"])
    assert "no method with more than one pass" in single.reason
    assert "add vanilla runs" in several.reason


# ---- held out, frontier, isoFLOP, multipliers ----------------------------------------------------


def test_a_law_predicts_the_budgets_it_has_not_seen():
    found = analysis.leave_one_budget_out(compute_runs(noise=0.002))
    assert len(found.budgets) == 8
    assert found.budgets["extrapolated"].tolist() == [False] * 7 + [True]
    assert found.error < 0.01
    broken = compute_runs(noise=0.002)
    broken.loc[broken["flops_realised"] == broken["flops_realised"].max(), "loss"] *= 1.1
    assert analysis.leave_one_budget_out(broken).budgets["error"].iloc[-1] == pytest.approx(-0.09, abs=0.02)
    assert isinstance(analysis.leave_one_budget_out(compute_runs(budgets=3)), Refusal)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_the_frontier_is_what_nothing_beats(points):
    runs = frame([loss for _, loss in points], flops_realised=[flops for flops, _ in points])
    kept = set(analysis.pareto(runs)["key"])
    for key, (flops, loss) in zip(runs["key"], points, strict=True):
        beaten = any(f <= flops and x <= loss and (f < flops or x < loss) for f, x in points)
        if beaten:
            assert key not in kept
    corners = {(f, x) for f, x in points if not any(g <= f and y <= x and (g < f or y < x) for g, y in points)}
    assert len(kept) == len(corners)


def isoflop_runs(seed=0, noise=0.0005) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows = []
    for flops in np.geomspace(1e18, 1e21, 5):
        best = (flops / 6 * (CHINCHILLA["a"] * CHINCHILLA["A"]) / (CHINCHILLA["b"] * CHINCHILLA["B"])) ** 0.5
        for factor in np.geomspace(0.2, 5, 9):
            size = best * factor
            rows.append({"parameters": size, "tokens": flops / 6 / size, "flops_realised": flops})
    table = pd.DataFrame(rows)
    loss = surface_loss(table["parameters"], table["tokens"]) * np.exp(random.normal(0, noise, len(table)))
    return frame(loss, **{name: table[name] for name in table})


def test_isoflop_minima_lie_where_the_law_has_them():
    found = analysis.isoflop(isoflop_runs(), bootstraps=200)
    assert len(found.minima) == 5
    a, b = CHINCHILLA["a"], CHINCHILLA["b"]
    ratio = (a * CHINCHILLA["A"]) / (b * CHINCHILLA["B"])
    for row in found.minima.itertuples():
        best = (ratio * (row.budget / 6) ** b) ** (1 / (a + b))
        assert row.parameters == pytest.approx(best, rel=0.15)
        assert row.low <= row.parameters <= row.high
    assert found.exponent.value == pytest.approx(b / (a + b), abs=0.03)
    surface = analysis.fit_surface(isoflop_runs(), bootstraps=100)
    assert analysis.optimal_exponent(surface).value == pytest.approx(b / (a + b), abs=0.02)
    assert analysis.disagreement(found, surface) == ""


def test_a_disagreement_is_told():
    surface = analysis.fit_surface(surface_runs(), bootstraps=50)
    runs = isoflop_runs()
    bent = runs.assign(parameters=runs["parameters"] ** 1.3)
    assert re.search(r"C\^0\.6.*C\^0\.5.*do not meet", analysis.disagreement(analysis.isoflop(bent), surface))


def test_a_minimum_at_the_edge_is_none():
    runs = isoflop_runs()
    budget = runs["flops_realised"].min()
    large = runs[runs["flops_realised"] == budget].nlargest(5, "parameters")
    found = analysis.isoflop(pd.concat([large, runs[runs["flops_realised"] > budget]]), bootstraps=50)
    assert found.profiles[0].parameters is None
    assert "edge" in found.profiles[0].problem
    assert len(found.minima) == 4


def test_isoflop_refuses_a_ladder():
    found = analysis.isoflop(compute_runs().assign(parameters=1e6))
    assert isinstance(found, Refusal)
    assert "several sizes" in found.reason


def test_the_multiplier_is_the_factor_of_compute():
    method = analysis.fit_power_law(compute_runs(1, cheaper=1.6, noise=0.001), bootstraps=200)
    reference = analysis.fit_power_law(compute_runs(2, noise=0.001), bootstraps=200)
    found = analysis.equivalent(method, reference)
    assert found.mean.low <= 1.6 <= found.mean.high
    assert found.mean.value == pytest.approx(1.6, rel=0.05)
    assert found.table["loss"].between(reference.runs["loss"].min() * 0.99, method.runs["loss"].max() * 1.01).all()
    back = analysis.equivalent(reference, method)
    assert back.mean.value == pytest.approx(1 / found.mean.value, rel=0.01)


@pytest.mark.slow
def test_the_multiplier_covers_the_truth():
    inside = 0
    for seed in range(25):
        method, reference = (
            analysis.fit_power_law(compute_runs(2 * seed + i, cheaper=c), bootstraps=100, seed=seed)
            for i, c in ((0, 1.6), (1, 1.0))
        )
        found = analysis.equivalent(method, reference)
        inside += found.mean.low <= 1.6 <= found.mean.high
    assert inside >= 20


def test_a_resample_that_reaches_a_loss_by_neither_law_speaks_for_both_ends():
    logs = np.log(np.full((100, 2), 1.5))
    logs[:10, 1] = np.nan
    low, high = _either_way(logs)
    assert (low[0], high[0]) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (low[1], high[1]) == (0, math.inf)


def test_parameters_are_compared_like_compute():
    sizes = np.repeat(np.geomspace(1e7, 1e9, 7), 2)

    def law(factor):
        loss = 2.0 + 300 * (factor * sizes) ** -0.3
        noisy = loss * np.exp(np.random.default_rng(int(factor)).normal(0, 0.001, 14))
        return analysis.fit_power_law(frame(noisy, parameters=sizes, tokens=1e9), "parameters", bootstraps=100)

    found = analysis.equivalent(law(2.0), law(1.0))
    assert found.x == "parameters"
    assert found.mean.value == pytest.approx(2.0, rel=0.1)


def test_methods_that_share_no_loss_are_not_compared():
    cheap = compute_runs().assign(loss=lambda runs: runs["loss"] + 5)
    found = analysis.equivalent(
        analysis.fit_power_law(cheap, bootstraps=20), analysis.fit_power_law(compute_runs(), bootstraps=20)
    )
    assert isinstance(found, Refusal)
    assert "no loss is reached by both" in found.reason


def test_a_loss_below_the_floor_takes_infinite_compute():
    law = analysis.fit_power_law(compute_runs(noise=0.0), bootstraps=2)
    logs = _inputs_at(law.theta[None], law, np.array([E + A * 100**-ALPHA, E - 0.1]))
    assert math.exp(logs[0, 0]) == pytest.approx(1e17, rel=1e-2)
    assert np.isinf(logs[0, 1])


def test_laws_of_different_inputs_are_not_compared():
    first = analysis.fit_power_law(compute_runs(), bootstraps=2)
    second = analysis.fit_power_law(
        compute_runs().rename(columns={"flops_realised": "flops_paper"}), "flops_paper", bootstraps=2
    )
    with pytest.raises(ValueError, match="fit both alike"):
        analysis.equivalent(first, second)


# ---- sweeps --------------------------------------------------------------------------------------


def sweep(seed=0, *, noise=0.01, seeds=2) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows = [
        {"lam": lam, "beta": beta, "l_max": l_max, "seed": s, "mean_steps": l_max / (1 + lam)}
        | {"loss": 3 + 0.3 * math.log10(lam) + 0.05 * beta + random.normal(0, noise)}
        for lam in (0.01, 0.1, 1.0)
        for beta in (0.5, 1.0)
        for l_max in (1, 3)
        for s in range(seeds)
    ]
    table = pd.DataFrame(rows)
    loss = table.pop("loss")
    return frame(loss, **{name: table[name] for name in table}, size="1.8m", tokens=1e6)


def test_importance_finds_what_moves_the_loss():
    found = analysis.importance(sweep(), ["lam", "beta", "l_max", "tau"]).set_index("parameter")
    assert found.index[0] == "lam"
    assert "tau" not in found.index
    values = sweep()["loss"]
    between = sweep().groupby("lam")["loss"].mean().var(ddof=0) / values.var(ddof=0)
    assert found.loc["lam", "share"] == pytest.approx(between, abs=0.02)
    assert found.loc["lam", "share"] > found.loc["lam", "chance"]
    assert found.loc["l_max", "share"] < found.loc["l_max", "chance"]
    assert found["share"].sum() <= 1.01


def test_importance_of_pure_noise_is_chance():
    random = np.random.default_rng(0)
    above = []
    for seed in range(40):
        runs = sweep().assign(loss=random.normal(3, 0.1, 24))
        found = analysis.importance(runs, ["lam", "beta"], seed=seed)
        above += (found["share"] > found["chance"]).tolist()
    assert np.mean(above) < 0.15  # 5 % are expected


def test_importance_refuses():
    assert "8 runs" in analysis.importance(sweep().head(5), ["lam"]).reason
    assert "no parameter" in analysis.importance(sweep(), ["tau", "size"]).reason
    assert "the same in all" in analysis.importance(sweep().assign(mean_steps=0.0), ["lam"], target="mean_steps").reason


def test_seed_noise_is_the_pooled_deviation():
    runs = sweep(seeds=5, noise=0.02)
    found = analysis.seed_noise(runs)
    pooled = math.sqrt(runs.groupby(["lam", "beta", "l_max"])["loss"].var(ddof=1).mean())
    assert found.deviation.value == pytest.approx(pooled)
    assert found.deviation.low <= 0.02 <= found.deviation.high
    assert (found.groups, found.runs) == (12, 60)
    assert isinstance(analysis.seed_noise(sweep(seeds=1)), Refusal)


def test_slices_are_means_at_each_value():
    found = analysis.slices(sweep(noise=0.0), "lam")
    assert found["value"].tolist() == [0.01, 0.1, 1.0]
    assert found["runs"].tolist() == [8, 8, 8]
    assert found["mean"].is_monotonic_increasing


# ---- small parts ---------------------------------------------------------------------------------


@given(st.lists(st.floats(1e10, 1e20), min_size=1, max_size=40))
def test_no_budget_is_wider_than_its_bound(values):
    compute = np.array(values)
    labels = budgets(compute)
    groups = [compute[labels == label] for label in range(labels.max() + 1)]
    assert all(len(own) for own in groups)
    assert all(own.max() <= BUDGET_SPREAD * own.min() * (1 + 1e-9) for own in groups)
    for smaller, larger in itertools.pairwise(groups):
        assert smaller.max() <= larger.min()
    assert 1 <= levels(compute) <= len(values)
    # One of them is the densest stretch of that width that there is.
    densest = max(((compute >= low) & (np.log(compute / low) <= np.log(BUDGET_SPREAD))).sum() for low in compute)
    assert max(map(len, groups)) >= densest


def test_runs_that_follow_on_each_other_are_many_budgets():
    compute = 1e18 * 1.15 ** np.arange(40)
    labels = budgets(compute)
    assert labels.max() + 1 == 20
    assert max(np.ptp(np.log(compute[labels == label])) for label in set(labels)) <= np.log(BUDGET_SPREAD)


def test_a_budget_keeps_to_the_cluster_that_was_trained_at():
    stragglers = np.array([0.8, 0.91, 0.95])
    compute = 1e18 * np.concatenate([np.linspace(0.99, 1.01, 9), stragglers])
    labels = budgets(compute)
    assert len(set(labels[:9])) == 1
    assert (labels == labels[0]).sum() == 11  # 0.91 to 1.01; with 0.8 it would be too wide
    assert (labels[9], labels[0]) == (0, 1)


def test_planned_budgets_are_taken_as_planned():
    compute = np.array([1.0, 1.5, 3.0, 1.25, 9.0, 2.1]) * 1e18  # halting decides what a planned run spends
    planned = np.array(["1e18", "1e18", "3e18", "", "", "3e18"], dtype=object)
    assert budgets(compute, planned).tolist() == [0, 0, 1, 0, 2, 1]  # 1.25 lies amidst those of 1e18
    runs = frame(np.ones(6), flops_realised=compute, budget=[1e18, 1e18, 3e18, None, None, 3e18])
    assert budgets_of(runs, "flops_realised").tolist() == [0, 0, 1, 0, 2, 1]


def chinchilla() -> pd.DataFrame:
    """The 240 runs that Epoch AI read off Hoffmann et al.'s figure 4 (arXiv 2404.10102), to five digits."""
    table = pd.read_csv(Path(__file__).with_name("chinchilla.csv"))
    parameters, flops = table["parameters"], table["flops"]
    return frame(table["loss"], parameters=parameters, tokens=flops / 6 / parameters, flops_realised=flops)


PLANNED_BY_HOFFMANN = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
"""Approach 2's budgets; among the 240 points are also the runs of approach 1, of all amounts between these."""


def test_the_budgets_of_chinchilla_have_minima_and_the_exponent_of_the_surface():
    runs = chinchilla()
    found = analysis.isoflop(runs, bootstraps=200)
    spreads = [profile.runs["flops_realised"].agg(["min", "max"]) for profile in found.profiles]
    assert max(high / low for low, high in spreads) <= BUDGET_SPREAD * (1 + 1e-9)
    budget = found.minima["budget"].to_numpy()
    for planned in PLANNED_BY_HOFFMANN:
        assert np.abs(np.log(budget / planned)).min() < 0.12, planned
    surface = analysis.optimal_exponent(analysis.fit_surface(runs, bootstraps=200))
    assert surface.low < 0.51 < surface.high
    assert 0.48 < found.exponent.value < 0.56  # the published interval of the surface's
    assert not analysis.disagreement(found, analysis.fit_surface(runs, bootstraps=200))
    law = analysis.leave_one_budget_out(runs)
    assert law.budgets["runs"].max() < 30


def test_intervals_hold_infinities():
    low, high = interval(np.array([1.0, 2.0, np.inf, np.inf])[:, None])
    assert low[0] == 1.0
    assert high[0] == np.inf


def test_resamples_draw_as_many_runs_as_there_are():
    drawn = resamples(300, 8, 0, least=5)
    assert (drawn.sum(1) == 8).all()
    assert ((drawn > 0).sum(1) >= 5).all()


# ---- frames of a user's own ----------------------------------------------------------------------

QUESTIONS = {
    "power law": lambda runs: analysis.fit_power_law(runs, bootstraps=20),
    "power law of parameters": lambda runs: analysis.fit_power_law(runs, "parameters", bootstraps=20),
    "surface": lambda runs: analysis.fit_surface(runs, bootstraps=20),
    "recurrence": lambda runs: analysis.fit_recurrence(runs, bootstraps=20),
    "hold-out": analysis.leave_one_budget_out,
    "isoflop": lambda runs: analysis.isoflop(runs, bootstraps=20),
    "pareto": analysis.pareto,
    "seed noise": analysis.seed_noise,
    "importance": lambda runs: analysis.importance(runs, ["lam", "size", "learning_rate"]),
    "importance of all": analysis.importance,
    "slices": lambda runs: analysis.slices(runs, "size"),
}


def anything(count=24) -> pd.DataFrame:
    """Runs that carry every analysis."""
    random = np.random.default_rng(0)
    parameters = np.tile(np.geomspace(1e6, 1e9, 6), count // 6)
    tokens = np.repeat(np.geomspace(1e8, 1e10, count // 6), 6)
    return frame(
        surface_loss(parameters, tokens) * np.exp(random.normal(0, NOISE, count)),
        size=np.tile(["0.6m", "1.8m", "17m", "4m", "8m", "125m"], count // 6), seed=np.arange(count) % 2,
        parameters=parameters, tokens=tokens, flops_realised=6 * parameters * tokens, lam=np.arange(count) % 3 / 2,
        passes_per_token=1.0 + np.arange(count) % 2, parameters_once=0.2 * parameters,
        parameters_recurrent=0.8 * parameters, mean_steps=random.random(count),
    )  # fmt: skip


FRAMES = {
    "empty": lambda runs: runs.head(0),
    "no columns": lambda runs: pd.DataFrame(),
    "one row": lambda runs: runs.head(1),
    "one size": lambda runs: runs.assign(parameters=1e6, size="1m"),
    "one loss": lambda runs: runs.assign(loss=3.0),
    "nullable": lambda runs: runs.convert_dtypes(),
    "nullable with gaps": lambda runs: runs.convert_dtypes().mask(np.arange(runs.size).reshape(runs.shape) % 7 == 0),
    "arrow": lambda runs: runs.convert_dtypes(dtype_backend="pyarrow"),
    "objects": lambda runs: runs.astype(object),
    "texts": lambda runs: runs.astype(str),
    "categories": lambda runs: runs.astype({"method": "category", "size": "category", "state": "category"}),
    "booleans": lambda runs: runs.assign(lam=pd.array([True, False, None] * (len(runs) // 3), dtype="boolean")),
    "lists": lambda runs: runs.assign(lam=[[index % 2] for index in range(len(runs))], mean_steps=[[1.0]] * len(runs)),
    "not a number": lambda runs: runs.assign(loss=np.nan),
    "infinite": lambda runs: runs.assign(flops_realised=np.inf, parameters=np.inf),
    "beyond a float": lambda runs: runs.assign(flops_realised=[10**400] * len(runs)),
    "nearly beyond": lambda runs: runs.assign(parameters=runs["parameters"] * 1e295, loss=runs["loss"] * 1e300),
    "wide": lambda runs: runs.assign(flops_realised=np.logspace(-300, 300, len(runs))),
    "complex": lambda runs: runs.assign(loss=runs["loss"] + 0j),
    "twice the column": lambda runs: pd.concat([runs, runs[["loss"]]], axis=1),
    "twice the index": lambda runs: runs.set_axis([0] * len(runs)),
    "mixed sizes": lambda runs: runs.assign(size=np.resize(np.array([1, "1.8m", None, 2.5], dtype=object), len(runs))),
    **{f"without {name}": lambda runs, name=name: runs.drop(columns=name) for name in anything().columns},
}


@pytest.mark.parametrize("name", FRAMES)
def test_any_frame_gets_an_answer_or_a_refusal(name):
    runs = FRAMES[name](anything())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for question, ask in QUESTIONS.items():
            answer = ask(runs)
            assert not isinstance(answer, Refusal) or answer.reason, question
            if isinstance(answer, laws.LawFit):
                law = answer.slice(tokens=1e9) if answer.form.terms == 2 else answer
                law.curve(*law.domain)
                assert set(answer.estimates) >= {"E"}
                analysis.equivalent(law, law)


@pytest.mark.parametrize("name", ["nullable", "arrow", "objects", "texts", "categories", "twice the index"])
def test_the_type_of_a_column_changes_no_answer(name):
    plain, typed = anything(), FRAMES[name](anything())
    one, other = (analysis.fit_surface(runs, bootstraps=20) for runs in (plain, typed))
    np.testing.assert_allclose(one.theta, other.theta)
    pd.testing.assert_frame_equal(
        analysis.importance(plain, ["size", "seed"]), analysis.importance(typed, ["size", "seed"])
    )


def test_a_run_that_two_studies_share_counts_once():
    runs = surface_runs(count=24)
    once, five = (analysis.fit_surface(f, bootstraps=50) for f in (runs, pd.concat([runs] * 5, ignore_index=True)))
    assert five.estimates == once.estimates
    assert five.left_out == "96 given more than once"
    nameless = pd.concat([runs.drop(columns="key")] * 2)
    assert len(usable(nameless, []).runs) == 24
    planned = runs.head(1).assign(state="planned", loss=np.nan)
    assert len(usable(pd.concat([planned, runs]), []).runs) == 24  # the finished row of the two


def test_seed_noise_pairs_what_is_equal_but_for_the_seed():
    runs = frame([4.9, 4.0, 4.01], seed=[0, 0, 1], size="0.6m", learning_rate=[1e-4, 3e-3, 3e-3])
    found = analysis.seed_noise(runs)
    assert found.deviation.value == pytest.approx(0.01 / math.sqrt(2))
    assert (found.groups, found.runs) == (1, 2)
    # what nobody foresaw sets runs apart too
    assert isinstance(analysis.seed_noise(runs.assign(optimizer=["a", "b", "c"])), Refusal)
    # and what a run results in does not: two seeds halt differently, and so spend differently
    assert analysis.seed_noise(runs.assign(flops_realised=[1.0, 2.0, 3.0], mean_steps=[0.1, 0.2, 0.3])) == found


def test_sizes_are_ordered_by_their_parameters():
    runs = anything()
    named = runs.assign(size=np.tile(["17m", "0.6m", "imported", "1.8m", "125m", "1.4b"], 4))
    assert ordered(named.drop(columns="parameters"), "size")[1] == ["0.6m", "1.8m", "17m", "125m", "1.4b", "imported"]
    assert ordered(named, "size")[1] == ["17m", "0.6m", "imported", "1.8m", "125m", "1.4b"]  # as they have parameters
    assert analysis.slices(named.drop(columns="parameters"), "size")["value"].tolist()[:2] == ["0.6m", "1.8m"]


def test_any_column_can_be_judged():
    runs = sweep().assign(learning_rate=lambda t: 10 ** -(2 + t["beta"]), seed=0)
    found = analysis.importance(runs.drop(columns="beta"), ["learning_rate", "schedule"])
    assert found["parameter"].tolist() == ["learning_rate"]
    assert set(analysis.importance(runs)["parameter"]) == {"lam", "beta", "l_max", "learning_rate"}


def test_a_wide_interval_of_the_irreducible_loss_is_called_unidentifiable():
    runs = compute_runs(budgets=4, per_budget=3, noise=0.03)
    law = analysis.fit_power_law(runs, bootstraps=200)
    e = law.estimates["E"]
    assert (e.high - e.low) / e.value > 1
    assert e.problem.startswith("not identifiable")
