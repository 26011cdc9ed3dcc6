"""Budget and learning rate: pure functions, by hand and by invariants."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.config import RunConfig, Schedule
from haltscale.platform.schedule import Spent, evenly, is_over, learning_rate, reached, share

RUN = RunConfig(tokens=20 * 64, context=16, batch_tokens=64, warmup_fraction=0.2, learning_rate=1.0)


def at(run: RunConfig, step: int, *, flops_per_step: float = 7.0) -> Spent:
    return Spent(step=step, tokens=step * run.batch_tokens, flops=step * flops_per_step)


def rates(run: RunConfig, steps: int) -> list[float]:
    return [learning_rate(run, at(run, step), at(run, step + 1)) for step in range(steps)]


runs = st.builds(
    lambda steps, warmup, final, decay, schedule, in_tokens: replace(
        RUN,
        tokens=steps * RUN.batch_tokens,
        warmup_fraction=warmup,
        warmup_tokens=round(warmup * steps * RUN.batch_tokens) if in_tokens else None,
        final_learning_rate_fraction=final,
        decay_fraction=decay,
        schedule=schedule,
        learning_rate=3e-3,
    ),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(Schedule),
    st.booleans(),
)


@given(runs)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(run):
    assert run.steps is not None
    all_rates = rates(run, run.steps)
    warmup = run.warmup_tokens / run.batch_tokens if run.warmup_tokens is not None else run.warmup_fraction * run.steps
    rising = math.ceil(warmup)
    end = run.final_learning_rate_fraction * run.learning_rate
    assert all(rate > 0 or end == 0 for rate in all_rates)
    assert all(after >= before for before, after in itertools.pairwise(all_rates[:rising]))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(all_rates[rising:]))
    assert max(all_rates) <= run.learning_rate * (1 + 1e-12)
    if run.schedule is not Schedule.WSD or run.decay_fraction < 1 - warmup / run.steps:
        assert max(all_rates) == pytest.approx(run.learning_rate)
    if run.schedule is not Schedule.CONSTANT:
        assert all(rate >= end * (1 - 1e-9) for rate in all_rates[rising:])


@given(runs.filter(lambda run: run.schedule is not Schedule.CONSTANT))
def test_the_schedule_ends_where_the_budget_ends(run):
    before = at(run, run.steps)
    falls = run.decay_fraction > 0 if run.schedule is Schedule.WSD else run.warmup_fraction < 0.99
    if falls and (run.warmup_tokens is None or run.warmup_tokens < before.tokens):
        end = run.final_learning_rate_fraction * run.learning_rate
        assert learning_rate(run, before, at(run, run.steps + 1)) == pytest.approx(end, abs=1e-12)


def test_every_schedule_by_hand():
    def after_warmup(schedule: Schedule) -> dict[int, float]:
        found = rates(replace(RUN, schedule=schedule), 20)
        assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
        return {step: found[step] for step in (8, 12, 16, 18)}

    assert after_warmup(Schedule.COSINE) == pytest.approx(
        {step: 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in (8, 12, 16, 18)}
    )
    assert after_warmup(Schedule.LINEAR) == pytest.approx({8: 0.775, 12: 0.55, 16: 0.325, 18: 0.2125})
    assert after_warmup(Schedule.WSD) == pytest.approx({8: 1.0, 12: 1.0, 16: 1.0, 18: 0.55})
    assert after_warmup(Schedule.CONSTANT) == {8: 1.0, 12: 1.0, 16: 1.0, 18: 1.0}


def test_wsd_runs_of_several_budgets_share_their_stable_phase():
    short = replace(RUN, schedule=Schedule.WSD, warmup_tokens=128, decay_fraction=0.25)
    long = replace(short, tokens=3 * short.tokens)
    stable = 15
    assert rates(short, stable) == rates(long, stable)
    assert rates(short, 20)[stable + 1 :] != rates(long, 20)[stable + 1 :]


@given(st.lists(st.floats(0.2, 20.0), min_size=1, max_size=40), st.sampled_from(Schedule))
def test_a_budget_in_flops_follows_what_is_spent(costs, schedule):
    """The same rates as a budget in tokens that has spent the same share, whatever the single steps cost."""
    spent = [0.0, *itertools.accumulate(costs)]
    run = replace(RUN, flops=spent[-1], schedule=schedule, tokens=1)
    in_tokens = replace(RUN, schedule=schedule)
    for step, (before, after) in enumerate(itertools.pairwise(spent)):
        here, there = (Spent(step=step + n, tokens=0, flops=flops) for n, flops in ((0, before), (1, after)))
        twin = [Spent(step=20 * flops / spent[-1], tokens=0, flops=0) for flops in (before, after)]  # type: ignore[arg-type]
        assert share(run, here) == pytest.approx(before / spent[-1])
        assert not is_over(run, here)
        if abs(before / spent[-1] - run.warmup_fraction) > 1e-9:
            assert learning_rate(run, here, there) == pytest.approx(learning_rate(in_tokens, *twin))
    assert is_over(run, Spent(step=len(costs), tokens=0, flops=spent[-1]))


@given(steps=st.integers(1, 1000), count=st.integers(1, 50))
def test_milestones_are_spread_and_end_at_the_end(steps, count):
    run = replace(RUN, tokens=steps * RUN.batch_tokens)
    found = [n + 1 for n in range(steps) if reached(run, at(run, n), at(run, n + 1), evenly(count))]
    assert found[-1] == steps
    assert found[0] > 0
    assert len(found) == count if count <= steps else len(found) <= steps
    gaps = [after - before for before, after in itertools.pairwise([0, *found])]
    assert max(gaps) - min(gaps) <= 1 or count > steps


@given(st.lists(st.floats(0.5, 20.0), min_size=10, max_size=60), st.integers(1, 8))
def test_a_budget_in_flops_passes_every_milestone_once(costs, count):
    spent = [0.0, *itertools.accumulate(costs)]
    run = replace(RUN, flops=spent[-1])
    points = [Spent(step=n, tokens=0, flops=flops) for n, flops in enumerate(spent)]
    found = [after.step for before, after in itertools.pairwise(points) if reached(run, before, after, evenly(count))]
    expected = {next(n for n, flops in enumerate(spent) if flops / spent[-1] >= each) for each in evenly(count)}
    assert found == sorted(expected)
    assert found[-1] == len(costs)
