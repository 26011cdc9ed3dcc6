"""A process that trains run after run keeps nothing of the runs before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import ray

from haltscale.platform.config import RunConfig
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.runs import ray_train
from haltscale.platform.runs.ray_train import RunSpec, Surroundings
from haltscale.platform.store import RunState, RunStore
from haltscale.platform.sweeps.study import Study


@pytest.mark.parametrize("zero_stage", range(3))  # DeepSpeed keeps stage 3's
def test_a_finished_runs_engine_is_freed(
    zero_stage: int, study: Callable[..., Study], base: RunConfig, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[weakref.ref[Any]] = []

    def start(*arguments: Any) -> Any:
        engine, progress = build(*arguments)
        engines.append(weakref.ref(engine))
        return engine, progress

    build = ray_train.start
    monkeypatch.setattr(ray_train, "start", start)
    planned = study()
    planned = replace(planned, execution=replace(planned.execution, zero_stage=zero_stage))
    corpus = prepare(planned.corpus, base.context)
    for run in planned.runs[:2]:
        key = planned.key(run)
        spec = RunSpec(
            store=store.root,
            study=planned.name,
            key=key,
            label=run.label,
            identity=planned.identity(run),
            execution=asdict(planned.execution),
            corpus_folder=str(corpus.folder),
            corpus_weights={},
        )
        around = Surroundings(rank=0, world=1, report=lambda figures: None, nodes=lambda: ["here"])
        ray_train._train_run(spec, around)
        assert store.views(planned.name, [key])[key].state is RunState.FINISHED
    assert not ray.is_initialized(), "a short run's only window is read by its own process"
    gc.collect()
    assert len(engines) == 2
    assert [engine() for engine in engines] == [None, None]
