"""The run store on S3: against a real server (moto's), over HTTP, in this process."""

from __future__ import annotations

import json
import threading
import uuid

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haltscale.platform import store as store_module
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.store import RunState, RunStore, StoreError


@pytest.fixture
def store(s3: str) -> RunStore:
    return RunStore(f"{s3}/{uuid.uuid4().hex}")


def test_documents(store):
    path = store.path("study", "key", "spec.json")
    assert store.read_json(path) == {}
    store.write_json(path, {"text": "λ → 🙂"})
    store.write_json(path, {"text": "again"})
    assert RunStore(store.root).read_json(path)["text"] == "again"
    with pytest.raises(StoreError, match="not a local folder"):
        store.local_path("study", "key")


def test_a_run_from_its_plan_to_its_record(store, author):
    assert store.studies() == []
    keys = author.every_state("quick")
    assert store.studies() == ["quick"]
    assert {run.key: run.state for run in store.runs("quick")} == {key: RunState(key) for key in keys}
    assert store.present("quick") == sorted(set(keys) - {"planned"})
    recorder = RunRecorder(store, "quick", "new", steps=2)
    recorder.begin(0, 0.0)
    for step in (1, 2):
        recorder.log({"step": step, "cross_entropy": 4.0, "mean_steps": 1.0}, step / 2)
    table = pd.DataFrame({"position": [0, 1], "reach": [[1.0, 0.5], [1.0, 0.0]]})
    recorder.probe(2, table)
    recorder.evaluation({"step": 2, "loss": 4.0})
    recorder.finish({"loss": 4.0, "steps": 2})
    assert store.metrics("quick", "new")["step"].tolist() == [1, 2]
    assert store.probe_steps("quick", "new") == [2]
    assert len(store.probe("quick", "new", 2)) == 2
    assert store.run("quick", "new").state is RunState.FINISHED


def test_another_process_is_seen_at_once(store, author):
    """Listings are never remembered: two stores are two processes."""
    other = RunStore(store.root)
    assert other.studies() == []
    author.plan("quick", [])
    assert other.studies() == ["quick"]
    author.spec("quick", "key", "a run")
    assert other.present("quick") == ["key"]
    store.append_lines(store.path("quick", "key", "metrics.jsonl"), [{"step": 1}])
    assert other.metrics("quick", "key")["step"].tolist() == [1]


chunks = st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=chunks, after=st.integers(-1, 51))
def test_lines_are_appended_in_parts_and_cut_back(store, chunks, after):
    """Parts of a few rows, so that there are several; a reader sees one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "PART_BYTES", 40)
        path = store.path(uuid.uuid4().hex, "key", "metrics.jsonl")
        rows = []
        for chunk in chunks:
            added = [{"step": step, "text": "\u2028"} for step in chunk]
            store.append_lines(path, added)
            rows += added
        assert store.read_lines(path) == rows
        store.truncate_lines(path, after_step=after)
        rows = [row for row in rows if row["step"] <= after]
        assert store.read_lines(path) == rows
        store.append_lines(path, [{"step": 99}])
        assert store.read_lines(path) == [*rows, {"step": 99}]


def test_a_row_costs_the_same_at_the_end_of_a_run(store, monkeypatch):
    monkeypatch.setattr(store_module, "PART_BYTES", 100)
    sent = []
    pipe = store.fs.pipe_file
    monkeypatch.setattr(store.fs, "pipe_file", lambda path, data: (sent.append(len(data)), pipe(path, data)))
    path = store.path("study", "key", "metrics.jsonl")
    for step in range(30):
        store.append_lines(path, [{"step": step}])
    assert [row["step"] for row in store.read_lines(path)] == list(range(30))
    assert max(sent) <= 100 + 2 * len(json.dumps({"step": 29}))


def test_writers_at_once_do_not_mix(store):
    path = store.path("study", "key", "study.json")
    threads = [
        threading.Thread(target=lambda n=n: [RunStore(store.root).write_json(path, {"filling": [n] * 999})])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(store.read_json(path)["filling"])) == 1


def test_a_bucket_that_is_not_there_is_named(s3):
    store = RunStore("s3://no-such-bucket/runs")
    with pytest.raises((StoreError, OSError), match=r"no-such-bucket|NoSuchBucket|does not exist"):
        store.write_json(store.path("study", None, "study.json"), {})


def test_a_url_that_nothing_reads_is_refused():
    with pytest.raises(StoreError, match="neither a folder nor a URL"):
        RunStore("nosuch://bucket/runs")


def test_ray_train_finds_the_same_place(s3, store):
    """Ray Train writes checkpoints with pyarrow's filesystem, from the same URL and the same environment."""
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri("/".join([store.root, "study", "key"]))
    with filesystem.open_output_stream(f"{path}/checkpoints/part") as stream:
        stream.write(b"shard")
    assert store.fs.cat_file(store.path("study", "key", "checkpoints", "part")) == b"shard"
