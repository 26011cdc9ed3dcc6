"""Several studies together: which may stand on one axis, their runs in one table, an arm of one against one of another.

Losses are nats per token of a text under a tokenizer, so those of two corpora say nothing about each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pandas as pd

from haltscale.dashboard import answer, fits
from haltscale.dashboard.answer import Answer
from haltscale.dashboard.data import StudyView, analysed, words


def fingerprint(view: StudyView) -> str:
    """Of the study's corpus; empty where its study.json has none."""
    return words(view.corpus.get("fingerprint"))


def agreeing(view: StudyView, others: Collection[StudyView]) -> tuple[list[StudyView], dict[str, str]]:
    """The studies whose losses compare with this one's, and why each of the rest is left out."""
    own, kept, refused = fingerprint(view), [view], {}
    for other in others:
        theirs = fingerprint(other)
        if not own:
            refused[other.name] = f"{view.name} records no fingerprint of its corpus: submit it again, which records it"
        elif not theirs:
            refused[other.name] = "it records no fingerprint of its corpus: submit it again, which records it"
        elif theirs != own:
            refused[other.name] = (
                f"its corpus is another ({words(other.corpus.get('name')) or 'unnamed'}, fingerprint {theirs}) than "
                f"{view.name}'s ({words(view.corpus.get('name')) or 'unnamed'}, {own}): their losses do not compare"
            )
        else:
            kept.append(other)
    return kept, refused


def joined(views: Collection[StudyView]) -> pd.DataFrame:
    """The runs of several studies as one table, with the column ``study``; keys and labels name it too."""
    parts = [
        answer.comparable(view).assign(
            study=view.name,
            key=[f"{view.name}/{key}" for key in answer.comparable(view)["key"]],
            label=[f"{label} · {view.name}" for label in answer.comparable(view)["label"]],
        )
        for view in views
    ]
    return pd.concat(parts, ignore_index=True)


def across(views: Mapping[str, StudyView], one: tuple[str, str], other: tuple[str, str], x: str) -> Answer:
    """An arm of one study against an arm of another.

    Args:
        views: by name, of studies that agree.
        one: study and arm; ``other`` likewise.
        x: what two runs of a point have in common.
    """
    names = [" of ".join(reversed(side)) for side in (one, other)]
    parts = []
    for (study, arm), name in zip((one, other), names, strict=True):
        runs = joined([views[study]])
        parts.append(runs[runs["method"] == arm].assign(method=name))
    both = pd.concat(parts, ignore_index=True)
    every = joined(list(views.values()))
    noise = fits.seed_noise(fits.settled(analysed(every)))
    view = replace(views[one[0]], runs=both, document={})
    return answer.answer(view, names[0], names[1], x, noise=noise)
