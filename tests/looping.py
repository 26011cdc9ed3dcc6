"""A small run for the tests of the training loop: random batches, and hooks that write down what they were told."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haltscale.model import AdaptiveOptions, LanguageModel, Method, build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import Optimizer, Precision, RunConfig
from haltscale.platform.corpora.order import rank_share
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import build_engine, snapshot, start
from haltscale.platform.training.loop import Hooks, train
from haltscale.platform.training.progress import Progress

VOCABULARY, CONTEXT, BATCH, STEPS = 300, 16, 8, 6
LARGE = 2000
"""A vocabulary whose embedding is above DeepSpeed's threshold: under ZeRO-3 it lies in shards between passes."""
RUN = RunConfig(
    size="0.6m",
    tokens=STEPS * BATCH * CONTEXT,
    context=CONTEXT,
    batch_tokens=BATCH * CONTEXT,
    precision=Precision.FP32,
    warmup_fraction=0.2,
)
RUNS = {
    "vanilla": RUN,
    "adaptive": replace(RUN, method=Method.ADAPTIVE, options=AdaptiveOptions(lam=0.3, l_max=2, tau=0.3)),
}
RUNS["muon"] = replace(RUNS["adaptive"], optimizer=Optimizer.MUON)

EVALUATED = RunConfig(
    size="0.6m",
    method=Method.ADAPTIVE,
    options=AdaptiveOptions(l_max=2, tau=0.4, router_bias=0.5),
    tokens=60,
    context=3,
    batch_tokens=60,
    precision=Precision.FP32,
)


def ragged_model(run: RunConfig, vocabulary: int) -> LanguageModel:
    """A model whose tokens think differently long from the start."""
    model = build_model(run.model_config(vocabulary), seed=0)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
    return model


@dataclass
class Batch:
    step: int
    seq_ids: Any
    tokens: Any


def batches(run: RunConfig, first: int = 0, *, seed: int = 0) -> Iterator[Batch]:
    """Each step's own random batch, whichever step one begins at; without end where the budget is in FLOPs."""
    for step in range(first, run.steps) if run.steps is not None else itertools.count(first):
        stream = np.random.default_rng([seed, step])
        shape = (run.batch_sequences, run.context + 1)
        yield Batch(step, np.arange(shape[0]) + step * shape[0], stream.integers(0, VOCABULARY, shape))


class Listener:
    """Hooks that write down what the loop told them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.told: list[tuple[str, int]] = []
        self.at_checkpoint: Any = lambda progress: None

    def hooks(self) -> Hooks:
        return Hooks(log=self._log, checkpoint=self._checkpoint, evaluate=self._evaluate)

    def _log(self, row: dict[str, Any], progress: Progress) -> None:
        assert row["step"] == progress.step
        self.rows.append(row)
        self.told.append(("log", progress.step))

    def _checkpoint(self, progress: Progress) -> None:
        self.told.append(("checkpoint", progress.step))
        self.at_checkpoint(progress)

    def _evaluate(self, progress: Progress) -> None:
        self.told.append(("evaluate", progress.step))

    def at(self, what: str) -> list[int]:
        return [step for told, step in self.told if told == what]


def execution_of(run: RunConfig, **changes: Any) -> ExecutionConfig:
    settings: dict[str, Any] = {"micro_batch_sequences": run.batch_sequences, "evaluations": 1, "checkpoints": 1}
    return ExecutionConfig(**{"log_every_seconds": 0.0, "zero_stage": 0} | settings | changes)


def engine_of(run: RunConfig, *, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    return build_engine(build_model(run.model_config(vocabulary), seed=run.seed), run, execution_of(run, **changes))


def go(
    engine: Any, run: RunConfig, stream: Iterator[Batch], progress: Progress | None = None, **changes: Any
) -> tuple[Progress, Listener]:
    """Train with every step logged."""
    listener = changes.pop("listener", None) or Listener()
    execution = execution_of(run, **changes)
    progress = train(engine, stream, run, progress or Progress(), listener.hooks(), execution=execution)
    return progress, listener


CLOCK = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "time")


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


# ---- several ranks --------------------------------------------------------------------------------------------------


def shares(run: RunConfig, first: int = 0, *, rank: int, world: int) -> Iterator[Batch]:
    """A rank's share of the batches that a single process would get."""
    for batch in batches(run, first):
        rows = rank_share(np.arange(len(batch.tokens))[None], rank=rank, world=world)[0]
        yield replace(batch, tokens=batch.tokens[rows])


def train_and_save(
    store: str,
    *,
    zero_stage: int,
    rank: int = 0,
    world: int = 1,
    notice: tuple[int, int] | None = None,
    case: str = "adaptive",
) -> dict[str, Any]:
    """A run with checkpoints, from the newest one in the store on.

    Args:
        notice: a rank, and the step at which it is told that it may end.
    """
    run = RUNS[case]
    execution = execution_of(run, zero_stage=zero_stage, workers=world, micro_batch_sequences=2, checkpoints=2)
    checkpoints = Checkpoints(RunStore(store), "study", "run", rank=rank, world=world)
    engine, progress = start(build_model(run.model_config(LARGE), seed=run.seed), run, execution, checkpoints)
    began, listener = progress.step, Listener()
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    hooks = listener.hooks()
    if notice and rank == notice[0]:
        hooks = replace(hooks, notice=lambda: progress.step + 1 >= notice[1])
    stream = shares(run, began, rank=rank, world=world)
    train(engine, stream, run, progress, hooks, execution=execution, rank=rank, world=world)
    checkpoints.wait()
    losses = [row["loss"] for row in listener.rows]
    return {
        "from": began,
        "losses": losses,
        "digest": progress.sequence_digest,
        "saved": listener.at("checkpoint"),
        "events": progress.events,
    }


def forget(store: str, step: int) -> None:
    """Remove the checkpoint of a step, as if the run had been killed before it."""
    shutil.rmtree(checkpoint_folder(store, step))


def checkpoint_folder(store: str, step: int) -> Path:
    return Path(RunStore(store).path("study", "run", "checkpoints", f"step-{step:08d}"))


def answer_together(folder: Path, tasks: dict[str, Any], *, timeout: float = 280) -> list[dict[str, Any]]:
    """What each of two processes (member.py) over gloo answers to all tasks, one after the other."""
    (folder / "tasks.json").write_text(json.dumps(list(tasks.items())))
    member = str(Path(__file__).parent / "member.py")
    commands = [[sys.executable, member, str(folder), str(rank)] for rank in range(2)]
    members = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    try:
        outputs = [member.communicate(timeout=timeout)[0].decode() for member in members]
    finally:
        for member in members:
            member.kill()
    assert [member.returncode for member in members] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(2)]
