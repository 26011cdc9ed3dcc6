"""The run store: atomic documents, append-only lines, states, and names that cannot leave it."""

import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform import store as store_module
from haltscale.platform.store import SCHEMA_VERSION, STALL_SECONDS, RunState, RunStore, StoreError, default_root


@pytest.fixture(params=["local", "memory"])
def any_store(request, tmp_path):
    """The same store on a local folder and on an fsspec filesystem that is none."""
    root = tmp_path / "runs" if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs"
    return RunStore(root)


# ---- where it is ----------------------------------------------------------------------------------------------------


def test_the_root_follows_the_environment(monkeypatch, home, tmp_path):
    assert default_root() == str(home / "runs")
    monkeypatch.setenv("HALTSCALE_STORE", "memory://somewhere")
    assert RunStore().root == "memory://somewhere"
    monkeypatch.delenv("HALTSCALE_STORE")
    monkeypatch.delenv("HALTSCALE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunStore().root == str(tmp_path / "haltscale" / "runs")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/etc", "../x", "a\\b", "-x", ".hidden", "a b", "x\n", "ü", "a" * 101]
)
def test_a_name_that_could_leave_the_store_is_refused(any_store, name):
    with pytest.raises(StoreError, match="not a valid study or run name"):
        any_store.path(name)
    with pytest.raises(StoreError, match="not a valid study or run name"):
        any_store.path("study", name)


@pytest.mark.parametrize("name", ["quickstart", "adaptive-0.6m-0123456789ab", "a", "A_b.c-1", "a..b"])
def test_ordinary_names_are_accepted(store, name):
    assert Path(store.path(name, name, "spec.json")).is_relative_to(store.root)


def test_local_paths_need_a_local_store(store):
    assert store.local_path("study", "key", "model") == Path(store.root) / "study" / "key" / "model"
    with pytest.raises(StoreError, match="not a local folder"):
        RunStore("memory://x").local_path("study", "key")


# ---- documents ------------------------------------------------------------------------------------------------------


def test_a_document_is_read_back(any_store):
    path = any_store.path("study", "key", "spec.json")
    assert any_store.read_json(path) == {}
    document = {"text": "λ → 🙂", "number": 0.1, "nested": {"list": [1, None, True]}}
    any_store.write_json(path, document)
    assert any_store.read_json(path) == {"schema": SCHEMA_VERSION, **document}
    any_store.write_json(path, {"other": 1})
    assert any_store.read_json(path) == {"schema": SCHEMA_VERSION, "other": 1}
    assert [name.rsplit("/", 1)[-1] for name in any_store.fs.ls(path.rsplit("/", 1)[0], detail=False)] == ["spec.json"]


@pytest.mark.parametrize("text", ['{"schema": 1, "state": "runn', "", "\x00\xff", "nonsense"])
def test_a_damaged_document_is_refused_with_advice(store, text):
    path = Path(store.path("study", "key", "spec.json"))
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"spec\.json is damaged .* remove the run's folder"):
        store.read_json(str(path))


@pytest.mark.parametrize("text", ['{"schema": 2}', "{}", "[1]", "null", '"text"'])
def test_a_document_of_another_schema_is_refused_with_advice(store, text):
    path = Path(store.path("study", "key", "spec.json"))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(StoreError, match="this version reads 1: use another store root"):
        store.read_json(str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_no_json_is_refused_and_the_old_document_stays(store, value):
    path = store.path("study", "key", "record.json")
    store.write_json(path, {"loss": 1.0})
    with pytest.raises((ValueError, TypeError)):
        store.write_json(path, {"loss": value})
    assert store.read_json(path)["loss"] == 1.0
    assert len(list(Path(path).parent.iterdir())) == 1


def test_a_writer_that_dies_leaves_the_old_document(store, monkeypatch):
    path = store.path("study", "key", "record.json")
    store.write_json(path, {"loss": 1.0})

    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr(store_module.os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        store.write_json(path, {"loss": 2.0})
    monkeypatch.undo()
    assert store.read_json(path)["loss"] == 1.0


WRITER = """
import sys
from haltscale.platform.store import RunStore
store = RunStore(sys.argv[1])
for count in range(60):
    store.write_json(store.path("study", "key", "status.json"), {"count": count, "filling": [count] * 20_000})
"""


def test_a_reader_sees_whole_documents_while_another_process_writes(store):
    path = store.path("study", "key", "status.json")
    store.write_json(path, {"count": -1, "filling": [-1] * 20_000})
    writer = subprocess.Popen([sys.executable, "-c", WRITER, store.root])
    last, reads = -1, 0
    while writer.poll() is None:
        document = store.read_json(path)
        assert document["filling"] == [document["count"]] * 20_000
        assert document["count"] >= last
        last, reads = document["count"], reads + 1
    assert writer.returncode == 0
    assert reads > 0
    assert store.read_json(path)["count"] == 59


def test_writers_at_once_do_not_mix(store):
    path = store.path("study", "key", "study.json")
    threads = [
        threading.Thread(target=lambda n=n: [store.write_json(path, {"filling": [n] * 5000}) for _ in range(8)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(store.read_json(path)["filling"])) == 1
    assert len(list(Path(path).parent.iterdir())) == 1


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_lines_are_appended(any_store):
    path = any_store.path("study", "key", "metrics.jsonl")
    assert any_store.read_lines(path) == []
    any_store.append_lines(path, [{"step": 1, "text": "a\nb\u2028c"}, {"step": 2}])
    any_store.append_lines(path, [{"step": 3}])
    assert [row["step"] for row in any_store.read_lines(path)] == [1, 2, 3]
    assert any_store.read_lines(path)[0]["text"] == "a\nb\u2028c"
    with pytest.raises(ValueError, match="not JSON compliant"):
        any_store.append_lines(path, [{"step": 4, "loss": float("nan")}])
    assert len(any_store.read_lines(path)) == 3


rows_of_text = st.lists(st.fixed_dictionaries({"step": st.integers(0, 99), "text": st.text(max_size=8)}), max_size=6)


@given(rows=rows_of_text, data=st.data())
def test_a_last_line_half_written_is_left_for_the_next_read(rows, data):
    store = RunStore(f"memory://{uuid.uuid4().hex}")
    path = store.path("study", "key", "metrics.jsonl")
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    cut = data.draw(st.integers(0, len(text)))
    store.fs.pipe_file(path, text[:cut])
    whole = text[:cut].count(b"\n")
    read = store.read_lines(path)
    assert read[:whole] == rows[:whole]
    assert len(read) - whole in (0, 1)  # one more where only the end of the line is missing
    assert read == rows[: len(read)]


@given(rows=rows_of_text, after=st.integers(-1, 100))
def test_truncation_keeps_what_came_before(rows, after):
    store = RunStore(f"memory://{uuid.uuid4().hex}")
    path = store.path("study", "key", "metrics.jsonl")
    store.append_lines(path, rows)
    store.truncate_lines(path, after_step=after)
    assert store.read_lines(path) == [row for row in rows if row["step"] <= after]


def test_truncation_drops_a_half_written_line_so_that_the_next_one_is_whole(any_store):
    path = any_store.path("study", "key", "metrics.jsonl")
    any_store.truncate_lines(path, after_step=1)
    assert not any_store.fs.exists(path)
    any_store.append_lines(path, [{"step": 1}, {"step": 2}])
    any_store.fs.pipe_file(path, any_store.fs.cat_file(path) + b'{"step": 3, "lo')
    any_store.truncate_lines(path, after_step=3)
    any_store.append_lines(path, [{"step": 3}])
    assert [row["step"] for row in any_store.read_lines(path)] == [1, 2, 3]


# ---- runs and studies -----------------------------------------------------------------------------------------------


def test_a_run_in_every_state(store, author):
    keys = author.every_state()
    states = {run.key: run.state for run in store.runs("quick")}
    assert list(states) == keys
    assert states == {key: RunState(key) for key in keys}
    assert store.finished_keys("quick") == {"finished"}
    assert store.run("quick", "planned").label == "planned"  # nothing is known but its key
    assert store.run("quick", "failed").label == "adaptive failed"


def test_silence_makes_a_running_run_stalled(store, author):
    author.status("quick", "key", "running", heartbeat=1e12)  # by a clock that is wrong: nobody asks it
    written = os.stat(store.path("quick", "key", "status.json")).st_mtime
    assert store.run("quick", "key", now=written + STALL_SECONDS - 1).state is RunState.RUNNING
    assert store.run("quick", "key", now=written + STALL_SECONDS + 1).state is RunState.STALLED


def test_a_run_whose_process_is_gone_is_stalled_at_once(store):
    """And one that lives is running, however long ago it logged anything: its lease is its sign of life."""
    code = (
        "import sys; from haltscale.platform.recorder import RunRecorder;"
        " from haltscale.platform.store import RunStore;"
        " run = RunRecorder(RunStore(sys.argv[1]), 'study', 'key', steps=1); run.own(); run.begin(0, 0.0);"
        " print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, store.root]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    os.utime(store.path("study", "key", "status.json"), (0, 0))
    view = store.run("study", "key")
    assert view.state is RunState.RUNNING
    assert view.silent_seconds < STALL_SECONDS
    process.kill()
    process.wait()
    assert store.run("study", "key").state is RunState.STALLED


def test_a_status_that_says_finished_without_a_record_is_not_finished(store, author):
    author.status("quick", "key", "finished")
    assert store.run("quick", "key").state is RunState.PLANNED


def test_a_record_decides(store, author):
    author.status("quick", "key", "failed", error="a worker died")
    author.record("quick", "key", loss=1.0)
    assert store.run("quick", "key").state is RunState.FINISHED


@pytest.mark.parametrize("name", ["spec", "status", "record"])
def test_a_damaged_run_is_shown_with_its_problem_and_does_not_hide_the_others(store, author, name):
    author.every_state()
    Path(store.path("quick", "finished", f"{name}.json")).write_text('{"schema": 1, "lo')
    view = next(store.runs("quick"))
    assert "damaged" in view.problem
    assert getattr(view, name) == {}
    assert [run.problem for run in store.runs("quick")][1:] == [""] * 4
    assert (view.state is RunState.FINISHED) == (name != "record")


def test_runs_of_an_earlier_version_of_the_study_come_last(store, author):
    author.every_state()
    author.plan("quick", ["stalled", "finished"])
    assert [run.key for run in store.runs("quick")] == ["stalled", "finished", "failed", "running"]


def test_studies_are_listed(any_store):
    assert any_store.studies() == []
    for name in ("b-study", "a-study"):
        any_store.write_json(any_store.path(name, None, "study.json"), {"name": name, "runs": []})
    any_store.write_json(any_store.path("no-study", "key", "spec.json"), {})
    any_store.fs.pipe_file(any_store.path("x").rsplit("/", 1)[0] + "/.DS_Store", b"")
    assert any_store.studies() == ["a-study", "b-study"]
    assert any_store.study("a-study")["name"] == "a-study"
    assert list(any_store.runs("a-study")) == []


def test_probes_are_found_by_step(any_store):
    assert any_store.probe_steps("study", "key") == []
    table = pd.DataFrame({"position": [0, 1], "reach": [[1.0, 0.5], [1.0, 0.0]]})
    for step in (200, 5, 100_000_000):
        path = any_store.probe_path("study", "key", step)
        any_store.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with any_store.fs.open(path, "wb") as file:
            table.to_parquet(file)
    any_store.fs.pipe_file(any_store.path("study", "key", "halting", "probe-00000300.parquet.partial"), b"half")
    assert any_store.probe_steps("study", "key") == [5, 200, 100_000_000]
    read = any_store.probe("study", "key", 5)
    assert [list(row) for row in read["reach"]] == [[1.0, 0.5], [1.0, 0.0]]


def test_telemetry_of_a_run_that_wrote_none_is_empty(any_store):
    assert any_store.metrics("study", "key").empty
    assert any_store.evaluations("study", "key").empty
