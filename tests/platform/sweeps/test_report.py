"""Results: the DataFrame for notebooks and the table for terminals."""

import math
import re
import sys
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform import run_table
from haltscale.platform.sweeps import report

RECORD = {
    "identity": {"method": "adaptive", "size": "0.6m", "seed": 3, "options": {"lam": 0.5, "l_max": 2}},
    "parameters_total": 594_000,
    "tokens": 300_000,
    "loss": 4.25,
    "loss_standard_error": 0.01,
    "perplexity": 70.1,
    "bits_per_byte": 1.9,
    "mean_steps": 1.5,
    "expected_steps": 1.25,
    "halting": {"well_predicted_mean_steps": 0.5, "badly_predicted_mean_steps": 1.75},
    "passes_per_token": 2.5,
    "flops_realised": 1.5e12,
    "flops_executed": 1.75e12,
    "flops_paper": 1.25e12,
    "wall_seconds": 60.0,
    "tokens_per_second": 5000.0,
}


@pytest.fixture
def written(author):
    author.spec("study", "done", "adaptive · 0.6m · λ 0.5")
    author.record("study", "done", **RECORD)
    identity = {"method": "vanilla", "size": "1.8m", "seed": 0, "options": {}}
    author.spec("study", "failed", "vanilla · 1.8m", **identity)
    author.status("study", "failed", "failed", error="[red]the disk[/red] is full")
    author.plan("study", ["failed", "done", "planned"])


def test_every_figure_of_the_record_has_a_column(store, written):
    frame = report.results(store, "study", ["done"])
    row = frame.to_dict("records")[0]
    for name, value in RECORD.items():
        if not isinstance(value, dict) and name != "parameters_total":
            assert row[name] == value, name
    assert row["parameters"] == 594_000
    assert (row["method"], row["size"], row["seed"], row["lam"], row["l_max"]) == ("adaptive", "0.6m", 3, 0.5, 2)
    assert (row["easy_steps"], row["hard_steps"]) == (0.5, 1.75)
    assert (row["run"], row["state"]) == ("adaptive · 0.6m · λ 0.5", "finished")
    assert not row["error"]


def test_the_order_is_the_studys_or_the_one_asked_for(store, written):
    assert report.results(store, "study")["key"].tolist() == ["failed", "done", "planned"]
    assert report.results(store, "study", ["planned", "failed"])["key"].tolist() == ["planned", "failed"]


def test_runs_without_a_record_have_no_figures(store, written):
    failed, _, planned = report.results(store, "study").to_dict("records")
    assert (failed["method"], failed["size"], failed["state"]) == ("vanilla", "1.8m", "failed")
    assert failed["error"] == "[red]the disk[/red] is full"
    assert planned["state"] == "planned"
    for row in (failed, planned):
        assert pd.isna(row["loss"])
        assert pd.isna(row["flops_realised"])


def test_a_damaged_run_says_so_in_its_row(store, written):
    store.fs.pipe_file(store.path("study", "done", "record.json"), b'{"schema": 1')
    row = report.results(store, "study", ["done"]).to_dict("records")[0]
    assert "damaged" in row["error"]
    assert row["state"] != "finished"


def test_the_printed_table(store, written, capsys):
    report.show_results(report.results(store, "study"), title="the title", note="a [note] in brackets")
    out = capsys.readouterr().out
    for word in ("the title", "adaptive · 0.6m · λ 0.5", "4.25", "1.50e+12", "594k", "perplexity", "–"):
        assert word in out, word
    assert "…" not in out
    assert "vanilla · 1.8m: [red]the disk[/red] is full" in out  # an error is text, not markup
    assert "a [note] in brackets" in out


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_value_is_cut_whatever_the_width(width, monkeypatch, capsys):
    monkeypatch.setattr(report, "_console", lambda: report.Console(file=sys.stdout, width=width))
    frame = pd.DataFrame({f"a long heading {n}": [1.25e12 + n * 1e10, 594_000.0 + n] for n in range(15)})
    report.show(frame.assign(run="adaptive · 0.6m"), title="wide")
    out = capsys.readouterr().out
    for value in frame.to_numpy().ravel():
        assert report._text(value) in out
    assert "adaptive · 0.6m" in out


def test_an_empty_study_is_printed(store, author, capsys):
    author.plan("study", [])
    report.show_results(report.results(store, "study"), title="nothing yet")
    assert "dashboard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (pd.NA, "–"), ("text", "text"), (True, "True"), (0, "0"), (0.0, "0"), (12.0, "12")],
)
def test_cells_that_are_no_measurements(value, text):
    assert report._text(value) == text


@given(st.floats(1e-6, 1e15), st.sampled_from([1, -1]))
def test_numbers_are_short_and_keep_their_first_digits(magnitude, sign):
    text = report._text(sign * magnitude)
    assert len(text) <= 9
    assert re.fullmatch(r"-?[\d.]+(k|M|e[-+]\d+)?", text)
    scale = {"k": 1e3, "M": 1e6}.get(text[-1], 1)
    assert float(text.rstrip("kM")) * scale == pytest.approx(
        sign * magnitude, rel=0.0051, abs=0.005 if 0.1 <= magnitude < 10 else 0
    )


@given(st.integers(-999, 999))
def test_small_counts_are_exact(value):
    assert report._text(value) == str(value)


# ---- controls -------------------------------------------------------------------------------------------------------


def pair(author, study, seed, *, control="shuffled", method="adaptive", gap=0.02, steps=1.5, digest="d"):
    """A subject and its control, whose documents cost `gap` nats a token more."""
    options = {"lam": 0.5, "l_max": 2}
    tokens = [100, 300, 200]
    nats = [(4 + 0.3 * n + 0.1 * seed) * count for n, count in enumerate(tokens)]
    shared = {"tokens": 300_000, "flops_realised": 1e12}
    subject, other = f"subject-{seed}", f"{control}-{method}-{seed}"
    replayed = {"steps_from": control, "steps_seed": seed} if method == "adaptive" else {}
    for key, identity, costs, mean, order in (
        (subject, {"method": "adaptive", "seed": seed, "options": options}, nats, 1.5, "d"),
        (
            other,
            {"method": method, "seed": seed, "options": {**options, **replayed}},
            [cost + gap * count for cost, count in zip(nats, tokens, strict=True)],
            steps,
            digest,
        ),
    ):
        author.spec(study, key, f"adaptive · 0.6m · seed {seed}", **identity)
        by_document = {"tokens": tokens, "nats": costs}
        more = {"identity": identity, "mean_steps": mean, "held_out_by_document": by_document, "sequence_digest": order}
        author.record(study, key, loss=4.0, **shared, **more)
    return {other: {"kind": control, "of": subject}}


def test_controls_are_paired_with_their_subjects_over_seeds(author, store):
    found = [pair(author, "s", seed, gap=gap) for seed, gap in ((0, 0.01), (1, 0.02), (2, 0.06))]
    author.plan("s", [], controls={key: one for each in found for key, one in each.items()})
    table = report.control_differences(store, "s")
    (row,) = table.to_dict("records")
    assert (row["subject"], row["control"], row["seeds"], row["documents"]) == ("adaptive · 0.6m", "shuffled", 3, 3)
    assert row["difference"] == pytest.approx(0.03)
    assert 0.01 <= row["low"] < 0.03 < row["high"] <= 0.06
    assert row["problem"] == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"steps": 1.6}, "mean steps differ: 1.500 and 1.600"),
        ({"digest": "e"}, "in another order"),
        ({"method": "shuffled"}, "an old control"),
    ],
)
def test_what_is_no_fair_pair_says_so(author, store, changes, problem):
    author.plan("s", [], controls=pair(author, "s", 0, **changes))
    (row,) = report.control_differences(store, "s").to_dict("records")
    assert problem in row["problem"]
    if "method" in changes:
        assert math.isnan(row["difference"])
        assert row["control"] == "shuffled (old control)"


def test_a_control_is_an_arm_of_its_own(author, store):
    author.plan("s", [], controls=pair(author, "s", 0))
    frame = report.results(store, "s")
    assert sorted(frame["method"]) == ["adaptive", "adaptive/shuffled"]
    assert "steps_schedule" not in frame


def test_a_study_without_controls_has_no_differences(store):
    assert report.control_differences(store, "nothing").empty


def test_what_branches_share_is_said() -> None:
    parents: list[Any] = [None, {"key": "a", "tokens": 10, "flops": 3e9}, "a"]  # the last of a former version
    rows = [
        {**run_table.branch_figures({"attempts": [{"step": 0, "parent": parent}]}), "flops_realised": 5e9}
        for parent in parents
    ]
    assert [row["branched_from"] for row in rows] == ["", "a", "a"]
    found = report.shared_work(pd.DataFrame(rows))
    assert found == "1 runs began in another: 3e+09 of 1.5e+10 realised FLOPs were not trained again"
    assert report.shared_work(pd.DataFrame(rows[:1])) == ""
