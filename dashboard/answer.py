"""What the Answer page says: which comparison a study is about, its verdict in words, and what is missing.

Pure functions over a study's view; the numbers come from :mod:`haltscale.platform.analysis.matched`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from haltscale.dashboard import data, style
from haltscale.dashboard.data import FlopsKind, StudyView, mapping, number, words
from haltscale.platform import analysis
from haltscale.platform.analysis import Comparison, Estimate, Refusal, Verdict
from haltscale.platform.arms import OLD_CONTROLS, is_control, shown

PLAIN = "vanilla"
EQUAL = {f"flops_{kind}": f"{kind} training FLOPs" for kind in FlopsKind} | {"tokens": "training tokens"}
"""What two runs of a point have in common, and how it is called."""


def named(view: StudyView) -> Counter[str]:
    """How often the study's controls name a run as their subject, by key."""
    pairs = mapping(view.document.get("controls"))
    return Counter(words(mapping(pair).get("of")) for pair in pairs.values())


def comparable(view: StudyView) -> pd.DataFrame:
    """The runs that may enter a comparison: those that search for hyperparameters never do."""
    return view.runs[(view.runs["role"] != "tuning") & (view.runs["method"] != "unknown")]


def arms(view: StudyView) -> list[str]:
    """The arms of a study, in its order."""
    return data.in_order(comparable(view)["method"])


def default_pair(view: StudyView) -> tuple[str, str] | None:
    """The comparison that a study names: the arm that its controls are of, against the plain model; None where there is
    only one arm."""
    runs, names = comparable(view), arms(view)
    if len(names) < 2:
        return None
    count = named(view)
    by_arm = Counter[str]()
    for key, method in zip(runs["key"], runs["method"], strict=True):
        by_arm[str(method)] += count.get(str(key), 0)
    subjects = [name for name in names if by_arm[name]]
    others = [name for name in names if name != PLAIN and not is_control(name)]
    routed = [name for name in others if name in set(runs["method"][runs["routed"]])]
    arm = max(subjects, key=lambda name: by_arm[name]) if subjects else (routed or others or names)[0]
    rest = [name for name in names if name != arm]
    return arm, PLAIN if PLAIN in rest else rest[0]


def default_equal(view: StudyView, arm: str, reference: str) -> str:
    """What two arms have in common: realised FLOPs, or tokens where no two of their runs spent the same."""
    realised = next(iter(EQUAL))
    for x in (realised, "tokens"):
        if len(answer(view, arm, reference, x).comparison.points):
            return x
    return realised


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An arm against a reference, with what is not finished beside it."""

    arm: str
    reference: str
    comparison: Comparison
    provisional: pd.DataFrame
    """Of :func:`haltscale.platform.analysis.provisional_points`."""
    setting: str = ""
    """The options of the arm that are compared, where it has several settings."""
    others: int = 0
    """Settings of the arm that are left out."""


def answer(
    view: StudyView,
    arm: str,
    reference: str,
    x: str,
    *,
    noise: analysis.SeedNoise | Refusal | None = None,
    documents: Mapping[str, pd.DataFrame] | None = None,
    evaluations: Mapping[str, pd.DataFrame] | None = None,
) -> Answer:
    """Compare two arms of a study at equal x, one setting of each."""
    runs, prefer = comparable(view), named(view)
    sides = [analysis.choose_setting(runs[runs["method"] == name], prefer) for name in (arm, reference)]
    one, other = (data.analysed(side.runs) for side in sides)
    planned = "planned_tokens"
    provisional = analysis.provisional_points(
        one.assign(**{planned: sides[0].runs["tokens"]}),
        other.assign(**{planned: sides[1].runs["tokens"]}),
        x,
        evaluations or {},
    )
    return Answer(
        arm=arm,
        reference=reference,
        comparison=analysis.compare_arms(one, other, x, noise=noise, documents=documents),
        provisional=provisional,
        setting=setting_name(runs[runs["method"] == arm], sides[0].runs) if sides[0].others else "",
        others=sides[0].others,
    )


def setting_name(every: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """The options of the chosen runs that other runs of their arm have otherwise: ``λ 0.1 · l_max 3``."""
    asked = [name for name in (*data.OPTIONS, *data.asked_for(every)) if name in every]
    parts = []
    for name in dict.fromkeys(asked):
        values = {data.written(value) for value in chosen[name]} - {""}
        if len(values) == 1 and every[name].map(data.written).nunique() > 1:
            parts.append(f"{style.SYMBOLS.get(name, name.replace('_', ' '))} {values.pop()}")
    return " · ".join(parts[:5])


def series_of(view: StudyView, methods: Sequence[str]) -> list[str]:
    """The series that stand for some methods: all of a method's, or those of the setting that is compared where they
    are many."""
    runs, prefer = comparable(view), named(view)
    found: list[str] = []
    for method in methods:
        own = runs[runs["method"] == method]
        if own["series"].nunique() > MOST_SERIES:
            own = analysis.choose_setting(own, prefer).runs
        found += list(dict.fromkeys(own["series"]))
    return found


MOST_SERIES = 3
"""Settings of a method that are highlighted together."""


# ---- in words ------------------------------------------------------------------------------------


def difference(value: Estimate) -> str:
    """``+0.346 [+0.173, +0.518]``."""
    return f"{style.signed(value.value)} [{style.signed(value.low)}, {style.signed(value.high)}]"


def headline(found: Answer) -> str:
    """The verdict in one sentence, with its interval."""
    equal, overall = EQUAL[found.comparison.x], found.comparison.overall
    one, other = shown(found.arm), shown(found.reference)
    if isinstance(overall, Refusal):
        return f"Not decided: at equal {equal}, {one} and {other} cannot be compared ({overall.reason})"
    reach = f"{difference(overall)} nats/token"
    match found.comparison.verdict:
        case Verdict.LOWER:
            return f"At equal {equal}, {one} has a lower loss than {other}: {reach}"
        case Verdict.HIGHER:
            return f"At equal {equal}, {one} has a higher loss than {other}: {reach}"
        case _:
            return f"Not decided: at equal {equal}, {one} and {other} differ by {reach}, which includes 0"


def support(found: Answer) -> str:
    """What the verdict rests on."""
    comparison = found.comparison
    points, cells = comparison.points, comparison.cells
    if points.empty:
        return ""
    seeds = points["seed"].nunique()
    better = int((points["difference"] < 0).sum())
    parts = [
        f"{_count(len(points), 'matched point')} ({_count(points['size'].nunique(), 'size')}, "
        f"{_count(cells['budget'].nunique(), 'budget')}, {_count(seeds, 'seed')})",
        f"{found.arm} is lower at {better} of {len(points)}",
    ]
    overall = comparison.overall
    if isinstance(overall, Estimate):
        parts.append(f"a perplexity {style.three(math.exp(overall.value))} times {found.reference}'s")
    text = "; ".join(parts) + "."
    if len(cells) == 1:
        text += f" The 95 % interval is over {cells['basis'].iloc[0]}."
    elif isinstance(overall, Estimate):
        text += " The 95 % interval is over points, which share their text: rather too narrow than too wide."
    if found.setting:
        text += f" {found.arm} at {found.setting}; its {_count(found.others, 'other setting')} are not compared."
    return text


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def missing(view: StudyView, found: Answer) -> list[str]:
    """What is missing from the answer, or may still change it, in sentences."""
    runs, comparison = comparable(view), found.comparison
    lines = []
    states = runs["state"].value_counts()
    open_runs = {state: int(states[state]) for state in ("running", "planned", "stalled", "stopped") if state in states}
    waiting = view.document.get("waiting")
    if isinstance(waiting, Sequence) and waiting and not isinstance(waiting, str):
        open_runs["waiting for their subjects"] = len(waiting)
    if open_runs:
        told = ", ".join(f"{count} {state}" for state, count in open_runs.items())
        lines.append(f"Provisional: the grid is not complete ({told}).")
    planned = number(view.document.get("published_of"))
    if planned > len(view.runs):
        lines.append(f"{len(view.runs)} of {planned:,.0f} planned runs are published.")
    wrong = {state: int(states[state]) for state in ("failed", "diverged", "capped", "damaged") if state in states}
    if wrong:
        told = ", ".join(f"{count} {state}" for state, count in wrong.items())
        lines.append(f"Without a result: {told}.")
    if comparison.unmatched:
        lines.append(
            f"{_count(comparison.unmatched, 'run')} of {found.arm} without a run of {found.reference} of the same size "
            f"and seed at equal {EQUAL[comparison.x]}."
        )
    if len(found.provisional):
        lines.append(
            f"{_count(len(found.provisional), 'pair')} not finished: drawn hollow at the last evaluation that both "
            "have; they enter no verdict."
        )
    single = int((comparison.cells["seeds"] == 1).sum())
    if single:
        lines.append(f"{single} of {_count(len(comparison.cells), 'cell')} with a single seed.")
    if (comparison.cells["basis"] == analysis.Basis.NONE).any():
        lines.append("No two runs differ in their seed only and no held-out documents are recorded: no cell intervals.")
    if found.arm in OLD_CONTROLS or found.reference in OLD_CONTROLS:
        lines.append("Old controls differ from a router in more than where the steps are: no verdict rests on them.")
    return lines


def claims(view: StudyView, documents: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The study's targets with their outcomes (:func:`haltscale.platform.analysis.judge`); empty where it has none.

    Args:
        documents: nats by held-out document, by key.
    """
    targets = analysis.targets_of(view.document)
    return analysis.judge(targets, data.analysed(comparable(view)), documents=documents, prefer=named(view))
