"""What mattered in a sweep: seed noise, shares of variance, and slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from haltscale.platform.analysis.estimates import LEVEL, Estimate, Floats, Refusal, quiet
from haltscale.platform.analysis.runs import MEASURED, NAMES, column, configurations, ordered, texts, usable

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


@quiet
def seed_noise(frame: pd.DataFrame, *, by: Sequence[str] | None = None) -> SeedNoise | Refusal:
    """Pooled over all configurations that were trained with two seeds or more.

    Args:
        by: columns in which runs of one configuration agree; by default everything that makes a run what it is, but
            for its seed (:func:`haltscale.platform.analysis.runs.configurations`).
    """
    runs = usable(frame, []).runs
    if "seed" not in runs:
        return Refusal(reason="the runs have no column seed, so none is known to differ in its seed only")
    runs = runs[texts(runs["seed"]) != ""].reset_index(drop=True)
    if by is None:
        groups = pd.Series(configurations(runs), index=runs.index)
    else:
        cells = [texts(runs[name]) for name in by if name in runs]
        groups = pd.Series(["\x1f".join(row) for row in zip(*cells, strict=True)] or "", index=runs.index)
    seeds, loss = pd.Series(texts(runs["seed"]), index=runs.index), column(runs, "loss")
    squares, degrees, configured, count = 0.0, 0, 0, 0
    for _, members in groups.groupby(groups):
        own = loss[seeds[members.index].drop_duplicates().index]
        if len(own) > 1:
            squares += float(((own - own.mean()) ** 2).sum())
            degrees, configured, count = degrees + len(own) - 1, configured + 1, count + len(own)
    if not degrees:
        return Refusal(reason="no two finished runs differ in their seed only: give a few configurations two seeds")
    deviation = float(np.sqrt(squares / degrees))
    tail = (1 - LEVEL) / 2
    low, high = (float(np.sqrt(squares / chi2.ppf(p, degrees))) for p in (1 - tail, tail))
    return SeedNoise(deviation=Estimate(value=deviation, low=low, high=high), groups=configured, runs=count)


@quiet
def importance(
    frame: pd.DataFrame, names: Sequence[str] | None = None, *, target: str = "loss", seed: int = 0
) -> pd.DataFrame | Refusal:
    """Each parameter's main effect: the share of the target's variance between its values, alone.

    A plain variance decomposition: epsilon squared, which takes off what as many groups would explain by chance, and
    the share that 5 % of random permutations of the target exceed. What the shares leave to 1 is interaction and noise.
    In a sweep that is not a full grid, parameters that vary together share what they explain.

    Args:
        frame: runs of one method.
        names: columns to judge, any that the runs have: an option, a field of the identity such as
            ``learning_rate``, the size; those with a single value are passed over. By default all settings of a run,
            and its seed.
        target: ``loss`` or ``mean_steps``.

    Returns:
        Largest first: ``parameter``, ``share`` (0 to 1), ``chance`` (the permutations' 95th percentile), ``levels``.
    """
    selection = usable(frame, [])
    runs = selection.runs
    runs = runs[np.isfinite(column(runs, target))].reset_index(drop=True)
    why = f" (left out: {selection.why()})" if len(selection.left_out) else ""
    if names is None:
        names = [str(name) for name in runs if name == "seed" or (name not in NAMES and name not in MEASURED)]
    if len(runs) < MIN_RUNS:
        return Refusal(reason=f"{len(runs)} of the {MIN_RUNS} runs that importance needs{why}")
    groups = {name: _levels(runs, name) for name in dict.fromkeys(names) if name in runs}
    groups = {name: found for name, found in groups.items() if 2 <= found.max() + 1 <= len(runs) // 2}
    if not groups:
        return Refusal(
            reason=f"no parameter of {', '.join(map(str, names))} takes two values with runs to compare{why}"
        )
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


def _levels(runs: pd.DataFrame, name: str) -> np.ndarray:
    """``(n,)`` group of each run by a parameter's value; missing values form a group of their own."""
    place, values = ordered(runs, name)
    if len(values) > MOST_LEVELS:
        known = place >= 0
        rank = pd.Series(place[known]).rank(method="average").to_numpy()
        place[known] = np.floor(MOST_LEVELS * (rank - 0.5) / known.sum()).astype(int)
    return np.unique(place, return_inverse=True)[1]


def _share(values: Floats, group: np.ndarray) -> Floats:
    """``(R,)`` epsilon squared of ``(R, n)`` values, 0 at least."""
    count = int(group.max() + 1)
    member = np.eye(count)[group]
    sizes = member.sum(0)
    mean = values.mean(axis=1, keepdims=True)
    between = ((values @ member / sizes - mean) ** 2 * sizes).sum(1)
    total = ((values - mean) ** 2).sum(1)
    within = (total - between) / max(values.shape[1] - count, 1)
    share = (between - (count - 1) * within) / np.maximum(total, 1e-300)
    return np.asarray(np.clip(share, 0.0, 1.0), dtype=np.float64)


@quiet
def slices(frame: pd.DataFrame, name: str, *, target: str = "loss") -> pd.DataFrame | Refusal:
    """The target at each value of a parameter, over whatever else varies.

    Returns:
        ``value``, ``mean``, ``least``, ``most``, ``runs``; in the order of the values (sizes by their parameters).
    """
    runs = usable(frame, []).runs
    if missing := [wanted for wanted in (name, target) if wanted not in runs]:
        return Refusal(reason=f"the runs have no column {' and no column '.join(missing)}")
    runs = runs[np.isfinite(column(runs, target))].reset_index(drop=True)
    place, values = ordered(runs, name)
    found = [column(runs, target)[place == index] for index in range(len(values))]
    return pd.DataFrame(
        {
            "value": values,
            "mean": [float(own.mean()) for own in found],
            "least": [float(own.min()) for own in found],
            "most": [float(own.max()) for own in found],
            "runs": [len(own) for own in found],
        }
    )
