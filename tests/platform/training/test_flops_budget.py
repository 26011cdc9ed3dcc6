"""A run whose budget is in realised FLOPs, through the real loop: its end, its schedule, its resumption."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from haltscale.model import AdaptiveOptions, build_model
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import Schedule
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import full_weights, snapshot, start

from looping import LARGE, RUN, RUNS, Listener, batches, engine_of, execution_of, go, timeless

PER_STEP = 6.0 * RUN.batch_tokens


def budgeted(method: str, **changes: Any) -> Any:
    """A run whose budget buys about nine passes over a batch. The adaptive one takes more than one for a step, and not
    the same number for every step."""
    run = RUNS[method]
    if method == "adaptive":
        run = replace(run, options=AdaptiveOptions(lam=0.3, l_max=2, tau=0.88))
    parameters = sum(build_model(run.model_config(LARGE), seed=0).parameter_groups_count().values())
    return replace(run, tokens=run.batch_tokens, flops=9 * PER_STEP * parameters, **changes)


@pytest.mark.parametrize("method", RUNS)
def test_the_step_that_spends_the_last_of_it_is_the_last(method):
    run = budgeted(method)
    progress, listener = go(engine_of(run, vocabulary=LARGE), run, batches(run), evaluations=4, checkpoints=3)
    spent = [row["flops_realised"] for row in listener.rows]
    assert len(spent) > 3
    assert spent[-2] < run.flops <= spent[-1] == progress.flops_realised
    for what, count in (("evaluate", 4), ("checkpoint", 3)):
        due = [next(n for n, flops in enumerate(spent, 1) if flops >= run.flops * k / count) for k in range(1, count)]
        assert [step for step in listener.at(what) if step < progress.step] == due
    assert listener.at("checkpoint")[-1] == progress.step


def test_the_learning_rate_follows_what_is_spent():
    """By hand: a straight line between the peak and a tenth of it, over the share of the FLOPs after the warm-up."""
    run = budgeted("adaptive", schedule=Schedule.LINEAR)
    _, listener = go(engine_of(run, vocabulary=LARGE), run, batches(run))
    shares = [0.0, *(row["flops_realised"] / run.flops for row in listener.rows)]
    costs = [after - before for before, after in itertools.pairwise(shares)]
    assert len({round(cost, 9) for cost in costs}) > 1, "steps cost differently"
    falling = 0
    for row, done, last in zip(listener.rows[1:], shares[1:], costs, strict=False):
        if done >= 0.2:
            falling += 1
            expected = 0.1 + 0.9 * (1 - (done - 0.2) / 0.8)
        else:
            expected = min(1.0, (done + last) / 0.2)  # the step is expected to cost what the one before did
        assert row["learning_rate"] == pytest.approx(run.learning_rate * expected, rel=1e-9)
    assert falling > 2


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_run(zero_stage, tmp_path: Path):
    run, store = budgeted("adaptive"), RunStore(tmp_path)
    model = lambda: build_model(run.model_config(LARGE), seed=run.seed)  # noqa: E731
    execution, checkpoints = execution_of(run, zero_stage=zero_stage, checkpoints=2), Checkpoints(store, "study", "run")
    engine, progress = start(model(), run, execution, checkpoints)
    listener = Listener()
    listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
    whole, _ = go(engine, run, batches(run), progress, listener=listener, zero_stage=zero_stage, checkpoints=2)
    checkpoints.wait()
    half, end = sorted(checkpoints.complete())
    assert end == whole.step
    shutil.rmtree(store.path("study", "run", "checkpoints", f"step-{end:08d}"))

    second, progress = start(model(), run, execution, Checkpoints(store, "study", "run"))
    assert progress.step == half
    resumed, later = go(second, run, batches(run, half), progress, zero_stage=zero_stage, checkpoints=2)
    assert timeless(later.rows) == timeless(listener.rows[half:])
    assert (resumed.flops_realised, resumed.sequence_digest) == (whole.flops_realised, whole.sequence_digest)
    for (name, mine), theirs in zip(full_weights(second).items(), full_weights(engine).values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert math.isfinite(later.rows[-1]["loss"])
