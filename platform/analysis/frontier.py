"""The best that compute can buy: Pareto frontiers, and isoFLOP profiles with their minima."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import BOOTSTRAPS, Estimate, Floats, Refusal, estimate, quiet, resamples
from haltscale.platform.analysis.laws import MIN_BUDGETS, LawFit
from haltscale.platform.analysis.runs import BUDGET_SPREAD, budgets_of, column, usable

MIN_PROFILE = 4
"""Model sizes that a budget needs: a parabola through three points fits anything."""
MOST_LOST = 0.1
"""Share of resamples without a minimum inside the grid above which a budget's minimum is not believed."""


def pareto(frame: pd.DataFrame, x: str = "flops_realised") -> pd.DataFrame:
    """The finished runs that no other run beats in both compute and loss, cheapest first.

    Args:
        frame: the results frame; runs of several methods compete with each other.
        x: a column that should be small.
    """
    runs = usable(frame, [x]).runs.sort_values([x, "loss"], kind="stable").reset_index(drop=True)
    if runs.empty:
        return runs
    loss = column(runs, "loss")
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return runs[loss < best_before].reset_index(drop=True)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Loss against parameters at one budget of compute."""

    budget: float
    """FLOPs: geometric mean over the budget's runs."""
    runs: pd.DataFrame
    coefficients: Floats
    """``(3,)`` of the parabola of the log loss in the log parameters, highest power first; empty where it has none."""
    parameters: Estimate | None
    """At the minimum."""
    loss: float
    """At the minimum, nats per token; NaN where there is none."""
    problem: str
    """Why the budget has no minimum; empty where it has one."""
    replicates: Floats
    """``(R,)`` logarithms of the parameters at the minimum."""

    def curve(self, count: int = 60) -> pd.DataFrame:
        """The parabola over the sizes measured: ``parameters``, ``loss``; empty where there is none."""
        if not len(self.coefficients):
            return pd.DataFrame({"parameters": [], "loss": []})
        sizes = column(self.runs, "parameters")
        grid = np.linspace(np.log(sizes.min()), np.log(sizes.max()), count)
        return pd.DataFrame({"parameters": np.exp(grid), "loss": np.exp(np.polyval(self.coefficients, grid))})


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """Profiles of all budgets, and how the best size grows with compute."""

    profiles: tuple[Profile, ...]
    """Smallest budget first."""
    exponent: Estimate | Refusal
    """m of N_opt = k C^m. Parabolas are biased even without noise (arXiv 2603.22339): a check of the surface fit."""
    left_out: str

    @property
    def minima(self) -> pd.DataFrame:
        """Budgets with a minimum: ``budget``, ``parameters``, ``low``, ``high``, ``loss``."""
        found = [p for p in self.profiles if p.parameters is not None]
        return pd.DataFrame(
            {
                "budget": [p.budget for p in found],
                "parameters": [p.parameters.value for p in found if p.parameters],
                "low": [p.parameters.low for p in found if p.parameters],
                "high": [p.parameters.high for p in found if p.parameters],
                "loss": [p.loss for p in found],
            }
        )


@quiet
def isoflop(
    frame: pd.DataFrame, x: str = "flops_realised", *, bootstraps: int = BOOTSTRAPS, seed: int = 0
) -> IsoFlop | Refusal:
    """A parabola of the log loss in the log parameters at every budget (Hoffmann et al. 2022, approach 2).

    A budget is what the study planned, else a cluster of runs (:func:`haltscale.platform.analysis.runs.budgets`). It
    has no minimum where its lowest loss is that of its smallest or largest size, where the parabola's minimum
    lies outside its sizes, or where it does so in more than a tenth of the resamples.

    Args:
        frame: runs of one method.
        x: kind of FLOPs by which the runs fall into budgets.
    """
    selection = usable(frame, [x, "parameters"])
    runs = selection.runs
    labels = budgets_of(runs, x)
    profiles = tuple(
        _profile(runs[labels == label].reset_index(drop=True), x, bootstraps, seed + int(label))
        for label in range(labels.max() + 1 if len(labels) else 0)
    )
    if not any(len(profile.coefficients) for profile in profiles):
        why = f" (left out: {selection.why()})" if selection.left_out.shape[0] else ""
        return Refusal(
            reason=f"no budget of compute has {MIN_PROFILE} model sizes; an isoFLOP study trains several sizes to the"
            f" same number of FLOPs{why}"
        )
    return IsoFlop(profiles=profiles, exponent=_growth(profiles), left_out=selection.why())


def _profile(runs: pd.DataFrame, x: str, bootstraps: int, seed: int) -> Profile:
    sizes, loss = np.log(column(runs, "parameters")), np.log(column(runs, "loss"))
    budget = float(np.exp(np.log(column(runs, x)).mean()))

    def without(problem: str, coefficients: Floats | None = None) -> Profile:
        kept = np.zeros(0) if coefficients is None else coefficients
        nothing = np.zeros(0)
        return Profile(
            budget=budget, runs=runs, coefficients=kept, parameters=None, loss=np.nan, problem=problem,
            replicates=nothing,
        )  # fmt: skip

    different = len(set(np.round(sizes, 2)))
    if different < MIN_PROFILE:
        return without(f"{different} of the {MIN_PROFILE} sizes that a profile needs")
    coefficients = _parabolas(sizes, loss, np.ones((1, len(sizes))))[0]
    minimum = _minima(coefficients[None], sizes)[0]
    if np.isnan(minimum) or sizes[loss.argmin()] in (sizes.min(), sizes.max()):
        return without("its minimum lies at the edge of the sizes or outside", coefficients)
    weights = resamples(bootstraps, len(sizes), seed, least=3)
    replicates = _minima(_parabolas(sizes, loss, weights), sizes)
    lost = float(np.isnan(replicates).mean())
    if lost > MOST_LOST:
        return without(f"not identifiable: {100 * lost:.0f} % of the resamples have no minimum inside", coefficients)
    inside = np.where(np.isnan(replicates), minimum, replicates)
    return Profile(
        budget=budget,
        runs=runs,
        coefficients=coefficients,
        parameters=estimate(float(np.exp(minimum)), np.exp(inside)),
        loss=float(np.exp(np.polyval(coefficients, minimum))),
        problem="",
        replicates=inside,
    )


def _parabolas(x: Floats, y: Floats, weights: Floats) -> Floats:
    """``(R, 3)`` weighted least squares, by the normal equations of centred powers."""
    centre = x.mean()
    powers = np.stack([(x - centre) ** 2, x - centre, np.ones_like(x)], axis=1)
    normal = np.einsum("rn,np,nq->rpq", weights, powers, powers) + 1e-12 * np.eye(3)
    a, b, c = np.linalg.solve(normal, np.einsum("rn,np,n->rp", weights, powers, y)[:, :, None])[:, :, 0].T
    return np.stack([a, b - 2 * a * centre, c - b * centre + a * centre**2], axis=1)


def _minima(coefficients: Floats, x: Floats) -> Floats:
    """``(R,)`` where the parabolas are lowest; NaN where that is not strictly inside the range of x."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -coefficients[:, 1] / (2 * coefficients[:, 0])
    inside = (coefficients[:, 0] > 0) & (found > x.min()) & (found < x.max())
    return np.where(inside, found, np.nan)


def _growth(profiles: tuple[Profile, ...]) -> Estimate | Refusal:
    found = [profile for profile in profiles if profile.parameters is not None]
    if len(found) < MIN_BUDGETS:
        return Refusal(reason=f"{len(found)} of the {MIN_BUDGETS} budgets with a minimum that an exponent needs")
    compute = np.log([profile.budget for profile in found])
    if np.ptp(compute) < np.log(BUDGET_SPREAD):
        return Refusal(reason="the budgets with a minimum are all of one amount of compute")
    compute = compute - compute.mean()
    sizes = np.stack([np.log(p.parameters.value) for p in found if p.parameters])
    replicates = np.stack([profile.replicates for profile in found], axis=1)
    slope = compute / (compute @ compute)
    return estimate(float(slope @ sizes), replicates @ slope)


@quiet
def optimal_exponent(surface: LawFit) -> Estimate:
    """m of N_opt = k C^m as the surface L(N, D) has it where C is proportional to N D: b / (a + b)."""
    parameters = np.concatenate([surface.theta[None], surface.replicates])
    a, b = parameters[:, 1 + surface.form.terms], parameters[:, 2 + surface.form.terms]
    return estimate(float((b / (a + b))[0]), (b / (a + b))[1:], problem=surface.estimates["a"].problem)


def disagreement(profiles: IsoFlop, surface: LawFit) -> str:
    """A warning where parabolas and surface put the best size apart by more than their intervals; else empty."""
    if isinstance(profiles.exponent, Refusal):
        return ""
    first, second = profiles.exponent, optimal_exponent(surface)
    if first.low <= second.high and second.low <= first.high:
        return ""
    return (
        f"the isoFLOP minima grow with C^{first.value:.3g}, the surface's optimum with C^{second.value:.3g}: their"
        " intervals do not meet"
    )
