"""Fits a law's form to losses: a variable-projection grid to start, L-BFGS to finish, a bootstrap over runs.

The objective is the sum (not the mean: a tiny mean stops an optimiser early) of Huber losses of log-residuals with
delta 1e-3 (Hoffmann et al. 2022, approach 3), here in units of delta squared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from haltscale.platform.analysis.estimates import Floats
from haltscale.platform.analysis.form import Form, Points

DELTA = 1e-3
"""Where Huber's loss of a log-residual turns from square to linear."""
GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4)
"""Exponents at which the other parameters are solved for."""
PHI_GRID = (0.0, 0.3, 0.6, 1.0)
STARTS = 4
"""The best grid points, each refined by L-BFGS."""


class FitError(ArithmeticError):
    """No start of the optimiser reached a minimum."""


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """The best fit and how the others fared."""

    theta: Floats
    """``(P,)``."""
    objective: float
    """Sum of Huber losses of the log-residuals, unrounded."""
    starts: int
    """Starts that converged."""
    spread: float
    """Worst minus best objective of these, relative to the best: large where there are several minima."""


def huber(residuals: Floats) -> Floats:
    """Huber's loss of log-residuals, in units of delta squared."""
    size = np.abs(residuals) / DELTA
    return np.where(size <= 1, 0.5 * size**2, size - 0.5)


def fit(form: Form, points: Points, log_loss: Floats) -> Minimum:
    """The minimum of the objective.

    Raises:
        FitError: no start converged.
    """
    bounds = form.bounds(log_loss)

    def objective(theta: Floats) -> tuple[float, Floats]:
        found, jacobian = form.evaluate(theta[None], points)
        residuals = found[0] - log_loss
        slope = np.clip(residuals / DELTA, -1, 1) / DELTA
        return float(huber(residuals).sum()), slope @ jacobian[0]

    options = {"maxiter": 1_000, "maxfun": 2_000, "ftol": 1e-10, "gtol": 1e-7}
    minima = []
    for start in grid_starts(form, points, log_loss):
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        # A line search that can go no lower on Huber's kinks ends "abnormally" at a minimum all the same.
        if np.isfinite(found.fun) and np.isfinite(found.x).all() and found.status in (0, 2):
            minima.append((float(found.fun), found.x))
    if not minima:
        raise FitError(f"none of {STARTS} starts of L-BFGS converged")
    minima.sort(key=lambda one: one[0])
    best, theta = minima[0]
    # Gauss-Newton ends what a line search on kinks leaves undone, and makes point and replicates one procedure.
    theta = refine(form, points, log_loss, np.ones((1, points.count)), theta)[0]
    best = min(best, objective(theta)[0])
    spread = (minima[-1][0] - best) / max(best, 1e-12)
    return Minimum(theta=theta, objective=best * DELTA**2, starts=len(minima), spread=max(spread, 0.0))


def grid_starts(form: Form, points: Points, log_loss: Floats) -> list[Floats]:
    """Variable projection: at each grid point of the exponents, E and the A_j follow by non-negative least squares."""
    loss = np.exp(log_loss)
    bounds = form.bounds(log_loss)
    found = []
    phis = PHI_GRID if form.phis else (0.0,)
    for *exponents, phi in itertools.product(*[GRID] * form.terms, phis):
        logs = points.logs - np.array(form.centres)[:, None]
        if form.phis:
            effective = points.once + points.recurrent * np.exp(phi * points.log_passes)
            logs = np.concatenate([np.log(effective)[None] - form.centres[0], logs[1:]])
        powers = np.exp(-np.array(exponents)[:, None] * logs)
        matrix = np.concatenate([np.ones((1, points.count)), powers]).T / loss[:, None]  # relative residuals
        if not np.isfinite(matrix).all():  # this exponent overflows over the range of the data
            continue
        try:
            solution, norm = nnls(matrix, np.ones(points.count))
        except RuntimeError:  # SciPy's: too many iterations
            continue
        vector = [*np.log(np.maximum(solution, 1e-300)), *exponents, *[phi] * len(form.phis)]
        found.append((norm, np.clip(vector, bounds[:, 0] + 1e-6, bounds[:, 1] - 1e-6)))
    found.sort(key=lambda one: one[0])
    return [start for _, start in found[:STARTS]]


def refine(
    form: Form, points: Points, log_loss: Floats, weights: Floats, start: Floats, *, iterations: int = 80
) -> Floats:
    """Minimise the weighted objective for many weightings at once, by damped Gauss-Newton on Huber's weights.

    All replicates of a bootstrap differ in their weights only and lie near the same minimum; in one batch they take
    seconds where an optimiser called for each of them takes minutes.

    Args:
        weights: ``(R, n)``, how often each run counts.
        start: ``(P,)``, where all of them begin.

    Returns:
        ``(R, P)``.
    """
    bounds = form.bounds(log_loss)
    theta = np.repeat(start[None], len(weights), axis=0)
    damping = np.full(len(weights), 1e-3)
    active = np.arange(len(weights))
    found, jacobian = form.evaluate(theta, points)
    value = (weights * huber(found - log_loss)).sum(1)
    for _ in range(iterations):
        residuals = found - log_loss
        scaled = weights[active] / np.maximum(np.abs(residuals) / DELTA, 1.0)
        weighted = jacobian * scaled[:, :, None]
        normal = weighted.transpose(0, 2, 1) @ jacobian
        slope = np.einsum("rnp,rn->rp", weighted, residuals)
        diagonal = np.einsum("rpp->rp", normal)
        diagonal += damping[active, None] * diagonal + 1e-12
        step = np.linalg.solve(normal, slope[:, :, None])[:, :, 0]
        tried = np.clip(theta[active] - step, bounds[:, 0], bounds[:, 1])
        tried_found, tried_jacobian = form.evaluate(tried, points)
        tried_value = (weights[active] * huber(tried_found - log_loss)).sum(1)
        better = tried_value < value[active]
        gain = np.where(better, (value[active] - tried_value) / np.maximum(value[active], 1e-12), 0.0)
        theta[active[better]] = tried[better]
        value[active[better]] = tried_value[better]
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 8)
        found = np.where(better[:, None], tried_found, found)
        jacobian = np.where(better[:, None, None], tried_jacobian, jacobian)
        going = np.where(better, gain > 1e-6, damping[active] < 1e4)
        active, found, jacobian = active[going], found[going], jacobian[going]
        if not len(active):
            break
    return theta
