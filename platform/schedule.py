"""Budget and learning rate as pure functions of how far a run is.

A budget is a number of tokens or of realised FLOPs; the schedule follows the share of it that is spent, so that it ends
where the run ends, however much the tokens halted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from haltscale.platform.config import RunConfig, Schedule


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has spent before a step, or after it."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    flops: float
    """Realised training FLOPs."""


def share(run: RunConfig, spent: Spent) -> float:
    """Share of the budget that is spent, 0 to 1."""
    if run.flops is not None:
        return min(1.0, spent.flops / run.flops)
    assert run.steps is not None
    return min(1.0, spent.step / run.steps)


def is_over(run: RunConfig, spent: Spent) -> bool:
    """Whether the budget is spent."""
    return share(run, spent) >= 1.0


def reached(run: RunConfig, before: Spent, after: Spent, shares: Iterable[float]) -> bool:
    """Whether the step between ``before`` and ``after`` reached one of these shares of the budget."""
    if run.steps is not None:
        return after.step in {max(1, round(run.steps * each)) for each in shares}
    first, last = share(run, before), share(run, after)
    return any(first < each <= last for each in shares)


def evenly(count: int) -> list[float]:
    """``count`` shares spread evenly, the last of them the end."""
    return [index / count for index in range(1, count + 1)]


def learning_rate(run: RunConfig, before: Spent, after: Spent) -> float:
    """The rate of the step between ``before`` and ``after``: linear warm-up, then the schedule.

    Args:
        run: gives the schedule and its parameters.
        before: what was spent before the step.
        after: what is expected to be spent after it.
    """
    risen = _risen(run, before, after)
    return run.learning_rate * (risen if risen is not None else _scheduled(run, share(run, before)))


def _risen(run: RunConfig, before: Spent, after: Spent) -> float | None:
    """Share of the peak during the warm-up, None after it."""
    if run.warmup_tokens is not None:
        return min(1.0, after.tokens / run.warmup_tokens) if before.tokens < run.warmup_tokens else None
    if share(run, before) < run.warmup_fraction:
        return min(1.0, share(run, after) / run.warmup_fraction)
    return None


def _scheduled(run: RunConfig, done: float) -> float:
    """Share of the peak after the warm-up, where ``done`` of the budget is spent."""
    final = run.final_learning_rate_fraction
    if run.schedule is Schedule.CONSTANT:
        return 1.0
    if run.schedule is Schedule.WSD:
        left = min(1.0, (1 - done) / run.decay_fraction) if run.decay_fraction > 0 else 1.0
        return final + (1 - final) * left
    warmup = _warmup_share(run)
    fallen = (done - warmup) / (1 - warmup) if warmup < 1 else 0.0
    left = 1 - fallen if run.schedule is Schedule.LINEAR else 0.5 * (1 + math.cos(math.pi * fallen))
    return final + (1 - final) * left


def _warmup_share(run: RunConfig) -> float:
    """Share of the budget that the warm-up takes; 0 where it is in tokens and the budget in FLOPs, since nobody knows
    beforehand: the schedule then begins at the start, under the warm-up."""
    if run.warmup_tokens is None:
        return run.warmup_fraction
    return 0.0 if run.steps is None else min(1.0, run.warmup_tokens / (run.steps * run.batch_tokens))


def can_branch(run: RunConfig) -> bool:
    """Whether the run has first steps that do not depend on its budget: WSD, a warm-up in tokens, and a method that
    does the same at every share of the budget (``follows_budget`` of its options)."""
    follows = getattr(run.options, "follows_budget", False)
    return run.schedule == Schedule.WSD and run.warmup_tokens is not None and not follows


def is_stable(run: RunConfig, before: Spent) -> bool:
    """Whether the step after ``before`` is that of any larger budget: the run's decay has not begun."""
    return can_branch(run) and (run.decay_fraction == 0 or (1 - share(run, before)) / run.decay_fraction >= 1)
