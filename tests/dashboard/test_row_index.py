"""An index never says another thing than the store: whatever changed, and whatever became of the index itself."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haltscale.dashboard import cached_store, data, row_index
from haltscale.dashboard.row_index import RowIndex

STUDY = "quick"


@pytest.fixture
def reads(monkeypatch):
    """Keys of the runs whose documents were read for a row."""
    seen: list[str] = []
    row = data.run_row
    monkeypatch.setattr(data, "run_row", lambda view, *rest: (seen.append(view.key), row(view, *rest))[1])
    return seen


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(row_index, "SAVE_SECONDS", 0.0)


def restarted():
    """The store as a server sees it that has just started."""
    cached_store._kept.clear()
    return cached_store.store()


def same(view: data.StudyView, other: data.StudyView) -> None:
    """What two looks at one store show; signs of life apart, which are of now."""
    one, two = (each.runs.drop(columns="heartbeat") for each in (view, other))
    pd.testing.assert_frame_equal(one, two)
    assert view.problems == other.problems


def test_a_new_server_reads_only_what_is_new_or_changed(author, reads):
    keys = author.finished_study()
    first = restarted().view(STUDY)
    reads.clear()
    same(restarted().view(STUDY), first)
    assert reads == []
    author.finish(keys[0], size="0.6m", loss=1.0)
    author.whole_run("newcomer", lam=0.5)
    author.plan([*keys, "newcomer"])
    reads.clear()
    view = restarted().view(STUDY)
    assert sorted(reads) == sorted([keys[0], "newcomer"])
    assert view.runs.set_index("key").loc[keys[0], "loss"] == 1.0
    same(view, data.load_study(author.store, STUDY))


def test_running_and_damaged_runs_are_read_at_each_look_and_the_rest_is_not(author, reads):
    author.troubled_study()
    restarted().view(STUDY)
    reads.clear()
    view = restarted().view(STUDY)
    assert set(reads) == {"running", "stalled", "damaged", "newer"}
    assert len(view.problems) == 2
    same(view, data.load_study(author.store, STUDY))


def test_a_failed_run_that_goes_on_is_read_again(author, reads):
    author.troubled_study()
    restarted().view(STUDY)
    author.status("failed", state="failed", step=200, error="another reason")
    author.train("capped", size="0.6m", lam=3.0, progress=0.75)
    reads.clear()
    view = restarted().view(STUDY)
    assert {"failed", "capped"} <= set(reads)
    assert view.runs.set_index("key").loc["failed", "note"] == "another reason"
    same(view, data.load_study(author.store, STUDY))


def test_the_same_rows_make_the_same_table(author):
    author.finished_study()
    store = restarted()
    assert store.view(STUDY).runs is store.view(STUDY).runs


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04K\x01."])
def test_a_damaged_index_is_made_anew(author, reads, content):
    keys = author.finished_study()
    store = restarted()
    first = store.view(STUDY)
    path = RowIndex(store, STUDY).path
    path.write_bytes(content)
    reads.clear()
    same(restarted().view(STUDY), first)
    assert sorted(reads) == sorted(keys)


def test_the_index_of_other_code_is_not_used(author, reads, monkeypatch):
    keys = author.finished_study()
    restarted().view(STUDY)
    monkeypatch.setattr(row_index, "_code", lambda: "other")
    reads.clear()
    restarted().view(STUDY)
    assert sorted(reads) == sorted(keys)


def test_nothing_is_kept_in_the_store_and_a_folder_that_cannot_be_written_is_no_error(author, monkeypatch, tmp_path):
    author.finished_study()
    before = sorted(Path(author.store.root).rglob("*"))
    restarted().view(STUDY)
    assert sorted(Path(author.store.root).rglob("*")) == before
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "file"))
    assert len(restarted().view(STUDY).runs) == 9


CHANGES = ("finish", "status", "remove the run", "remove the record", "damage", "metrics", "restart")


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 2)), max_size=6))
def test_a_store_that_changes_under_it(author, changes):
    shutil.rmtree(author.store.root, ignore_errors=True)
    keys = ["a", "b", "c"]
    for key in keys:
        author.begin(key)
        author.finish(key)
    author.plan(keys)
    store = restarted()
    store.view(STUDY)
    for place, (change, which) in enumerate(changes):
        key = keys[which]
        folder = Path(author.store.path(STUDY, key))
        folder.mkdir(exist_ok=True)
        if change == "finish":
            author.begin(key)
            author.finish(key, loss=float(place))
        elif change == "status":
            author.status(key, state="failed", error=f"reason {place}")
        elif change == "remove the run":
            shutil.rmtree(folder)
        elif change == "remove the record":
            (folder / "record.json").unlink(missing_ok=True)
        elif change == "damage":
            (folder / "record.json").write_text("{" * (place + 1))
        elif change == "metrics":
            author.store.append_lines(str(folder / "metrics.jsonl"), [{"step": place, "loss": None}])
        else:
            store = restarted()
        same(store.view(STUDY), data.load_study(author.store, STUDY))
