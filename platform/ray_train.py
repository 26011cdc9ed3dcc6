"""Ray Train: one run, trained by a group of workers, from its spec to its record.

One of the few modules that import Ray. The worker function ties the parts together; each of them also works without
Ray. A run goes on from its last checkpoint by itself: after a worker's death, and in a new job after the driver's.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from safetensors.torch import save_file

from haltscale.model import LanguageModel, build_model
from haltscale.platform import evaluation, provenance
from haltscale.platform.config import ExecutionConfig, RunConfig
from haltscale.platform.corpus import PreparedCorpus
from haltscale.platform.engine import build_engine, full_weights, load_checkpoint, resolve_precision, save_checkpoint
from haltscale.platform.ray_data import RESERVED_CPUS, stream
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.store import RunStore
from haltscale.platform.training import Hooks, Progress, TrainingDivergedError, train

log = logging.getLogger(__name__)


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
    planned_flops: float = 0.0
    """Upper estimate of the training FLOPs, for the time left of a sweep."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(spec: RunSpec, *, callbacks: list[Any] | None = None) -> None:
    """Train one run under Ray Train, to its record.

    Args:
        spec: the run.
        callbacks: Ray Train's, such as the one that reports to Ray Tune.

    Raises:
        ray.train.TrainingFailedError: the workers failed more often than ``max_failures`` allows.
    """
    execution = ExecutionConfig(**spec.execution)
    resources = {"CPU": execution.cpus_per_worker - RESERVED_CPUS / execution.workers}
    if execution.gpus_per_worker:
        resources["GPU"] = execution.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=spec.to_dict(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=execution.workers,
            use_gpu=bool(execution.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path="/".join([spec.store, spec.study, spec.key]),
            failure_config=ray.train.FailureConfig(max_failures=execution.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=callbacks or [],
        ),
    )
    trainer.fit()


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker of a run does."""
    spec = RunSpec(**config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    run, execution = RunConfig.from_identity(spec.identity), ExecutionConfig(**spec.execution)
    torch.set_num_threads(execution.cpus_per_worker)
    corpus = PreparedCorpus.open(Path(spec.corpus_folder))
    if corpus is None:
        raise FileNotFoundError(f"{spec.corpus_folder} is not on this node: put HALTSCALE_HOME on a shared filesystem")

    model = build_model(run.model_config(corpus.counts["vocab_size"]), seed=run.seed)
    micro, accumulation = execution.accumulation(run.batch_sequences)
    engine = build_engine(model, run, zero_stage=execution.zero_stage, micro_batch=micro, accumulation=accumulation)
    progress = Progress()
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            progress = load_checkpoint(engine, Path(folder))
    recorder = RunRecorder(RunStore(spec.store), spec.study, spec.key, steps=run.steps, enabled=rank == 0)
    recorder.begin(progress.step)

    def save(progress: Progress) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(engine, Path(folder), progress)
            ray.train.report({"step": progress.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def evaluate(progress: Progress) -> None:
        evaluate_run(engine.module, corpus, run, progress, recorder)

    batches = stream(
        corpus.folder,
        seed=run.seed,
        rows=corpus.rows,
        batch=run.batch_sequences,
        first_step=progress.step,
        steps=run.steps,
        rank=rank,
        world=world,
    )
    try:
        train(
            engine,
            batches,
            run,
            progress,
            Hooks(log=lambda row, _: recorder.log(row), checkpoint=save, evaluate=evaluate),
            micro_batches=accumulation,
            world=world,
            evaluations=execution.evaluations,
            checkpoints=execution.checkpoints,
            log_every_seconds=execution.log_every_seconds,
        )
    except TrainingDivergedError as diverged:
        recorder.fail(str(diverged))  # trying again would diverge again
        return
    finish(engine, corpus, run, progress, recorder, spec)


def evaluate_run(
    model: LanguageModel, corpus: PreparedCorpus, run: RunConfig, progress: Progress, recorder: RunRecorder
) -> tuple[dict[str, Any], evaluation.TokenEvents]:
    """Read the held-out documents and the probe text, and write both down."""
    documents, probe = corpus.validation(), corpus.probe()
    events = evaluation.read_documents(model, documents, context=run.context)
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "split": "validation",
        **evaluation.summarise(events, text_bytes=sum(document.bytes for document in documents)),
        "flops_realised": progress.flops_realised,
        "flops_executed": progress.flops_executed,
        "flops_paper": progress.flops_paper,
        "time": time.time(),
    }
    recorder.evaluation(row)
    probed = evaluation.read_documents(model, [probe], context=run.context)
    recorder.probe(progress.step, evaluation.probe_table(probed, probe))
    return row, events


def finish(
    engine: Any,
    corpus: PreparedCorpus,
    run: RunConfig,
    progress: Progress,
    recorder: RunRecorder,
    spec: RunSpec,
) -> None:
    """Evaluate, export the weights, and write the record, last."""
    row, events = evaluate_run(engine.module, corpus, run, progress, recorder)
    weights = full_weights(engine)
    if ray.train.get_context().get_world_rank() == 0:
        _export(spec, engine.module, weights, corpus)
    per_token = events.flops * (1 / len(events.nll))
    groups = engine.module.parameter_groups_count()
    recorder.finish(
        {
            "label": spec.label,
            "study": spec.study,
            "key": spec.key,
            "identity": spec.identity,
            "tokens": progress.tokens,
            "steps": progress.step,
            "parameters": groups,
            "parameters_total": sum(groups.values()),
            **{name: row[name] for name in ("loss", "loss_standard_error", "perplexity", "bits_per_byte")},
            **{name: row[name] for name in ("mean_steps", "expected_steps", "steps_histogram", "tokens_evaluated")},
            "passes_per_token": progress.pass_rows / progress.tokens,
            "flops_realised": progress.flops_realised,
            "flops_executed": progress.flops_executed,
            "flops_paper": progress.flops_paper,
            "inference_flops_per_token": asdict(per_token),
            "halting": evaluation.halting_by_difficulty(events),
            "sequence_digest": progress.sequence_digest,
            "wall_seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.seconds,
            "precision": resolve_precision(run.precision),
            "execution": spec.execution,
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "machine": provenance.machine(),
            "finished_at": time.time(),
        }
    )


def _export(spec: RunSpec, model: LanguageModel, weights: dict[str, torch.Tensor], corpus: PreparedCorpus) -> None:
    """The finished model: weights that cannot execute anything, the config, the tokenizer."""
    store = RunStore(spec.store)
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1))
        (Path(folder) / "tokenizer.json").write_text((corpus.folder / "tokenizer.json").read_text())
        for file in Path(folder).iterdir():
            target = store.path(spec.study, spec.key, "model", file.name)
            store.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            store.fs.put_file(str(file), target)
