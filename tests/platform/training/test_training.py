"""The training loop with DeepSpeed in this process: schedule, ledger, resumption, accumulation, refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from haltscale.model import AdaptiveOptions, Method, PassCounts, VanillaOptions, build_model
from haltscale.platform.config import Precision
from haltscale.platform.execution import Offload
from haltscale.platform.schedule import Spent, learning_rate
from haltscale.platform.training import loop, metrics
from haltscale.platform.training.engine import full_weights
from haltscale.platform.training.mfu import peak_flops
from haltscale.platform.training.monitors import RunCappedError, TrainingDivergedError
from haltscale.platform.training.progress import Progress

from looping import (
    BATCH,
    CONTEXT,
    LARGE,
    RUN,
    RUNS,
    STEPS,
    VOCABULARY,
    Batch,
    Listener,
    batches,
    engine_of,
    forget,
    go,
    timeless,
    train_and_save,
)

# ---- pure parts -----------------------------------------------------------------------------------------------------


def test_a_precision_that_is_named_is_taken():
    assert replace(RUN, precision=Precision.FP32).resolved().precision is Precision.FP32
    assert replace(RUN, precision=Precision.BF16).resolved().precision is Precision.BF16
    assert replace(RUN, precision=Precision.AUTO).resolved().precision in (Precision.FP32, Precision.BF16)
    assert replace(RUN, precision=Precision.AUTO).resolved(on_gpu=True).precision is Precision.BF16


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
def test_the_first_row_is_the_models_own(device, method):
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
def test_the_ledger_is_the_sum_over_the_steps(device, zero_stage, vocabulary):
    """Each step's counts are taken where the model gives them, and summed by hand."""
    run = replace(RUNS["adaptive"], tokens=3 * RUN.batch_tokens)
    engine = engine_of(run, zero_stage=zero_stage, micro_batch_sequences=BATCH // 2, vocabulary=vocabulary)
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


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_a_peak_is_known_or_not_told(name, dtype, peak):
    assert peak_flops(name, dtype) == peak


def test_utilisation_is_what_was_needed_over_the_peak(monkeypatch):
    run = RUNS["adaptive"]
    _, unknown = go(engine_of(run), run, batches(run))
    assert not any("mfu" in row for row in unknown.rows)
    monkeypatch.setattr(loop, "peak_flops", lambda name, dtype: 1e12)
    _, known = go(engine_of(run), run, batches(run))
    before = {"flops_realised": 0.0, "seconds": 0.0}
    for row in known.rows:
        rate = (row["flops_realised"] - before["flops_realised"]) / (row["seconds"] - before["seconds"])
        assert row["mfu"] == pytest.approx(rate / 1e12)
        before = row


def test_compiling_is_told_apart_from_the_rates(monkeypatch):
    """Of the seconds until the second row, one went into compiling, before the first step was done."""
    told = iter([0.0, 1.0])
    monkeypatch.setattr(metrics, "compile_seconds", lambda: next(told, 1.0))
    progress = Progress()
    window = metrics.MetricsWindow(progress)
    step = metrics.StepTotals(sums=np.ones(12), rank_steps=np.ones(1), histogram=np.ones(2))
    rows = []
    for seconds in (3.0, 5.0):
        progress.seconds = seconds
        progress.tokens = int(20 * seconds)
        window.add(step)
        rows.append(window.close(progress, 1e-3, None))
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([60 / 2, 40 / 2])
    assert rows[0]["compile_seconds"] == 1.0
    assert "compile_seconds" not in rows[1]


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
def test_accumulation_does_not_change_the_result(method):
    run = RUNS[method]
    _, once = go(engine_of(run, zero_stage=1), run, batches(run))
    _, pieces = go(
        engine_of(run, zero_stage=1, micro_batch_sequences=BATCH // 4),
        run,
        batches(run),
        micro_batch_sequences=BATCH // 4,
    )
    for name in ("loss", "cross_entropy", "grad_norm"):
        one, other = ([row[name] for row in rows] for rows in (once.rows, pieces.rows))
        assert one == pytest.approx(other, rel=2e-4), name


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_zero_stage_does_not_change_the_result(device, zero_stage):
    run = RUNS["adaptive"]
    _, plain = go(engine_of(run, vocabulary=LARGE), run, batches(run))
    engine = engine_of(run, zero_stage=zero_stage, vocabulary=LARGE)
    _, sharded = go(engine, run, batches(run))
    for name in ("loss", "mean_steps"):
        assert [row[name] for row in sharded.rows] == pytest.approx([row[name] for row in plain.rows], rel=1e-4), name
    shapes = {name: weight.shape for name, weight in full_weights(engine).items()}
    whole = build_model(run.model_config(LARGE), seed=0).state_dict()
    assert shapes == {name: weight.shape for name, weight in whole.items()}


EXECUTIONS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "compiled, with activation checkpointing, in shards": {
        "compile": True,
        "activation_checkpointing": True,
        "zero_stage": 2,
    },
    "activation checkpointing": {"activation_checkpointing": True},
    "activation checkpointing in shards": {"activation_checkpointing": True, "zero_stage": 3},
    "optimizer on the CPU, stage 1": {"offload_optimizer": Offload.CPU},
    "optimizer on the CPU, stage 2": {"offload_optimizer": Offload.CPU, "zero_stage": 2},
    "all on the CPU": {"offload_optimizer": Offload.CPU, "offload_parameters": Offload.CPU, "zero_stage": 3},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if "compiled" in n else []) for n in EXECUTIONS],
)
def test_the_execution_does_not_change_the_result(name):
    run = RUNS["adaptive"]
    _, plain = go(engine_of(run, zero_stage=1, vocabulary=LARGE), run, batches(run))
    changes = {"zero_stage": 1} | EXECUTIONS[name]
    _, other = go(engine_of(run, vocabulary=LARGE, **changes), run, batches(run), **changes)
    losses, others = ([row["loss"] for row in listener.rows] for listener in (plain, other))
    assert others == pytest.approx(losses, rel=1e-4)


def test_deterministic_kernels_are_asked_for():
    try:
        run = replace(RUNS["adaptive"], precision=Precision.BF16)
        _, first = go(engine_of(run, deterministic=True), run, batches(run), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        _, second = go(engine_of(run, deterministic=True), run, batches(run), deterministic=True)
        assert timeless(first.rows) == timeless(second.rows)
    finally:
        torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("zero_stage", range(4))
def test_a_run_goes_on_from_its_checkpoint(device, zero_stage, tmp_path):
    """On CPUs to the last bit; a GPU adds up in no fixed order."""
    whole = train_and_save(str(tmp_path), zero_stage=zero_stage)
    forget(str(tmp_path), 6)
    resumed = train_and_save(str(tmp_path), zero_stage=zero_stage)
    assert resumed["from"] == 3
    assert resumed["digest"] == whole["digest"]
    exact = {} if device.type == "cuda" else {"rel": 0, "abs": 0}
    assert resumed["losses"] == pytest.approx(whole["losses"][3:], **exact)


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


def test_a_run_that_has_had_its_time_saves_and_ends():
    """With a checkpoint, so that a higher limit resumes it."""
    listener = Listener()
    with pytest.raises(RunCappedError, match="max_hours \\(1\\) is reached at step 1: raise it to resume"):
        go(engine_of(RUN), RUN, batches(RUN), Progress(seconds=3601.0), listener=listener, max_hours=1.0)
    assert listener.at("checkpoint") == [1]
    progress, _ = go(engine_of(RUN), RUN, batches(RUN), Progress(seconds=3601.0), max_hours=2.0)
    assert progress.step == STEPS
