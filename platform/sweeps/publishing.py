"""Publish a study: its records and what the dashboard draws of them, small enough for a repository.

The copy is itself a run store, so every reader of stores reads it. Left behind are checkpoints, weights (but for those
of named runs), the telemetry of single held-out tokens, all runs that have not finished, and those of earlier versions
of the study.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haltscale.platform.store import RunState, RunStore, StoreError

log = logging.getLogger(__name__)

MOST_METRICS = 40
"""Rows of training metrics of a run that are kept, spread evenly, the first and the last among them."""
MOST_MODEL_BYTES = 3_000_000
"""Of the finished model of a run that is copied with its weights."""


def publish(store: RunStore, study: str, root: str | Path, *, models: Sequence[str] = ()) -> RunStore:
    """Copy the finished runs of a study, as it was planned last, to another store, in place of what that has of it.

    Of each run: ``spec.json``, ``record.json``, evaluations, metrics thinned to :data:`MOST_METRICS` rows, and the last
    evaluation's summary; of those that compare and whose tokens took different numbers of steps, also its probe. The
    cube stays behind: no page draws it, and it would be two thirds of a run's size. ``study.json`` lists the runs that
    were copied; ``published_of`` says how many the study has.

    Args:
        store: where the study is.
        study: its name.
        root: root of the store to copy to, a local folder.
        models: keys of runs whose finished model is copied too, so that pages that run a model have one.

    Returns:
        The store that was copied to.

    Raises:
        StoreError: the study is not there, has no finished run, or would be copied onto itself; a named run has not
            finished, or its model is too large for a repository.
    """
    document = {name: value for name, value in store.study(study).items() if name != "schema"}
    if not document:
        raise store.no_study(study)
    copy = RunStore(root)
    if copy.root == store.root:
        raise StoreError(f"{root} is the store that the study is in: give another folder")
    planned = [str(key) for key in document.get("runs", [])]
    runs = [run for run in store.views(study, planned).values() if run.state is RunState.FINISHED and not run.problem]
    if not runs:
        raise StoreError(f"study {study!r} has no finished run yet: `haltscale status {study}` shows how far it is")
    folders = {key: _model_files(store, study, key, {run.key for run in runs}) for key in models}
    shutil.rmtree(copy.path(study), ignore_errors=True)
    for run in runs:
        _publish_run(store, copy, study, run.key, {"spec": run.spec, "record": run.record})
    for key, files in folders.items():
        for file in files:
            _copy_file(store, copy, file, study, key, "model")
    kept = {run.key for run in runs}
    controls = {key: control for key, control in document.get("controls", {}).items() if key in kept}
    listed: dict[str, Any] = {"runs": [run.key for run in runs], "controls": controls, "published_of": len(planned)}
    if "tuning" in document:
        listed["tuning"] = [key for key in document["tuning"] if key in kept]
    copy.write_json(copy.path(study, None, "study.json"), {**document, **listed})
    return copy


def _model_files(store: RunStore, study: str, key: str, finished: set[str]) -> list[str]:
    """The files of a run's finished model."""
    if key not in finished:
        raise StoreError(f"run {key!r} has not finished in study {study!r}: name a finished run's key")
    listed = store.fs.find(store.path(study, key, "model"), detail=True)
    if not listed:
        raise StoreError(f"run {key} has no finished model in {store.root}")
    if (size := sum(int(one["size"]) for one in listed.values())) > MOST_MODEL_BYTES:
        limit = f"{MOST_MODEL_BYTES / 1e6:g} MB"
        raise StoreError(f"the model of run {key} has {size / 1e6:.1f} MB: at most {limit} are copied with a study")
    return list(listed)


def _publish_run(store: RunStore, copy: RunStore, study: str, key: str, documents: dict[str, Any]) -> None:
    for name, document in documents.items():
        copy.write_json(copy.path(study, key, f"{name}.json"), {k: v for k, v in document.items() if k != "schema"})
    for name, most in (("metrics", MOST_METRICS), ("evaluations", None)):
        rows: list[Mapping[str, Any]] = [*store.read_lines(store.path(study, key, f"{name}.jsonl"))]
        if rows:
            copy.append_lines(copy.path(study, key, f"{name}.jsonl"), thinned(rows, most) if most else rows)
    wanted = ["summary", *(["probe"] if _is_ragged(documents) else [])]
    for name in wanted:
        steps = store.probe_steps(study, key) if name == "probe" else store.halting_steps(study, key)
        for step in steps[-1:]:
            _copy_file(store, copy, store.halting_path(study, key, name, step), study, key, "halting")
    for name in store.later_evaluations(study, key):
        _copy_file(store, copy, store.evaluation_path(study, key, name), study, key, "evaluations")


def _is_ragged(documents: dict[str, Any]) -> bool:
    """Whether a run compares, and its tokens took different numbers of steps."""
    histogram = documents["record"].get("steps_histogram") or []
    return bool(documents["spec"].get("role") != "tuning") and sum(share > 0 for share in histogram) > 1


def _copy_file(store: RunStore, copy: RunStore, path: str, study: str, key: str, folder: str) -> None:
    target = copy.path(study, key, folder, path.rsplit("/", 1)[-1])
    try:
        content = store.fs.cat_file(path)
    except OSError as error:  # a folder in its place, say: it costs no other
        log.warning("%s is left out: %s", path, error)
        return
    copy.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    Path(target).write_bytes(content)


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, spread evenly, the first and the last among them.

    >>> thinned(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
