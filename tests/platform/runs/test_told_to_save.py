"""A run that is told of its end, while it trains in this process: it saves once, says so, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltscale.platform import lease
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import RunConfig
from haltscale.platform.corpora import ray_data
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.lease import give_notice, has_notice
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs import ray_train
from haltscale.platform.runs.ray_train import RunSpec, Surroundings
from haltscale.platform.store import RunState, RunStore
from haltscale.platform.sweeps.study import Study

TOLD_AT = 2


def test_a_run_saves_once_when_it_is_told_and_goes_on(
    study: Callable[..., Study], base: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    planned = study()
    planned = replace(planned, execution=replace(planned.execution, checkpoints=1, evaluations=1))
    run = planned.runs[0]
    assert run.steps is not None
    assert run.steps > TOLD_AT + 2
    key, corpus = planned.key(run), prepare(planned.corpus, base.context)
    folder = store.path(planned.name, key)
    recorders: list[RunRecorder] = []
    saved: list[int] = []
    was_pending: list[bool] = []

    own = RunRecorder.own
    monkeypatch.setattr(RunRecorder, "own", lambda self: (recorders.append(self), own(self))[1])

    def stream_here(place: Path, *, first_step: int, steps: int, **read: Any) -> Iterator[ray_data.Batch]:
        for step in range(first_step, steps):
            if step == TOLD_AT:
                give_notice(store, folder)
                while not recorders[0].is_told_to_save:
                    pass  # the lease's thread sees it within RENEW_SECONDS
            window = {"first": np.array([step]), "steps": np.array([1])}
            rows = ray_data._read_window(window, place=str(place), **read)
            tokens = np.stack(rows["tokens"].to_numpy(zero_copy_only=False)).reshape(read["batch"], -1)
            yield ray_data.Batch(
                step=step, seq_ids=np.array(rows["seq_ids"][0].as_py()), tokens=tokens.astype(np.int64)
            )

    def report(figures: dict[str, Any]) -> None:
        saved.append(figures["step"])
        was_pending.append(has_notice(store, folder))
        if figures["step"] < (run.steps or 0):
            assert max(Checkpoints(store, planned.name, key).complete()) == figures["step"], "on disk when it says so"

    monkeypatch.setattr(ray_train, "stream", stream_here)
    spec = RunSpec(
        store=store.root,
        study=planned.name,
        key=key,
        label=run.label,
        identity=planned.identity(run),
        execution=asdict(planned.execution),
        corpus_folder=corpus.place,
        corpus_weights={},
    )
    ray_train._train_run(spec, Surroundings(rank=0, world=1, report=report, nodes=lambda: ["here"]))
    assert saved == [TOLD_AT + 1, run.steps]
    assert was_pending == [False, False]
    assert store.run(planned.name, key).state is RunState.FINISHED
