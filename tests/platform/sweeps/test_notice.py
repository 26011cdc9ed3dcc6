"""A study that is told of its end: which runs are told, and when it is over."""

from __future__ import annotations

import threading

from haltscale.platform import lease
from haltscale.platform.lease import give_notice, has_notice
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.sweeps.notice import save


def test_the_runs_that_train_are_told_and_waited_for(store, author, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    author.every_state("study")
    author.status("study", "deaf", "running", step=1)
    author.plan("study", ["finished", "planned", "heeding", "deaf"])
    recorder = RunRecorder(store, "study", "heeding", steps=10)
    recorder.own()
    recorder.begin(0, 0.0)
    saved = threading.Event()

    def train() -> None:
        while not recorder.is_told_to_save:
            saved.wait(0.01)
        saved.set()
        recorder.has_saved()

    thread = threading.Thread(target=train)
    thread.start()
    assert save(store, "study", seconds=2.0) == 1
    thread.join()
    assert saved.is_set()
    assert {key for key in store.present("study") if has_notice(store, store.path("study", key))} == {"deaf", "running"}
    recorder.close()


def test_nobody_is_waited_for_where_nothing_trains(store, author):
    author.every_state("study")
    author.plan("study", ["finished", "planned"])
    author.status("study", "running", "finished", step=1)
    assert save(store, "study", seconds=600) == 0


def test_a_recorder_of_another_rank_is_never_told(store):
    recorder = RunRecorder(store, "study", "run", steps=10, enabled=False)
    recorder.own()
    give_notice(store, store.path("study", "run"))
    assert not recorder.is_told_to_save
    recorder.has_saved()
    assert has_notice(store, store.path("study", "run")), "rank 0 says that all have saved"
