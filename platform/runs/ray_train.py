"""One run from its spec to its record: by a group of Ray Train's workers, or in the process that asks.

One of the few modules that import Ray. The worker function ties the parts together; each of them also works without
Ray. A run resumes from its last checkpoint by itself: after a worker's death, and in a new job after the driver's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchTrainer

from haltscale.model import METHODS, build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import ConfigError, RunConfig
from haltscale.platform.corpora.corpus import PreparedCorpus
from haltscale.platform.corpora.ray_data import RESERVED_CPUS, Batch, stream
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.initial_model import InitialModelError
from haltscale.platform.memory import collect_garbage
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs.branching import branch_point
from haltscale.platform.runs.finalize import evaluate_run, finish
from haltscale.platform.runs.ray_process_group import PrivateTorchConfig
from haltscale.platform.schedule import share
from haltscale.platform.store import Cause, RunState, RunStore
from haltscale.platform.training.engine import full_weights, open_process_group, readable, snapshot, start
from haltscale.platform.training.loop import Hooks, train
from haltscale.platform.training.metrics import sum_over_ranks
from haltscale.platform.training.monitors import RunCappedError, TrainingDivergedError, memory_explained
from haltscale.platform.training.progress import Progress
from haltscale.platform.training.sinks import open_sinks

log = logging.getLogger(__name__)

STEPS_PER_STREAM = 4096
"""Steps that are planned ahead at a time where the number of steps is open."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All that a worker needs to know, JSON-able, so that it travels to any node."""

    store: str
    study: str
    key: str
    label: str
    identity: dict[str, Any]
    execution: dict[str, Any]
    corpus_folder: str
    """The prepared corpus's place: a folder that every node has, or a URL."""
    corpus_weights: dict[str, float | None]
    """Of the corpus's sources, where they are mixed."""
    role: str = "comparison"
    """``tuning`` for a run by whose held-out loss settings are chosen, so that it has no place in a comparison."""
    recipe: dict[str, Any] | None = None
    """Where the run's settings are from, if they were tuned: for the record, no part of the identity."""
    planned_flops: float = 0.0
    """Upper estimate of the training FLOPs, for the time left of a sweep."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def described(self) -> dict[str, Any]:
        """What ``spec.json`` and ``record.json`` say about the run."""
        names = ["label", "study", "key", "role", "identity", "execution", *(["recipe"] if self.recipe else [])]
        described = {name: getattr(self, name) for name in names}
        # for readers of the store, which may lack the package of the method
        return described | {"routed": METHODS[self.identity["method"]].routed}


def fit(spec: RunSpec, *, callbacks: list[Any] | None = None) -> None:
    """Train one run under Ray Train, to its record.

    Args:
        spec: the run.
        callbacks: Ray Train's, such as the one that reports to Ray Tune.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than ``max_failures`` allows.
    """
    execution = ExecutionConfig.from_dict(spec.execution)
    resources = {"CPU": execution.cpus_per_worker - RESERVED_CPUS / execution.workers}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=spec.to_dict(),
        torch_config=PrivateTorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=execution.workers,
            use_gpu=bool(execution.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path="/".join([spec.store, spec.study, spec.key]),
            failure_config=ray.train.FailureConfig(max_failures=execution.max_failures),
            callbacks=callbacks or [],
        ),
    )
    trainer.fit()


def resources_here(execution: ExecutionConfig) -> dict[str, float] | None:
    """What a process must hold of its node to train a run by itself (:func:`fit_here`); None for runs of several
    workers, which need :func:`fit`."""
    if execution.workers > 1:
        return None
    held = {"cpu": execution.cpus_per_worker - RESERVED_CPUS}
    return held | ({"gpu": execution.gpus_per_worker} if execution.gpus_per_worker else {})


def fit_here(spec: RunSpec, *, report: Callable[[dict[str, Any]], object]) -> None:
    """Train one run of one worker in this very process, to its record: no controller, no group of workers, and torch
    and DeepSpeed are imported once for all runs of the process. The result is that of :func:`fit`, to the last bit.

    A run that raises is tried again from its last checkpoint, ``max_failures`` times. If the process dies, whoever
    started it calls again in another one; the run resumes from its last checkpoint then too.

    Args:
        spec: the run.
        report: told at every checkpoint its ``step``, and at every evaluation of a tuning run also ``share`` and
            ``loss``.
    """
    execution = ExecutionConfig.from_dict(spec.execution)
    if execution.workers > 1:
        raise ValueError(f"workers must be 1 to train in one process (got {execution.workers}): use fit")
    node = ray.get_runtime_context().get_node_id()
    for left in reversed(range(execution.max_failures + 1)):
        ended = False
        try:
            _train_run(spec, Surroundings(rank=0, world=1, report=report, nodes=lambda: [node]))
            ended = True
            return
        except Exception:
            if not left:
                raise
            log.exception("%s: failed; trying again from its last checkpoint, %d times more", spec.label, left)
        finally:
            collect_garbage(settled=ended)  # DeepSpeed's engine is full of cycles, and the next run needs its memory


def _nodes(world: int) -> list[str]:
    """The Ray node of each rank."""
    nodes = [""] * world
    torch.distributed.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return nodes


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker of a group does."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    surroundings = Surroundings(
        rank=rank,
        world=world,
        report=ray.train.report,
        nodes=partial(_nodes, world),
        is_preempted=lambda: ray.train.get_preemption_info() is not None,
    )
    _train_run(RunSpec(**config), surroundings)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run asks of whatever it runs in."""

    rank: int
    world: int
    report: Callable[[dict[str, Any]], object]
    """Told by all ranks at the same places."""
    nodes: Callable[[], list[str]]
    """Where each rank is; all ranks ask at once, when their process group is open."""
    is_preempted: Callable[[], bool] = lambda: False
    """Whether this node will be taken away; all ranks ask at once."""


def _train_run(spec: RunSpec, around: Surroundings) -> None:
    rank = around.rank
    METHODS.named(spec.identity["method"])  # the study's own: one that is given by its path has to be imported here too
    run, execution = RunConfig.from_identity(spec.identity), ExecutionConfig.from_dict(spec.execution)
    torch.set_num_threads(execution.cpus_per_worker)
    corpus = PreparedCorpus.open(spec.corpus_folder, spec.corpus_weights)
    if corpus is None:
        raise FileNotFoundError(
            f"{spec.corpus_folder} is not on this node: put HALTSCALE_HOME on a shared filesystem, or set"
            " HALTSCALE_CORPORA to a place in object storage"
        )

    open_process_group()
    store = RunStore(spec.store)
    recorder = RunRecorder(store, spec.study, spec.key, steps=run.steps, enabled=rank == 0)
    recorder.own()
    torch.distributed.barrier()  # no rank looks for checkpoints while an earlier attempt may still write one
    try:
        _train(spec, run, execution, corpus, recorder, around)
    except TrainingDivergedError as diverged:
        recorder.fail(str(diverged), state=RunState.DIVERGED, cause=Cause.PERMANENT)
    except RunCappedError as capped:
        recorder.fail(str(capped), state=RunState.CAPPED, cause=Cause.PERMANENT, capped_hours=execution.max_hours)
    except (ConfigError, InitialModelError) as refused:
        recorder.fail(f"{type(refused).__name__}: {refused}", cause=Cause.PERMANENT)
        raise  # other ranks may be waiting for this one
    finally:
        recorder.close()


def _train(
    spec: RunSpec,
    run: RunConfig,
    execution: ExecutionConfig,
    corpus: PreparedCorpus,
    recorder: RunRecorder,
    around: Surroundings,
) -> None:
    """Train from the newest checkpoint to the record."""
    rank, world, store = around.rank, around.world, recorder.store
    checkpoints = Checkpoints(store, spec.study, spec.key, rank=rank, world=world)
    model = build_model(corpus.model_config(run), seed=run.seed)
    branch = (
        branch_point(checkpoints, store, spec.study, spec.key, rank=rank, world=world) if execution.branch else None
    )
    parent, saved = branch or ("", None)
    engine, progress = start(model, run, execution, checkpoints, saved)
    try:
        inherited = {"key": parent, "tokens": progress.tokens, "flops": progress.flops_realised} if parent else None
        recorder.begin(progress.step, share(run, progress.spent), nodes=around.nodes(), parent=inherited)
        is_preempted = False

        def prune(progress: Progress) -> None:
            keep = set(progress.pinned)
            if execution.keep_best and rank == 0 and (best := recorder.best_step(checkpoints.complete())) is not None:
                keep.add(best)
            checkpoints.prune(keep, execution.keep_last)

        def save(progress: Progress) -> None:
            checkpoints.write(snapshot(engine), progress.to_dict())
            if sum_over_ranks(int(notice()), world):
                checkpoints.wait()
                sum_over_ranks(0, world)  # the others have waited too
                recorder.has_saved()
            prune(progress)
            around.report({"step": progress.step})

        def evaluate(progress: Progress) -> None:
            with readable(engine) as (whole, shared):
                together = {"rank": rank, "world": world} if shared else {}
                row = evaluate_run(whole, corpus, run, progress, recorder, **together).row
            if spec.role == "tuning":  # for the scheduler, which may end the run here
                around.report({"step": progress.step, "share": share(run, progress.spent), "loss": row["loss"]})

        def batches() -> Iterator[Batch]:
            first = progress.step
            while run.steps is None or first < run.steps:  # how many steps a budget in FLOPs buys is not known yet
                last = first + STEPS_PER_STREAM if run.steps is None else run.steps
                yield from stream(
                    corpus.place,
                    seed=run.seed,
                    mixture=corpus.mixture,
                    batch=run.batch_sequences,
                    first_step=first,
                    steps=last,
                    rank=rank,
                    world=world,
                )
                first = last

        def log(row: dict[str, Any], progress: Progress) -> None:
            nonlocal is_preempted
            recorder.log(row, share(run, progress.spent), events=progress.events)
            write(row)
            is_preempted = around.is_preempted()

        def notice() -> bool:
            return is_preempted or recorder.is_told_to_save

        hooks = Hooks(log=log, checkpoint=save, evaluate=evaluate, notice=notice)
        sinks = open_sinks(
            execution.sinks if rank == 0 else (),
            study=spec.study,
            key=spec.key,
            label=spec.label,
            config=spec.identity,
            step=progress.step,
        )
        with sinks as write, memory_explained(execution):
            train(engine, batches(), run, progress, hooks, execution=execution, rank=rank, world=world)
        checkpoints.wait()
        weights = full_weights(engine)
        with readable(engine) as (whole, shared):
            together = {"rank": rank, "world": world} if shared else {}
            finish(whole, weights, corpus, run, progress, recorder, spec.described(), **together)
    finally:
        engine.destroy()  # its hooks keep it alive in a process that trains the next run
