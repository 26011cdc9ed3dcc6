"""What a study's runs are at this moment, from its sweep and from those of its runs that have finished.

Some runs are known from the sweep; a tuned run when its tuning runs have finished, and a control when its subject has.
They become known stage by stage (:func:`haltscale.platform.sweeps.ray_tune.run_stages`), by one rule: what stands in
the store decides, so that an interrupted study asks for the same runs again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from haltscale.platform.config import RunConfig
from haltscale.platform.run_table import number
from haltscale.platform.store import Cause, RunState, RunView
from haltscale.platform.sweeps.expansion import Expansion, PlannedRun, RunControl, control_run, labels
from haltscale.platform.sweeps.recipes import RecipeSource, RunTuned, Search, plain_of, recipe_of, search, with_values
from haltscale.platform.sweeps.spec import TUNING

Known = tuple[RunConfig, Mapping[str, Any] | None]
"""A run, and where its recipe is from."""


def planned_runs(
    expansion: Expansion,
    views: Mapping[str, RunView],
    *,
    key: Callable[[RunConfig], str],
    cost: Callable[[RunConfig], float],
    vocab_size: int,
    role: str,
) -> list[PlannedRun]:
    """All runs: tuning runs, the others, what waits; cheapest first.

    Args:
        views: the study's runs in the store, by key.
        key: of a run.
        cost: of a run, to sort by.
        role: of the study's runs, but for the tuning ones.
    """
    stages = _Stages(views, key, vocab_size)
    for run in expansion.runs:
        stages.add(run)
    subjects: dict[Any, Known | None] = {}
    for tuned in expansion.tuned:
        known = subjects[tuned.same()] = stages.tuned(tuned)
        if known:
            stages.add(*known)
        else:
            stages.waiting.append(PlannedRun(label="", run=None, role=role, expected=tuned.run, of=TUNING))
    for control in expansion.controls:
        subject = control.subject
        stages.control(control, subjects[subject.same()] if isinstance(subject, RunTuned) else (subject, None))
    return stages.planned(cost, role)


class _Stages:
    def __init__(self, views: Mapping[str, RunView], key: Callable[[RunConfig], str], vocab_size: int) -> None:
        self._views, self._key, self._vocab_size = views, key, vocab_size
        self._trials: dict[RunConfig, RunConfig] = {}
        self._runs: dict[RunConfig, PlannedRun] = {}
        self._searches: dict[Any, Search] = {}
        self.waiting: list[PlannedRun] = []

    def add(
        self, run: RunConfig, recipe: Mapping[str, Any] | None = None, control: RunControl | None = None,
        subject: RunConfig | None = None,
    ) -> None:  # fmt: skip
        """A run that is known; two subjects may share a control, or the sweep may have it already."""
        kind = control.kind if control else None
        entry = PlannedRun(label="", run=run, control=kind, subject=subject, recipe=recipe)
        self._runs.setdefault(run.canonical(), entry)

    def search(self, tuned: RunTuned) -> Search:
        """The tuning of an arm, with its runs among those planned."""
        arm = (tuned.trial.canonical(), tuned.how)
        if arm not in self._searches:
            self._searches[arm] = found = search(tuned, self._loss, self._vocab_size)
            for trial in found.tried.values():
                self._trials.setdefault(trial.canonical(), trial)
        return self._searches[arm]

    def tuned(self, tuned: RunTuned, *, borrowed: bool = False) -> Known | None:
        """A run with its recipe; None while it is being tuned."""
        found = self.search(tuned)
        if found.best is None:
            return None
        recipe = recipe_of(tuned, found, self._key, self._vocab_size, borrowed=borrowed)
        return with_values(tuned.run, recipe["values"]), recipe

    def control(self, control: RunControl, subject: Known | None) -> None:
        """A control, and the tuning runs of a plain one whose subject is tuned."""
        kind, own = control.kind, control.subject
        plain = None
        if isinstance(own, RunTuned) and not kind.replays and control.learning_rate is None:
            plain = plain_of(own, self._vocab_size)
        if plain is not None:
            self.search(plain)  # its runs need not wait for the subject
        run, found = subject or (None, None)
        made = None
        if run is not None:
            view = self._views.get(self._key(run))
            made = control_run(replace(control, subject=run), view.record if view else {}, self._vocab_size)
        if made is not None:
            recipe: Mapping[str, Any] | None = None
            if plain is not None:
                moved = replace(plain, run=made)
                is_other = plain.how.rule is None and made.shape != plain.trial.shape
                known = self.tuned(moved, borrowed=is_other)
                if known is None:
                    made = None
                else:
                    made, recipe = known
            elif found is not None:
                recipe = _handed_on(found, control)
            elif not kind.replays and control.learning_rate is not None:
                recipe = _handed_on({}, control)
        if made is not None:
            self.add(made, recipe, control, run)
            return
        expected = run or (own.run if isinstance(own, RunTuned) else own)
        self.waiting.append(PlannedRun(label="", run=None, control=kind, subject=run, expected=expected))

    def _loss(self, trial: RunConfig) -> float | None:
        """A tuning run's held-out loss: infinite where it ended without one for good, None where it may yet have it."""
        view = self._views.get(self._key(trial))
        if view is None:
            return None
        if view.state is RunState.FINISHED:
            loss = number(view.record.get("loss"))
            return math.inf if math.isnan(loss) else loss
        if view.state in (RunState.DIVERGED, RunState.FAILED) and view.status.get("cause") == Cause.PERMANENT:
            return math.inf
        return None

    def planned(self, cost: Callable[[RunConfig], float], role: str) -> list[PlannedRun]:
        """Everything with its label."""
        trials = sorted(self._trials.values(), key=cost)
        found = [
            PlannedRun(label=f"tuning · {label}", run=trial, role=TUNING) for trial, label in labels(trials).items()
        ]
        entries = {entry.run: entry for entry in self._runs.values() if entry.run}
        named = labels(sorted(entries, key=cost))
        by_label = {run: named[run] for run in sorted(entries, key=cost)}
        found += [replace(entries[run], label=label, role=role) for run, label in by_label.items()]
        expected = labels([entry.expected for entry in self.waiting if entry.expected and not entry.control])
        for entry in self.waiting:
            assert entry.expected is not None
            label = named.get(entry.expected) or expected.get(entry.expected) or entry.expected.label
            if entry.control:
                found.append(
                    replace(entry, label=f"{entry.control} control of {label}", role=role, of=label, expected=None)
                )
            else:
                found.append(replace(entry, label=label))
        return found


def _handed_on(recipe: Mapping[str, Any], control: RunControl) -> dict[str, Any]:
    """The recipe of a control that has its subject's, or a rate that was set for it by hand."""
    if control.kind.replays:
        return {**recipe, "source": str(RecipeSource.SUBJECT)}
    if control.learning_rate is None:
        return {**recipe, "source": str(RecipeSource.BORROWED)}
    values = {**recipe.get("values", {}), "learning_rate": control.learning_rate}
    return {"source": str(RecipeSource.GIVEN), "values": values}
