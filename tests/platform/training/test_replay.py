"""What a run's tokens took in steps is recorded, and a replay control, really trained, repeats it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from haltscale.model import (
    AdaponderOptions,
    AdaptiveOptions,
    Method,
    MorOptions,
    Ponder3Options,
    Routing,
    StepsFrom,
    build_model,
)
from haltscale.platform.checkpoints import Checkpoints
from haltscale.platform.schedule import Spent
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.expansion import RunControl, control_run
from haltscale.platform.sweeps.sweep import ControlKind
from haltscale.platform.training.engine import full_weights, snapshot, start
from haltscale.platform.training.progress import Progress
from haltscale.platform.training.steps_schedule import MOST, StepsSchedule

from looping import RUN, VOCABULARY, Listener, batches, engine_of, execution_of, forget, go

STEPS = 48
SUBJECTS = {
    "adaptive": (Method.ADAPTIVE, AdaptiveOptions(lam=1.0, beta=0.0, l_max=3, tau=0.2, router_bias=1.0)),
    "ponder3": (Method.PONDER3, Ponder3Options(lam=1.0, l_max=2, tau=0.3, router_bias=1.0)),
    "adaponder": (Method.ADAPONDER, AdaponderOptions(lam=1.0, l_max=2, fraction=0.5, tau=0.5, router_bias=0.3)),
    "mor": (Method.MOR, MorOptions()),
    "mor, token choice": (Method.MOR, MorOptions(routing=Routing.TOKEN_CHOICE)),
}


def subject_of(case: str, **changes: Any) -> Any:
    method, options = SUBJECTS[case]
    size = "1.8m" if method is Method.MOR else "0.6m"
    values = {"context": 32, "batch_tokens": 32 * 32, "tokens": STEPS * 32 * 32, "learning_rate": 1e-2} | changes
    return replace(RUN, method=method, size=size, options=options, **values)


def trained(run: Any) -> tuple[Progress, Listener, Any]:
    engine = engine_of(run)
    progress, listener = go(engine, run, batches(run))
    return progress, listener, engine


def record_of(run: Any, progress: Progress) -> dict[str, Any]:
    schedule = StepsSchedule.from_list(progress.steps_schedule).by_share(run)
    record = {"steps_schedule": schedule, "steps_histogram": schedule[-1][1:], "flops_realised": 1.0, "tokens": 1}
    return json.loads(json.dumps(record))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * case.startswith("mor")) for case in SUBJECTS]
)
def test_controls_repeat_their_subjects_steps_and_flops(case: str) -> None:
    """Mean steps, realised FLOPs and, shuffled, the histogram within 1 %, over the whole run and along it."""
    subject = subject_of(case)
    progress, rows, _ = trained(subject)
    for kind in (ControlKind.SHUFFLED, ControlKind.FIXED):
        repeats(kind, case, subject, progress, rows)


def repeats(kind: ControlKind, case: str, subject: Any, progress: Progress, rows: Listener) -> None:
    control = control_run(RunControl(kind, subject, None), record_of(subject, progress), VOCABULARY)
    assert control is not None
    assert control.problems(VOCABULARY) == []
    repeated, again, _ = trained(control)
    ours, theirs = (np.array([row["steps_histogram"] for row in one.rows]) for one in (rows, again))
    levels = np.arange(ours.shape[1])
    means = ours @ levels
    if case == "adaptive":
        assert means.max() - means.min() > 0.5, "the router learned nothing: the test has lost its subject"
    assert (theirs @ levels).mean() == pytest.approx(means.mean(), rel=0.01)
    assert repeated.flops_realised == pytest.approx(progress.flops_realised, rel=0.01)
    assert repeated.tokens == progress.tokens
    assert repeated.sequence_digest == progress.sequence_digest
    assert [row["learning_rate"] for row in again.rows] == [row["learning_rate"] for row in rows.rows]
    np.testing.assert_allclose(theirs @ levels, means, atol=0.12)  # of single steps, a thousand tokens each
    if kind is ControlKind.SHUFFLED:
        np.testing.assert_allclose(theirs.mean(0), ours.mean(0), atol=0.01)
    else:
        assert (theirs > 0).sum(1).max() <= 2


def test_a_control_of_a_budget_in_flops_follows_the_same_course() -> None:
    token_run = subject_of("adaptive")
    progress, _, _ = trained(token_run)
    subject = replace(token_run, flops=0.9 * progress.flops_realised)
    first, rows, _ = trained(subject)
    control = control_run(RunControl(ControlKind.SHUFFLED, subject, None), record_of(subject, first), VOCABULARY)
    second, again, _ = trained(control)
    assert second.flops_realised == pytest.approx(first.flops_realised, rel=0.02)  # whole steps
    assert second.tokens == pytest.approx(first.tokens, rel=0.025)
    rates = [
        [row["learning_rate"] for row in one.rows[: min(len(rows.rows), len(again.rows))]] for one in (rows, again)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.02)


@pytest.mark.parametrize("source", [StepsFrom.ROUTER, StepsFrom.SHUFFLED])
def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Any, source: StepsFrom) -> None:
    """Gates held open at first, replayed steps, the recorded schedule: all follow the budget, not the process."""
    schedule = ((0.0, 0.0, 0.1, 0.2, 0.7), (0.5, 0.4, 0.3, 0.2, 0.1))
    options = replace(SUBJECTS["adaptive"][1], gate_warmup=0.4, lam_ramp=0.3, explore=0.2)
    options = replace(options, **({"steps_from": source, "steps_schedule": schedule} if source != "router" else {}))
    run = replace(subject_of("adaptive", tokens=8 * 32 * 32), options=options)
    store = RunStore(tmp_path)

    def once(until: int | None = None) -> tuple[Any, Progress]:
        checkpoints = Checkpoints(store, "study", "run")
        execution = execution_of(run, checkpoints=8)
        engine, progress = start(build_model(run.model_config(VOCABULARY), seed=0), run, execution, checkpoints)
        listener = Listener()
        listener.at_checkpoint = lambda progress: checkpoints.write(snapshot(engine), progress.to_dict())
        go(engine, run, batches(run, progress.step), progress, listener=listener, checkpoints=8)
        checkpoints.wait()
        return full_weights(engine), progress

    whole, progress = once()
    for step in (8, 7, 6, 5, 4):
        forget(str(tmp_path), step)
    resumed, again = once()
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert again.steps_schedule == progress.steps_schedule
    assert len(progress.steps_schedule) == 8


# ---- the schedule ----------------------------------------------------------------------------------------------------


def filled(steps: int, run: Any) -> tuple[StepsSchedule, np.ndarray]:
    stream = np.random.default_rng(0)
    schedule, every = StepsSchedule(), stream.integers(0, 50, (steps, 3)) + 1
    for step, counts in enumerate(every):
        schedule.add(Spent(step=step, tokens=step * run.batch_tokens, flops=step * 2.0), counts)
    return schedule, every


@pytest.mark.parametrize("steps", [1, 7, MOST, MOST + 1, 999, 4321])
def test_a_schedule_keeps_every_token_at_a_hundredth_of_the_budget(steps: int) -> None:
    run = replace(RUN, tokens=steps * RUN.batch_tokens)
    schedule, every = filled(steps, run)
    rows = np.array(schedule.to_list())
    assert len(rows) <= MOST
    np.testing.assert_array_equal(rows[:, 2:].sum(0), every.sum(0))
    edges = [*rows[:, 0].astype(int), steps]
    assert max(np.diff(edges)) <= max(1, steps / 100)
    for first, last, row in zip(edges, edges[1:], rows, strict=False):
        np.testing.assert_array_equal(row[2:], every[first:last].sum(0))
    by_share = np.array(schedule.by_share(run))
    assert by_share[0, 0] == 0
    assert (np.diff(by_share[:, 0]) > 0).all()
    assert len(by_share) <= 100
    np.testing.assert_allclose(by_share[:, 1:].sum(1), 1, atol=1e-4)


def test_a_schedule_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    schedule, every = filled(777, RUN)
    half, _ = filled(0, RUN)
    for step, counts in enumerate(every):
        if step % 50 == 0:
            half = StepsSchedule.from_list(json.loads(json.dumps(half.to_list())))
        half.add(Spent(step=step, tokens=0, flops=step * 2.0), counts)
    assert half.to_list() == schedule.to_list()


def test_a_budget_in_flops_is_shared_by_flops() -> None:
    run = replace(RUN, flops=100.0)
    schedule = StepsSchedule()
    for step, spent in enumerate([0.0, 10.0, 70.0]):
        schedule.add(Spent(step=step, tokens=0, flops=spent), [3 - step, step])
    assert schedule.by_share(run) == [
        [0.0, 1.0, 0.0],
        [0.1, 0.66667, 0.33333],
        [0.7, 0.33333, 0.66667],
    ]


def test_what_repeats_itself_is_written_once() -> None:
    schedule = StepsSchedule()
    for step in range(6):
        schedule.add(Spent(step=step, tokens=0, flops=0.0), [0, 8])
    assert schedule.by_share(replace(RUN, tokens=6 * RUN.batch_tokens)) == [[0.0, 0.0, 1.0]]
