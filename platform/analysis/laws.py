"""Scaling laws of runs: L(C), L(N), L(N, D), and what a latent step is worth.

Every function takes the results frame (``haltscale.platform.sweeps.report.results``) and answers with a fit or with a
:class:`Refusal` that says why the runs cannot carry one. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import (
    BOOTSTRAPS,
    Estimate,
    Floats,
    Refusal,
    estimate,
    interval,
    quiet,
    resamples,
    spread_of,
)
from haltscale.platform.analysis.fitting import FitError, fit, refine
from haltscale.platform.analysis.form import LOOPED, Form, Points
from haltscale.platform.analysis.runs import budgets_of, column, levels, usable
from haltscale.platform.arms import controls_of

MIN_RUNS = 6
MIN_BUDGETS = 3
MIN_RANGE = 4.0
"""Largest over smallest compute (or parameters, or tokens) that a law's input must span."""
MOST_SPREAD = 2.0
"""An exponent is not identifiable when its interval is wider than this many times its value."""
MOST_SPREAD_E = 1.0
"""The same for E, which is a loss: from nothing to all of it, an interval says nothing."""


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """A fitted law."""

    form: Form
    theta: Floats
    """``(P,)`` parameters in the form's own terms."""
    replicates: Floats
    """``(R, P)`` of the bootstrap over runs."""
    bounds: Floats
    """``(P, 2)``."""
    runs: pd.DataFrame
    """The runs behind it."""
    left_out: str
    """How many runs were left out, and why; empty where none was."""
    objective: float
    """Sum of Huber losses (delta 1e-3) of the log-residuals."""
    starts: int
    spread: float
    """Relative distance of the worst start's objective from the best one's."""

    @cached_property
    @quiet
    def estimates(self) -> dict[str, Estimate]:
        """Every parameter with its interval; those that the data do not determine say so."""
        reported = self.form.reported(np.concatenate([self.theta[None], self.replicates]))
        low, high = interval(self.replicates)
        found = {}
        for index, name in enumerate(self.form.names):
            room = 1e-3 * (self.bounds[index, 1] - self.bounds[index, 0])
            problem = ""
            if min(self.theta[index], low[index]) <= self.bounds[index, 0] + room:
                problem = "not identifiable: it runs to its lower bound"
            elif max(self.theta[index], high[index]) >= self.bounds[index, 1] - room:
                problem = "not identifiable: it runs to its upper bound"
            found[name] = estimate(reported[0, index], reported[1:, index], problem=problem)
            bound = {"E": MOST_SPREAD_E} | dict.fromkeys(self.form.exponents, MOST_SPREAD)
            width = (found[name].high - found[name].low) / abs(found[name].value)
            if not problem and width > bound.get(name, np.inf):
                problem = f"not identifiable: its interval is {width:.1f} times its value"
                found[name] = replace(found[name], problem=problem)
        return found

    @property
    def problem(self) -> str:
        """Which of its parameters the data do not determine, and why; empty where they determine all."""
        return "; ".join(f"{name} is {one.problem}" for name, one in self.estimates.items() if one.problem)

    @property
    def domain(self) -> tuple[float, float]:
        """Smallest and largest first input of the runs behind the fit."""
        values = column(self.runs, self.form.inputs[0])
        return float(values.min()), float(values.max())

    @cached_property
    @quiet
    def residuals(self) -> Floats:
        """``(n,)`` log of observed over fitted loss."""
        return np.log(column(self.runs, "loss")) - np.log(self.predict(self.form.points(self.runs)))

    @quiet
    def predict(self, points: Points) -> Floats:
        """``(n,)`` fitted loss, nats per token."""
        return np.asarray(np.exp(self.form.evaluate(self.theta[None], points)[0][0]), dtype=np.float64)

    @quiet
    def band(self, points: Points) -> tuple[Floats, Floats]:
        """``(n,)`` ends of the fitted loss's interval: of the law, not of a single run's loss."""
        return interval(np.exp(self.form.evaluate(self.replicates, points)[0]))

    @quiet
    def curve(self, low: float, high: float, count: int = 80) -> pd.DataFrame:
        """A law of one input between two values: ``x``, ``loss``, ``low``, ``high``."""
        x = np.geomspace(low, high, count)
        points = self.form.at({self.form.inputs[0]: x})
        below, above = self.band(points)
        return pd.DataFrame({"x": x, "loss": self.predict(points), "low": below, "high": above})

    @quiet
    def slice(self, **fixed: float) -> LawFit:
        """The law of the first input alone, the others held: ``surface.slice(tokens=26e9)``."""
        kept = self.form.inputs[0]
        theta = _sliced(self.form, np.concatenate([self.theta[None], self.replicates]), fixed)
        form = Form(inputs=(kept,), centres=self.form.centres[:1])
        bounds = form.bounds(np.log(column(self.runs, "loss")))
        return replace(self, form=form, theta=theta[0], replicates=theta[1:], bounds=bounds)


def _sliced(form: Form, theta: Floats, fixed: Mapping[str, float]) -> Floats:
    irreducible = np.exp(theta[:, 0])
    for index, name in enumerate(form.inputs[1:], start=1):
        exponent = theta[:, 1 + form.terms + index]
        irreducible = irreducible + np.exp(theta[:, 1 + index] - exponent * (np.log(fixed[name]) - form.centres[index]))
    return np.stack([np.log(irreducible), theta[:, 1], theta[:, 1 + form.terms]], axis=1)


def fit_power_law(
    frame: pd.DataFrame, x: str = "flops_realised", *, bootstraps: int = BOOTSTRAPS, seed: int = 0
) -> LawFit | Refusal:
    """L(x) = E + A x^-alpha, the loss against compute or against parameters.

    Args:
        frame: runs of one method.
        x: a column: ``flops_realised``, ``flops_executed``, ``flops_paper`` or ``parameters``; against parameters all
            runs must have seen equally many tokens.
        bootstraps: replicates.
        seed: of the bootstrap.
    """
    if x == "parameters":
        tokens = column(usable(frame, [x, "tokens"]).runs, "tokens")
        if len(tokens) and spread_of(tokens) > 1.05:
            return Refusal(
                reason="the runs saw different numbers of tokens, so parameters alone explain no loss: fit L(N, D)"
            )
    return _fit(frame, (x,), bootstraps=bootstraps, seed=seed)


def fit_surface(frame: pd.DataFrame, *, bootstraps: int = BOOTSTRAPS, seed: int = 0) -> LawFit | Refusal:
    """L(N, D) = E + A N^-a + B D^-b over runs of one method (Hoffmann et al. 2022, approach 3)."""
    return _fit(frame, ("parameters", "tokens"), bootstraps=bootstraps, seed=seed)


@dataclass(frozen=True, kw_only=True)
class RecurrenceFit:
    """What a pass of the stack is worth, per method."""

    law: LawFit
    """L = E + A (N_once + r^phi N_rec)^-a [+ B D^-b] over all methods, with one phi for each."""
    note: str
    """What the law leaves out, where the runs cannot show it."""

    @property
    def phi(self) -> dict[str, Estimate]:
        """By method. 1: a further pass is worth as many new parameters; 0: it is worth nothing."""
        return {name: self.law.estimates[name] for name in self.law.form.phis}

    def advantage(self, method: str, control: str) -> Estimate:
        """phi of a method minus that of a control, with the interval of the difference.

        Raises:
            KeyError: one of them is not in the fit.
            ValueError: the one is not a replay control of the other; a difference in more than the placement of the
                steps allows no verdict on the router.
        """
        if control not in controls_of(method, [control]):
            raise ValueError(f"{control} is not a replay control of {method} (docs/controls.md)")
        first, second = (1 + 2 * self.law.form.terms + self.law.form.phis.index(n) for n in (method, control))
        problem = self.phi[method].problem or self.phi[control].problem
        difference = self.law.replicates[:, first] - self.law.replicates[:, second]
        return estimate(float(self.law.theta[first] - self.law.theta[second]), difference, problem=problem)


@quiet
def fit_recurrence(
    frame: pd.DataFrame, *, bootstraps: int = BOOTSTRAPS, seed: int = 0, least: int = 3
) -> RecurrenceFit | Refusal:
    """phi of every method that makes more than one pass, in one law with the runs that make a single one.

    The runs with one pass per token (vanilla) fix E, A, a (and B, b); what the others' passes are worth follows from
    them. Where all runs saw equally many tokens, the data term is part of E.

    Args:
        frame: runs of all methods, with ``parameters_once``, ``parameters_recurrent`` and ``passes_per_token``.
        least: runs that a method needs.
    """
    selection = usable(frame, ["parameters", "tokens", *LOOPED])
    runs = selection.runs
    if "method" not in runs:
        return Refusal(reason="the runs have no column method, which says whose passes they make")
    single = runs["passes_per_token"].sub(1).abs() < 1e-6
    counts = runs.loc[~single, "method"].value_counts()
    methods = sorted(str(name) for name, count in counts.items() if count >= least)
    if not methods:
        return Refusal(reason=_because(f"no method with more than one pass has {least} runs", selection.why()))
    if not single.any():
        return Refusal(
            reason=_because(
                "no run makes a single pass: add vanilla runs, which say what parameters are worth", selection.why()
            )
        )
    kept = runs[single | runs["method"].astype(str).isin(methods)].reset_index(drop=True)
    varied = kept["tokens"].nunique() >= MIN_BUDGETS and spread_of(column(kept, "tokens")) >= 2
    found = _fit(
        kept,
        ("parameters", "tokens") if varied else ("parameters",),
        phis=tuple(methods),
        bootstraps=bootstraps,
        seed=seed,
        narrow=False,
    )
    if isinstance(found, Refusal):
        return found
    note = "" if varied else "the runs saw too few different numbers of tokens: the data term is part of E"
    return RecurrenceFit(law=replace(found, left_out=selection.why()), note=note)


@quiet
def _fit(
    frame: pd.DataFrame,
    inputs: Sequence[str],
    *,
    bootstraps: int,
    seed: int,
    phis: tuple[str, ...] = (),
    narrow: bool = True,
) -> LawFit | Refusal:
    selection = usable(frame, [*inputs, *(LOOPED if phis else ())])
    runs, why = selection.runs, selection.why()
    if refusal := _too_little(runs, inputs, why, parameters=1 + 2 * len(inputs) + len(phis), narrow=narrow):
        return refusal
    form = Form(
        inputs=tuple(inputs),
        centres=tuple(float(np.log(column(runs, name)).mean()) for name in inputs),
        phis=phis,
    )
    points, log_loss = form.points(runs), np.log(column(runs, "loss"))
    try:
        best = fit(form, points, log_loss)
        weights = resamples(bootstraps, len(runs), seed, least=len(form.names))
        replicates = refine(form, points, log_loss, weights, best.theta)
    except (FitError, np.linalg.LinAlgError) as error:
        return Refusal(reason=_because(f"the optimiser failed: {error}", why))
    if not np.isfinite(replicates).all():
        return Refusal(reason=_because("the optimiser failed on a resample of the runs", why))
    return LawFit(
        form=form,
        theta=best.theta,
        replicates=replicates,
        bounds=form.bounds(log_loss),
        runs=runs,
        left_out=why,
        objective=best.objective,
        starts=best.starts,
        spread=best.spread,
    )


def _too_little(
    runs: pd.DataFrame, inputs: Sequence[str], why: str, *, parameters: int, narrow: bool
) -> Refusal | None:
    """Why these runs carry no law; None where they do."""
    least = max(MIN_RUNS, parameters + 1)
    if len(runs) < least:
        return Refusal(reason=_because(f"{len(runs)} of the {least} runs that a fit needs", why))
    for name in inputs:
        values = column(runs, name)
        count = levels(values)
        if count < MIN_BUDGETS and narrow:
            return Refusal(reason=_because(f"{count} of the {MIN_BUDGETS} values of {name} that a fit needs", why))
        if narrow and spread_of(values) < MIN_RANGE:
            return Refusal(
                reason=_because(f"{name} spans a factor of {spread_of(values):.2g}, a fit needs {MIN_RANGE:g}", why)
            )
    return None


def _because(reason: str, why: str) -> str:
    return f"{reason} (left out: {why})" if why else reason


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How well a law predicts a budget that it has not seen."""

    budgets: pd.DataFrame
    """A row per held-out budget: ``budget`` (geometric mean of the input), ``runs``, ``error`` (mean of predicted over
    observed loss, minus 1), ``extrapolated`` (all others are smaller)."""

    @property
    def error(self) -> float:
        """Mean absolute relative error over the budgets."""
        return float(self.budgets["error"].abs().mean())


@quiet
def leave_one_budget_out(frame: pd.DataFrame, x: str = "flops_realised") -> HeldOut | Refusal:
    """Fit L(x) without each budget in turn and predict it; leaving out the largest one is an extrapolation.

    Args:
        frame: runs of one method.
        x: as in :func:`fit_power_law`.
    """
    selection = usable(frame, [x])
    runs = selection.runs
    labels = budgets_of(runs, x)
    if len(set(labels)) <= MIN_BUDGETS:
        reason = f"{len(set(labels))} of the {MIN_BUDGETS + 1} budgets that leaving one out needs"
        return Refusal(reason=_because(reason, selection.why()))
    law = _fit(runs, (x,), bootstraps=1, seed=0)
    if isinstance(law, Refusal):
        return law
    points, losses = law.form.points(runs), column(runs, "loss")
    held = labels[None] == np.arange(labels.max() + 1)[:, None]
    without = refine(law.form, points, np.log(losses), (~held).astype(np.float64), law.theta)
    error = np.exp(law.form.evaluate(without, points)[0]) / losses - 1
    flops = column(runs, x)
    rows = [
        {
            "budget": float(np.exp(np.log(flops[rows]).mean())),
            "runs": int(rows.sum()),
            "error": float(errors[rows].mean()),
            "extrapolated": index == labels.max(),
        }
        for index, (rows, errors) in enumerate(zip(held, error, strict=True))
    ]
    return HeldOut(budgets=pd.DataFrame(rows))
