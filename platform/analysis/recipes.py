"""Whether the arms of a comparison are each at their own recipe; what is wrong otherwise, in words."""

from __future__ import annotations

import pandas as pd

from haltscale.platform.analysis.runs import TUNING, texts

FAIR = ("tuned", "carried", "rule", "subject")
"""Sources of a recipe that are the arm's own: found for it, by a named rule, or, for a replay, its subject's."""
UNFAIR = {
    "": "not tuned (at settings that all runs share, or chosen by hand)",
    "borrowed": "at a recipe that was tuned for another arm or size",
    "given": "at a learning rate that was set by hand",
}


def recipe_warning(runs: pd.DataFrame) -> str:
    """What is unfair about comparing these runs' arms: those that are not at a recipe of their own, or whose best value
    was at an end of what was tried. Empty where there is nothing, or one arm alone.

    Args:
        runs: with a column ``method`` (or ``arm``), and ``recipe`` and ``recipe_at_end`` where runs have any
            (:func:`haltscale.platform.run_table.row`).
    """
    if "role" in runs:
        runs = runs[texts(runs["role"]) != TUNING]
    name = next((name for name in ("arm", "method") if name in runs), None)
    if name is None:
        return ""
    arms = texts(runs[name])
    if len(set(arms) - {""}) < 2:
        return ""
    sources = texts(runs["recipe"]) if "recipe" in runs else [""] * len(runs)
    ends = texts(runs["recipe_at_end"]) if "recipe_at_end" in runs else [""] * len(runs)
    warnings = []
    for source, meaning in UNFAIR.items():
        if found := sorted({str(arm) for arm, own in zip(arms, sources, strict=True) if own == source and arm}):
            warnings.append(f"{', '.join(found)}: {meaning}")
    at_end: dict[str, set[str]] = {}
    for arm, end in zip(arms, ends, strict=True):
        if end:
            at_end.setdefault(str(end), set()).add(str(arm))
    warnings += [
        f"{', '.join(sorted(found))}: the best {end} is the last of those tried, so a better one may lie beyond"
        for end, found in sorted(at_end.items())
    ]
    return "; ".join(warnings)
