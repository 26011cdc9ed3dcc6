"""Two arms at matched points: runs of one size and one seed that spent the same compute, or read as many tokens.

A point is a pair of runs; a cell is one size at one budget, over its seeds. Arms that a study sweeps have several
settings, and only one of them may enter a comparison: the best of many would be chosen by its noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from haltscale.platform.analysis.estimates import LEVEL, Estimate, Refusal
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.analysis.runs import budgets_of, column, ordered, texts, usable
from haltscale.platform.analysis.sweeps import SeedNoise

SAME = 1.02
"""Compute, or tokens, of two runs that differ by a larger factor are not equal."""
SAME_STEPS = 0.01
"""Share by which the mean latent steps of a replayed control may differ from its subject's: beyond it, they differ in
more than where their steps are."""
LEAST_POINTS = 3
"""Points below which a mean over several cells has no interval."""


class Verdict(StrEnum):
    """What a difference in loss says of the first arm."""

    LOWER = "lower"
    HIGHER = "higher"
    UNDECIDED = "not decided"


class Basis(StrEnum):
    """What the interval of a cell rests on."""

    DOCUMENTS_AND_SEEDS = "documents and seeds"
    SEED_NOISE = "seed noise of the study"
    DOCUMENTS = "documents, one seed"
    NONE = "no interval"


def verdict(value: Estimate | Refusal) -> Verdict:
    """Whether an arm has a lower or a higher loss than its reference, by a difference of the two."""
    if isinstance(value, Refusal) or not value.excludes(0.0):
        return Verdict.UNDECIDED
    return Verdict.LOWER if value.value < 0 else Verdict.HIGHER


def mean_difference(differences: pd.Series) -> Estimate | Refusal:
    """The mean with its t interval over points, which share data and, some of them, seeds."""
    if len(differences) < LEAST_POINTS:
        return Refusal(reason=f"{len(differences)} of the {LEAST_POINTS} points that a mean needs")
    mean, error = float(differences.mean()), float(stats.sem(differences))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, len(differences) - 1)) * error
    return Estimate(value=mean, low=mean - reach, high=mean + reach)


def document_frame(record: Mapping[str, Any]) -> pd.DataFrame:
    """``tokens`` and ``nats`` of each held-out document of a run's record; empty where it has none."""
    found = record.get("held_out_by_document")
    found = found if isinstance(found, Mapping) else {}
    tokens, nats = (found.get(name) or [] for name in ("tokens", "nats"))
    if not isinstance(tokens, list) or not isinstance(nats, list) or len(tokens) != len(nats):
        return pd.DataFrame({"tokens": [], "nats": []}, dtype=float)
    try:
        return pd.DataFrame({"tokens": tokens, "nats": nats}, dtype=float)
    except (TypeError, ValueError):  # documents are whatever lies in the store
        return pd.DataFrame({"tokens": [], "nats": []}, dtype=float)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against a reference. Differences are nats per token of the arm minus the reference's: below 0 it is
    better."""

    x: str
    """What is equal: a kind of FLOPs, or ``tokens``."""
    points: pd.DataFrame
    """``size``, ``budget`` (the mean of x in the cell), ``seed``, ``key``, ``reference_key``, ``loss``,
    ``reference_loss``, ``difference``."""
    cells: pd.DataFrame
    """``size``, ``budget``, ``seeds``, ``difference``, ``low``, ``high`` (NaN without interval), ``basis``."""
    overall: Estimate | Refusal
    """The mean over the points; over a single cell, the cell's."""
    unmatched: int = 0
    """Runs of the arm without a run of the reference to be compared with."""

    @property
    def verdict(self) -> Verdict:
        """Of the overall difference."""
        return verdict(self.overall)


def matched_points(arm: pd.DataFrame, reference: pd.DataFrame, x: str) -> pd.DataFrame:
    """The points of a comparison: for each run of an arm the reference's run of its size and seed that is nearest in x,
    where that is within a factor of :data:`SAME`.

    Args:
        arm, reference: runs of one setting each (:func:`usable` runs count); columns ``key``, ``size``, ``seed``,
            ``loss`` and x.
    """
    one, other = (usable(frame, [x]).runs for frame in (arm, reference))
    rows: list[dict[str, Any]] = []
    if len(one) and len(other) and all(name in frame for frame in (one, other) for name in ("size", "seed")):
        budget = _centres(pd.concat([one, other], ignore_index=True), x)[: len(one)]
        names = [
            np.array(["\x1f".join(pair) for pair in zip(texts(frame["size"]), texts(frame["seed"]), strict=True)])
            for frame in (one, other)
        ]
        spent, sought = column(one, x), column(other, x)
        for index in range(len(one)):
            same = np.flatnonzero(names[1] == names[0][index])
            if not len(same):
                continue
            apart = np.abs(np.log(sought[same] / spent[index]))
            best = int(same[int(apart.argmin())])
            if apart.min() > math.log(SAME):
                continue
            mine, theirs = one.iloc[index], other.iloc[best]
            rows.append(
                {
                    "size": mine["size"],
                    "budget": float(budget[index]),
                    "seed": mine["seed"],
                    "key": str(mine["key"]),
                    "reference_key": str(theirs["key"]),
                    "loss": float(mine["loss"]),
                    "reference_loss": float(theirs["loss"]),
                    "difference": float(mine["loss"] - theirs["loss"]),
                }
            )
    columns = ("size", "budget", "seed", "key", "reference_key", "loss", "reference_loss", "difference")
    found = pd.DataFrame(rows, columns=list(columns))
    if found.empty:
        return found
    place, _ = ordered(found, "size")
    return (
        found.assign(place=place)
        .sort_values(["budget", "place", "seed"], kind="stable")
        .drop(columns="place")
        .reset_index(drop=True)
    )


def _centres(runs: pd.DataFrame, x: str) -> np.ndarray:
    """``(n,)`` the budget of each run as a number: what its study planned, else the geometric mean of its budget's x,
    to two digits."""
    labels, values = budgets_of(runs, x), column(runs, x)
    planned = column(runs, "budget") if x.startswith("flops") else np.full(len(runs), np.nan)
    found = np.empty(len(runs))
    for label in set(labels):
        own = labels == label
        known = planned[own][np.isfinite(planned[own])]
        centre = float(known[0]) if len(known) else float(np.exp(np.log(values[own]).mean()))
        found[own] = float(f"{centre:.3g}")
    return found


def compare_arms(
    arm: pd.DataFrame,
    reference: pd.DataFrame,
    x: str,
    *,
    noise: SeedNoise | Refusal | None = None,
    documents: Mapping[str, pd.DataFrame] | None = None,
) -> Comparison:
    """An arm against a reference at equal x, cell by cell and over all.

    Args:
        arm, reference: runs of one setting each, as :func:`matched_points` takes them.
        noise: of the study: the interval of a cell whose records have no documents, or a single seed.
        documents: :func:`document_frame` by key.
    """
    points = matched_points(arm, reference, x)
    rows = []
    for (size, budget), members in points.groupby(["size", "budget"], sort=False):
        value, basis = _cell(members, noise, documents or {})
        rows.append(
            {
                "size": size,
                "budget": budget,
                "seeds": len(members),
                "difference": value.value,
                "low": value.low,
                "high": value.high,
                "basis": str(basis),
            }
        )
    cells = pd.DataFrame(rows, columns=["size", "budget", "seeds", "difference", "low", "high", "basis"])
    overall: Estimate | Refusal
    if len(cells) == 1 and cells["basis"].iloc[0] != Basis.NONE:
        only = cells.iloc[0]
        overall = Estimate(value=float(only["difference"]), low=float(only["low"]), high=float(only["high"]))
    elif points.empty:
        what = "tokens" if x == "tokens" else "FLOPs"
        overall = Refusal(reason=f"no two finished runs of one size and seed have equal {what}")
    else:
        overall = mean_difference(points["difference"])
    count = len(usable(arm, [x]).runs)
    return Comparison(x=x, points=points, cells=cells, overall=overall, unmatched=count - len(points))


def _cell(
    members: pd.DataFrame, noise: SeedNoise | Refusal | None, documents: Mapping[str, pd.DataFrame]
) -> tuple[Estimate, Basis]:
    """The mean difference of a cell, with the best interval that there is."""
    count, mean = len(members), float(members["difference"].mean())
    read: Estimate | Refusal = Refusal(reason="no documents")
    if {*members["key"], *members["reference_key"]} <= set(documents):
        sides = [[documents[key] for key in members[name]] for name in ("key", "reference_key")]
        if all(len(frame) for side in sides for frame in side):
            read = paired_difference(*sides)
    if count > 1 and isinstance(read, Estimate):
        return read, Basis.DOCUMENTS_AND_SEEDS
    if isinstance(noise, SeedNoise):
        degrees = max(noise.runs - noise.groups, 1)
        reach = float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * noise.deviation.value * math.sqrt(2 / count)
        return Estimate(value=mean, low=mean - reach, high=mean + reach), Basis.SEED_NOISE
    if isinstance(read, Estimate):
        return read, Basis.DOCUMENTS
    return Estimate(value=mean, low=math.nan, high=math.nan), Basis.NONE


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The setting of an arm that a comparison takes, and how many others there are."""

    runs: pd.DataFrame
    others: int = 0
    setting: str = field(default="", repr=False)


def settings_of(runs: pd.DataFrame) -> np.ndarray:
    """``(n,)`` the setting of each run of an arm: the column ``setting`` (:func:`haltscale.platform.run_table.setting`)
    where there is one, else the same for all."""
    return texts(runs["setting"]) if "setting" in runs else np.full(len(runs), "", dtype=object)


def choose_setting(runs: pd.DataFrame, prefer: Mapping[str, int] | None = None) -> Chosen:
    """Of an arm's runs, those of the one setting that is compared.

    It is the setting of the runs that the study names (as subjects of its controls), else the one that was run at most
    points (size, compute, seed), else the first. Never the best.

    Args:
        prefer: how often the study names a run, by key.
    """
    labels = settings_of(runs)
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        return Chosen(runs=runs, setting=names[0] if names else "")
    keys = texts(runs["key"]) if "key" in runs else np.full(len(runs), "")

    def rank(name: str) -> tuple[int, int, int]:
        own = labels == name
        named = sum((prefer or {}).get(str(key), 0) for key in keys[own])
        return -named, -_places(runs[own]), names.index(name)

    best = min(names, key=rank)
    return Chosen(runs=runs[labels == best], others=len(names) - 1, setting=str(best))


def _places(runs: pd.DataFrame) -> int:
    kept = [name for name in ("size", "seed", "budget", "planned_tokens") if name in runs]
    rows = zip(*(texts(runs[name]) for name in kept), strict=True)
    return len(set(rows)) if kept else len(runs)


# ---- runs that are not finished ------------------------------------------------------------------


def provisional_points(
    arm: pd.DataFrame, reference: pd.DataFrame, x: str, evaluations: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Pairs of runs of which one is not finished, compared at the last evaluation that both have at equal x.

    Both must be of one size, seed, and planned budget: losses along two learning-rate schedules of other lengths say
    nothing about each other.

    Args:
        arm, reference: runs with ``key``, ``size``, ``seed``, ``state``, ``budget`` and ``planned_tokens``.
        evaluations: rows of ``loss`` and x, in order, by key.

    Returns:
        ``size``, ``budget`` (x at that evaluation), ``seed``, ``key``, ``reference_key``, ``difference``.
    """
    rows = []
    columns = ["size", "seed", "budget", "planned_tokens"]
    named = [
        ["\x1f".join(cells) for cells in zip(*(texts(frame[name]) for name in columns), strict=True)]
        if set(columns) <= set(frame)
        else []
        for frame in (arm, reference)
    ]
    theirs = {name: index for index, name in enumerate(named[1])}
    for index, name in enumerate(named[0]):
        if name not in theirs:
            continue
        mine, other = arm.iloc[index], reference.iloc[theirs[name]]
        if mine["state"] == "finished" and other["state"] == "finished":
            continue
        one, two = (evaluations.get(str(run["key"]), pd.DataFrame()) for run in (mine, other))
        if not all({"loss", x} <= set(frame) and len(frame) for frame in (one, two)):
            continue
        spent, sought = column(one, x), column(two, x)
        losses, other_losses = column(one, "loss"), column(two, "loss")
        with np.errstate(divide="ignore", invalid="ignore"):
            apart = np.abs(np.log(sought[None, :] / spent[:, None]))
        apart[~np.isfinite(losses)] = np.inf
        apart[:, ~np.isfinite(other_losses)] = np.inf
        apart = np.where(np.isfinite(apart), apart, np.inf)
        near = np.flatnonzero(apart.min(axis=1) <= math.log(SAME))
        if not len(near):
            continue
        last = int(near[-1])
        best = int(apart[last].argmin())
        rows.append(
            {
                "size": mine["size"],
                "budget": float(spent[last]),
                "seed": mine["seed"],
                "key": str(mine["key"]),
                "reference_key": str(other["key"]),
                "difference": float(losses[last] - other_losses[best]),
            }
        )
    return pd.DataFrame(rows, columns=["size", "budget", "seed", "key", "reference_key", "difference"])
