"""What mattered in a sweep: seed noise, shares of variance, and slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from haltscale.platform.analysis.estimates import LEVEL, Estimate, Floats, Refusal
from haltscale.platform.analysis.runs import column, usable

CONFIGURATION = ("method", "size", "tokens", "lam", "beta", "l_max", "tau")
"""Columns that, together with the seed, make a run what it is, where the frame has them."""
MIN_RUNS = 8
PERMUTATIONS = 500
MOST_LEVELS = 6
"""A parameter with more values is cut into this many groups of equal size."""


@dataclass(frozen=True, kw_only=True)
class SeedNoise:
    """Standard deviation of the loss between runs that differ in their seed only."""

    deviation: Estimate
    """Nats per token, pooled over the groups; the interval is chi-squared's."""
    groups: int
    """Configurations with at least two seeds."""
    runs: int


def seed_noise(frame: pd.DataFrame, *, by: Sequence[str] = CONFIGURATION) -> SeedNoise | Refusal:
    """Pooled over all configurations that were trained with two seeds or more.

    Args:
        by: columns in which runs of one configuration agree; those that the frame lacks are passed over.
    """
    selection = usable(frame, [])
    names = [name for name in by if name in selection.runs]
    squares, degrees, groups, count = 0.0, 0, 0, 0
    for _, members in selection.runs.groupby(names, dropna=False):
        members = members.drop_duplicates("seed")
        if len(members) > 1:
            loss = column(members, "loss")
            squares += float(((loss - loss.mean()) ** 2).sum())
            degrees, groups, count = degrees + len(loss) - 1, groups + 1, count + len(loss)
    if not degrees:
        return Refusal(reason="no two finished runs differ in their seed only: give a few configurations two seeds")
    deviation = float(np.sqrt(squares / degrees))
    tail = (1 - LEVEL) / 2
    low, high = (float(np.sqrt(squares / chi2.ppf(p, degrees))) for p in (1 - tail, tail))
    return SeedNoise(deviation=Estimate(value=deviation, low=low, high=high), groups=groups, runs=count)


def importance(
    frame: pd.DataFrame, names: Sequence[str], *, target: str = "loss", seed: int = 0
) -> pd.DataFrame | Refusal:
    """Each parameter's main effect: the share of the target's variance between its values, alone.

    A plain variance decomposition: epsilon squared, which takes off what as many groups would explain by chance, and
    the share that 5 % of random permutations of the target exceed. What the shares leave to 1 is interaction and noise.
    In a sweep that is not a full grid, parameters that vary together share what they explain.

    Args:
        frame: runs of one method.
        names: parameters to judge; those with a single value are passed over.
        target: ``loss`` or ``mean_steps``.

    Returns:
        Largest first: ``parameter``, ``share`` (0 to 1), ``chance`` (the permutations' 95th percentile), ``levels``.
    """
    selection = usable(frame, [])
    runs = selection.runs
    runs = runs[pd.to_numeric(runs[target], errors="coerce").notna()] if target in runs else runs.head(0)
    why = f" (left out: {selection.why()})" if len(selection.left_out) else ""
    if len(runs) < MIN_RUNS:
        return Refusal(reason=f"{len(runs)} of the {MIN_RUNS} runs that importance needs{why}")
    groups = {name: _levels(runs[name]) for name in names if name in runs}
    groups = {name: found for name, found in groups.items() if 2 <= found.max() + 1 <= len(runs) // 2}
    if not groups:
        return Refusal(reason=f"no parameter of {', '.join(names)} takes two values with runs to compare{why}")
    values = column(runs, target)
    if np.ptp(values) == 0:
        return Refusal(reason=f"{target} is the same in all {len(runs)} runs")
    random = np.random.default_rng(seed)
    shuffled = np.stack([random.permutation(values) for _ in range(PERMUTATIONS)])
    rows = [
        {
            "parameter": name,
            "share": float(_share(values[None], group)[0]),
            "chance": float(np.percentile(_share(shuffled, group), 95)),
            "levels": int(group.max() + 1),
        }
        for name, group in groups.items()
    ]
    return pd.DataFrame(rows).sort_values("share", ascending=False, kind="stable").reset_index(drop=True)


def _levels(values: pd.Series) -> np.ndarray:
    """``(n,)`` group of each run by a parameter's value; missing values form a group of their own."""
    found = pd.factorize(values, use_na_sentinel=False)[0]
    if found.max() + 1 > MOST_LEVELS:
        found = pd.qcut(values.rank(method="first"), MOST_LEVELS, labels=False).to_numpy()
    return np.asarray(found)


def _share(values: Floats, group: np.ndarray) -> Floats:
    """``(R,)`` epsilon squared of ``(R, n)`` values, 0 at least."""
    count = int(group.max() + 1)
    member = np.eye(count)[group]
    sizes = member.sum(0)
    mean = values.mean(axis=1, keepdims=True)
    between = ((values @ member / sizes - mean) ** 2 * sizes).sum(1)
    total = ((values - mean) ** 2).sum(1)
    within = (total - between) / max(values.shape[1] - count, 1)
    return np.clip((between - (count - 1) * within) / np.maximum(total, 1e-300), 0.0, 1.0)


def slices(frame: pd.DataFrame, name: str, *, target: str = "loss") -> pd.DataFrame:
    """The target at each value of a parameter, over whatever else varies.

    Returns:
        ``value``, ``mean``, ``least``, ``most``, ``runs``; in the order of the values.
    """
    runs = usable(frame, []).runs
    if runs.empty:
        return pd.DataFrame({"value": [], "mean": [], "least": [], "most": [], "runs": []})
    grouped = runs.assign(target=pd.to_numeric(runs[target], errors="coerce")).groupby(name)["target"]
    table = grouped.agg(["mean", "min", "max", "count"]).reset_index()
    return table.set_axis(["value", "mean", "least", "most", "runs"], axis=1)
