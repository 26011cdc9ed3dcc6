"""Figures of laws and sweeps, by the data in them and against the analysis that they show."""

import math

import numpy as np
import pandas as pd
import pytest

from haltscale.dashboard import data, figures, halting_figures, law_figures, style, sweep_figures
from haltscale.dashboard.data import FlopsKind
from haltscale.dashboard.law_figures import Measure
from haltscale.platform import analysis

STUDY = "quick"


@pytest.fixture
def runs(author) -> pd.DataFrame:
    author.troubled_study()
    return data.load_study(author.store, STUDY).runs


@pytest.mark.parametrize("kind", list(FlopsKind))
def test_scaling_draws_each_run_once_at_its_flops_and_perplexity(runs, kind):
    figure = law_figures.scaling(runs, kind)
    drawn = {
        key: (x, y)
        for trace in figure.data
        if trace.mode == "markers"
        for key, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    shown = data.plotted(runs, kind).set_index("key")
    assert set(drawn) == set(shown.index)
    for key, (x, y) in drawn.items():
        assert x == shown.loc[key, f"flops_{kind}"]
        assert y == shown.loc[key, "loss"]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert kind.value in figure.layout.xaxis.title.text


def test_scaling_marks_runs_without_a_result_as_hollow(runs):
    states = runs.set_index("key")["state"]
    for trace in law_figures.scaling(runs, FlopsKind.REALISED).data:
        if trace.mode == "markers":
            hollow = trace.marker.symbol.endswith("-open")
            assert all((states[key] != "finished") == hollow for key in trace.customdata)


def test_scaling_lines_join_the_mean_over_seeds(author):
    for seed, factor in ((0, 1.0), (1, 1.21)):
        key = f"seed-{seed}"
        author.begin(key, method="vanilla", lam=None)
        loss = math.log(100 * factor)
        author.finish(key, lam=None, loss=loss, perplexity=100 * factor)
    author.plan(["seed-0", "seed-1"])
    figure = law_figures.scaling(
        data.load_study(author.store, STUDY).runs, FlopsKind.REALISED, measure=Measure.PERPLEXITY
    )
    (line,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert list(line.y) == pytest.approx([110.0])


def test_a_series_keeps_its_marker_when_others_are_filtered_away(runs):
    def marks(frame: pd.DataFrame) -> dict[str, str]:
        return {
            trace.legendgroup: (trace.line.dash, trace.marker.symbol)
            for trace in law_figures.scaling(frame, FlopsKind.REALISED).data
            if trace.mode == "lines+markers"
        }

    every = marks(runs)
    assert len(set(every.values())) == len(every)
    some = marks(runs[runs["lam"] == 1.0])
    assert some == {name: every[name] for name in some}


def test_scaling_of_one_run_and_of_none(runs):
    one = law_figures.scaling(runs.head(1), FlopsKind.REALISED)
    low, high = one.layout.xaxis.range
    assert low < high
    assert not law_figures.scaling(runs.head(0), FlopsKind.REALISED).data


def test_labels_are_escaped_in_hover_boxes(runs):
    hostile = runs.head(1).assign(label="<img src=x onerror=alert(1)>")
    figure = law_figures.scaling(hostile, FlopsKind.REALISED)
    assert "<img" not in figure.to_json().replace("\\u003c", "<")


def generated(methods=("vanilla", "adaptive"), *, noise=0.003) -> pd.DataFrame:
    """Finished runs of known laws as the pages hold them."""
    random = np.random.default_rng(0)
    rows = []
    for method in methods:
        for size in (1e6, 2e6, 4e6, 8e6):
            for tokens in (1e8, 4e8, 1.6e9):
                for seed in (0, 1):
                    steps = 0.0 if method == "vanilla" else 1.5
                    effective = 0.3 * size + 0.7 * size * (1 + steps) ** 0.5
                    loss = 1.8 + 50 * effective**-0.3 + 900 * tokens**-0.34
                    row = dict.fromkeys(data.NUMBERS, math.nan) | dict.fromkeys(data.TEXT, "")
                    rows.append(
                        row
                        | {
                            "key": f"{method}-{size:g}-{tokens:g}-{seed}",
                            "label": f"{method} {size:g}",
                            "role": "comparison",
                        }
                        | {"state": "finished", "method": method, "series": method, "size": f"{size / 1e6:g}m"}
                        | {"loss": loss * math.exp(random.normal(0, noise)), "seed": seed, "tokens": tokens}
                        | {"tokens_done": tokens, "parameters": size, "parameters_once": 0.3 * size, "rank": 0.0}
                        | {"parameters_recurrent": 0.7 * size, "passes": 1 + steps, "mean_steps": steps, "shade": 0.0}
                        | {"flops_realised": 6 * size * tokens * (1 + steps), "lam": 0.1 if steps else math.nan}
                    )
    frame = pd.DataFrame(rows)
    return frame.assign(perplexity=np.exp(frame["loss"]), rank=pd.factorize(frame["series"])[0].astype(float))


def by_name(figure, part: str):
    return [trace for trace in figure.data if trace.name and part in trace.name]


@pytest.mark.parametrize("measure", list(Measure))
def test_a_fit_is_drawn_as_the_analysis_has_it(measure):
    shown = generated()
    law = analysis.fit_power_law(data.analysed(shown[shown["method"] == "vanilla"]), bootstraps=50)
    figure = law_figures.scaling(shown, FlopsKind.REALISED, measure=measure, laws={"vanilla": law})
    (line,) = by_name(figure, "vanilla: fit")
    expected = measure.of(law.predict(law.form.at({"flops_realised": np.asarray(line.x)})))
    np.testing.assert_allclose(line.y, expected, rtol=1e-9)
    assert (min(line.x), max(line.x)) == pytest.approx(law.domain)
    exponent = law.estimates["alpha"]
    assert (style.three(exponent.value) if exponent.identifiable else "not identifiable") in line.name
    (band,) = by_name(figure, "95 % band")
    half = len(band.y) // 2
    assert (np.asarray(band.y[:half]) >= np.asarray(line.y) - 1e-9).all()
    assert (np.asarray(band.y[half:][::-1]) <= np.asarray(line.y) + 1e-9).all()
    assert any(trace.line.dash == "dot" for trace in figure.data if trace.mode == "lines")  # beyond its own runs
    assert figures.point_count(figure) <= figures.MOST_POINTS


def test_the_frontier_is_the_analysis_frontier():
    shown = generated()
    frontier = analysis.pareto(data.analysed(shown))
    (stairs,) = by_name(law_figures.scaling(shown, FlopsKind.REALISED, frontier=frontier), "Pareto")
    assert list(stairs.x) == frontier["flops_realised"].tolist()
    assert list(stairs.y) == frontier["loss"].tolist()


def test_many_series_keep_a_short_legend_and_few_points():
    many = pd.concat([generated(("adaptive",)).assign(series=f"adaptive · λ {i}", rank=float(i)) for i in range(40)])
    figure = law_figures.scaling(many, FlopsKind.REALISED)
    assert len([trace for trace in figure.data if trace.showlegend is not False]) <= law_figures.MOST_LEGEND
    assert figures.point_count(figure) <= figures.MOST_POINTS


def test_multipliers_phi_and_residuals_show_the_analysis():
    shown = data.analysed(generated())
    laws = {m: analysis.fit_power_law(part, bootstraps=50) for m, part in shown.groupby("method")}
    found = analysis.equivalent(laws["adaptive"], laws["vanilla"])
    (line,) = [t for t in law_figures.multipliers({"adaptive": found}, "vanilla").data if t.mode == "lines" and t.name]
    assert list(line.y) == found.table["multiplier"].tolist()
    phi = analysis.fit_recurrence(shown, bootstraps=50).phi
    (dot,) = law_figures.intervals(phi, "phi", {0.0: "nothing"}).data
    assert dot.x[0] == phi["adaptive"].value
    surfaces = {"vanilla": analysis.fit_surface(shown[shown["method"] == "vanilla"], bootstraps=20)}
    residuals = law_figures.predicted(surfaces).data[1]
    np.testing.assert_allclose(residuals.y, 100 * surfaces["vanilla"].residuals)


def test_an_isoflop_figure_has_a_star_at_each_minimum():
    rows = []
    for flops in (1e15, 1e16, 1e17):
        for factor in np.geomspace(0.2, 5, 7):
            size = (flops / 6 * 1e-3) ** 0.5 * factor
            loss = 1.8 + 60 * size**-0.34 + 600 * (flops / 6 / size) ** -0.34
            rows.append(
                {"key": f"{size:g}", "state": "finished", "loss": loss, "parameters": size, "flops_realised": flops}
            )
    found = analysis.isoflop(pd.DataFrame(rows), bootstraps=30)
    figure = law_figures.isoflop(found, FlopsKind.REALISED)
    (stars,) = by_name(figure, "minimum")
    assert list(stars.x) == found.minima["parameters"].tolist()
    assert len(by_name(figure, "FLOPs")) == 3


def swept(losses: dict[tuple[float, float], float], seeds: int = 2) -> pd.DataFrame:
    """Finished runs of lam x beta with given losses, one size and budget."""
    base = generated(("adaptive",)).head(1)
    rows = [
        base.assign(lam=lam, beta=beta, loss=loss, mean_steps=beta, seed=seed, key=f"{lam}-{beta}-{seed}")
        for (lam, beta), loss in losses.items()
        for seed in range(seeds)
    ]
    return pd.concat(rows, ignore_index=True)


NOISE = analysis.SeedNoise(deviation=analysis.Estimate(value=0.1, low=0.08, high=0.14), groups=10, runs=30)


def test_heat_maps_hold_the_means_side_by_side():
    losses = {(lam, beta): 10 * lam + beta for lam in (0.1, 1.0) for beta in (1.0, 2.0)}
    loss, steps = sweep_figures.heat_maps(swept(losses), "lam", "beta", None).data
    np.testing.assert_allclose(loss.z, [[2, 11], [3, 12]])
    np.testing.assert_allclose(steps.z, [[1, 1], [2, 2]])
    assert loss.text[0][0] == "2.000<br>n 2"


def test_cells_that_cannot_be_told_from_the_best_are_grey_and_say_their_noise():
    shown = swept({(0.1, 1.0): 4.0, (1.0, 1.0): 4.05, (0.1, 2.0): 5.0, (1.0, 2.0): 5.1})
    loss, grey, _ = sweep_figures.heat_maps(shown, "lam", "beta", None, noise=NOISE).data
    np.testing.assert_array_equal(np.isnan(loss.z), [[True, True], [False, False]])
    np.testing.assert_array_equal(grey.z, [[1, 1], [np.nan, np.nan]])
    # t(0.975, 20) = 2.08596 times 0.1 / sqrt(2)
    assert loss.text[0][0] == "4.000<br>± 0.147<br>n 2"


@pytest.mark.parametrize(
    ("losses", "headline"),
    [
        ({(0.1, 1.0): 4.0, (1.0, 1.0): 4.05, (0.1, 2.0): 4.1}, "No difference: none of the 3 settings"),
        ({(0.1, 1.0): 4.0, (1.0, 1.0): 5.0, (0.1, 2.0): 6.0}, "Use λ 0.1 · β 1"),
        ({(0.1, 1.0): 4.0, (1.0, 1.0): 4.05, (0.1, 2.0): 6.0}, "2 of 3 settings cannot be told from the best"),
    ],
)
def test_a_sweep_recommends_what_the_noise_lets_it(losses, headline):
    found = sweep_figures.ranking(swept(losses), ["lam", "beta"], NOISE)
    assert found is not None
    assert found.headline.startswith(headline)
    unknown = sweep_figures.ranking(swept(losses), ["lam", "beta"], analysis.Refusal(reason="one seed"))
    assert unknown is not None
    assert unknown.headline.startswith("No recommendation")


def test_importance_and_slices_show_the_analysis():
    shown = pd.concat([generated(("adaptive",)).assign(lam=lam) for lam in (0.1, 1.0)])
    table = analysis.importance(data.analysed(shown), ["lam", "size"])
    bars = sweep_figures.importance({"loss": table}).data[0]
    assert list(bars.x) == pytest.approx((100 * table["share"]).tolist())
    means = analysis.slices(shown, "lam")
    line = by_name(sweep_figures.slice_of(shown, means, "lam", "loss"), "mean")[0]
    assert list(line.y) == means["mean"].tolist()
    sizes = [str(size) for size in shown.sort_values("parameters")["size"].unique()]
    assert [trace.name for trace in sweep_figures.slice_of(shown, means, "lam", "loss").data][:-1] == sizes


def test_a_line_goes_through_what_a_run_has():
    shown = pd.concat([generated(("adaptive",)).assign(lam=lam) for lam in (0.1, 1.0)], ignore_index=True)
    shown.loc[3, "mean_steps"] = float("nan")
    figure = sweep_figures.parallel(shown, "realised")
    titles = list(figure.layout.xaxis.ticktext)
    assert [titles[0], *titles[-3:]] == ["λ", "latent steps", "FLOPs, realised", "loss"]
    width, lines = len(titles) + 1, {}
    for band in figure.data:
        for start in range(0, len(band.y), width):
            label = band.customdata[start][0]
            lines.setdefault(label, []).append((band.y[start : start + width], band.customdata[start : start + width]))
    assert sum(len(found) for found in lines.values()) == len(shown)
    best = shown.sort_values("loss").iloc[0]
    heights, said = next(found for found in lines[best["label"]] if found[0][-2] == 0)
    assert heights[0] == pytest.approx([0.1, 1.0].index(best["lam"]) - sweep_figures.APART / 2), "the best is lowest"
    assert said[-2][1] == f"loss {style.three(best['loss'])}"
    flops = np.log10(shown["flops_realised"])
    assert heights[-3] == pytest.approx((np.log10(best["flops_realised"]) - flops.min()) / (flops.max() - flops.min()))
    unknown = [found for found in lines[shown.loc[3, "label"]] if np.isnan(found[0][-4])]
    assert len(unknown) == 1
    sizes = [str(size) for size in shown.sort_values("parameters")["size"].unique()]
    place = titles.index("size")
    ticks = sorted((a.y, a.text) for a in figure.layout.annotations if a.x == place)
    assert [text for _, text in ticks] == sizes  # by their number, not by their letters


def test_halting_figures_show_the_summary():
    rows = halting_figures.table_of(
        [{"value": 0, "tokens": 5, "mean_steps": 1.0, "low": None, "high": 1.5, "loss": 2.0}, "rubbish", None],
        ("value", "tokens", "mean_steps", "low", "high", "loss"),
    )
    assert len(rows) == 1
    steps, loss = halting_figures.steps_by(rows, "by_surprisal").data
    assert (list(steps.y), list(loss.y)) == ([1.0], [2.0])
    gains = pd.DataFrame({"depth": [1.0, 2, 2], "step": [1.0, 1, 2], "tokens": [9.0] * 3, "mean": [-0.1, 0.2, 0.3]})
    drawn = halting_figures.gains(gains.assign(low=gains["mean"] - 0.1, high=gains["mean"] + 0.1)).data
    assert [list(trace.y) for trace in drawn] == [[0, -0.1], [0, 0.2, 0.3]]
    assert halting_figures.table_of(None, ("value",)).empty


def test_ordinal_lines_rise_in_lightness_and_stay_clear_of_both_pages():
    def lightness(color: str) -> float:
        return sum(weight * int(color[i : i + 2], 16) for weight, i in ((0.3, 1), (0.59, 3), (0.11, 5)))

    shades = [lightness(style.line_color(index, 4)) for index in range(5)]
    assert shades == sorted(shades)
    assert shades[0] > 60
    assert shades[-1] < 215
    assert style.line_color(0, 0)


def test_shades_of_a_method_differ_and_stay_clear_of_both_pages():
    shades = [style.shade("#0072B2", share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert len(set(shades)) == 5
    assert shades[2].lower() == "#0072b2"
    assert style.shade("#0072B2", math.nan) == "#0072B2"
