"""The shelf reads a file again exactly when it has changed, and of a growing one only what is new."""

import json
import os
from pathlib import Path

import pytest

from haltscale.dashboard import cached_store
from haltscale.platform.store import RunStore, StoreError

STUDY = "quick"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What was really read: names of documents, and of telemetry with the byte from which on."""
    seen: list[str] = []
    read_json, tail = RunStore.read_json, cached_store._tail
    monkeypatch.setattr(
        RunStore, "read_json", lambda self, path: (seen.append(Path(path).name), read_json(self, path))[1]
    )
    monkeypatch.setattr(
        cached_store,
        "_tail",
        lambda path, start: (seen.append(f"{Path(path).name} from {start}"), tail(path, start))[1],
    )
    return seen


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(author, reads):
    author.begin("k")
    author.train("k", progress=0.3)
    author.status("k", step=100)
    reads.clear()
    for _ in range(3):
        view = cached_store.store().run(STUDY, "k")
        rows = cached_store.store().metrics(STUDY, "k")
    assert sorted(reads) == ["metrics.jsonl from 0", "spec.json", "status.json"]
    assert len(rows) == 60

    reads.clear()
    path = Path(author.store.path(STUDY, "k", "metrics.jsonl"))
    size = path.stat().st_size
    author.status("k", step=200)
    author.store.append_lines(str(path), [{"step": 999, "loss": 1.0}])
    assert cached_store.store().run(STUDY, "k").status["step"] == 200 != view.status["step"]
    assert list(cached_store.store().metrics(STUDY, "k")["step"])[-1] == 999
    assert len(cached_store.store().metrics(STUDY, "k")) == 61
    assert sorted(reads) == [f"metrics.jsonl from {size}", "status.json"]


def test_half_a_line_waits_for_its_other_half(author):
    path = Path(author.store.path(STUDY, "k", "metrics.jsonl"))
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1}\n{"ste')
    assert [row["step"] for row in cached_store.store().read_lines(str(path))] == [1]
    with path.open("a") as file:
        file.write('p": 2}\n')
    assert [row["step"] for row in cached_store.store().read_lines(str(path))] == [1, 2]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_a_resumed_run_cuts_short_is_read_anew(author, in_place):
    path = Path(author.store.path(STUDY, "k", "metrics.jsonl"))
    author.store.append_lines(str(path), [{"step": step, "loss": 1.0} for step in range(50)])
    assert len(cached_store.store().read_lines(str(path))) == 50
    if in_place:
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(20)))
    else:
        author.store.truncate_lines(str(path), after_step=19)
    assert [row["step"] for row in cached_store.store().read_lines(str(path))] == list(range(20))


def test_damage_is_not_remembered(author):
    author.begin("k")
    path = author.store.path(STUDY, "k", "status.json")
    author.store.fs.pipe_file(path, b"{")
    for _ in range(2):
        with pytest.raises(StoreError):
            cached_store.store().read_json(path)
    author.status("k", step=7)
    assert cached_store.store().read_json(path)["step"] == 7


def test_rows_of_finished_runs_are_made_once_until_their_documents_change(author, monkeypatch):
    from haltscale.dashboard import data

    author.whole_run("k")
    author.plan(["k"])
    made: list[str] = []
    row = data.run_row
    monkeypatch.setattr(data, "run_row", lambda view, *rest: (made.append(view.key), row(view, *rest))[1])
    first = cached_store.store().view(STUDY)
    assert cached_store.store().view(STUDY).runs.equals(first.runs)
    assert made == ["k"]
    author.finish("k", loss=1.0)
    assert cached_store.store().view(STUDY).runs["loss"].tolist() == [1.0]


def test_nothing_is_written_to_the_store(author):
    author.troubled_study()
    root = Path(author.store.root)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}
    for path in root.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o400)
    view = cached_store.store().view(STUDY)
    for key in view.runs["key"]:
        cached_store.store().metrics(STUDY, key)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")} == before
