"""Targets: what a study is to show or to reproduce, as numbers or orders, and whether its runs hold them.

A target is written before there is a result, and judged by one rule: it holds where the 95 % interval of what was
measured lies inside of the expected range, does not hold where the two do not meet, and is not decided otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import Estimate, Refusal
from haltscale.platform.analysis.matched import SAME_STEPS, Basis, choose_setting, compare_arms, mean_difference
from haltscale.platform.analysis.recipes import recipe_warning
from haltscale.platform.analysis.runs import TUNING, column, texts, usable
from haltscale.platform.arms import OLD_CONTROLS

LOSS = "loss"
NOTHING = "nothing"
EQUAL = ("flops_realised", "tokens", NOTHING)
"""What may be equal in a comparison, within :data:`haltscale.platform.analysis.matched.SAME`. Nothing but the seed: the
claim says what each side may spend, and the options choose the runs."""
LEAST_SEEDS = 2


class Outcome(StrEnum):
    """What became of a target."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "not decided"


@dataclass(frozen=True, kw_only=True)
class Target:
    """An expected range of a figure of one arm, or of its difference from a reference at equal compute or tokens."""

    claim: str
    """In a sentence."""
    source: str
    """Whose claim it is: a paper's number or name, or ``us``."""
    arm: str
    """The arm measured, as tables name it: ``adaptive``, ``looped/injected``, ``adaptive/shuffled``."""
    reference: str = ""
    """The arm that it is compared with, run by run: same size, same seed; empty: the arm's own figure is judged."""
    equal: str = EQUAL[0]
    """What the two arms have in common: ``flops_realised`` (training), ``tokens``, or ``nothing`` but size and seed."""
    quantity: str = LOSS
    """A column of the table of results: ``loss`` (nats per token), ``flops_realised``, ``mean_steps``, ..."""
    minus: str = ""
    """A column that is subtracted from it, such as ``hard_steps`` from ``easy_steps``."""
    relative: bool = False
    """Judge the ratio to the reference less 1, in place of the difference."""
    low: float | None = None
    """Least expected value; None: none."""
    high: float | None = None
    """Largest expected value; None: none. ``high=0``: lower than the reference; ``low=0``: higher; an expected number
    with its tolerance: both."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the arm's runs, those with these values in their columns; by default the setting that a comparison takes."""
    reference_options: Mapping[str, Any] = field(default_factory=dict)
    """The same of the reference. Where either names a ``size``, the two may differ in it."""

    def problems(self) -> list[str]:
        """Everything wrong with it."""
        found = []
        if not self.claim or not self.source:
            found.append("a target needs its claim in words and its source")
        if self.equal not in EQUAL:
            found.append(f"equal must be one of {', '.join(EQUAL)} (got {self.equal!r})")
        if self.equal == NOTHING and (self.quantity in EQUAL or not self.reference_options):
            found.append("where nothing is equal, reference_options say which runs, and no cost is compared")
        if self.low is None and self.high is None:
            found.append("give low, high or both: nothing is expected")
        elif self.low is not None and self.high is not None and self.low > self.high:
            found.append(f"low must not be above high (got {self.low} and {self.high})")
        if self.relative and not self.reference:
            found.append("a relative target needs a reference")
        for name in (self.arm, self.reference):
            if name in OLD_CONTROLS and self.quantity == LOSS:
                found.append(f"no verdict rests on an old control (got {name!r})")
        return [f"target {self.claim!r}: {problem}" for problem in found]

    def document(self) -> dict[str, Any]:
        """As JSON; :meth:`from_document` reads it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: object) -> Self | None:
        """A target of a study's ``study.json``; None where it is none."""
        if not isinstance(document, Mapping):
            return None
        known = {one.name: document[one.name] for one in fields(cls) if one.name in document}
        words = ("claim", "source", "arm", "reference", "equal", "quantity", "minus")
        if not all(isinstance(known.get(name, ""), str) for name in words):
            return None
        if not all(isinstance(known.get(name, {}), Mapping) for name in ("options", "reference_options")):
            return None
        if not all(_is_bound(known.get(name)) for name in ("low", "high")):
            return None
        try:
            target = cls(**known)
        except TypeError:  # a field without a default is missing
            return None
        return None if target.problems() else target


def _is_bound(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def judge(
    targets: Iterable[Target],
    runs: pd.DataFrame,
    *,
    documents: Mapping[str, pd.DataFrame] | None = None,
    prefer: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Each target with its outcome.

    Args:
        runs: the study's (:func:`haltscale.platform.sweeps.report.results`); tuning runs never count.
        documents: :func:`~haltscale.platform.analysis.matched.document_frame` by key: without them an interval is over
            seeds alone.
        prefer: how often the study's controls name a run as their subject, by key: which setting of an arm is taken.

    Returns:
        ``claim``, ``source``, ``verdict`` (:class:`Outcome`), ``figure`` (what was measured with its 95 % interval),
        ``value``, ``low``, ``high`` (NaN where there are none), and ``reason``: what it rests on, or why nothing is
        decided.
    """
    return pd.DataFrame(
        [_judged(target, runs, documents or {}, prefer or {}) for target in targets],
        columns=["claim", "source", "verdict", "figure", "value", "low", "high", "reason"],
    )


def _judged(
    target: Target, runs: pd.DataFrame, documents: Mapping[str, pd.DataFrame], prefer: Mapping[str, int]
) -> dict[str, Any]:
    row: dict[str, Any] = {"claim": target.claim, "source": target.source, "verdict": str(Outcome.UNDECIDED)}
    row |= {"figure": "", **dict.fromkeys(("value", "low", "high"), math.nan)}
    sides = _sides(target, runs, prefer)
    value, basis = measured(target, *sides, documents)
    if isinstance(value, Refusal):
        return row | {"reason": value.reason}
    unit = "relative" if target.relative else {LOSS: "nats/token"}.get(target.quantity, "")
    figure = f"{value.value:+.4g} [{value.low:+.4g}, {value.high:+.4g}] {unit}".strip()
    row |= {"figure": figure, "value": value.value, "low": value.low, "high": value.high}
    low = -math.inf if target.low is None else target.low
    high = math.inf if target.high is None else target.high
    ranked = target.quantity == LOSS and bool(target.reference)
    if ranked and (warning := recipe_warning(pd.concat(sides, ignore_index=True))):
        return row | {"reason": f"{basis}; {warning}"}
    if target.reference.startswith(f"{target.arm}/") and (problem := _unequal_steps(*sides)):
        return row | {"reason": f"{basis}; {problem}"}
    if low <= value.low and value.high <= high:
        return row | {"verdict": str(Outcome.HOLDS), "reason": basis}
    if value.high < low or value.low > high:
        return row | {"verdict": str(Outcome.FAILS), "reason": basis}
    return row | {"reason": f"{basis}; the interval crosses the border of what is expected"}


def measured(
    target: Target, arm: pd.DataFrame, reference: pd.DataFrame, documents: Mapping[str, pd.DataFrame]
) -> tuple[Estimate | Refusal, str]:
    """What a target is about: the figure with its interval, and what it rests on."""
    if not target.reference:
        found = usable(arm, []).runs
        values = pd.Series(_figures(target, found)).dropna()
        return mean_difference(values), f"{len(values)} runs"
    if "size" in {**target.options, **target.reference_options} and arm["size"].nunique() == 1:
        reference = reference.assign(size=arm["size"].iloc[0])  # sizes that differ by intention
    x = target.equal
    if x == NOTHING:
        x = EQUAL[0]
        arm, reference = arm.assign(**{x: 1.0}), reference.assign(**{x: 1.0})
    if target.quantity == LOSS and not target.minus and not target.relative:
        comparison = compare_arms(arm, reference, x, documents=documents)
        seeds = int(comparison.points["seed"].nunique())
        if not isinstance(comparison.overall, Refusal) and seeds < LEAST_SEEDS:
            return Refusal(reason=f"{seeds} seed: a verdict needs {LEAST_SEEDS} at least, paired"), ""
        bases = dict.fromkeys(map(str, comparison.cells["basis"]))
        over = ", ".join(base for base in bases if base != Basis.NONE) if len(comparison.cells) == 1 else "points"
        return (
            comparison.overall,
            f"{len(comparison.points)} pairs of runs, {seeds} seeds; interval over {over or 'seeds'}",
        )
    points = compare_arms(arm, reference, x).points
    sides = []
    for frame, key in ((arm, "key"), (reference, "reference_key")):
        values = pd.Series(_figures(target, frame), index=texts(frame["key"])) if len(frame) else pd.Series(dtype=float)
        sides.append(values.reindex(points[key]).to_numpy(dtype=float))
    gaps = sides[0] / sides[1] - 1 if target.relative else sides[0] - sides[1]
    gaps = gaps[np.isfinite(gaps)]
    return mean_difference(pd.Series(gaps)), f"{len(gaps)} pairs of runs; interval over pairs"


def _sides(target: Target, runs: pd.DataFrame, prefer: Mapping[str, int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of the arm, and of the reference."""
    arm = _side(runs, target.arm, target.options, prefer)
    return arm, _side(runs, target.reference, target.reference_options, prefer)


def _unequal_steps(subject: pd.DataFrame, control: pd.DataFrame) -> str:
    """Why a control differs in more than where its subject's steps are."""
    means = [float(column(side, "mean_steps").mean()) for side in (subject, control)]
    apart = abs(means[1] - means[0]) > SAME_STEPS * means[0]
    return f"mean steps differ: {means[0]:.4f} and {means[1]:.4f}" if apart else ""


def _figures(target: Target, runs: pd.DataFrame) -> np.ndarray:
    """``(n,)`` the quantity of each run."""
    own = column(runs, target.quantity)
    return own - column(runs, target.minus) if target.minus else own


def _side(runs: pd.DataFrame, name: str, options: Mapping[str, Any], prefer: Mapping[str, int]) -> pd.DataFrame:
    """The runs of an arm that a target is about."""
    own = runs[texts(runs["method"]) == name] if "method" in runs else runs.head(0)
    if "role" in own:
        own = own[texts(own["role"]) != TUNING]
    for option, value in options.items():
        own = own[[_same(cell, value) for cell in own[option]]] if option in own else own.head(0)
    return (own if options else choose_setting(own, prefer).runs).reset_index(drop=True)


def _same(cell: object, value: object) -> bool:
    return bool(cell == value) if isinstance(cell, str | bool | int | float | np.generic) else cell is value


def targets_of(document: Mapping[str, Any]) -> list[Target]:
    """The targets in a study's ``study.json``; what is none is left out."""
    listed = document.get("targets")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return []
    return [target for one in listed if (target := Target.from_document(one)) is not None]
