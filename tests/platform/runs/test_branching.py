"""Several budgets from one WSD run: a branch is the run left alone, to the last bit."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model import METHODS, AdaptiveOptions, Method, build_model
from haltscale.model.looped import LoopedOptions
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.config import RunConfig, Schedule
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs.branching import branch_point, shortest_of_families
from haltscale.platform.schedule import Spent, can_branch, is_stable, learning_rate
from haltscale.platform.store import RunStore
from haltscale.platform.training.engine import full_weights, snapshot, start

from looping import LARGE, RUN, RUNS, Listener, batches, execution_of, go, timeless

SLOW = pytest.mark.slow


def wsd(steps: int, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"warmup_tokens": 2 * RUN.batch_tokens, "decay_fraction": 0.5}
    run = replace(RUNS["adaptive"], tokens=steps * RUN.batch_tokens, schedule=Schedule.WSD)
    return replace(run, **(settings | changes))


def spent(run: RunConfig, step: int) -> Spent:
    return Spent(step=step, tokens=step * run.batch_tokens, flops=0.0)


def rate(run: RunConfig, step: int) -> float:
    return learning_rate(run, spent(run, step), spent(run, step + 1))


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 1), st.integers(0, 60), st.floats(0, 1))
def test_stable_steps_have_the_rate_of_any_other_budget(steps, more, decay, warmup, final):
    changes = {"decay_fraction": decay, "warmup_tokens": warmup, "final_learning_rate_fraction": final}
    run, longer = wsd(steps, **changes), wsd(steps + more, **changes)
    stable = [is_stable(run, spent(run, step)) for step in range(steps)]
    assert stable == sorted(stable, reverse=True), "once the rate falls, it falls"
    for step in range(sum(stable)):
        assert is_stable(longer, spent(longer, step))
        assert rate(run, step) == rate(longer, step)
    if decay == 0:
        assert all(stable)


def test_a_schedule_is_known_by_its_name_too():
    assert can_branch(wsd(8, schedule="wsd"))
    assert [is_stable(wsd(8), spent(wsd(8), step)) for step in range(8)] == [True] * 5 + [False] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup_tokens": None},
        {"schedule": Schedule.COSINE},
        {"options": AdaptiveOptions(l_max=2, gate_warmup=0.5)},
        {"options": AdaptiveOptions(l_max=2, lam_ramp=0.5)},
        {"options": AdaptiveOptions(l_max=2, depth_growth=0.5)},
        {"options": AdaptiveOptions(l_max=2, steps_from="shuffled", steps_schedule=((0.0, 0.5, 0.5, 0.0),))},
        {"method": Method.LOOPED, "options": LoopedOptions(depth_growth=0.5)},
    ],
)
def test_what_depends_on_the_budget_has_no_branches(changes):
    assert not can_branch(wsd(8, **changes))
    assert not is_stable(wsd(8, **changes), spent(wsd(8), 1))


class Author:
    """Trains runs of one study in this process, as its worker function does under Ray."""

    def __init__(self, store: RunStore, *, zero_stage: int = 0, branch: bool = True) -> None:
        self.store, self.changes = store, {"zero_stage": zero_stage, "checkpoints": 1, "branch": branch}

    def spec(self, key: str, run: RunConfig) -> Checkpoints:
        execution = execution_of(run, **self.changes)
        spec = {"label": key, "study": "study", "key": key, "identity": run.identity("c", "f")}
        self.store.write_json(self.store.path("study", key, "spec.json"), {**spec, "execution": asdict(execution)})
        return Checkpoints(self.store, "study", key)

    def train(self, key: str, run: RunConfig) -> tuple[Any, Any, list[dict[str, Any]]]:
        checkpoints, execution = self.spec(key, run), execution_of(run, **self.changes)
        found = branch_point(checkpoints, self.store, "study", key) if execution.branch else None
        parent, saved = found or ("", None)
        model = build_model(run.model_config(LARGE), seed=run.seed)
        engine, progress = start(model, run, execution, checkpoints, saved)
        recorder = RunRecorder(self.store, "study", key, steps=run.steps)
        inherited = {"key": parent, "tokens": progress.tokens, "flops": progress.flops_realised} if parent else None
        recorder.begin(progress.step, 0.0, parent=inherited)
        listener = Listener()
        listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
        done, _ = go(engine, run, batches(run, progress.step), progress, listener=listener, **self.changes)
        checkpoints.wait()
        for row in listener.rows:
            recorder.log(row, row["step"] / (run.steps or 1))
        return engine, done, self.store.read_lines(self.store.path("study", key, "metrics.jsonl"))

    def attempts(self, key: str) -> list[tuple[int, str | None]]:
        rows = self.store.read_lines(self.store.path("study", key, "attempts.jsonl"))
        return [(row["step"], (row.get("parent") or {}).get("key")) for row in rows]


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 3])
def test_a_chain_of_branches_is_each_run_left_alone(zero_stage, tmp_path: Path):
    budgets = {"short": wsd(8), "middle": wsd(12), "long": wsd(16)}
    branched = Author(RunStore(tmp_path / "branched"), zero_stage=zero_stage)
    alone = Author(RunStore(tmp_path / "alone"), zero_stage=zero_stage, branch=False)
    for key, run in budgets.items():
        engine, progress, rows = branched.train(key, run)
        other, theirs, their_rows = alone.train(key, run)
        assert timeless(rows) == timeless(their_rows), key
        assert progress.sequence_digest == theirs.sequence_digest
        assert (progress.tokens, progress.flops_realised) == (theirs.tokens, theirs.flops_realised)
        for (name, mine), whole in zip(full_weights(engine).items(), full_weights(other).values(), strict=True):
            assert torch.equal(mine, whole), name
    assert [branched.attempts(key) for key in budgets] == [[(0, None)], [(5, "short")], [(7, "middle")]]


@pytest.mark.parametrize("method", [method for method in Method if method is not Method.SHUFFLED])
@pytest.mark.parametrize("in_flops", [False, True])
def test_a_branch_of_every_method_is_the_run_left_alone(method: Method, in_flops: bool, tmp_path: Path):
    """Budgets in tokens, and in FLOPs that are spent in the middle of a step."""
    options = METHODS[method].options()
    shape = {"size": "3x64"} if method is Method.MOR else {}
    short = wsd(6, method=method, options=options, **shape)
    branched, alone = Author(RunStore(tmp_path / "branched")), Author(RunStore(tmp_path / "alone"), branch=False)
    if in_flops:
        _, progress, _ = alone.train("measured", short)
        short = replace(short, flops=0.9 * progress.flops_realised)
    long = replace(short, tokens=2 * short.tokens, flops=None if short.flops is None else 2 * short.flops)
    branched.train("short", short)
    engine, mine, rows = branched.train("long", long)
    other, theirs, their_rows = alone.train("long", long)
    ((step, parent),) = branched.attempts("long")
    assert parent == "short"
    assert 0 < step < mine.step
    assert timeless(rows) == timeless(their_rows)
    assert (mine.step, mine.tokens, mine.flops_realised) == (theirs.step, theirs.tokens, theirs.flops_realised)
    for (name, weight), whole in zip(full_weights(engine).items(), full_weights(other).values(), strict=True):
        assert torch.equal(weight, whole), name
    shared = branched.store.read_lines(branched.store.path("study", "long", "attempts.jsonl"))[0]["parent"]
    assert 0 < shared["flops"] < mine.flops_realised
    assert shared["tokens"] == step * short.batch_tokens


def test_a_branch_that_was_killed_goes_on_from_its_own_checkpoint(tmp_path: Path):
    author = Author(RunStore(tmp_path / "branched"))
    author.train("short", wsd(8))
    checkpoints = author.spec("long", wsd(16))
    found = branch_point(checkpoints, author.store, "study", "long")
    assert found
    assert found[1].progress["step"] == 5
    author.train("long", wsd(16))
    assert branch_point(checkpoints, author.store, "study", "long") is None


@pytest.fixture
def trunk(tmp_path: Path) -> Author:
    author = Author(RunStore(tmp_path / "runs"))
    author.train("trunk", wsd(8))
    return author


@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 1e-3}, {"decay_fraction": 0.25}, {"clip": 0.5}])
def test_a_run_that_differs_otherwise_is_no_kin(trunk, changes):
    checkpoints = trunk.spec("other", wsd(16, **changes))
    assert branch_point(checkpoints, trunk.store, "study", "other") is None


def test_no_decayed_or_damaged_checkpoint_is_a_branch_point(trunk):
    """The trunk has one of step 5, after which its rate falls, and one of step 8, its end."""
    assert sorted(Checkpoints(trunk.store, "study", "trunk").complete()) == [5, 8]
    checkpoints = trunk.spec("tiny", wsd(6))  # its rate falls after step 4
    assert branch_point(checkpoints, trunk.store, "study", "tiny") is None
    checkpoints = trunk.spec("long", wsd(16))
    assert branch_point(checkpoints, trunk.store, "study", "long")
    (shard,) = Path(trunk.store.path("study", "trunk", "checkpoints", "step-00000005")).glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert branch_point(checkpoints, trunk.store, "study", "long") is None


def test_only_the_shortest_of_a_family_need_not_wait():
    runs = {"a8": wsd(8), "a12": wsd(12), "b12": wsd(12, seed=1), "b16": wsd(16, seed=1), "plain": RUN}
    known = [(key, run, run.identity("c", "f")) for key, run in runs.items()]
    assert shortest_of_families(known) == {"a8", "b12", "plain"}
    assert shortest_of_families(known[1:]) == {"a12", "b12", "plain"}
