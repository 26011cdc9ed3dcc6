"""A process that trains run after run keeps nothing of the runs before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltscale.platform.config import RunConfig
from haltscale.platform.corpora import ray_data
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.runs import ray_train
from haltscale.platform.runs.ray_train import RunSpec, Surroundings
from haltscale.platform.store import RunState, RunStore
from haltscale.platform.sweeps.study import Study


def stream_here(folder: Path, *, first_step: int, steps: int, **read: Any) -> Iterator[ray_data.Batch]:
    """`ray_data.stream` without Ray."""
    for step in range(first_step, steps):
        rows = ray_data._read_window({"first": np.array([step]), "steps": np.array([1])}, place=str(folder), **read)
        tokens = np.stack(rows["tokens"].to_numpy(zero_copy_only=False)).reshape(read["batch"], -1).astype(np.int64)
        yield ray_data.Batch(step=step, seq_ids=np.array(rows["seq_ids"][0].as_py()), tokens=tokens)


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
    monkeypatch.setattr(ray_train, "stream", stream_here)
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
    gc.collect()
    assert len(engines) == 2
    assert [engine() for engine in engines] == [None, None]
