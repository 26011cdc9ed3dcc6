"""Which runs an analysis may use, and how they fall into budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import Floats

BUDGET_GAP = 1.2
"""Runs whose compute differs by less than this factor from a neighbour's belong to one budget."""
TUNING = "tuning"
"""Role of the runs that only searched for hyperparameters: no law is fitted to them."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs that count, and those that do not, with the reason."""

    runs: pd.DataFrame
    left_out: pd.DataFrame
    """Columns ``key`` and ``reason``."""

    def why(self) -> str:
        """The reasons with their counts, for a refusal or a caption; empty where every run counts."""
        counts = self.left_out["reason"].value_counts()
        return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def usable(frame: pd.DataFrame, needed: Sequence[str]) -> Selection:
    """The finished, sound runs with positive numbers in the ``needed`` columns.

    Args:
        frame: as ``haltscale.platform.sweeps.report.results`` makes it: ``key``, ``state``, ``loss`` (nats/token),
            ``role`` where there are tuning runs, and the needed columns.
        needed: columns that enter logarithms, such as ``flops_realised``; ``loss`` is always among them.
    """
    reasons = pd.Series("", index=frame.index, dtype=object)

    def leave(which: pd.Series, reason: str) -> None:
        reasons[(reasons == "") & which.reindex(frame.index, fill_value=False)] = reason

    loss = pd.to_numeric(frame["loss"], errors="coerce")
    if "role" in frame:
        leave(frame["role"].eq(TUNING), "tuning")
    leave(frame["state"].isin(["diverged"]) | (frame["state"].eq("finished") & ~np.isfinite(loss)), "diverged")
    leave(frame["state"].ne("finished"), "not finished")
    for name in dict.fromkeys(["loss", *needed]):
        values = pd.to_numeric(frame[name], errors="coerce") if name in frame else pd.Series(np.nan, index=frame.index)
        leave(~(np.isfinite(values) & values.gt(0)), f"without {name}")
    out = reasons != ""
    left_out = pd.DataFrame({"key": frame.loc[out, "key"], "reason": reasons[out]}).reset_index(drop=True)
    return Selection(runs=frame[~out].reset_index(drop=True), left_out=left_out)


def column(runs: pd.DataFrame, name: str) -> Floats:
    """A column as float64."""
    return np.asarray(pd.to_numeric(runs[name], errors="coerce"), dtype=np.float64)


def budgets(compute: Floats) -> np.ndarray:
    """The budget that each run belongs to, 0 for the smallest: gaps above :data:`BUDGET_GAP` divide them."""
    order = np.argsort(compute, kind="stable")
    jumps = np.diff(np.log(compute[order])) > np.log(BUDGET_GAP)
    found = np.empty(len(compute), dtype=int)
    found[order] = np.concatenate([[0], np.cumsum(jumps)]) if len(compute) else []
    return found


def levels(values: Floats) -> int:
    """How many values are told apart: each at least :data:`BUDGET_GAP` times the one before that counted."""
    count, last = 0, 0.0
    for value in np.sort(values):
        if value >= BUDGET_GAP * last:
            count, last = count + 1, float(value)
    return count
