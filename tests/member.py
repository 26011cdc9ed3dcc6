"""One rank of a group of processes that a test starts: ``member.py FOLDER RANK``, the task in ``FOLDER/task.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from haltscale.model import FixedOptions, Method, build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import RunConfig
from haltscale.platform.engine import build_engine, fragments, snapshot, start
from haltscale.platform.order import rank_share
from haltscale.platform.store import RunStore
from haltscale.platform.training import Progress, train

sys.path.insert(0, str(Path(__file__).parent))
from looping import LARGE, RUNS, Batch, Listener, batches, execution_of

FOLDER, RANK = Path(sys.argv[1]), int(sys.argv[2])
TASK = json.loads((FOLDER / "task.json").read_text())
WORLD = TASK["world"]


def shares(run: RunConfig, first: int = 0) -> Iterator[Batch]:
    """This rank's share of the batches that a single process would get."""
    for batch in batches(run, first):
        rows = rank_share(np.arange(len(batch.tokens))[None], rank=RANK, world=WORLD)[0]
        yield replace(batch, tokens=batch.tokens[rows])


def matrix() -> dict[str, Any]:
    """Every case of steps per rank at every ZeRO stage: the method is told how many latent steps to take."""
    answer: dict[str, Any] = {"losses": {}, "mean_steps": {}, "straggling": {}}
    for case, depths in TASK["cases"].items():
        for stage in range(4):
            options = FixedOptions(steps=float(max(depths)))
            run = replace(RUNS["adaptive"], method=Method.FIXED, options=options, learning_rate=1e-2)
            run = replace(run, tokens=3 * run.batch_tokens)
            model = build_model(run.model_config(LARGE), seed=0)
            model.steps = float(depths[RANK])  # type: ignore[assignment]
            rows = learn(build_engine(model, run, execution(run, zero_stage=stage)), run, shares(run), zero_stage=stage)
            for name, column in (("losses", "loss"), ("mean_steps", "mean_steps"), ("straggling", "straggling")):
                values = [row[column] for row in rows]
                answer[name].setdefault(case, {})[str(stage)] = values if name == "losses" else values[0]
    return answer


def execution(run: RunConfig, **changes: Any) -> Any:
    return execution_of(run, **{"workers": WORLD, "micro_batch_sequences": 2} | changes)


def learn(engine: Any, run: RunConfig, stream: Iterator[Batch], **changes: Any) -> list[dict[str, Any]]:
    listener = Listener()
    setting = execution(run, **changes)
    train(engine, stream, run, Progress(), listener.hooks(), execution=setting, rank=RANK, world=WORLD)
    return listener.rows


def padded() -> dict[str, Any]:
    """One step on given rows, some of which end early; how far the weights moved, in the elements that rank 0 holds."""
    run = replace(RUNS["adaptive"], tokens=RUNS["adaptive"].batch_tokens, warmup_fraction=0.0, weight_decay=0.0)
    whole = np.array(TASK["rows"])
    share = rank_share(np.arange(len(whole))[None], rank=RANK, world=WORLD)[0]
    model = build_model(run.model_config(LARGE), seed=run.seed)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = build_engine(model, run, execution(run, zero_stage=TASK["zero_stage"]))
    (row,) = learn(engine, run, iter([Batch(0, np.arange(len(whole)), whole[share])]), zero_stage=TASK["zero_stage"])
    moved = {}
    for fragment in fragments(engine):
        if fragment.start == 0:
            old = before[fragment.parameter].flatten()[: fragment.numel]
            moved[fragment.parameter] = (fragment.of(fragment.stepped) - old)[:500].tolist()
    return {"loss": row["loss"], "grad_norm": row["grad_norm"], "moved": moved}


def train_and_save() -> dict[str, Any]:
    """A run with checkpoints, from the newest one on."""
    run = RUNS["adaptive"]
    setting = execution(run, zero_stage=TASK["zero_stage"], checkpoints=2)
    checkpoints = Checkpoints(RunStore(TASK["store"]), "study", "run", rank=RANK, world=WORLD)
    engine, progress = start(build_model(run.model_config(LARGE), seed=run.seed), run, setting, checkpoints)
    began, listener = progress.step, Listener()
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    notice = TASK.get("notice", [None, None])
    hooks = replace(listener.hooks(), notice=lambda: notice[0] == RANK and progress.step + 1 >= notice[1])
    stream = shares(run, progress.step)
    train(engine, stream, run, progress, hooks, execution=setting, rank=RANK, world=WORLD)
    checkpoints.wait()
    dist.barrier()
    losses = [row["loss"] for row in listener.rows]
    return {
        "from": began,
        "losses": losses,
        "digest": progress.sequence_digest,
        "saved": sorted({step for told, step in listener.told if told == "checkpoint"}),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=WORLD)
    answer = {"matrix": matrix, "padded": padded, "train": train_and_save}[TASK["do"]]()
    (FOLDER / f"answer-{RANK}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()
