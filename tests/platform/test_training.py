"""The training loop with DeepSpeed in this process: schedule, ledger, resumption, accumulation, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from haltscale.model import AdaptiveOptions, Method, PassCounts, VanillaOptions, build_model
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.engine import (
    build_engine,
    full_weights,
    load_checkpoint,
    resolve_precision,
    save_checkpoint,
)
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.schedule import Spent, learning_rate
from haltscale.platform.training import (
    Hooks,
    Progress,
    StepTotals,
    TrainingDivergedError,
    train,
)

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


@dataclass
class Batch:
    step: int
    seq_ids: Any
    tokens: Any


def batches(run: RunConfig, first: int = 0, *, seed: int = 0) -> Iterator[Batch]:
    """Each step's own random batch, whichever step one begins at."""
    for step in range(first, run.steps):
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


def engine_of(run: RunConfig, *, zero_stage: int = 0, accumulation: int = 1, vocabulary: int = VOCABULARY) -> Any:
    model = build_model(run.model_config(vocabulary), seed=run.seed)
    micro = run.batch_sequences // accumulation
    return build_engine(model, run, zero_stage=zero_stage, micro_batch=micro, accumulation=accumulation)


def go(
    engine: Any, run: RunConfig, stream: Iterator[Batch], progress: Progress | None = None, **changes: Any
) -> tuple[Progress, Listener]:
    """Train with every step logged."""
    listener = changes.pop("listener", None) or Listener()
    settings = {"micro_batch_sequences": run.batch_sequences, "evaluations": 1, "checkpoints": 1}
    execution = ExecutionConfig(**{"log_every_seconds": 0.0} | settings | changes)
    progress = train(engine, stream, run, progress or Progress(), listener.hooks(), execution=execution, world=1)
    return progress, listener


CLOCK = ("seconds", "tokens_per_second", "time")


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


# ---- pure parts -----------------------------------------------------------------------------------------------------


def test_a_precision_that_is_named_is_taken():
    assert resolve_precision(Precision.FP32) is Precision.FP32
    assert resolve_precision(Precision.BF16) is Precision.BF16
    assert resolve_precision(Precision.AUTO) in (Precision.FP32, Precision.BF16)


@pytest.mark.parametrize(
    ("loss", "cross_entropy", "norm"), [(math.nan, 2, None), (math.inf, 2, 1), (2, 51, 1), (2, 2, math.inf)]
)
def test_a_lost_loss_is_named_with_its_step(loss, cross_entropy, norm):
    def totals(loss: float, cross_entropy: float) -> StepTotals:
        return StepTotals(np.array([loss, cross_entropy, 0, 0, 1, 0, 0, 0, 0, 1.0]))

    totals(2, 2).check_finite(17, None)
    totals(2, 2).check_finite(17, 3.0)
    with pytest.raises(TrainingDivergedError, match="step 17"):
        totals(loss, cross_entropy).check_finite(17, norm)


def test_the_digest_tells_which_sequences_came_in_which_order():
    def digest(*steps: list[int]) -> str:
        progress = Progress()
        for step in steps:
            progress.saw(np.array(step))
        return progress.sequence_digest

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    others = [digest([1, 2], [3]), digest([2, 1], [3]), digest([3], [1, 2]), digest([1, 2]), digest([1, 2], [3], [4])]
    assert len(set(others)) == len(others)
    assert digest(np.array([1, 2], dtype=np.int32)) == digest(np.array([9, 1, 9, 2])[1::2])  # type: ignore[arg-type]


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
def test_the_loss_falls_on_a_repeated_batch(method):
    run = replace(RUNS[method], tokens=15 * RUN.batch_tokens, learning_rate=5e-3)
    tokens = next(batches(run)).tokens
    _, listener = go(engine_of(run), run, (Batch(step, np.arange(BATCH), tokens) for step in range(15)))
    losses = [row["cross_entropy"] for row in listener.rows]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.7)
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("method", RUNS)
def test_the_first_row_is_the_models_own(method):
    """Loss, steps and FLOPs of the first step, by calling the model without engine and loop."""
    run = replace(RUNS[method], tokens=RUN.batch_tokens)
    batch = next(batches(run))
    progress, listener = go(engine_of(run, zero_stage=1), run, iter([batch]))  # stage 0 tells no gradient norm
    model = build_model(run.model_config(VOCABULARY), seed=run.seed)
    tokens = torch.as_tensor(batch.tokens)
    output = model(tokens[:, :-1], tokens[:, 1:])
    output.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (row,) = listener.rows
    flops = model.flops(output.trace.counts)
    expected = {
        "step": 1,
        "tokens": BATCH * CONTEXT,
        "loss": float(output.loss.detach()),
        "cross_entropy": float(output.cross_entropy),
        "penalty": float(output.penalty),
        "mean_steps": output.trace.mean_steps,
        "expected_steps": output.trace.expected_steps,
        "grad_norm": float(norm),
        "learning_rate": run.learning_rate,
        "flops_realised": 3 * flops.realised,
        "flops_executed": 3 * flops.executed,
        "flops_paper": 3 * flops.paper,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    histogram = output.trace.histogram()
    assert row["steps_histogram"] == pytest.approx([count / (BATCH * CONTEXT) for count in histogram])
    assert progress.pass_rows == sum(output.trace.counts.rows)


@pytest.mark.parametrize(
    ("zero_stage", "vocabulary"),
    [
        (0, VOCABULARY),
        (1, VOCABULARY),
        (3, LARGE),
    ],
)
def test_the_ledger_is_the_sum_over_the_steps(zero_stage, vocabulary):
    """Each step's counts are taken where the model gives them, and summed by hand."""
    run = replace(RUNS["adaptive"], tokens=3 * RUN.batch_tokens)
    engine = engine_of(run, zero_stage=zero_stage, accumulation=2, vocabulary=vocabulary)
    seen: list[PassCounts] = []
    engine.module.register_forward_hook(lambda _, __, output: seen.append(output.trace.counts))
    progress, listener = go(engine, run, batches(run), micro_batch_sequences=BATCH // 2)
    assert len(seen) == 6
    model = build_model(run.model_config(vocabulary), seed=run.seed)
    flops = [model.flops(counts).training for counts in seen]
    assert progress.flops_realised == pytest.approx(sum(f.realised for f in flops))
    assert progress.flops_executed == pytest.approx(sum(f.executed for f in flops))
    assert progress.flops_paper == pytest.approx(sum(f.paper for f in flops))
    assert progress.flops_paper > 0
    assert progress.pass_rows == sum(sum(counts.rows) for counts in seen)
    assert progress.tokens == run.tokens
    assert [row["tokens"] for row in listener.rows] == [BATCH * CONTEXT * n for n in (1, 2, 3)]
    assert listener.rows[-1]["flops_realised"] == progress.flops_realised


def test_rows_average_over_what_happened_since_the_last_one():
    run = RUNS["adaptive"]
    _, every = go(engine_of(run), run, batches(run), checkpoints=6)
    _, seldom = go(engine_of(run), run, batches(run), checkpoints=2, log_every_seconds=1e9)
    assert [row["step"] for row in seldom.rows] == [3, 6]
    for last, row in zip((3, 6), seldom.rows, strict=True):
        for name in ("loss", "cross_entropy", "penalty", "mean_steps", "expected_steps"):
            values = [each[name] for each in every.rows[last - 3 : last]]
            assert row[name] == pytest.approx(sum(values) / 3, rel=1e-4, abs=1e-5), name
        assert sum(row["steps_histogram"]) == pytest.approx(1)
        assert row["learning_rate"] == every.rows[last - 1]["learning_rate"]
        assert row["flops_realised"] == pytest.approx(every.rows[last - 1]["flops_realised"], rel=1e-3)


def test_milestones_happen_in_their_order_and_are_logged():
    run = RUN
    _, listener = go(engine_of(run), run, batches(run), evaluations=3, checkpoints=2, log_every_seconds=1e9)
    assert listener.told == [
        *[("log", 2), ("evaluate", 2), ("log", 3), ("checkpoint", 3), ("log", 4), ("evaluate", 4)],
        *[("log", 6), ("checkpoint", 6)],  # the last evaluation is the caller's
    ]


def test_training_goes_on_in_training_mode_after_an_evaluation():
    engine, listener, modes = engine_of(RUN), Listener(), []
    engine.module.register_forward_hook(lambda module, *_: modes.append(module.training))
    listener._evaluate = lambda progress: engine.module.eval()  # type: ignore[method-assign,assignment,return-value]
    go(engine, RUN, batches(RUN), evaluations=3, listener=listener)
    assert modes == [True] * STEPS


def test_the_schedule_reaches_the_optimizer():
    engine = engine_of(RUN)
    used: list[float] = []
    step = engine.optimizer.step

    def watched(*arguments: Any, **named: Any) -> Any:
        used.extend({group["lr"] for group in engine.optimizer.param_groups})
        return step(*arguments, **named)

    engine.optimizer.step = watched
    _, listener = go(engine, RUN, batches(RUN))
    points = [Spent(step=step, tokens=step * RUN.batch_tokens, flops=0.0) for step in range(STEPS + 1)]
    assert used == [learning_rate(RUN, before, after) for before, after in itertools.pairwise(points)]
    assert [row["learning_rate"] for row in listener.rows] == used


def test_only_matrices_decay():
    groups = engine_of(RUN).optimizer.param_groups
    decays = sorted((group["weight_decay"], {p.ndim >= 2 for p in group["params"]}) for group in groups)
    assert decays == [(0.0, {False}), (RUN.weight_decay, {True})]


# ---- the same result whatever the execution -------------------------------------------------------------------------


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_resumed_run_is_the_uninterrupted_run(method, zero_stage, tmp_path):
    """To the last bit: a run that was killed has the same place in a study as one that was not."""
    run = RUNS[method]
    engine, listener = engine_of(run, zero_stage=zero_stage), Listener()
    listener.at_checkpoint = lambda progress: save_checkpoint(engine, tmp_path / f"at-{progress.step}", progress)
    whole, _ = go(engine, run, batches(run), listener=listener, checkpoints=2)
    assert listener.at("checkpoint") == [3, 6]

    other_start = replace(run, seed=run.seed + 1)  # all that counts comes from the checkpoint
    second = engine_of(other_start, zero_stage=zero_stage)
    progress = load_checkpoint(second, tmp_path / "at-3")
    assert progress.step == 3
    resumed, later = go(second, run, batches(run, 3), progress, checkpoints=2)
    assert timeless(later.rows) == timeless(listener.rows[3:])
    assert replace(resumed, seconds=0) == replace(whole, seconds=0)
    for (name, mine), theirs in zip(full_weights(second).items(), full_weights(engine).values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    for zero_stage in (0, 1):
        with pytest.raises(RuntimeError, match="holds no checkpoint that this run can resume from") as refusal:
            load_checkpoint(engine_of(RUN, zero_stage=zero_stage), tmp_path)
        assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("method", RUNS)
def test_accumulation_does_not_change_the_result(method):
    run = RUNS[method]
    _, once = go(engine_of(run, zero_stage=1), run, batches(run))
    _, pieces = go(engine_of(run, zero_stage=1, accumulation=4), run, batches(run), micro_batch_sequences=BATCH // 4)
    for name in ("loss", "cross_entropy", "grad_norm"):
        one, other = ([row[name] for row in rows] for rows in (once.rows, pieces.rows))
        assert one == pytest.approx(other, rel=2e-4), name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_zero_stage_does_not_change_the_result(zero_stage):
    run = RUNS["adaptive"]
    _, plain = go(engine_of(run, vocabulary=LARGE), run, batches(run))
    engine = engine_of(run, zero_stage=zero_stage, vocabulary=LARGE)
    _, sharded = go(engine, run, batches(run))
    for name in ("loss", "mean_steps"):
        assert [row[name] for row in sharded.rows] == pytest.approx([row[name] for row in plain.rows], rel=1e-4), name
    shapes = {name: weight.shape for name, weight in full_weights(engine).items()}
    whole = build_model(run.model_config(LARGE), seed=0).state_dict()
    assert shapes == {name: weight.shape for name, weight in whole.items()}


def test_exported_weights_are_the_trained_ones():
    run = RUNS["adaptive"]
    engine = engine_of(run, zero_stage=1)
    go(engine, run, batches(run))
    model = build_model(run.model_config(VOCABULARY), seed=99)
    model.load_state_dict(full_weights(engine))
    tokens = torch.as_tensor(next(batches(run)).tokens)
    with torch.no_grad():
        mine, theirs = (m.eval()(tokens[:, :-1], tokens[:, 1:]).nll_BT for m in (model, engine.module))
    assert torch.equal(mine, theirs)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[1, 2], [0, 2], [0, 0], [0]])
def test_a_stream_that_delivers_the_wrong_step_is_refused(steps):
    engine, tokens = engine_of(RUN), next(batches(RUN)).tokens
    with pytest.raises(ValueError, match=r"data stream delivered step (\d|None), step \d is due"):
        go(engine, RUN, (Batch(step, np.arange(BATCH), tokens) for step in steps))


@pytest.mark.parametrize("options", [VanillaOptions(), AdaptiveOptions(l_max=1)])
def test_a_loss_that_is_lost_stops_the_run_before_it_is_logged(options):
    run = replace(RUN, method=Method.ADAPTIVE if options != VanillaOptions() else Method.VANILLA, options=options)
    engine, listener = engine_of(run), Listener()

    def poisoned() -> Iterator[Batch]:
        for batch in batches(run):
            if batch.step == 2:
                with torch.no_grad():
                    engine.module.embedding.weight.fill_(math.nan)
            yield batch

    with pytest.raises(TrainingDivergedError, match="nan at step 3"):
        go(engine, run, poisoned(), listener=listener)
    assert [row["step"] for row in listener.rows] == [1, 2]
    assert listener.at("checkpoint") == []
