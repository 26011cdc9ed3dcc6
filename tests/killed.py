"""Trains runs to their end, from wherever it was killed before: ``killed.py FOLDER STAGE...``, one run per ZeRO stage.

Every step that is ever taken, also again after a kill, is written to ``FOLDER/stage-<stage>.jsonl``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from haltscale.model import build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import snapshot, start
from haltscale.platform.training.loop import Hooks, train
from haltscale.platform.training.progress import Progress

from looping import LARGE, RUNS, batches, execution_of, timeless

STEPS = 15


def run_of(stage: int) -> RunConfig:
    """Stages 0 and 3 in float32, 1 and 2 in bfloat16."""
    run = RUNS["adaptive"]
    precision = Precision.FP32 if stage in (0, 3) else Precision.BF16
    return replace(run, tokens=STEPS * run.batch_tokens, precision=precision, seed=stage)


def main(folder: Path, stage: int) -> None:
    run = run_of(stage)
    execution = execution_of(run, zero_stage=stage, checkpoints=STEPS // 3)
    checkpoints = Checkpoints(RunStore(folder / "runs"), "study", f"run-{stage}")
    engine, progress = start(build_model(run.model_config(LARGE), seed=run.seed), run, execution, checkpoints)

    def log(row: dict[str, Any], progress: Progress) -> None:
        (plain,) = timeless([row])
        with (folder / f"stage-{stage}.jsonl").open("a") as file:
            file.write(json.dumps({**plain, "digest": progress.sequence_digest}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(progress: Progress) -> None:
        checkpoints.write(snapshot(engine), progress.to_dict())
        checkpoints.prune(set(), keep_last=2)

    hooks = Hooks(log=log, checkpoint=save, evaluate=lambda progress: None)
    train(engine, batches(run, progress.step), run, progress, hooks, execution=execution)
    checkpoints.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[2:]:
        main(Path(sys.argv[1]), int(each))
