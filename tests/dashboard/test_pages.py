"""Each page in each state, from the entry point, in process."""

import ast
import json
from pathlib import Path

import pytest
from pages import FOLDER, PAGES, TITLES, charts, open_page, text
from streamlit.testing.v1 import AppTest

from haltscale.dashboard import headless, launch
from haltscale.platform.lease import Lease
from haltscale.platform.store import RunStore

STUDY = "quick"


@pytest.mark.parametrize("name", PAGES)
def test_an_empty_store_says_how_to_fill_it(author, name):
    page = open_page(name)
    assert page.title[0].value == "No study yet"
    lines = {code.value for code in page.code}
    assert "make study" in lines
    assert any("ray job submit --working-dir . -- python -m haltscale.studies.quickstart" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("answer", 1),
        ("cost", 0),
        ("studies", 0),
        ("live", 2),
        ("compute", 1),
        ("sensitivity", 2),
        ("halting", 4),
        ("tokens", 2),
        ("evaluations", 0),
        ("notes", 0),
        ("playground", 0),
        ("method", 0),
    ],
)
def test_a_finished_study(author, name, figures):
    author.finished_study()
    page = open_page(name)
    assert page.title[0].value == TITLES[name]
    assert len(charts(page)) == figures
    assert "9 finished" in text(page)
    assert not page.error
    assert not page.warning


@pytest.mark.parametrize("name", PAGES)
def test_a_study_in_trouble(author, name):
    author.troubled_study()
    page = open_page(name)
    assert page.title[0].value == TITLES[name]
    for state in ("1 running", "1 stalled", "1 failed", "2 diverged", "1 capped", "2 damaged", "2 planned"):
        assert state in text(page)


@pytest.mark.parametrize("name", PAGES)
def test_a_study_that_has_only_been_planned(author, name):
    author.plan(["a", "b"])
    page = open_page(name)
    assert not charts(page)
    assert page.info or name == "studies"
    assert "2 planned" in text(page)


@pytest.mark.parametrize("name", PAGES)
def test_a_study_of_another_schema_version(author, name):
    author.plan([])
    Path(author.store.path(STUDY, None, "study.json")).write_text('{"schema": 99}')
    page = open_page(name)
    assert "schema 99" in text(page)


@pytest.mark.parametrize("name", PAGES)
def test_a_run_before_its_first_evaluation(author, name):
    author.begin("fresh")
    author.train("fresh", progress=0.1)
    author.status("fresh", step=40)
    author.plan(["fresh"])
    page = open_page(name)
    assert "1 running" in text(page)
    assert len(charts(page)) == (2 if name == "live" else 0)


def test_the_kind_of_flops_is_chosen_and_named(author):
    author.finished_study()
    page = open_page("compute")
    assert "training FLOPs, realised" in charts(page)[0]["layout"]["xaxis"]["title"]["text"]
    page.segmented_control(key="flops").set_value("paper").run()
    assert "training FLOPs, paper" in charts(page)[0]["layout"]["xaxis"]["title"]["text"]


def test_too_few_runs_are_refused_with_a_reason_in_place_of_numbers(author):
    author.finished_study()
    assert "Not fitted" not in text(open_page("compute")), "laws are fitted on request"
    page = open_page("compute", fits="true")
    assert "Not fitted" in text(page)
    assert "3 of the 6 runs that a fit needs" in text(page)
    for view, reason in (
        ("IsoFLOP", "no budget of compute has 4 model sizes"),
        ("Multipliers", "of the 6 runs"),
        ("Value of a latent step", "no method with more than one pass has 3 runs"),
        ("Size and data", "of the 6 runs"),
    ):
        page = open_page("compute", view=view)
        assert page.segmented_control(key="view").value == view
        assert reason in text(page)
        assert len(charts(page)) == (view == "IsoFLOP"), "points are drawn, nothing that is refused"


def test_short_runs_are_called_what_they_are(author):
    author.finished_study()
    assert "not the method's gain" in text(open_page("compute"))


def test_the_address_restores_what_was_chosen(author):
    author.finished_study()
    author.plan([], study="another")
    page = open_page("compute", study=STUDY, flops="executed", measure="perplexity", method="vanilla")
    assert page.selectbox(key="study").value == STUDY
    assert page.segmented_control(key="flops").value == "executed"
    chart = charts(page)[0]
    assert "perplexity" in chart["layout"]["yaxis"]["title"]["text"]
    assert {trace["name"] for trace in chart["data"] if trace.get("customdata")} == {"vanilla, result"}


def test_filters_that_leave_nothing_say_so(author):
    author.finished_study()
    author.begin("only", method="looped", size="9m", lam=None)
    page = open_page("compute", method="looped", size="0.6m")
    assert "No run passes the filters" in text(page)


def test_a_figure_can_be_taken_along(author):
    author.finished_study()
    page = open_page("compute")
    labels = {button.label for button in page.get("download_button")}
    assert {"Data, CSV", "Data, Parquet", "Figure, HTML"} <= labels


def test_studies_list_every_run_what_went_wrong_and_the_other_studies(author):
    author.troubled_study()
    author.plan([], study="another")
    page = open_page("studies", study=STUDY)
    studies, runs = (frame.value for frame in page.dataframe)
    assert list(studies["study"]) == [STUDY, "another"]
    assert studies["wrong"].iloc[0] == 7  # stalled, failed, capped, two diverged, two damaged
    assert len(runs) == 20
    assert {"CSV", "Parquet"} <= {button.label for button in page.get("download_button")}
    assert "remove the run's folder to train it again" in text(page)
    assert "schema 99" in text(page)
    assert "ran out of memory" in text(page)


def test_runs_show_progress_time_left_and_errors(author):
    author.troubled_study()
    page = open_page("live")
    bar = next(bar for bar in page.progress if "left" in bar.text)
    assert bar.value == 60
    assert "4 min 10 s left" in bar.text
    assert "ran out of memory" in text(page)
    assert "silent for 15 min" in text(page)
    for why in ("a higher limit resumes it", "its loss is not finite at step 20"):
        assert why in text(page)
    assert "2 planned, not begun" in [expander.label for expander in page.expander]


def test_chosen_curves_and_a_run_without_metrics(author):
    author.troubled_study()
    page = open_page("live")
    page.multiselect(key="curves").set_value(["silent", "vanilla-0_6m-None"]).run()
    assert not page.exception
    assert "No training metrics: adaptive · 1.8m · λ 0.5" in text(page)
    assert {trace["name"] for trace in charts(page)[0]["data"]} == {"vanilla · 0.6m", "vanilla · 0.6m, held out"}


@pytest.mark.parametrize("name", ["studies", "live"])
def test_who_runs_a_study_is_named_while_it_does(author, name):
    author.plan(["a"])
    lease = Lease(author.store, author.store.path(STUDY), who="someone")
    lease.acquire()
    try:
        assert "Run by someone since" in text(open_page(name))
    finally:
        lease.release()
    assert "Run by" not in text(open_page(name))


@pytest.mark.parametrize(
    ("name", "figures"),
    [("studies", 0), ("live", 0), ("compute", 1), ("sensitivity", 2), ("halting", 6), ("tokens", 2)],
)
def test_a_study_of_known_need(author, name, figures, caplog):
    author.known_need_study()
    page = open_page(name)
    assert len(charts(page)) == figures
    assert not page.error
    assert not page.warning
    assert "default hashing method failed" not in caplog.text
    assert ("Steps given against steps needed" in text(page)) == (name == "halting")


def test_needs_are_shown_only_where_they_are_known(author):
    author.finished_study()
    assert "Steps given against steps needed" not in text(open_page("halting"))
    assert "steps that it needs" not in text(open_page("tokens"))


def test_a_study_of_known_need_shows_its_figures_and_opens_on_the_router(author):
    author.known_need_study()
    studies = open_page("studies").dataframe[1].value
    assert list(studies["need_rank_correlation"].dropna()) == [1, 1, 0, 0]
    halting = open_page("halting")
    assert halting.selectbox(key="halting-run").value == "routed-2"
    tokens = open_page("tokens")
    assert tokens.selectbox(key="run").value == "routed-2"
    assert "steps that it needs" in text(tokens)


def shown_tokens(page: AppTest) -> str:
    """Which study, run and step the token map was given."""
    return json.loads(page.get("bidi_component")[0].proto.json)["id"]


def test_tokens_follow_the_run_and_the_step(author, nasty):
    author.finished_study()
    author.probe("adaptive-0_6m-0_1", step=500, histogram=[0.25] * 4, words=nasty)
    page = open_page("tokens")
    assert page.selectbox(key="run").value == "adaptive-4_2m-1_0"
    assert shown_tokens(page) == "quick/adaptive-4_2m-1_0/400/steps"
    page.selectbox(key="run").set_value("adaptive-0_6m-0_1").run()
    page.select_slider(key="step").set_value("100").run()
    assert not page.exception
    assert page.select_slider(key="step").value == "100"
    assert shown_tokens(page) == "quick/adaptive-0_6m-0_1/100/steps"
    page.select_slider(key="step").set_value("latest").run()
    assert shown_tokens(page) == "quick/adaptive-0_6m-0_1/500/steps"
    author.probe("adaptive-0_6m-0_1", step=600, histogram=[0.25] * 4)
    page.run()  # a live page's next look: the newest evaluation is still the one on show
    assert shown_tokens(page) == "quick/adaptive-0_6m-0_1/600/steps"
    page.selectbox(key="run").set_value("vanilla-0_6m-None").run()
    assert shown_tokens(page) == "quick/vanilla-0_6m-None/400/steps"


def test_a_damaged_probe_is_said_not_raised(author):
    author.whole_run("k")
    author.plan(["k"])
    Path(author.store.probe_path(STUDY, "k", 400)).write_bytes(b"PAR1")
    page = open_page("tokens")
    assert "cannot be read" in page.warning[0].value.replace("\\", "")


def test_new_runs_and_new_studies_show_on_the_next_look(author):
    author.whole_run("first")
    author.plan(["first"])
    page = open_page("studies")
    assert len(page.dataframe[1].value) == 1
    author.whole_run("second", lam=1.0)
    author.plan(["first", "second"])
    author.plan([], study="another")
    page.run()
    assert len(page.dataframe[1].value) == 2
    assert page.selectbox(key="study").options == ["another", STUDY]
    assert page.selectbox(key="study").value == STUDY


def test_labels_from_the_store_are_never_markdown(author):
    author.begin("k", label="**bold** [link](x) :red[x] <b>")
    author.train("k", progress=0.3)
    author.status("k", step=100)
    author.plan(["k"])
    page = open_page("live")
    assert any("\\*\\*bold\\*\\*" in block.value and "\\[link\\]" in block.value for block in page.markdown)


@pytest.mark.parametrize("name", PAGES)
def test_no_page_shows_its_comments(name):
    """Streamlit writes every bare string of a script but its docstring on the page."""
    statements = ast.parse((FOLDER / "app_pages" / f"{name}.py").read_text(encoding="utf-8")).body
    assert not [one for one in statements[1:] if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)]


def test_every_page_says_what_it_is():
    from haltscale.dashboard import layout

    pages = layout.pages(FOLDER / "app_pages")
    assert [entry["page"].stem for entry in pages] == list(PAGES)
    assert all(entry["help"] and entry["icon"].startswith(":material/") for entry in pages)


def test_tokens_are_coloured_by_what_was_asked_for_and_two_runs_stand_side_by_side(author):
    author.finished_study()
    page = open_page("tokens", colour="gain", beside="true")
    shown = [json.loads(one.proto.json) for one in page.get("bidi_component")]
    assert len(shown) == 2
    assert all(one["id"].endswith("/gain") for one in shown)
    page.selectbox(key="run-2").set_value("vanilla-0_6m-None").run()
    assert json.loads(page.get("bidi_component")[1].proto.json)["id"].startswith("quick/vanilla-0_6m-None/")


def test_a_swept_option_gets_its_heat_maps(author):
    for lam in (0.1, 1.0):
        for beta in (0.5, 1.0):
            key = f"k-{lam}-{beta}"
            author.begin(
                key,
                identity={"method": "adaptive", "size": "1.8m", "seed": 0, "tokens": 1_000_000}
                | {"options": {"lam": lam, "beta": beta, "l_max": 3}},
            )
            author.finish(key, lam=lam)
    author.plan([f"k-{lam}-{beta}" for lam in (0.1, 1.0) for beta in (0.5, 1.0)])
    page = open_page("sensitivity")
    maps = [trace for chart in charts(page) for trace in chart["data"] if trace["type"] == "heatmap"]
    assert len(maps) == 2
    assert "4 of the 8 runs that importance needs" in text(page)


def test_later_evaluations_are_shown_and_a_damaged_one_is_said(author):
    author.finished_study()
    key = "adaptive-4_2m-0_1"
    folder = Path(author.store.path(STUDY, key, "evaluations"))
    point = {"dial": "tau", "own": True, "loss": 4.1, "mean_steps": 1.0, "flops_realised": 1e7}
    author.store.write_json(
        str(folder / "dial.json"),
        {"points": [point | {"value": 0.01}, point | {"value": 0.1, "own": False, "loss": 4.2, "flops_realised": 8e6}]},
    )
    arms = [{"name": "learned", "loss": 4.1, "mean_steps": 1.0, "minus_learned": None}]
    arms.append(
        {"name": "shuffled", "loss": 4.3, "mean_steps": 1.0} | {"minus_learned": {"mean": 0.2, "low": 0.1, "high": 0.3}}
    )
    author.store.write_json(str(folder / "controls.json"), {"arms": arms, "oracle": None})
    author.store.write_json(str(folder / "sciq.json"), {"task": "sciq", "items": 9, "accuracy": 0.3, "chance": 0.25})
    page = open_page("evaluations")
    (chart,) = charts(page)
    assert list(chart["data"][0]["marker"]["symbol"]) == ["circle", "star"]
    tasks, controls = (frame.value for frame in page.dataframe)
    assert tasks["accuracy"].tolist() == [0.3]
    assert controls["minus learned, nats"].tolist() == ["–", "0.200 [0.100, 0.300]"]
    (folder / "step-00000020").mkdir()
    author.store.write_json(str(folder / "step-00000020" / "sciq.json"), {"task": "sciq", "items": 9, "accuracy": 0.2})
    tasks = open_page("evaluations").dataframe[0].value
    label = tasks["run"][0]
    assert tasks[["run", "accuracy"]].to_numpy().tolist() == [[label, 0.3], [f"{label} @ step 20", 0.2]]
    (folder / "sciq.json").write_text("{")
    assert "cannot be read" in text(open_page("evaluations"))


@pytest.mark.parametrize("name", PAGES)
def test_the_published_study_is_there_before_anything_was_run(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HALTSCALE_STORE", launch.demo_root())
    before = {file: file.stat().st_mtime_ns for file in Path(launch.demo_root()).rglob("*")}
    page = open_page(name, study="reference")
    assert page.title[0].value == TITLES[name]
    assert "Does adaptive latent chain-of-thought pay for its FLOPs" in text(page)
    assert not page.error
    assert {file: file.stat().st_mtime_ns for file in Path(launch.demo_root()).rglob("*")} == before, "only read"


def test_runs_that_search_for_hyperparameters_are_no_points_of_a_comparison():
    root = Path(__file__).parents[2] / "studies" / "results"
    drawn = headless.draw(str(root), "compute", {"study": "little-text"}).charts
    (chart,) = (one for one in drawn if "scaling" in one.name)
    shown = RunStore(root).views("little-text", set(chart.behind["key"]))
    assert {view.record["role"] for view in shown.values()} == {"comparison"}
