"""Whether a run trains as it should, and when a study will end: from what its runs have logged."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from haltscale.dashboard import data

LEAST_ROWS = 12
"""Logged steps below which nothing is said of a trend."""
RECENT = 0.2
"""Share of the logged steps that is called recent."""
WORSE_LOSS = 1.05
"""Recent training loss over the lowest earlier one (medians)."""
LARGE_GRADIENT = 10.0
"""Largest recent gradient norm over the median of all."""
SLOW = 0.6
"""Recent tokens/s over the median of all."""
UNEVEN = 1.5
"""Max-to-mean ratio of latent steps across ranks."""
SILENT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Health:
    """What to know of a run."""

    reasons: tuple[str, ...] = ()
    """Why to look at it; empty where it is healthy."""

    @property
    def healthy(self) -> bool:
        return not self.reasons


def judge(rows: pd.DataFrame, *, routes: bool = False, l_max: float = math.nan, silent: float = 0.0) -> Health:
    """Judge a run that trains by its metrics.

    Args:
        rows: of :func:`haltscale.dashboard.data.metrics`.
        routes: whether a router chooses its steps: then none or all of them everywhere is a collapse.
        l_max: most latent steps.
        silent: seconds since its last sign of life.
    """
    reasons = []
    if silent > SILENT_SECONDS:
        reasons.append(f"silent for {data.silence(silent)}")
    if "loss" in rows and len(rows):
        if not math.isfinite(float(rows["loss"].iloc[-1])):
            reasons.append(f"the training loss is not a number at step {rows['step'].iloc[-1]:,.0f}")
        elif len(rows) >= LEAST_ROWS:
            reasons += _loss(rows["loss"])
    if len(rows) >= LEAST_ROWS:
        reasons += _gradient(rows) + _speed(rows) + _balance(rows)
        if routes:
            reasons += _collapse(rows, l_max)
    return Health(reasons=tuple(reasons))


def _recent(values: pd.Series) -> pd.Series:
    return values.tail(max(3, round(RECENT * len(values))))


def _loss(loss: pd.Series) -> list[str]:
    recent = _recent(loss)
    before = loss.iloc[: -len(recent)].dropna()
    if len(before) < 3:
        return []
    lowest = float(before.rolling(min(5, len(before))).median().min())
    now = float(recent.median())
    if not lowest > 0 or now <= WORSE_LOSS * lowest:
        return []
    return [f"the training loss has risen: {now:.3f} nats/token of late, {lowest:.3f} before"]


def _gradient(rows: pd.DataFrame) -> list[str]:
    if "grad_norm" not in rows:
        return []
    norms = rows["grad_norm"]
    recent, typical = _recent(norms), float(norms.median())
    if recent.isna().any() and norms.notna().any() and norms.iloc[-1] != norms.iloc[-1]:
        return ["the gradient norm is not a number"]
    if typical > 0 and float(recent.max()) > LARGE_GRADIENT * typical:
        return [f"the gradient norm jumped to {recent.max():.3g}; its median is {typical:.3g}"]
    return []


def _speed(rows: pd.DataFrame) -> list[str]:
    if "tokens_per_second" not in rows:
        return []
    speed = rows["tokens_per_second"]
    now, typical = float(_recent(speed).median()), float(speed.median())
    if typical > 0 and now < SLOW * typical:
        return [f"it has slowed down: {now:,.0f} tokens/s of late, {typical:,.0f} in the median"]
    return []


def _balance(rows: pd.DataFrame) -> list[str]:
    uneven = float(_recent(rows["straggling"]).median()) if "straggling" in rows else math.nan
    if uneven > UNEVEN:
        return [f"uneven workers: the busiest takes {uneven:.2f} times the mean latent steps"]
    return []


def _collapse(rows: pd.DataFrame, l_max: float) -> list[str]:
    if "mean_steps" not in rows:
        return []
    recent = _recent(rows["mean_steps"]).dropna()
    if len(recent) and float(recent.max()) < 0.01:
        return ["the router takes no steps at all of late"]
    if len(recent) and l_max > 0 and float(recent.min()) > 0.99 * l_max:
        return ["the router takes all steps everywhere of late"]
    return []


def seconds_left(runs: pd.DataFrame) -> float:
    """Seconds until all runs of a study have ended, as many at a time as are running now; NaN where nothing runs or
    nothing is known.

    A planned run is taken to last as long as the finished ones of its method, size and budget, else of its method and
    size, else of its method, else of the study.
    """
    running = runs[runs["state"] == "running"]
    if running.empty:
        return math.nan
    left = float(running["seconds_left"].dropna().sum())
    finished = runs[(runs["state"] == "finished") & runs["wall_seconds"].gt(0)]
    for run in runs[runs["state"] == "planned"].to_dict("records"):
        left += expected_seconds(finished, run, ("method", "size", "budget"))
    return left / len(running)


def expected_seconds(finished: pd.DataFrame, run: Mapping[Any, Any], names: Sequence[str]) -> float:
    """How long a run will take, from finished ones that agree in as many of the columns as any do."""
    for count in range(len(names), -1, -1):
        same = np.ones(len(finished), dtype=bool)
        for name in names[:count]:
            value = run.get(name)
            same &= (finished[name].isna() if pd.isna(value) else finished[name] == value).to_numpy()
        if same.any():
            return float(finished.loc[same, "wall_seconds"].median())
    return math.nan


def clock(seconds: float, now: float | None = None) -> str:
    """When that many seconds from now are over: the time of day here, with the date where it is another day."""
    start = time.time() if now is None else now
    end, today = time.localtime(start + seconds), time.localtime(start)
    form = "%H:%M" if end[:3] == today[:3] else "%a %d %b, %H:%M"
    return time.strftime(form, end)
