"""Figures, by the data in them."""

import colorsys
import math

import numpy as np
import pandas as pd
import pytest

from haltscale.dashboard import data, figures, halting_figures, law_figures, style
from haltscale.dashboard.data import FlopsKind

STUDY = "quick"


@pytest.fixture
def runs(author) -> pd.DataFrame:
    author.troubled_study()
    return data.load_study(author.store, STUDY).runs


def test_steps_share_adds_up_to_all_tokens(runs):
    counted = data.thinking(runs)
    figure = figures.steps_share(counted)
    assert np.sum([trace.x for trace in figure.data], axis=0) == pytest.approx(100)
    assert len(figure.data) == 4
    assert [trace.marker.color for trace in figure.data] == [style.step_color(step, 3) for step in range(4)]


def test_runs_with_long_labels_that_begin_alike_keep_their_own_rows(runs):
    alike = data.thinking(runs).assign(
        label="a very long label that says everything about the run in many words, twice"
    )
    for figure in (figures.steps_share(alike), figures.easy_and_hard(alike.dropna(subset="well_steps"))):
        rows = list(figure.data[-1].y)
        assert len(set(rows)) == len(rows)
        assert len(figure.layout.yaxis.ticktext) == len(figure.layout.yaxis.tickvals) == len(rows)


def test_steps_over_training_follows_the_evaluations(author):
    author.whole_run("k", lam=1.0)
    rows = data.evaluations(author.store, STUDY, "k")
    figure = figures.steps_over_training(rows)
    assert list(figure.data[0].x) == [250_000, 500_000, 750_000, 1_000_000]
    assert figure.data[0].y[-1] == pytest.approx(100 * rows["steps_histogram"].iloc[-1][0])
    assert not figures.steps_over_training(pd.DataFrame()).data


def test_easy_and_hard_pairs(runs):
    figure = figures.easy_and_hard(runs[runs["method"] == "adaptive"])
    well, badly = figure.data[-2:]
    assert well.name == "well predicted"
    assert all(low < high for low, high in zip(well.x, badly.x, strict=True))
    assert well.marker.symbol != badly.marker.symbol


@pytest.fixture
def needs(author) -> pd.DataFrame:
    author.known_need_study()
    return data.needed(data.load_study(author.store, STUDY).runs)


def test_steps_by_need_has_a_panel_per_arm_and_bars_that_add_up(needs):
    figure = halting_figures.steps_by_need(needs)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["adaptive", "adaptive/shuffled", "adaptive/fixed", "vanilla"]
    by_panel: dict[str, list] = {}
    for trace in figure.data:
        by_panel.setdefault(trace.xaxis, []).append(trace)
    assert len(by_panel) == 4
    for traces in by_panel.values():
        assert np.sum([trace.x for trace in traces], axis=0) == pytest.approx(100)
        assert [list(trace.y) for trace in traces] == [["unpredictable", "none", "1 step", "2 steps"]] * 3
    assert [list(trace.x) for trace in by_panel["x"]] == [[100, 100, 0, 0], [0, 0, 100, 0], [0, 0, 0, 100]]
    assert [trace.name for trace in figure.data if trace.showlegend] == ["0 steps", "1 step", "2 steps"]
    assert [trace.marker.color for trace in by_panel["x"]] == [style.step_color(step, 2) for step in range(3)]


def test_more_arms_than_a_row_holds_go_on_in_the_next(needs):
    many = pd.concat([needs.assign(arm=needs["arm"] + f" {index}") for index in range(2)])
    figure = halting_figures.steps_by_need(many)
    assert len({trace.xaxis for trace in figure.data}) == 8
    assert len({axis.domain for axis in figure.select_yaxes()}) == 2


@pytest.mark.parametrize("measure", list(halting_figures.MEASURES))
def test_measures_by_need_are_the_arms_own(needs, measure):
    figure = halting_figures.measure_by_need(needs, measure)
    assert [trace.name for trace in figure.data] == ["adaptive", "adaptive/shuffled", "adaptive/fixed", "vanilla"]
    for trace in figure.data:
        assert list(trace.y) == list(needs.loc[needs["arm"] == trace.name, measure])
    assert len({(trace.marker.color, trace.marker.pattern.shape) for trace in figure.data}) == 4
    assert list(figure.layout.xaxis.categoryarray) == ["unpredictable", "none", "1 step", "2 steps"]


def test_the_table_of_needs_has_a_row_per_arm(needs):
    table = halting_figures.need_table(needs).set_index("Arm")
    assert list(table.index) == ["adaptive", "adaptive/shuffled", "adaptive/fixed", "vanilla"]
    assert table.loc["adaptive", "Rank corr."] == 1
    assert table.loc["adaptive", "Accuracy, 2 steps"] == pytest.approx(0.7)
    assert table.loc["adaptive/shuffled", "Steps, unpredictable"] == pytest.approx(0.3)


def test_figures_of_no_needs_are_empty(needs):
    none = needs.iloc[:0]
    assert not halting_figures.steps_by_need(none).data
    assert not halting_figures.measure_by_need(none, "loss").data
    assert halting_figures.need_table(none).empty


def test_controls_follow_their_subject_in_colours_of_its_kind(author):
    author.known_need_study()
    figure = halting_figures.controls(data.load_study(author.store, STUDY).runs.query("mean_steps > 0"))
    assert [trace.name for trace in figure.data] == ["adaptive", "adaptive/shuffled", "adaptive/fixed"]
    colors = {name: style.method_color(name) for name in ("adaptive", "adaptive/shuffled", "adaptive/fixed", "vanilla")}
    assert len(set(colors.values())) == 4
    hue = {
        name: colorsys.rgb_to_hsv(*(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0] for name, c in colors.items()
    }
    for name in ("adaptive/shuffled", "adaptive/fixed"):
        assert hue[name] == pytest.approx(hue["adaptive"], abs=0.02)


def test_probe_figures(author):
    author.begin("k")
    author.probe("k", step=1, histogram=[0.4, 0.3, 0.2, 0.1])
    events = data.probe(author.store, STUDY, "k", 1)
    boxes = figures.nll_by_steps(events)
    assert [box.median[0] for box in boxes.data] == [
        pytest.approx(np.median(group["nll"])) for _, group in events.groupby("steps")
    ]
    (bars,) = figures.steps_by_nll(events).data
    assert len(bars.y) == 5
    assert np.mean(bars.y) == pytest.approx(events["steps"].mean(), abs=0.05)
    assert bars.y[-1] > bars.y[0]
    empty = events.head(0)
    assert not figures.nll_by_steps(empty).data
    figures.steps_by_nll(empty)


def test_training_curves_have_a_budget_of_points(runs):
    steps = np.arange(50_000)
    long = pd.DataFrame(
        {"step": steps, "tokens": steps * 100, "loss": 5.0, "mean_steps": 1.0, "tokens_per_second": 9.0}
    )
    keys = list(runs["key"][:6])
    figure = figures.training_curves(runs, dict.fromkeys(keys, long))
    assert len(figure.data) == 18
    assert figures.point_count(figure) <= figures.MOST_POINTS
    assert all(trace.x[0] == 0 and trace.x[-1] == steps[-1] * 100 for trace in figure.data)
    full = long.assign(flops_realised_per_second=2e9, straggling=1.2)
    full = figures.training_curves(runs, dict.fromkeys(keys, full))
    assert len(full.data) == 30
    assert figures.point_count(full) <= figures.MOST_POINTS


def test_workers_that_differ_get_a_panel_of_their_balance(runs):
    key, other = map(str, runs["key"][:2])
    alone = pd.DataFrame({"tokens": [1.0, 2.0], "loss": [5.0, 4.0], "straggling": [1.0, 1.0]})
    uneven = alone.assign(straggling=[1.3, 1.1])

    figure = figures.training_curves(runs, {key: alone, other: uneven})
    last = [trace for trace in figure.data if trace.yaxis == "y4"]
    assert [list(trace.y) for trace in last] == [[1.0, 1.0], [1.3, 1.1]]
    assert "busiest worker" in figure.layout.yaxis4.title.text
    assert figure.layout.xaxis4.title.text == "tokens trained on"

    assert len(figures.training_curves(runs, {key: alone}).data) == 1


def test_training_curves_without_some_telemetry(runs):
    figure = figures.training_curves(runs, {str(runs["key"].iloc[0]): pd.DataFrame({"tokens": [1.0], "loss": [5.0]})})
    assert len(figure.data) == 1


def test_a_figure_as_a_page_of_its_own_needs_no_network(runs):
    page = figures.as_html(law_figures.scaling(runs, FlopsKind.REALISED), "quick <1>").decode()
    assert 'src="http' not in page
    assert "&lt;1" in page or "\\u003c1" in page or "&amp;lt;1" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.2345, "1.23"),
        (123.4, "123"),
        (0.012345, "0.0123"),
        (12345.6, "12,300"),
        (9.999, "10.0"),
        (3.2e12, "3.20×10¹²"),
        (2e-7, "2.00×10⁻⁷"),
        (math.nan, "–"),
    ],
)
def test_three_significant_digits(value, text):
    assert style.three(value) == text


def test_durations_and_counts_in_words():
    assert [style.duration(seconds) for seconds in (9, 250, 7500, math.nan)] == ["9 s", "4 min 10 s", "2 h 05 min", "–"]
    assert [style.compact(count) for count in (950, 1_020_000, 2.6e9)] == ["950", "1.02M", "2.60B"]


@pytest.mark.parametrize(("low", "high"), [(40, 50), (3.8, 4.1), (56, 170), (3e12, 6e13), (1e10, 1e16), (0.5, 0.9)])
def test_log_ticks_are_few_and_lie_inside(low, high):
    values, names = style.log_ticks(low, high)
    assert 3 <= len(values) <= 9
    assert len(set(names)) == len(values)
    assert all(low * 0.99 <= value <= high * 1.01 for value in values)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_ink_on_every_step_is_readable(most):
    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for step in range(most + 1):
        color = style.step_color(step, most)
        low, high = sorted([luminance(color), luminance(style.ink_on(color))])
        assert (high + 0.05) / (low + 0.05) >= 4.5
