"""Ray Tune: schedule a study's missing runs. The store says what is missing; Tune only schedules.

One of the few modules that import Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from haltscale.platform import cluster

if TYPE_CHECKING:
    from haltscale.platform.config import RunConfig
    from haltscale.platform.sweeps.expansion import PlannedRun
    from haltscale.platform.sweeps.plan import StudyPlan
    from haltscale.platform.sweeps.spec import Halving

cluster.prepare_client()  # before Ray is imported: it reads its environment then
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the study, not this stage of it
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a checkpoint's report has no loss
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's newer output prints boxes even at verbose=0

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.integration.ray_train import TuneReportCallback  # noqa: E402

from haltscale.platform.corpora import ray_data  # noqa: E402
from haltscale.platform.corpora.corpus import PreparedCorpus  # noqa: E402
from haltscale.platform.execution import ExecutionConfig  # noqa: E402
from haltscale.platform.recorder import RunRecorder  # noqa: E402
from haltscale.platform.runs import ray_train  # noqa: E402
from haltscale.platform.store import ENDED, RunState, RunStore, haltscale_home  # noqa: E402
from haltscale.platform.sweeps.progress import SweepProgress  # noqa: E402

log = logging.getLogger(__name__)

TRIAL_CPUS = 0.01
"""A trial's driver only waits for its workers; at Ray's default of 1 CPU each it would starve them."""
PROGRESS_SECONDS = 10.0
PROGRESS_SHARE = 0.05
"""Of the time, at most, in which a sweep's progress is read from the store."""
WRITERS = 16
"""Writes to the store at once, when a sweep begins."""


def run_stages(study: StudyPlan, store: RunStore, *, retry_failed: bool = False) -> None:
    """Train what is missing; what its results make known (tuned runs, controls, branches, the next round of a search)
    is the next stage.

    Args:
        retry_failed: train those too that failed for a permanent reason.
    """
    tried: set[str] = set()
    while left := {
        key: entry for key, entry in study.missing(store, retry_failed=retry_failed).items() if key not in tried
    }:
        now = study.ready(left)
        planned = study.planned(store)
        waits = [entry for entry in planned if entry.run is None]
        waiting, kind = len(waits), "controls" if all(entry.control for entry in waits) else "runs"
        log.info(
            "%s: %d of %d runs are finished, %d to train%s",
            study.name,
            len(planned) - waiting - len(left),
            len(planned) - waiting,
            len(left),
            f", {waiting} {kind} wait for them" if waiting else "",
        )
        run_missing(study, now, store)
        tried |= set(now)


def run_missing(study: StudyPlan, missing: Mapping[str, PlannedRun], store: RunStore) -> None:
    """Train runs, as many at once as the cluster holds, in their order.

    A run that fails is recorded as failed and the others continue.
    """
    runs = {key: entry.run for key, entry in missing.items() if entry.run}
    with contextlib.ExitStack() as beside:  # a streamed corpus is prepared further until its runs have ended
        corpora = {
            context: beside.enter_context(_begin(study, [run for run in runs.values() if run.context == context]))
            for context in sorted({run.context for run in runs.values()})
        }
        _describe(study, corpora, store)
        _run(study, runs, missing, corpora, store)
    if study.corpus.segment_tokens:  # its statistics are fuller now
        _describe(study, corpora, store)


def _begin(study: StudyPlan, runs: list[RunConfig]) -> contextlib.AbstractContextManager[PreparedCorpus]:
    """The corpus for runs of one context."""
    lengths = [run.steps * run.batch_sequences for run in runs if run.steps is not None]
    rows = max(lengths) if len(lengths) == len(runs) else None  # a budget of FLOPs does not tell
    batch = max(run.batch_sequences for run in runs)
    return ray_data.begin(study.corpus, runs[0].context, batch=batch, rows=rows)


def _describe(study: StudyPlan, corpora: Mapping[int, PreparedCorpus], store: RunStore) -> None:
    corpus = next(iter(corpora.values()))
    counts = (PreparedCorpus.open(corpus.place) or corpus).counts
    store.write_json(store.path(study.name, None, "study.json"), study.document(counts, store))


def _run(
    study: StudyPlan,
    runs: Mapping[str, RunConfig],
    missing: Mapping[str, PlannedRun],
    corpora: Mapping[int, PreparedCorpus],
    store: RunStore,
) -> None:
    specs = []
    for key, run in runs.items():
        spec = ray_train.RunSpec(
            store=store.root,
            study=study.name,
            key=key,
            label=missing[key].label,
            identity=study.identity(run),
            execution=asdict(study.execution),
            corpus_folder=corpora[run.context].place,
            corpus_weights=study.corpus.weights,
            role=missing[key].role,
            recipe=dict(missing[key].recipe or {}) or None,
            planned_flops=study.flops_bound(run),
        )
        specs.append(spec)
    _write_plan(specs, store)
    progress = SweepProgress(store, study.name, {s.key: s.planned_flops for s in specs}, time.monotonic)
    with _shown(progress):
        failed = _tune(specs, concurrency=concurrency(ray.cluster_resources(), study), halving=study.halving)
    for key, view in store.views(study.name, runs).items() if study.halving else ():
        has_ended = view.state in (RunState.FINISHED, RunState.DIVERGED, RunState.CAPPED)
        if not has_ended and key not in failed:  # the scheduler stopped it
            status = {name: value for name, value in view.status.items() if name != "schema"}
            ended = {**status, "state": RunState.STOPPED, "seconds_left": None, "error": None}
            store.write_json(store.path(study.name, key, "status.json"), ended)


def _write_plan(specs: list[ray_train.RunSpec], store: RunStore) -> None:
    """What the runs are to be, in the store; many at once, since each write may be a request's or a disk's wait."""

    def write(spec: ray_train.RunSpec) -> None:
        store.write_json(store.path(spec.study, spec.key, "spec.json"), spec.described())
        store.write_json(store.path(spec.study, spec.key, "status.json"), {"state": RunState.PLANNED})  # no old failure

    with ThreadPoolExecutor(WRITERS) as writers:
        for _ in writers.map(write, specs):
            pass  # raises what a write did


def concurrency(resources: Mapping[str, float], study: StudyPlan) -> int:
    """How many runs fit at once; at least 1, since :meth:`StudyPlan.problems` has checked that one does."""
    execution = study.execution
    fits = resources.get("CPU", 1) // (execution.workers * execution.cpus_per_worker)
    if execution.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0) // (execution.workers * execution.gpus_per_worker))
    return max(1, int(fits))


def _tune(specs: list[ray_train.RunSpec], *, concurrency: int, halving: Halving | None) -> set[str]:
    """Train the runs; the keys of those that failed. One that the scheduler ends may see its workers die, and record
    that as a failure in its last moment: it is not among them."""
    asha = halving and tune.schedulers.ASHAScheduler(
        time_attr="share",  # of the budget, so that runs of different lengths are compared at the same place
        metric="loss",
        mode="min",
        max_t=1.0,
        grace_period=halving.first,
        reduction_factor=halving.factor,
    )
    here = ray_train.resources_here(ExecutionConfig.from_dict(specs[0].execution))
    tuner = tune.Tuner(
        tune.with_resources(_trial_here, here) if here else tune.with_resources(_trial, {"cpu": TRIAL_CPUS}),
        param_space={"spec": tune.grid_search([spec.to_dict() for spec in specs])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrency,
            scheduler=asha,
            reuse_actors=not asha,  # a trial's driver takes seconds to import torch, but one that is ended is in a run
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"{specs[0].study}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(haltscale_home() / "tune"),
            # A trial records its own failures; what Tune sees fail is the death of its process, or of its node.
            failure_config=tune.FailureConfig(max_failures=specs[0].execution["max_failures"]),
            verbose=0,
        ),
    )
    failed = set()
    for result in tuner.fit():
        if result.error:
            _record_failure(ray_train.RunSpec(**result.config["spec"]), result.error)
        if result.error or (result.metrics or {}).get("failed"):
            failed.add(str(result.config["spec"]["key"]))
    return failed


def _trial_name(trial: Any) -> str:
    return str(trial.config["spec"]["key"])


def _trial(config: dict[str, Any]) -> dict[str, Any] | None:
    """One trial: drives one Ray Train run of several workers."""
    spec = ray_train.RunSpec(**config["spec"])
    with _failures_recorded(spec):
        ray_train.fit(spec, callbacks=[TuneReportCallback()])
    return _ended(spec)


def _trial_here(config: dict[str, Any]) -> dict[str, Any] | None:
    """One trial: trains a run of one worker in this process, which trains the next one afterwards."""
    spec = ray_train.RunSpec(**config["spec"])
    with _failures_recorded(spec):
        ray_train.fit_here(spec, report=tune.report)
    return _ended(spec)


@contextlib.contextmanager
def _failures_recorded(spec: ray_train.RunSpec) -> Iterator[None]:
    """A failure is recorded in the run's own folder, where it belongs; the other trials continue."""
    try:
        yield
    except Exception as error:
        log.exception("%s failed", spec.label)
        _record_failure(spec, error)


def _ended(spec: ray_train.RunSpec) -> dict[str, Any] | None:
    if RunStore(spec.store).run(spec.study, spec.key).state is RunState.FINISHED:
        return None
    return {"failed": True, "loss": math.inf, "share": 1.0}  # to a scheduler, as bad as can be


def _record_failure(spec: ray_train.RunSpec, error: BaseException) -> None:
    store = RunStore(spec.store)
    if store.run(spec.study, spec.key).state not in ENDED:  # a worker that knew the cause has said so
        RunRecorder(store, spec.study, spec.key, steps=0).fail(_first_line(error))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:500]


@contextlib.contextmanager
def _shown(progress: SweepProgress) -> Iterator[None]:
    """Log the sweep's progress from a thread until the block ends."""
    over = threading.Event()

    def watch() -> None:
        wait = PROGRESS_SECONDS
        while not over.wait(wait):
            began = time.monotonic()
            for line in progress.lines():
                log.info("%s", line)
            wait = max(PROGRESS_SECONDS, (time.monotonic() - began) / PROGRESS_SHARE)

    thread = threading.Thread(target=watch, daemon=True, name="sweep-progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for line in progress.lines():
            log.info("%s", line)
