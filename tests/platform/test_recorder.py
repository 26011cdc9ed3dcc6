"""The recorder: what a run's folder holds at each moment of its life."""

import uuid
from pathlib import Path

import pandas as pd
import pytest

from haltscale.platform import recorder as recorder_module
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.store import RunState, RunStore

ROW = {"cross_entropy": 4.0, "mean_steps": 1.5, "loss": 4.25}


class Clock:
    """A clock that stands where it is put; in the place of the module ``time``."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(recorder_module, "time", self)

    def time(self):
        return self.now


@pytest.fixture(params=["local", "memory"])
def any_store(request, tmp_path):
    return RunStore(tmp_path / "runs" if request.param == "local" else f"memory://{uuid.uuid4().hex}/runs")


def recorder(store, **changes):
    return RunRecorder(store, "study", "key", **({"steps": 10} | changes))


def table():
    return pd.DataFrame({"position": [0, 1], "reach": [[1.0, 0.5], [1.0, 0.25]]})


def test_the_life_of_a_run(any_store):
    assert any_store.run("study", "key").state is RunState.PLANNED
    run = recorder(any_store)
    run.begin(0, 0, nodes=["a node"])
    assert any_store.run("study", "key").state is RunState.RUNNING
    for step in (1, 2):
        run.log({"step": step, **ROW}, step / 20)
    run.evaluation({"step": 2, "loss": 4.1})
    run.probe(2, table())
    view = any_store.run("study", "key")
    assert view.state is RunState.RUNNING
    assert (view.status["step"], view.status["steps"]) == (2, 10)
    assert (view.status["loss"], view.status["mean_steps"]) == (4.0, 1.5)
    run.finish({"loss": 4.0, "steps": 10})
    view = any_store.run("study", "key")
    assert view.state is RunState.FINISHED
    assert view.record["loss"] == 4.0
    assert view.status["step"] == 10
    assert [(attempt["step"], attempt["nodes"]) for attempt in view.record["attempts"]] == [(0, ["a node"])]
    assert any_store.metrics("study", "key")["step"].tolist() == [1, 2]
    assert any_store.evaluations("study", "key")["loss"].tolist() == [4.1]
    assert any_store.probe_steps("study", "key") == [2]
    assert any_store.probe("study", "key", 2)["position"].tolist() == [0, 1]


def test_a_run_that_goes_on_writes_its_rows_once(any_store):
    first = recorder(any_store)
    first.begin(0, 0)
    for step in range(1, 7):
        first.log({"step": step, **ROW}, step / 20)
        first.evaluation({"step": step, "loss": step})
        first.probe(step, table())
    second = recorder(any_store)  # its checkpoint was taken at step 4
    second.begin(4, 0.2)
    assert any_store.metrics("study", "key")["step"].tolist() == [1, 2, 3, 4]
    # The evaluation of the checkpoint's own step may have been cut off, and is made again.
    assert any_store.evaluations("study", "key")["step"].tolist() == [1, 2, 3]
    for step in range(5, 9):
        second.log({"step": step, **ROW}, step / 20)
        second.probe(step, table())
    assert any_store.metrics("study", "key")["step"].tolist() == list(range(1, 9))
    assert any_store.probe_steps("study", "key") == list(range(1, 9))


def test_a_failure_keeps_how_far_the_run_was(any_store):
    run = recorder(any_store)
    run.begin(0, 0)
    run.log({"step": 3, **ROW}, 3 / 20)
    recorder(any_store, steps=0).fail("RuntimeError: a worker died")  # told by another process
    view = any_store.run("study", "key")
    assert view.state is RunState.FAILED
    assert view.status["error"] == "RuntimeError: a worker died"
    assert (view.status["step"], view.status["steps"]) == (3, 10)
    assert view.status["seconds_left"] is None
    recorder(any_store).begin(3, 0.15)
    view = any_store.run("study", "key")
    assert view.state is RunState.RUNNING
    assert view.status["error"] is None


def test_a_run_that_never_began_can_fail(any_store):
    recorder(any_store, steps=0).fail("it did not start")
    view = any_store.run("study", "key")
    assert view.state is RunState.FAILED
    assert view.status["error"] == "it did not start"


def test_time_left_counts_from_where_this_attempt_began(store, monkeypatch):
    clock = Clock(monkeypatch)
    run = recorder(store, steps=20)
    run.begin(4, 0.2)
    assert store.run("study", "key").status["seconds_left"] is None
    clock.now += 12.0
    run.log({"step": 8, **ROW}, 8 / 20)  # 4 steps in 12 s, 12 to go
    status = store.run("study", "key", now=clock.now).status
    assert status["seconds_left"] == pytest.approx(36.0)
    run.finish({"loss": 1.0, "steps": 20})
    assert store.run("study", "key").status["seconds_left"] == 0.0


def test_other_ranks_are_silent(store):
    run = recorder(store, enabled=False)
    run.begin(0, 0)
    run.log({"step": 1, **ROW}, 1 / 20)
    run.evaluation({"step": 1})
    run.probe(1, table())
    run.fail("x")
    run.finish({"loss": 1.0, "steps": 20})
    assert not store.fs.exists(store.path("study", "key"))


def test_the_record_is_written_last(store, monkeypatch):
    """A run that dies while it finishes is not finished."""
    written = []
    write = store.write_json
    monkeypatch.setattr(store, "write_json", lambda path, document: (written.append(path), write(path, document)))
    run = recorder(store)
    run.begin(0, 0)
    run.finish({"loss": 1.0, "steps": 20})
    assert written[-1].endswith("record.json")
    assert [path for path in written if path.endswith("record.json")] == written[-1:]


def test_a_probe_is_replaced_whole(store, monkeypatch):
    run = recorder(store)
    run.probe(1, table())
    run.probe(1, table().iloc[:1])
    assert len(store.probe("study", "key", 1)) == 1

    def disk_full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("shutil.copyfile", disk_full)
    with pytest.raises(OSError, match="disk full"):
        run.probe(1, table())
    assert len(store.probe("study", "key", 1)) == 1
    assert store.probe_steps("study", "key") == [1]
    assert len(list(Path(store.path("study", "key", "halting")).iterdir())) == 1, "no half file is left"
