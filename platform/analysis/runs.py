"""Which runs an analysis may use, what makes two of them the same, and how they fall into budgets.

A frame may be anybody's: columns may be missing, of any type, nullable, or hold what is not a number. Nothing here
raises for that; what cannot be used is left out with a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import Floats, quiet

BUDGET_SPREAD = 1.2
"""Largest over smallest compute within one budget that no study planned."""
TUNING = "tuning"
"""Role of the runs that only searched for hyperparameters: no law is fitted to them."""
NAMES = (
    *("key", "run", "label", "study", "state", "error", "role", "seed", "configuration", "setting"),
    *("recipe", "recipe_at_end"),
)
"""Columns that say which run a row is and how it went; none but ``seed`` is part of what was computed."""
MEASURED = (
    *("loss", "loss_standard_error", "perplexity", "bits_per_byte", "mean_steps", "expected_steps"),
    *("easy_steps", "hard_steps", "passes_per_token", "flops_realised", "flops_executed", "flops_paper"),
    *("wall_seconds", "tokens_per_second"),
)
"""Columns that a run results in. In a frame without ``configuration``, every column that is neither one of these nor
one of :data:`NAMES` is taken for a setting: an unknown column distinguishes runs."""
PLANNED = "budget"
"""Column with the compute that a study planned for a run, where it planned any: equal values are one budget."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs that count, and those that do not, with the reason."""

    runs: pd.DataFrame
    """``key``, ``loss`` and the needed columns are there, the last two as float64."""
    left_out: pd.DataFrame
    """Columns ``key`` and ``reason``."""

    def why(self) -> str:
        """The reasons with their counts, for a refusal or a caption; empty where every run counts."""
        counts = self.left_out["reason"].value_counts()
        return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def usable(frame: pd.DataFrame, needed: Sequence[str]) -> Selection:
    """The finished, sound runs with positive numbers in the ``needed`` columns, each once.

    Args:
        frame: as ``haltscale.platform.sweeps.report.results`` makes it: ``key``, ``state``, ``loss`` (nats/token),
            ``role`` where there are tuning runs, and the needed columns. Without ``state`` all runs are taken as
            finished; without ``key`` rows that are equal in every column are one run.
        needed: columns that enter logarithms, such as ``flops_realised``; ``loss`` is always among them.
    """
    frame = frame.loc[:, ~frame.columns.duplicated()].reset_index(drop=True)
    reasons = np.full(len(frame), "", dtype=object)

    def leave(which: np.ndarray, reason: str) -> None:
        reasons[(reasons == "") & which] = reason

    state = texts(frame["state"]) if "state" in frame else np.full(len(frame), "finished", dtype=object)
    if "role" in frame:
        leave(texts(frame["role"]) == TUNING, "tuning")
    failed = ~np.isfinite(column(frame, "loss")) if "loss" in frame else np.zeros(len(frame), dtype=bool)
    leave((state == "diverged") | ((state == "finished") & failed), "diverged")
    leave(state != "finished", "not finished")
    wanted = list(dict.fromkeys(["loss", *needed]))
    values = {name: column(frame, name) for name in wanted}
    for name in wanted:
        leave(~(np.isfinite(values[name]) & (values[name] > 0)), f"without {name}")
    kept = reasons == ""
    names = texts(frame["key"]) if "key" in frame else _rows(frame)
    again = pd.Series(names[kept]).duplicated().to_numpy(dtype=bool) & (names[kept] != "")
    reasons[np.flatnonzero(kept)[again]] = "given more than once"
    kept = reasons == ""
    keys = frame["key"] if "key" in frame else pd.Series(frame.index.astype(str), dtype=object)
    left_out = pd.DataFrame({"key": keys[~kept], "reason": reasons[~kept]}).reset_index(drop=True)
    runs = frame.assign(key=keys, **values)[kept].reset_index(drop=True)
    return Selection(runs=runs, left_out=left_out)


def _rows(frame: pd.DataFrame) -> np.ndarray:
    """Each row as text."""
    columns = [texts(frame[name]) for name in frame]
    return np.array(["\x1f".join(cells) for cells in zip(*columns, strict=True)] or [""] * len(frame), dtype=object)


# ---- columns -------------------------------------------------------------------------------------


def column(runs: pd.DataFrame, name: str) -> Floats:
    """A column as float64: NaN for what is missing or not a number, and for every row where there is no such column."""
    return numbers(runs[name]) if name in runs else np.full(len(runs), np.nan)


def numbers(values: pd.Series) -> Floats:
    """Values as float64: NaN for what is missing or not a number."""
    if getattr(values.dtype, "kind", "O") == "c":
        return np.full(len(values), np.nan)
    try:
        return np.asarray(pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError, OverflowError):  # lists, complex numbers, integers beyond a float
        return np.array([_number(value) for value in values], dtype=np.float64)


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:
        return math.inf


def texts(values: pd.Series) -> np.ndarray:
    """Values as texts by which they are compared: 1, 1.0 and True are distinguished by their meaning alone (1 and
    1.0 are equal); "" for what is missing."""
    return np.array([_text(value) for value in values], dtype=object)


def _text(value: object) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return ""
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    return str(value)


def parameters_named(size: str) -> float:
    """The number behind a size's name (``1.8m`` -> 1.8e6); infinite for a name without one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt])", size.strip().lower())
    return float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]] if match else math.inf


def ordered(runs: pd.DataFrame, name: str) -> tuple[np.ndarray, list[object]]:
    """The values of a column in their order: numbers ascending, sizes by their parameters, anything else as text.

    Returns:
        ``(n,)`` the place of each run's value, -1 where it is missing; and the values.
    """
    values = runs[name]
    labels = texts(values)
    missing = labels == ""
    found = numbers(values)
    first: dict[str, int] = {}
    for index, label in enumerate(labels):
        first.setdefault(str(label), index)
    first.pop("", None)
    order: list[str]
    if name == "size" and not np.isfinite(found[~missing]).all():
        parameters = column(runs, "parameters")

        def counted(label: str) -> tuple[float, float, str]:
            own = parameters[labels == label]
            own = own[np.isfinite(own)]
            named = parameters_named(label)
            return (float(np.median(own)) if len(own) else named, named, label)

        order = sorted(first, key=counted)
    elif not np.isnan(found[~missing]).any():
        order = sorted(first, key=lambda label: found[first[label]])
    else:
        order = sorted(first)
    place = {label: index for index, label in enumerate(order)} | {"": -1}
    return np.array([place[str(label)] for label in labels], dtype=int), [values.iloc[first[one]] for one in order]


# ---- what is the same ----------------------------------------------------------------------------


def configurations(runs: pd.DataFrame) -> np.ndarray:
    """What each run is but for its seed, as text: runs of one text differ in their seed only.

    It is the column ``configuration`` (a digest of the run's identity without its seed) where a run has one, else all
    columns that are neither in :data:`NAMES` nor in :data:`MEASURED`.
    """
    settings = runs[[name for name in runs if name not in NAMES and name not in MEASURED]]
    rows = _rows(settings)
    if "configuration" not in runs:
        return rows
    known = texts(runs["configuration"])
    return np.where(known != "", known, rows)


# ---- budgets -------------------------------------------------------------------------------------


def budgets_of(runs: pd.DataFrame, x: str) -> np.ndarray:
    """The budget of each run: what its study planned where the column :data:`PLANNED` says so and ``x`` is a kind of
    FLOPs, else :func:`budgets` of ``x``."""
    planned = texts(runs[PLANNED]) if PLANNED in runs and x.startswith("flops") else None
    return budgets(column(runs, x), planned)


@quiet
def budgets(compute: Floats, planned: np.ndarray | None = None) -> np.ndarray:
    """The budget that each run belongs to, 0 for the smallest.

    Runs with one planned budget are together. The others join a planned budget whose runs lie around them, within half
    of :data:`BUDGET_SPREAD`; else the narrow window that holds the most runs is a budget, then that which holds the
    most of the rest, and so on. So no budget spans more than :data:`BUDGET_SPREAD`, however closely runs follow on
    each other, and a window never moves off the cluster that a study trained at.

    Args:
        compute: ``(n,)`` positive.
        planned: ``(n,)`` what the study planned, as text; "" where it planned nothing.
    """
    logs = np.log(compute)
    width = math.log(BUDGET_SPREAD) * (1 + 1e-12)
    labels = np.full(len(logs), -1)
    count = 0
    for name in dict.fromkeys(planned if planned is not None else ()):
        if name != "":
            labels[np.asarray(planned) == name] = count
            count += 1
    if count:
        centres = np.array([logs[labels == label].mean() for label in range(count)])
        for index in np.flatnonzero(labels < 0):
            nearest = int(np.abs(centres - logs[index]).argmin())
            if abs(centres[nearest] - logs[index]) <= width / 2:
                labels[index] = nearest
    rest = np.flatnonzero(labels < 0)
    rest = rest[np.argsort(logs[rest], kind="stable")]
    while len(rest):
        ends = np.searchsorted(logs[rest], logs[rest] + width, side="right")
        held = ends - np.arange(len(rest))
        spread = np.round(logs[rest][ends - 1] - logs[rest], 9)  # of equal windows, the smallest comes first
        start = int(np.lexsort((spread, -held))[0])  # the most runs; of equally many, the closest together
        labels[rest[start : ends[start]]] = count
        rest = np.delete(rest, slice(start, ends[start]))
        count += 1
    centres = np.array([logs[labels == label].mean() for label in range(count)])
    return np.argsort(np.argsort(centres, kind="stable"), kind="stable")[labels] if count else labels


@quiet
def levels(values: Floats) -> int:
    """How many values are distinct: each at least :data:`BUDGET_SPREAD` times the one before that counted."""
    count, last = 0, -math.inf
    for value in np.log(np.sort(values)):
        if value >= last + math.log(BUDGET_SPREAD):
            count, last = count + 1, float(value)
    return count
