"""One rank of a group of processes that a test starts (``member.py FOLDER RANK``), its tasks in ``tasks.json``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from haltscale.model import FixedOptions, Method, build_model
from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.corpora.corpus import PreparedCorpus
from haltscale.platform.corpora.order import rank_share
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs.finalize import evaluate_run
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import build_engine, fragments, readable
from haltscale.platform.training.loop import train
from haltscale.platform.training.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
import muon_steps
from gradients import through_deepspeed

import looping
from looping import LARGE, RUNS, Batch, Listener, execution_of

FOLDER, RANK, WORLD = Path(sys.argv[1]), int(sys.argv[2]), 2


def learn(model: Any, run: RunConfig, stream: Iterator[Batch], zero_stage: int) -> tuple[Any, list[dict[str, Any]]]:
    execution = execution_of(run, zero_stage=zero_stage, workers=WORLD, micro_batch_sequences=2)
    engine, listener = build_engine(model, run, execution), Listener()
    train(engine, stream, run, Progress(), listener.hooks(), execution=execution, rank=RANK, world=WORLD)
    return engine, listener.rows


def depths(per_rank: list[int], zero_stage: int) -> list[dict[str, Any]]:
    """Rows of metrics of three steps in which the tokens of each rank take as many latent steps as they are told."""
    options = FixedOptions(steps=float(max(per_rank)))
    run = replace(RUNS["adaptive"], method=Method.FIXED, options=options, learning_rate=1e-2)
    run = replace(run, tokens=3 * run.batch_tokens)
    model = build_model(run.model_config(LARGE), seed=0)
    model.steps = float(per_rank[RANK])  # type: ignore[assignment]
    return learn(model, run, looping.shares(run, rank=RANK, world=WORLD), zero_stage)[1]


def padded(rows: list[list[int]], zero_stage: int) -> dict[str, Any]:
    """One step on given rows, some of which end early, and where the weights went that this rank steps."""
    run = replace(RUNS["adaptive"], tokens=RUNS["adaptive"].batch_tokens, warmup_fraction=0.0, weight_decay=0.0)
    share = rank_share(np.arange(len(rows))[None], rank=RANK, world=WORLD)[0]
    model = build_model(run.model_config(LARGE), seed=run.seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine, (row,) = learn(model, run, iter([Batch(0, np.arange(len(rows)), np.array(rows)[share])]), zero_stage)
    moved = []
    for fragment in fragments(engine):
        old = before[fragment.parameter].flatten()[fragment.start :][: fragment.numel]
        signs = (fragment.of(fragment.stepped) - old).sign()[:500]
        moved.append([fragment.parameter, fragment.start, signs.tolist()])
    return {"loss": row["loss"], "grad_norm": row["grad_norm"], "moved": moved}


def gradients(case: str, precision: str, pieces: int, zero_stage: int, optimizer: str = "adamw") -> dict[str, float]:
    """Relative errors of the gradients that this rank's optimizer was given."""
    kinds: Any = {"precision": Precision(precision), "optimizer": Optimizer(optimizer)}
    return through_deepspeed(case, **kinds, pieces=pieces, zero_stage=zero_stage, rank=RANK, world=WORLD)


def muon(case: str, pieces: int, zero_stage: int) -> dict[str, float]:
    """Relative errors of where Muon and AdamW moved the weights that this rank steps."""
    return muon_steps.through_deepspeed(case, pieces=pieces, zero_stage=zero_stage, rank=RANK, world=WORLD)


def trained(store: str, zero_stage: int, notice: list[int] | None = None, case: str = "adaptive") -> dict[str, Any]:
    pair = (notice[0], notice[1]) if notice else None
    return looping.train_and_save(store, zero_stage=zero_stage, rank=RANK, world=WORLD, notice=pair, case=case)


def evaluated(corpus: str, store: str, key: str, zero_stage: int) -> dict[str, Any]:
    """A reading of the held-out documents, shared by the ranks."""
    prepared = PreparedCorpus.open(Path(corpus))
    assert prepared is not None
    run = looping.EVALUATED
    execution = execution_of(run, zero_stage=zero_stage, workers=WORLD, micro_batch_sequences=1)
    engine = build_engine(looping.ragged_model(run, prepared.counts["vocab_size"]), run, execution)
    recorder = RunRecorder(RunStore(store), "study", key, steps=1, enabled=RANK == 0)
    passes: list[int] = []
    with readable(engine) as (model, shared):
        model.register_forward_hook(lambda *_: passes.append(1))
        together = {"rank": RANK, "world": WORLD} if shared else {}
        result = evaluate_run(model, prepared, run, Progress(step=7), recorder, **together)
    return {"row": dict(result.row), "summary": dict(result.summary), "passes": len(passes)}


def harm(store: str, step: int, shard: int) -> None:
    dist.barrier()
    if RANK == 0:
        (file,) = looping.checkpoint_folder(store, step).glob(f"shard-{shard:05d}-of-*.safetensors")
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    dist.barrier()


def forget(store: str, step: int) -> None:
    dist.barrier()
    if RANK == 0:
        looping.forget(store, step)
    dist.barrier()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's calls, at every piece
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=WORLD)
    functions = (depths, padded, gradients, muon, trained, evaluated, forget, harm)
    does = {function.__name__: function for function in functions}
    answers = {name: does[task.pop("do")](**task) for name, task in json.loads((FOLDER / "tasks.json").read_text())}
    (FOLDER / f"answers-{RANK}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()
