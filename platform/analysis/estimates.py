"""What an analysis answers: a number with its interval, or a reason why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Of every interval: percentiles of the bootstrap."""
BOOTSTRAPS = 1_000

Floats = npt.NDArray[np.float64]

quiet = np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
"""Decorates what may overflow to infinity on the way: that is the right value there (a coefficient at x = 1, a
multiplier below E), it counts as infinite, and its logarithm is left out."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """No number, and why: the data cannot carry it."""

    reason: str
    """What is missing and, where something would help, what."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its percentile interval."""

    value: float
    low: float
    high: float
    problem: str = ""
    """Why the number says nothing ("not identifiable: ..."); empty where it does."""

    @property
    def identifiable(self) -> bool:
        """Whether the data determine the number."""
        return not self.problem

    def excludes(self, value: float) -> bool:
        """Whether the interval leaves a value out."""
        return self.identifiable and not self.low <= value <= self.high


def interval(replicates: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Percentile interval over the first axis of ``(replicates, ...)``; infinite replicates count as infinite."""
    # Ordered replicates, no interpolation: between a number and an infinity there is nothing to interpolate.
    last, tail = len(replicates) - 1, 0.5 * (1.0 - level)
    ranked = np.sort(replicates, axis=0)
    unknown = np.isnan(ranked[-1])  # sorted last
    low, high = ranked[math.floor(tail * last)], ranked[math.ceil((1.0 - tail) * last)]
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def estimate(value: float, replicates: Floats, *, problem: str = "") -> Estimate:
    """A value with the interval of its ``(replicates,)``."""
    low, high = interval(replicates)
    return Estimate(value=float(value), low=float(low), high=float(high), problem=problem)


def resamples(count: int, rows: int, seed: int, *, least: int) -> Floats:
    """``(count, rows)``: how often each run is drawn in each bootstrap replicate.

    Args:
        least: different runs that a replicate must hold to be fitted at all; draws with fewer are drawn again.
    """
    random = np.random.default_rng(seed)
    drawn = random.multinomial(rows, np.full(rows, 1.0 / rows), size=count)
    while len(poor := np.flatnonzero((drawn > 0).sum(1) < min(least, rows))):
        drawn[poor] = random.multinomial(rows, np.full(rows, 1.0 / rows), size=len(poor))
    return drawn.astype(np.float64)


@quiet
def spread_of(values: Floats) -> float:
    """Largest over smallest, of positive values."""
    return float(values.max() / values.min()) if len(values) and values.min() > 0 else math.nan
