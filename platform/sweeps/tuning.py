"""Tuning: find good settings (lam, beta, tau, a learning rate) before comparing anything.

A tuning study chooses by the held-out loss, so its runs have the role ``tuning`` in ``spec.json`` and ``record.json``
and a study of their own: they cannot enter a frontier by accident. Compare with fresh seeds afterwards.

Its points follow from its seed and its results alone. So a tuning study that was killed asks for the same runs again,
finds them finished, and continues; a larger ``samples`` runs only what is new.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from haltscale.platform.store import ENDED, RunState, RunStore, RunView
from haltscale.platform.sweeps.expansion import PlannedRun
from haltscale.platform.sweeps.spec import TUNING
from haltscale.platform.sweeps.study import Study
from haltscale.platform.sweeps.sweep import Distribution, Point, Sweep, grid, sample

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

OBJECTIVES = ("loss", "flops_realised", "mean_steps", "passes_per_token", "wall_seconds")
"""What a record has that less of is better."""


class Search(StrEnum):
    """How the next points are chosen."""

    RANDOM = "random"
    """Independently of all results; the only one that successive halving goes with."""
    TPE = "tpe"
    """Optuna's tree-structured Parzen estimator (needs ``haltscale[tuning]``), in rounds of ``batch`` points."""


@dataclass(frozen=True, kw_only=True)
class TuningStudy(Study):
    """A study whose points are searched for. ``sweep`` has one point: what all runs share beside ``base``."""

    sweep: Sweep = field(default_factory=grid)
    space: Mapping[str, Distribution]
    """What to search: a field of the run or an option of its method, and where from (``log_uniform(0.01, 1)``)."""
    samples: int = 20
    """How many points in all."""
    search: Search = Search.RANDOM
    objectives: tuple[str, ...] = ("loss",)
    """Columns of the record to make small; with several (``("loss", "flops_realised")``) the search is for all points
    that no other one beats in every respect."""
    batch: int = 4
    """Points that TPE asks for at a time; they train side by side, and the next ones know their results."""
    seed: int = 0
    """Of the search; runs have the base's."""
    role: str = TUNING

    def problems(
        self, cluster: Mapping[str, float] | None = None, views: Mapping[str, RunView] | None = None
    ) -> list[str]:
        """Everything that is wrong with the study, all at once."""
        found = super().problems(cluster, views)
        if len(self.sweep) != 1:
            found.append(f"the sweep of a tuning study must have one point (got {len(self.sweep)})")
        if not self.space:
            found.append("space is empty: give it something to search, such as lam=log_uniform(0.01, 1.0)")
        elif not found:
            found += [problem.partition(": ")[2] for problem in self.drawn._expansion.problems[:1]]
        for name in ("samples", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                found.append(f"{name} must be an integer of at least 1 (got {getattr(self, name)!r})")
        if self.search not in list(Search):
            found.append(f"search must be one of {', '.join(Search)} (got {self.search!r})")
        if not self.objectives or not set(self.objectives) <= set(OBJECTIVES):
            found.append(f"objectives must be one or more of {', '.join(OBJECTIVES)} (got {self.objectives!r})")
        if self.halving and self.search is not Search.RANDOM:
            found.append("halving requires search='random': TPE cannot learn from a run that was stopped early")
        return found

    @cached_property
    def drawn(self) -> Study:
        """The study of the points that random search draws; with TPE, of those that its first round may ask for."""
        return self._over(list(sample(self.samples, seed=self.seed, **self.space)))  # type: ignore[arg-type]

    def _over(self, points: list[Point]) -> Study:
        """This study with its points given; equal ones are one run."""
        different = [point for index, point in enumerate(points) if point not in points[:index]]
        given = Sweep(tuple(different)) * self.sweep
        shared = ("name", "question", "corpus", "base", "execution", "note", "role", "halving")
        return Study(**{name: getattr(self, name) for name in shared}, sweep=given)

    def _planned(self, views: Mapping[str, RunView]) -> list[PlannedRun]:
        if self.search is Search.RANDOM:
            return self.drawn._planned(views)
        return self._over(self._suggested(views))._planned(views)

    def _suggested(self, views: Mapping[str, RunView]) -> list[Point]:
        """All points of the rounds up to the first one that is not finished: a pure function of the results."""
        searcher, points = self._searcher(), list[Point]()
        while len(points) < self.samples:
            trials = [searcher.ask(self._distributions) for _ in range(min(self.batch, self.samples - len(points)))]
            suggested = [{name: self._rounded(name, value) for name, value in trial.params.items()} for trial in trials]
            points += suggested
            results = [self._result(point, views) for point in suggested]
            if any(result is None for result in results):
                break
            for trial, result in zip(trials, results, strict=True):
                searcher.tell(trial, result)
        return points

    def _searcher(self) -> optuna.Study:
        import optuna  # only a search by TPE needs it

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.seed, constant_liar=True, n_startup_trials=2 * self.batch)
        return optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=sampler)

    @cached_property
    def _distributions(self) -> dict[str, Any]:
        import optuna

        made: dict[str, Any] = {}
        for name, axis in self.space.items():
            if axis.choices:
                made[name] = optuna.distributions.CategoricalDistribution(axis.choices)
            elif axis.whole:
                made[name] = optuna.distributions.IntDistribution(int(axis.low), int(axis.high))
            else:
                made[name] = optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.logarithmic)
        return made

    def _rounded(self, name: str, value: Any) -> Any:
        axis = self.space[name]
        return value if axis.choices or axis.whole else float(f"{value:.4g}")

    def _result(self, point: Point, views: Mapping[str, RunView]) -> list[float] | None:
        """The objectives of a point that has ended; a failed run is as bad as can be."""
        (run,) = self._over([point]).runs
        view = views.get(self.key(run))
        if view is None or view.state not in (RunState.FINISHED, *ENDED):
            return None
        return [float(view.record.get(name, 1e9)) for name in self.objectives]

    def best(self, store: RunStore | None = None) -> pd.DataFrame:
        """The finished runs that no other one beats in every objective, best first by the first one."""
        results = self.results(store)
        results = results[results["state"] == RunState.FINISHED].sort_values(list(self.objectives))
        values = results[list(self.objectives)].to_numpy()
        beaten = [any((other <= own).all() and (other < own).any() for other in values) for own in values]
        return results[[not is_beaten for is_beaten in beaten]]
