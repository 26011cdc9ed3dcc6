"""Published studies: what is copied, what is left behind, and that the copy is a store like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform import cli
from haltscale.platform.store import RunStore, StoreError
from haltscale.platform.sweeps import publishing, report


def ragged(store: RunStore, histogram: list[float]) -> None:
    """Give the finished run's tokens these shares of steps."""
    path = store.path("quick", "finished", "record.json")
    document = {name: value for name, value in store.read_json(path).items() if name != "schema"}
    store.write_json(path, document | {"steps_histogram": histogram})


@pytest.fixture
def full(store: RunStore, author: Any) -> RunStore:
    """A study with a run in every state; the finished one has all that a run leaves behind."""
    author.every_state()
    ragged(store, [0.25, 0.75])
    rows = [{"step": step, "loss": 9 - step / 100} for step in range(1, 101)]
    store.append_lines(store.path("quick", "finished", "metrics.jsonl"), rows)
    store.append_lines(store.path("quick", "finished", "evaluations.jsonl"), [{"step": 50, "loss": 5.0}, {"step": 100}])
    halting = Path(store.path("quick", "finished", "halting"))
    halting.mkdir()
    for step in (50, 100):
        for name in ("probe", "cube", "events"):
            pd.DataFrame({"step": [step]}).to_parquet(halting / f"{name}-{step:08d}.parquet")
        store.write_json(str(halting / f"summary-{step:08d}.json"), {"step": step})
    store.write_json(store.evaluation_path("quick", "finished", "controls"), {"name": "controls"})
    for folder in ("model", "checkpoints"):
        (Path(store.path("quick", "finished", folder))).mkdir()
        (Path(store.path("quick", "finished", folder)) / "weights.safetensors").write_bytes(b"weights")
    return store


def test_the_models_that_are_named_go_along(full: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = publishing.publish(full, "quick", tmp_path / "published", models=["finished"])
    assert copy.local_path("quick", "finished", "model", "weights.safetensors").read_bytes() == b"weights"
    with pytest.raises(StoreError, match="name a finished run's key"):
        publishing.publish(full, "quick", tmp_path / "published", models=["running"])
    monkeypatch.setattr(publishing, "MOST_MODEL_BYTES", 6)
    with pytest.raises(StoreError, match="at most 6e-06 MB are copied"):
        publishing.publish(full, "quick", tmp_path / "published", models=["finished"])
    assert copy.finished_keys("quick") == {"finished"}, "a refusal removes nothing"


def test_the_copy_reads_like_the_store_it_came_from(full: RunStore, tmp_path: Path) -> None:
    copy = publishing.publish(full, "quick", tmp_path / "published")
    assert copy.studies() == ["quick"]
    before = report.results(full, "quick")
    finished = before[before["state"] == "finished"].reset_index(drop=True)
    copied = report.results(copy, "quick")
    pd.testing.assert_frame_equal(copied, finished[copied.columns], check_dtype=False)
    assert finished.drop(columns=copied.columns).isna().all(axis=None), "options that no finished run has"
    assert copy.study("quick") == full.study("quick") | {"runs": ["finished"], "controls": {}, "published_of": 5}
    assert copy.evaluations("quick", "finished").equals(full.evaluations("quick", "finished"))
    assert copy.later_evaluations("quick", "finished") == full.later_evaluations("quick", "finished")
    assert copy.halting_summary("quick", "finished", 100)["step"] == 100
    assert copy.probe("quick", "finished", 100)["step"].tolist() == [100]
    assert not Path(copy.halting_path("quick", "finished", "cube", 100)).exists()


def test_no_weights_no_token_events_and_few_metrics_are_copied(full: RunStore, tmp_path: Path) -> None:
    publishing.publish(full, "quick", tmp_path / "published")
    files = {str(file.relative_to(tmp_path / "published")) for file in (tmp_path / "published").rglob("*.*")}
    assert files == {
        "quick/study.json",
        *(f"quick/finished/{name}" for name in ("spec.json", "record.json", "metrics.jsonl", "evaluations.jsonl")),
        "quick/finished/halting/probe-00000100.parquet",
        "quick/finished/halting/summary-00000100.json",
        "quick/finished/evaluations/controls.json",
    }
    steps = RunStore(tmp_path / "published").metrics("quick", "finished")["step"]
    assert len(steps) == publishing.MOST_METRICS
    assert steps.iloc[[0, -1]].tolist() == [1, 100]


def test_tokens_that_all_think_alike_need_no_telemetry(full: RunStore, tmp_path: Path) -> None:
    ragged(full, [0.0, 1.0])
    copy = publishing.publish(full, "quick", tmp_path / "published")
    assert copy.halting_summary("quick", "finished", 100)["step"] == 100
    assert copy.probe_steps("quick", "finished") == []


def test_publishing_again_leaves_nothing_of_the_last_time(full: RunStore, tmp_path: Path) -> None:
    copy = publishing.publish(full, "quick", tmp_path / "published")
    stray = Path(copy.path("quick", "gone", "record.json"))
    stray.parent.mkdir()
    stray.write_text("{}")
    publishing.publish(full, "quick", tmp_path / "published")
    assert copy.present("quick") == ["finished"]


def test_runs_of_an_earlier_plan_are_left_behind(full: RunStore, author: Any, tmp_path: Path) -> None:
    author.plan("quick", ["failed", "planned"])
    with pytest.raises(StoreError, match="no finished run yet"):
        publishing.publish(full, "quick", tmp_path / "published")
    author.plan("quick", ["finished", "planned"])
    author.spec("quick", "earlier", "earlier", method="vanilla", size="0.6m", seed=1, options={})
    author.status("quick", "earlier", "finished", step=10)
    author.record("quick", "earlier", loss=4.0, identity={"method": "vanilla"}, parameters_total=594_000)
    assert "earlier" in full.finished_keys("quick")
    copy = publishing.publish(full, "quick", tmp_path / "published")
    assert copy.present("quick") == ["finished"]
    assert copy.study("quick")["published_of"] == 2


def test_what_cannot_be_published(full: RunStore, author: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no study 'quack'"):
        publishing.publish(full, "quack", tmp_path / "published")
    with pytest.raises(StoreError, match="give another folder"):
        publishing.publish(full, "quick", full.root)
    author.plan("empty", ["planned"])
    with pytest.raises(StoreError, match="no finished run yet"):
        publishing.publish(full, "empty", tmp_path / "published")
    assert not (tmp_path / "published").exists()


@given(st.lists(st.integers(), max_size=50), st.integers(2, 60))
def test_thinned_rows_keep_order_and_ends(rows: list[int], most: int) -> None:
    numbered = list(enumerate(rows))
    kept = publishing.thinned(numbered, most)
    assert len(kept) == min(len(rows), most)
    assert kept == sorted(set(kept))
    if rows:
        assert (kept[0], kept[-1]) == (numbered[0], numbered[-1])


def test_the_verb(full: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "published"
    cli.main(["results", "quick", "--store", full.root, "--export", str(target)])
    out = capsys.readouterr().out
    assert f"1 finished runs of quick are in {target}" in out
    assert f"haltscale dashboard --store {target}" in out
    assert json.loads((target / "quick" / "finished" / "record.json").read_text())["loss"] == 4.25
