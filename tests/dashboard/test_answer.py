"""The Answer page's words, the forest plot by its data, points from elsewhere, and the health of runs."""

import math

import numpy as np
import pandas as pd
import pytest
from pages import charts, open_page, text

from haltscale.dashboard import answer, answer_figures, data, halting_figures, health, launch, law_figures, outside
from haltscale.dashboard.data import FlopsKind
from haltscale.platform.store import RunStore

STUDY = "quick"


@pytest.fixture(scope="module")
def reference():
    return data.load_study(RunStore(launch.demo_root()), "reference")


def test_the_published_study_says_its_answer_with_its_interval(monkeypatch):
    monkeypatch.setenv("HALTSCALE_STORE", launch.demo_root())
    page = open_page("answer", study="reference")
    headline = page.header[0].value.replace("\\", "")
    assert "At equal realised training FLOPs, adaptive has a higher loss than vanilla: +0." in headline
    assert headline.endswith("] nats/token")
    names = charts(page)[0]["data"]
    assert sum(len(trace["x"]) for trace in names) == len(
        answer_figures.forest_rows(found(page_view()).comparison, "adaptive")
    )
    assert "planned runs are published" in text(page)


def page_view():
    return data.load_study(RunStore(launch.demo_root()), "reference")


def found(view):
    return answer.answer(view, "adaptive", "vanilla", "flops_realised")


def test_the_comparison_is_the_one_that_the_study_names(reference):
    assert answer.default_pair(reference) == ("adaptive", "vanilla")
    one = found(reference)
    assert one.setting == "λ 0.1 · β 1 · l_max 3"
    assert one.others == 26


def test_every_row_of_the_forest_is_its_cell(reference):
    comparison = found(reference).comparison
    rows = answer_figures.forest_rows(comparison, "adaptive")
    assert rows["kind"].tolist() == ["all", *["cell"] * len(comparison.cells)]
    figure = answer_figures.forest(rows, "adaptive", "vanilla")
    assert [trace.x[0] for trace in figure.data] == rows["difference"].tolist()
    for trace, row in zip(figure.data, rows.to_dict("records"), strict=True):
        if math.isfinite(row["high"]):
            assert trace.x[0] + trace.error_x.array[0] == pytest.approx(row["high"])
            assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(row["low"])
        assert ("not decided" in trace.name) == (row["low"] <= 0 <= row["high"])


def test_targets_are_judged_where_the_study_has_them(author):
    author.finished_study()
    path = author.store.path(STUDY, None, "study.json")
    target = {"claim": "it takes steps", "source": "us", "arm": "adaptive", "quantity": "mean_steps", "low": 0.0}
    author.store.write_json(path, author.store.read_json(path) | {"targets": [target, "odd", {"claim": "b"}]})
    page = open_page("answer")
    (table,) = [frame.value for frame in page.dataframe if "claim" in frame.value]
    assert table["claim"].tolist() == ["it takes steps"]
    assert table["verdict"].tolist() == ["holds"]
    assert "runs" in table["reason"][0]
    author.plan([])
    assert "Targets of the study" not in text(open_page("answer"))


def test_what_is_unfinished_is_said(author):
    author.troubled_study()
    page = open_page("answer")
    assert "Provisional: the grid is not complete" in text(page)
    assert "1 running" in text(page)


def test_cost_names_the_cheapest_and_the_break_even(monkeypatch):
    monkeypatch.setenv("HALTSCALE_STORE", launch.demo_root())
    page = open_page("cost", study="reference")
    assert "vanilla is cheapest" in text(page)
    assert "reak-even between adaptive and vanilla" in text(page)
    dollars = page.dataframe[0].value["money"]
    page.number_input(key="price").set_value(14.0).run()
    np.testing.assert_allclose(page.dataframe[0].value["money"], 10 * dollars)


def test_points_from_elsewhere_are_hollow_and_in_no_line(reference):
    points = outside.read(b"label,flops,loss,source\n<b>x,1e12,3.5,paper\n")
    figure = law_figures.scaling(reference.runs, FlopsKind.REALISED, outside=points)
    (trace,) = [one for one in figure.data if one.name == "from elsewhere"]
    assert list(trace.x) == [1e12]
    assert trace.marker.symbol.endswith("-open")
    assert "<b>x" not in trace.hovertext[0].replace("<b>&lt;b&gt;x", "")
    assert len(law_figures.scaling(reference.runs, FlopsKind.REALISED).data) == len(figure.data) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"label,flops\na,1\n", "lacks the columns loss, source"),
        (b"label,flops,loss,source\na,1,x,s\n", "line 2: loss must be a positive number"),
        (b"label,flops,loss,source\na,1,1,s\nb,-1,1,s\n", "line 3: flops must be a positive number"),
        (b"\xff\xfe\x00", "not a CSV table"),
    ],
)
def test_a_file_of_other_points_says_what_is_wrong(content, message):
    with pytest.raises(outside.OutsideError, match=message):
        outside.read(content)


@pytest.mark.parametrize("axis", list(law_figures.Axis))
def test_every_axis_draws_each_run_at_its_value(reference, axis):
    column = axis.column(FlopsKind.REALISED)
    figure = law_figures.scaling(reference.runs, FlopsKind.REALISED, axis=axis)
    drawn = {
        key: x
        for trace in figure.data
        if trace.mode == "markers" and trace.customdata is not None
        for key, x in zip(trace.customdata, trace.x, strict=True)
    }
    shown = data.plotted(reference.runs, FlopsKind.REALISED)
    shown = shown[shown[column].gt(0)].set_index("key")
    assert drawn == pytest.approx(shown[column].to_dict())


def test_isoflop_panels_hold_the_means_of_each_budget(reference):
    figure = law_figures.isoflop_points(reference.runs, ["vanilla"])
    runs = reference.runs[reference.runs["method"] == "vanilla"]
    for trace in figure.data:
        budget = next(b for b in runs["nominal"].unique() if f"{law_figures.style.power(b)} FLOPs" == trace.name)
        own = runs[runs["nominal"] == budget].groupby("parameters")["loss"]
        expected = own.agg(lambda losses: np.exp(np.log(losses).mean()))
        np.testing.assert_allclose(trace.x, expected.index)
        np.testing.assert_allclose(trace.y, expected)


# ---- the ladder ----------------------------------------------------------------------------------


def test_the_ladder_has_the_best_post_hoc_rule_and_says_who_wins():
    gap = {"mean": 0.02, "low": 0.01, "high": 0.03}
    arms = [
        {"name": "learned", "mean_steps": 1.0, "minus_learned": None},
        {"name": "fixed", "mean_steps": 1.0, "minus_learned": gap},
        {"name": "posthoc-change", "mean_steps": 1.0, "minus_learned": gap | {"mean": 0.05, "high": 0.06}},
        {"name": "posthoc-confidence", "mean_steps": 1.0, "minus_learned": gap},
        {"name": "oracle", "mean_steps": 1.0, "minus_learned": {"mean": -0.1, "low": -0.2, "high": -0.05}},
        {"name": "unheard", "minus_learned": gap},
        "odd",
    ]
    rows = halting_figures.ladder_rows({"arms": arms}, "r")
    assert rows["rung"].tolist() == ["fixed", "posthoc", "learned", "oracle"]
    assert rows["mean"].tolist() == [0.02, 0.02, 0.0, -0.1]
    verdict = halting_figures.ladder_verdict(rows)
    assert "better than fixed in 1" in verdict
    assert "oracle saves 0.100" in verdict
    assert list(halting_figures.ladder(rows).data[0].x) == rows["mean"].tolist()


# ---- health --------------------------------------------------------------------------------------


def metrics(**columns: object) -> pd.DataFrame:
    steps = np.arange(1, 41)
    base = {"step": steps, "loss": 8.0 * steps**-0.2, "grad_norm": 1.0, "tokens_per_second": 100.0, "mean_steps": 1.0}
    return pd.DataFrame(base | columns)


LAST = np.arange(1, 41) > 32


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, ""),
        ({"loss": np.where(LAST, 9.0, 4.0)}, "the training loss has risen: 9.000"),
        ({"loss": np.where(np.arange(1, 41) == 40, np.nan, 4.0)}, "not a number at step 40"),
        ({"grad_norm": np.where(LAST, 50.0, 1.0)}, "the gradient norm jumped to 50"),
        ({"tokens_per_second": np.where(LAST, 10.0, 100.0)}, "it has slowed down: 10 tokens/s"),
        ({"straggling": np.where(LAST, 2.0, 1.0)}, "uneven workers"),
        ({"mean_steps": np.where(LAST, 0.0, 1.0)}, "no steps at all"),
        ({"mean_steps": np.where(LAST, 3.0, 1.0)}, "all steps everywhere"),
    ],
)
def test_a_run_is_healthy_or_says_why_not(columns, reason):
    found = health.judge(metrics(**columns), routes=True, l_max=3)
    assert found.healthy == (reason == "")
    assert reason in "; ".join(found.reasons)


def test_steps_of_methods_without_a_router_are_no_collapse():
    assert health.judge(metrics(mean_steps=3.0), routes=False, l_max=3).healthy
    assert not health.judge(metrics(), silent=600.0).healthy


def test_the_time_left_of_a_study_counts_what_is_planned():
    columns = ["state", "method", "size", "budget", "wall_seconds", "seconds_left"]
    rows = [
        ("finished", "a", "1m", math.nan, 100.0, math.nan),
        ("finished", "b", "1m", math.nan, 300.0, math.nan),
        ("running", "a", "1m", math.nan, math.nan, 40.0),
        ("planned", "b", "1m", math.nan, math.nan, math.nan),
        ("planned", "a", "2m", math.nan, math.nan, math.nan),
    ]
    runs = pd.DataFrame(rows, columns=columns)
    assert health.seconds_left(runs) == 40 + 300 + 100
    assert math.isnan(health.seconds_left(runs[runs["state"] != "running"]))
