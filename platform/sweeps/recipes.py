"""Tuning as a stage: which tuning runs an arm needs next, and, when they have finished, its recipe.

A pure function of the finished runs. So a study that was interrupted asks for the same runs again, and a wider grid for
those alone that it adds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from haltscale.model import VanillaOptions
from haltscale.model.config import Method
from haltscale.platform.config import RunConfig, apply_point
from haltscale.platform.sweeps import planning
from haltscale.platform.sweeps.rules import rounded
from haltscale.platform.sweeps.sweep import Tuning

Values = tuple[Any, ...]
"""A value for each name that is tuned, in their order."""


class RecipeSource(StrEnum):
    """Where a compared run's recipe comes from; in ``recipe.source`` of its record."""

    TUNED = "tuned"
    """Found by tuning this arm at this size."""
    CARRIED = "carried"
    """Found by tuning this arm at another size or budget, and carried over by a named rule."""
    RULE = "rule"
    """Given by a rule from shape and budget; not tuned here."""
    SUBJECT = "subject"
    """Of a control that replays its subject: that run's, which is what makes it a control."""
    BORROWED = "borrowed"
    """Tuned for another arm or size, and used here as it is."""
    GIVEN = "given"
    """Set by hand for this control."""


@dataclass(frozen=True)
class RunTuned:
    """A compared run whose recipe is to be found."""

    run: RunConfig
    """The compared run, but for its recipe."""
    trial: RunConfig
    """A tuning run, but for its recipe."""
    how: Tuning

    def tried(self, values: Values) -> RunConfig:
        """The tuning run with these values."""
        return with_values(self.trial, dict(zip(self.how.names, values, strict=True)))

    def same(self) -> tuple[RunConfig, Tuning]:
        """Equal for what is the same compared run."""
        return self.run.canonical(), self.how


def with_values(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A run with some of its fields, or of its method's options, changed."""
    return apply_point(run, {"method": run.method, **values})[0]


def tuned_problems(tuned: RunTuned, vocab_size: int) -> list[str]:
    """Everything wrong with how a run is tuned, each value tried included; the run itself was checked before."""
    how, found = tuned.how, list(tuned.how.problems())
    for name, values in how.over if not found else ():
        for value in values:
            run, unknown = apply_point(tuned.trial, {"method": tuned.trial.method, name: value})
            found += [f"over {name}: {problem}" for problem in unknown or run.problems(vocab_size)]
            if unknown:
                break
    if how.rule is not None and not found:
        found += how.rule.problems(tuned.run) or how.rule.problems(tuned.trial)
    if how.rule is None and tuned.trial.shape != tuned.run.shape:
        found.append(
            f"tuned at {tuned.trial.size} for {tuned.run.size}: give the rule by which the recipe changes with the"
            " size, such as rule=StepLaw(), or rule=Constant() to claim that it does not"
        )
    if (warmup := tuned.trial.warmup_tokens) is not None and tuned.trial.flops is None and warmup >= tuned.trial.tokens:
        found.append(
            f"warmup_tokens {warmup} is all of a tuning run's {tuned.trial.tokens} tokens: give tuned a larger share"
        )
    return list(dict.fromkeys(found))


def shortened(run: RunConfig, share: float) -> RunConfig:
    """A run with a share of its budget, in whole steps, one at least."""
    if run.flops is not None:
        return replace(run, flops=run.flops * share)
    return replace(run, tokens=max(1, int(run.tokens * share) // run.batch_tokens) * run.batch_tokens)


def plain_of(tuned: RunTuned, vocab_size: int) -> RunTuned | None:
    """The plain model's tuning beside a subject's: at its size and tuning budget, over what a plain model has.

    Its tuning runs are those of a vanilla arm of that size and budget, and are known before the subject has finished.
    None where nothing is left to tune.
    """
    names = {f.name for f in fields(RunConfig)}
    over = tuple((name, values) for name, values in tuned.how.over if name in names)
    if not over and tuned.how.over:
        return None

    def plain(run: RunConfig) -> RunConfig:
        made = replace(run, method=Method.VANILLA, options=VanillaOptions(), flops=None)
        return made if run.flops is None else replace(made, tokens=planning.tokens_for(run.flops, made, vocab_size))

    return RunTuned(run=plain(tuned.run), trial=plain(tuned.trial), how=replace(tuned.how, over=over))


@dataclass(frozen=True, kw_only=True)
class Search:
    """How far the tuning of an arm is."""

    tried: dict[Values, RunConfig]
    """All tuning runs known so far, by what they try."""
    losses: dict[Values, float] = field(default_factory=dict)
    """Held-out loss in nats per token of those that have ended; infinite where one diverged."""
    best: Values | None = None
    """None while a tuning run is missing, or where all of them diverged."""
    axes: dict[str, Values] = field(default_factory=dict)
    """The values of each name, with those that the axis was extended by."""

    @property
    def failed(self) -> bool:
        """Whether every tuning run has ended and none has a result."""
        return self.best is None and bool(self.losses) and len(self.losses) == len(self.tried)


def search(tuned: RunTuned, loss_of: Callable[[RunConfig], float | None], vocab_size: int) -> Search:
    """The tuning runs of an arm, and the best of them where all have ended.

    First the whole grid. Then, until the best one has both neighbours on every axis of numbers: those neighbours that
    are missing, inside the grid or one ratio beyond its end.

    Args:
        loss_of: a tuning run's held-out loss; None where it has not ended, infinite where it diverged.
    """
    if not tuned.how.over:  # the rule says it all
        return Search(tried={}, best=())
    axes: dict[str, list[Any]] = {name: list(values) for name, values in tuned.how.over}
    given = Counter({name: len(values) for name, values in axes.items()})
    tried = {values: tuned.tried(values) for values in itertools.product(*axes.values())}
    while True:
        found = {values: loss_of(run) for values, run in tried.items()}
        losses = {values: loss for values, loss in found.items() if loss is not None}
        shown = {name: tuple(values) for name, values in axes.items()}
        if len(losses) < len(tried):
            return Search(tried=tried, losses=losses, axes=shown)
        best = min(losses, key=losses.__getitem__)
        if not math.isfinite(losses[best]):
            return Search(tried=tried, losses=losses, axes=shown)
        more: dict[Values, RunConfig] = {}
        for place, (name, axis) in enumerate(axes.items()):
            for step in (-1, 1):
                value = _neighbour(axis, best[place], step)
                if value is None and len(axis) - given[name] < tuned.how.extensions:
                    value = _beyond(axis, step)
                    run = None if value is None else tuned.tried((*best[:place], value, *best[place + 1 :]))
                    if run is None or run.problems(vocab_size):
                        continue
                    axis.insert(0 if step < 0 else len(axis), value)
                if value is not None and (at := (*best[:place], value, *best[place + 1 :])) not in tried:
                    more[at] = tuned.tried(at)
        if not more:
            return Search(tried=tried, losses=losses, axes=shown, best=best)
        tried |= more


def _is_numeric(axis: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis)


def _neighbour(axis: list[Any], value: Any, step: int) -> Any:
    """The next value of an axis; None at its end, and for what is not a number."""
    place = axis.index(value) + step
    return axis[place] if _is_numeric(axis) and 0 <= place < len(axis) else None


def _beyond(axis: list[Any], step: int) -> Any:
    """The value one ratio beyond an axis's end; None where it has no ratio there."""
    if not _is_numeric(axis):
        return None
    end, inner = (axis[0], axis[1]) if step < 0 else (axis[-1], axis[-2])
    if end <= 0 or inner <= 0:  # weight decay 0 has nothing below it; above it, what follows is doubled
        return None if step < 0 or end <= 0 else end * 2
    value = end * (end / inner)
    if isinstance(end, int):
        return whole if (whole := round(value)) not in axis and whole > 0 else None
    return float(f"{value:.6g}")


def recipe_of(
    tuned: RunTuned, found: Search, key: Callable[[RunConfig], str], vocab_size: int, *, borrowed: bool = False
) -> dict[str, Any]:
    """What the record of a compared run says about its recipe, JSON-able.

    Args:
        found: a search with a best.
        key: of a run in the store.
        borrowed: the values were found at another size, and no rule carries them.

    Returns:
        ``source`` (:class:`RecipeSource`); ``values`` (those used); ``found`` (the best of those tried); ``tried``:
        rows of the values, ``loss`` (nats per token; null: diverged) and ``key``; ``at``: size, seed and budget of the
        tuning runs; ``rule``: name and source; ``neighbours``: by name, how much higher the loss is one value below
        and one above the best, in nats per token (null: not tried, or diverged); ``at_end``: names whose best is the
        first or last of those tried.
    """
    assert found.best is not None
    how, best = tuned.how, dict(zip(tuned.how.names, found.best, strict=True))
    rule, trial = how.rule, tuned.trial
    values = rule.carried(best, with_values(trial, best), tuned.run, vocab_size) if rule else best
    source = RecipeSource.TUNED
    if rule is not None and not best:
        values = _absolute(tuned.run, how, vocab_size)
        source = RecipeSource.RULE
    elif borrowed:
        source = RecipeSource.BORROWED
    elif trial.shape != tuned.run.shape or values != best:
        source = RecipeSource.CARRIED
    low = found.losses.get(found.best, math.nan)
    neighbours: dict[str, dict[str, float | None]] = {}
    at_end = []
    for place, name in enumerate(how.names):
        axis = list(found.axes[name])
        if not _is_numeric(axis):
            continue
        beside = {}
        for side, step in (("below", -1), ("above", 1)):
            value = _neighbour(axis, found.best[place], step)
            loss = found.losses.get((*found.best[:place], value, *found.best[place + 1 :]), math.inf)
            beside[side] = round(loss - low, 6) if math.isfinite(loss) else None
        neighbours[name] = beside
        if found.best[place] in (axis[0], axis[-1]) and found.best[place] != 0:  # nothing is below 0
            at_end.append(name)
    return {
        "source": str(source),
        "values": values,
        "found": best,
        "tried": [
            {
                **dict(zip(how.names, tried, strict=True)),
                "loss": loss if math.isfinite(loss) else None,
                "key": key(found.tried[tried]),
            }
            for tried, loss in found.losses.items()
        ],
        "at": {
            "method": str(trial.method),
            "size": trial.size,
            "seed": trial.seed,
            **({"tokens": trial.tokens} if trial.flops is None else {"flops": trial.flops}),
        },
        "rule": {"name": rule.name, "source": rule.source} if rule else None,
        "neighbours": neighbours,
        "at_end": at_end,
    }


def _absolute(run: RunConfig, how: Tuning, vocab_size: int) -> dict[str, Any]:
    assert how.rule is not None
    return rounded(how.rule.recipe(run, vocab_size), run) if how.rule.gives else {}
