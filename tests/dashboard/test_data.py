"""The store as DataFrames: every state a run can be in, and no damage that spreads."""

import math
import os
from pathlib import Path

import pandas as pd
import pytest

from haltscale.dashboard import data, style
from haltscale.dashboard.data import FlopsKind
from haltscale.platform.lease import Lease
from haltscale.platform.store import RunState, StoreError

STUDY = "quick"


def by_key(view: data.StudyView) -> pd.DataFrame:
    return view.runs.set_index("key")


def test_a_finished_run_shows_its_record(author):
    author.finished_study()
    run = by_key(data.load_study(author.store, STUDY)).loc["adaptive-1_8m-0_1"]
    record = author.store.run(STUDY, "adaptive-1_8m-0_1").record
    for name in (
        "loss",
        "perplexity",
        "bits_per_byte",
        "mean_steps",
        "flops_realised",
        "flops_executed",
        "flops_paper",
    ):
        assert run[name] == pytest.approx(record[name])
    assert run["passes"] == pytest.approx(record["passes_per_token"])
    assert (run["state"], run["size"], run["lam"], run["l_max"]) == ("finished", "1.8m", 0.1, 3)
    assert run["well_steps"] == record["halting"]["well_predicted_mean_steps"]


def test_a_running_run_shows_its_last_evaluation(author):
    author.begin("going")
    author.train("going", progress=0.6)
    author.status("going", step=240, seconds_left=90.0)
    author.plan(["going"])
    view = data.load_study(author.store, STUDY)
    run = by_key(view).loc["going"]
    last = author.store.evaluations(STUDY, "going").iloc[-1]
    assert view.active
    assert run["state"] == "running"
    assert run["perplexity"] == pytest.approx(last["perplexity"])
    assert run["tokens_done"] == last["tokens"] == 500_000
    assert run["tokens"] == 1_000_000
    assert run["seconds_left"] == 90.0
    assert run["tokens_per_second"] == pytest.approx(2600, rel=0.1)


def test_every_state_is_told_apart_and_says_why(author):
    author.troubled_study()
    runs = by_key(data.load_study(author.store, STUDY))
    expected = {name: name for name in ("running", "stalled", "failed", "diverged", "damaged", "planned")}
    expected |= {
        "capped": "capped",
        "apart": "diverged",
        "newer": "damaged",
        "silent": "finished",
        "never-begun": "planned",
    }
    assert dict(runs.loc[list(expected), "state"]) == expected
    assert "ran out of memory" in runs.loc["failed", "note"]
    assert "15 min" in runs.loc["stalled", "note"]
    assert "is damaged" in runs.loc["damaged", "note"]
    assert "schema 99" in runs.loc["newer", "note"]
    assert "not a number" in runs.loc["diverged", "note"]
    assert "a higher limit resumes it" in runs.loc["capped", "note"]
    assert "not finite" in runs.loc["apart", "note"]


def test_damage_is_listed_and_harms_no_other_run(author):
    author.troubled_study()
    view = data.load_study(author.store, STUDY)
    assert {problem.where for problem in view.problems} == {"damaged", "newer"}
    assert (view.runs["state"] == "finished").sum() == 10


@pytest.mark.parametrize(
    "status",
    [
        {"state": "running", "heartbeat": None},
        {"state": "running", "heartbeat": "yesterday"},
        {"state": ["running"], "step": "many", "steps": {}},
        {"state": "failed", "error": None},
        {},
    ],
)
def test_nonsense_in_a_status_raises_nowhere(author, status):
    author.begin("odd")
    author.store.write_json(author.store.path(STUDY, "odd", "status.json"), status)
    author.plan(["odd", "../outside", ""])
    view = data.load_study(author.store, STUDY)
    assert list(view.runs["key"][:2]) == ["odd", "../outside"]


@pytest.mark.parametrize(
    "record",
    [
        {"loss": 4.0},
        {"loss": "four", "steps_histogram": "flat", "halting": [], "identity": None},
        {"loss": None, "steps_histogram": [None, 1]},
    ],
)
def test_a_record_with_holes_makes_a_row_with_holes(author, record):
    author.begin("holes")
    author.store.write_json(author.store.path(STUDY, "holes", "record.json"), record)
    author.plan(["holes"])
    run = by_key(data.load_study(author.store, STUDY)).loc["holes"]
    if record["loss"] == 4.0:
        assert run["perplexity"] == pytest.approx(math.exp(4))
        assert run["state"] == "finished"
    else:
        assert run["state"] == "diverged"
    assert run["steps_histogram"] == []


def test_an_earlier_evaluation_never_stands_in_for_a_diverged_result(author):
    author.begin("lost")
    author.train("lost")
    author.finish("lost", loss=None, perplexity=None)
    author.plan(["lost"])
    evaluated = data.evaluations(author.store, STUDY, "lost")
    assert evaluated["loss"].notna().any()
    run = data.run_row(author.store.run(STUDY, "lost"), evaluated, data.metrics(author.store, STUDY, "lost"))
    assert run["state"] == "diverged"
    assert math.isnan(run["loss"])
    assert math.isnan(run["perplexity"])


def test_telemetry_with_rubbish_lines_and_rows_written_twice(author):
    path = Path(author.store.path(STUDY, "k", "metrics.jsonl"))
    path.parent.mkdir(parents=True)
    path.write_text(
        '{"step": 2, "loss": null}\n{"step": 1, "loss": 7.0}\nrubbish\n{"step": 1, "loss": 6.5}\n{"step": 3, "lo'
    )
    rows = data.metrics(author.store, STUDY, "k")
    assert list(rows["step"]) == [1, 2]
    assert rows["loss"].iloc[0] == 6.5
    assert math.isnan(rows["loss"].iloc[1])
    assert data.metrics(author.store, STUDY, "absent").empty


def test_realised_flops_per_second_are_those_between_two_rows(author):
    author.begin("k")
    rows = [
        {"step": 1, "tokens": 10, "flops_realised": 4.0, "seconds": 2.0, "straggling": 1.1},
        {"step": 2, "tokens": 20, "flops_realised": 10.0, "seconds": 3.0, "straggling": 1.3},
        {"step": 3, "tokens": 30, "flops_realised": 20.0, "seconds": 3.0, "straggling": 1.2},
        {"step": 4, "tokens": 40, "flops_realised": None, "seconds": 4.0},
        {"step": 5, "tokens": 50, "flops_realised": 30.0, "seconds": 5.0},
    ]
    author.store.append_lines(author.store.path("quick", "k", "metrics.jsonl"), rows)
    author.status("k", step=5)
    author.plan(["k"])
    speed = data.metrics(author.store, "quick", "k")["flops_realised_per_second"].tolist()
    assert speed[:2] == [2.0, 6.0]
    assert all(math.isnan(one) for one in speed[2:])  # no time passed; no count; none before
    assert data.load_study(author.store, "quick").runs["straggling"].tolist() == [pytest.approx(1.2)]


def test_a_study_of_another_schema_becomes_a_problem(author):
    author.plan([])
    Path(author.store.path(STUDY, None, "study.json")).write_text('{"schema": 99, "runs": []}')
    view = data.load_study(author.store, STUDY)
    assert view.runs.empty
    assert "schema 99" in view.problems[0].what


def test_a_damaged_probe_says_so(author):
    author.begin("k")
    author.probe("k", step=100, histogram=[0.5, 0.5])
    Path(author.store.probe_path(STUDY, "k", 100)).write_bytes(b"PAR1 half a file")
    with pytest.raises(StoreError, match="cannot be read"):
        data.probe(author.store, STUDY, "k", 100)
    pd.DataFrame({"text": ["a"]}).to_parquet(author.store.probe_path(STUDY, "k", 100))
    with pytest.raises(StoreError, match="lacks the columns nll, steps"):
        data.probe(author.store, STUDY, "k", 100)


def test_series_carry_lam_and_whatever_else_varies(author):
    author.begin("a", lam=0.3)
    author.begin("b", lam=0.3, identity={"method": "adaptive", "size": "1.8m", "options": {"lam": 0.3, "l_max": 5}})
    author.begin("v", method="vanilla", lam=None)
    author.plan(["a", "b", "v"])
    runs = by_key(data.load_study(author.store, STUDY))
    assert list(runs["series"]) == ["adaptive · λ 0.3 · l_max 3", "adaptive · λ 0.3 · l_max 5", "vanilla"]
    assert list(runs["rank"]) == [0, 1, 2]


def test_labels_that_occur_twice_get_what_tells_them_apart(author):
    options = {"lam": 1.0, "l_max": 3}
    for key, seed in (("adaptive-0.6m-aaaaaa", 0), ("adaptive-0.6m-bbbbbb", 1), ("adaptive-0.6m-cccccc", 1)):
        author.begin(
            key, identity={"method": "adaptive", "size": "0.6m", "seed": seed, "options": options}, label="same"
        )
    author.begin("other", label="other")
    author.plan(["adaptive-0.6m-aaaaaa", "adaptive-0.6m-bbbbbb", "adaptive-0.6m-cccccc", "other"])
    labels = list(data.load_study(author.store, STUDY).runs["label"])
    assert labels == ["same · seed 0", "same · seed 1 · bbbbbb", "same · seed 1 · cccccc", "other"]


def test_runs_of_one_label_are_told_apart_by_the_options_that_differ(author):
    for key, more in (
        ("a-aaaaaa", {"router": "mlp"}),
        ("a-bbbbbb", {"router": "linear", "tau": 0.5}),
        ("a-cccccc", {}),
    ):
        options = {"lam": 1.0, "l_max": 3, "mixture": "last", **more}
        author.begin(key, identity={"method": "adaptive", "size": "0.6m", "seed": 0, "options": options}, label="same")
    author.plan(["a-aaaaaa", "a-bbbbbb", "a-cccccc"])
    labels = list(data.load_study(author.store, STUDY).runs["label"])
    assert labels == ["same · router mlp", "same · tau 0.5 · router linear", "same"]


def test_runs_of_one_label_and_different_lengths_are_told_apart_by_their_tokens(author):
    for key, tokens in (("short", 5e6), ("long", 2e9)):
        author.begin(key, identity={"method": "vanilla", "size": "0.6m", "seed": 0, "tokens": tokens}, label="same")
    author.plan(["short", "long"])
    labels = list(data.load_study(author.store, STUDY).runs["label"])
    assert labels == ["same · 5.00M tokens", "same · 2.00B tokens"]


def test_filters_keep_what_has_no_lam_and_an_empty_filter_keeps_all(author):
    author.finished_study()
    view = data.load_study(author.store, STUDY)
    assert data.facets(view.runs) == {
        "method": ["vanilla", "adaptive"],
        "size": ["0.6m", "1.8m", "4.2m"],
        "nominal": data.facets(view.runs)["nominal"],
        "lam": ["0.1", "1"],
        "beta": ["1"],
        "l_max": ["3"],
        "seed": ["0"],
    }
    budgets = data.facets(view.runs)["nominal"]
    assert sum(len(data.select(view, nominal=[one]).runs) for one in budgets) == 9
    assert len(data.select(view).runs) == 9
    chosen = data.select(view, lam=["0.1"], size=["4.2m"]).runs
    assert set(chosen["key"]) == {"vanilla-4_2m-None", "adaptive-4_2m-0_1"}


def test_runs_of_earlier_versions_of_a_study_come_last(author):
    author.whole_run("old")
    author.begin("new")
    author.plan(["new"])
    assert list(data.load_study(author.store, STUDY).runs["key"]) == ["new", "old"]


def test_what_is_drawn(author):
    author.troubled_study()
    runs = data.load_study(author.store, STUDY).runs
    keys = set(data.plotted(runs, FlopsKind.PAPER)["key"])
    assert {"running", "stalled", "failed"} <= keys
    assert keys.isdisjoint({"diverged", "damaged", "newer", "planned", "never-begun"})
    assert set(data.thinking(runs)["method"]) == {"adaptive"}


def test_every_state_of_a_run_has_its_colour_and_icon():
    states = {*RunState, "damaged"}
    assert {*style.STATE_COLORS} == {*style.STATE_ICONS} == states


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "an unknown time"), (12.4, "12 s"), (900, "15 min"), (9e3, "2 h")]
)
def test_silence_in_words(seconds, words):
    assert data.silence(seconds) == words


def test_a_study_says_who_runs_it_while_somebody_does(author):
    author.plan(["a"])
    assert data.load_study(author.store, STUDY).owner == ""
    lease = Lease(author.store, author.store.path(STUDY))
    lease.acquire()
    try:
        assert str(os.getpid()) in data.load_study(author.store, STUDY).owner
    finally:
        lease.release()
    assert data.load_study(author.store, STUDY).owner == ""


def test_steps_against_needs_are_pooled_over_seeds_and_kept_apart_by_arm(author):
    author.known_need_study()
    rows = data.needed(data.load_study(author.store, STUDY).runs)
    assert list(dict.fromkeys(rows["arm"])) == ["adaptive", "adaptive/shuffled", "adaptive/fixed", "vanilla"]
    routed = rows[rows["arm"] == "adaptive"]
    assert routed["need"].iloc[0] != routed["need"].iloc[0]  # NaN: unpredictable
    assert list(routed["need"].iloc[1:]) == [0, 1, 2]
    assert list(routed["runs"]) == [2] * 4
    assert list(routed["tokens"]) == [12_000, 4000, 2000, 2000]
    assert list(routed["accuracy"]) == pytest.approx([0.1, 0.95, 0.8, 0.7])
    assert list(routed["steps_histogram"].iloc[-1]) == [0, 0, 1]
    assert set(routed["rank_correlation"]) == {1.0}
    assert rows.loc[rows["arm"] == "vanilla", "rank_correlation"].isna().all()


def test_a_running_run_shows_the_needs_of_its_last_evaluation(author):
    author.known_need_study()
    path = Path(author.store.path(STUDY, "routed", "record.json"))
    need = author.store.read_json(str(path))["need"]
    path.unlink()
    for step, tokens in ((100, 5), (200, 7)):
        latest = {**need, "by_need": [{**need["by_need"][2], "tokens": tokens}]}
        row = {"split": "validation", "step": step, "tokens": 1000 * step, "loss": 1.0, "need": latest}
        author.store.append_lines(author.store.path(STUDY, "routed", "evaluations.jsonl"), [row])
    rows = data.needed(data.load_study(author.store, STUDY).runs.query("key == 'routed'"))
    assert (list(rows["need"]), list(rows["tokens"])) == ([1], [7])


@pytest.mark.parametrize(
    "need", ["many", {"by_need": "rows"}, {"by_need": [7, {"need": 1, "tokens": None}]}, {"by_need": []}]
)
def test_nonsense_about_needs_is_passed_over(author, need):
    author.whole_run("odd")
    author.finish("odd", need=need)
    author.plan(["odd"])
    assert data.needed(data.load_study(author.store, STUDY).runs).empty


def test_texts_without_needs_have_none(author):
    author.finished_study()
    assert data.needed(data.load_study(author.store, STUDY).runs).empty


def test_arms_are_followed_by_their_controls():
    names = ["vanilla", "adaptive/fixed", "adaptive", "shuffled", "looped", "adaptive/shuffled", "mor/fixed"]
    found = ["vanilla", "adaptive", "adaptive/shuffled", "adaptive/fixed", "shuffled", "looped", "mor/fixed"]
    assert data.in_order([*names, "adaptive"]) == found


def test_pages_about_halting_open_on_a_run_that_a_router_stops(author):
    keys = author.known_need_study()
    runs = data.load_study(author.store, STUDY).runs
    assert data.telling(runs, keys) == "routed-2"
    assert data.telling(runs, ["plain", "even", "blind"]) == "blind"
    assert data.telling(runs, ["plain"]) == "plain"


def test_old_controls_are_called_what_they_are(author):
    author.whole_run("k", method="shuffled")
    author.plan(["k"])
    assert data.load_study(author.store, STUDY).runs["series"].iloc[0] == "shuffled (old control)"


def test_sizes_sort_by_their_number():
    assert sorted(["1.4b", "410m", "2x", "125k", "1.8m"], key=data.size_order) == ["125k", "1.8m", "410m", "1.4b", "2x"]
