"""What a model costs over its life: training, and every token that it serves.

A latent step is paid again for each served token, a larger model too; a model that is trained for longer is paid once.
So which method is cheapest at a loss depends on how many tokens are served.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import quiet
from haltscale.platform.analysis.runs import column, texts, usable

CELL = ("method", "setting", "size", "nominal", "planned_tokens")
"""Runs that agree in these differ in their seed only."""


def candidates(frame: pd.DataFrame, train: str, serve: str) -> pd.DataFrame:
    """What could be trained and served: the means over seeds of the finished runs.

    Args:
        frame: the results frame; tuning runs do not count.
        train: column of the training FLOPs.
        serve: column of the inference FLOPs per token.

    Returns:
        ``method``, ``size``, ``label`` (of one of the runs), ``runs``, ``loss`` (nats/token), ``train`` and ``serve``.
    """
    runs = usable(frame, [train, serve]).runs
    names = [name for name in CELL if name in runs]
    columns = ["method", "size", "label", "runs", "loss", "train", "serve"]
    if runs.empty or "method" not in runs:
        return pd.DataFrame(columns=columns)
    cells = ["\x1f".join(row) for row in zip(*(texts(runs[name]) for name in names), strict=True)]
    rows = []
    for _, index in runs.groupby(np.array(cells, dtype=object), sort=False).groups.items():
        part = runs.loc[index]
        first = part.iloc[0]
        rows.append(
            {
                "method": str(first["method"]),
                "size": str(first.get("size", "")),
                "label": str(first.get("label", first["key"])),
                "runs": len(part),
                "loss": float(column(part, "loss").mean()),
                "train": float(column(part, train).mean()),
                "serve": float(column(part, serve).mean()),
            }
        )
    return pd.DataFrame(rows, columns=columns)


@quiet
def cheapest(models: pd.DataFrame, loss: float, tokens: float) -> pd.DataFrame:
    """Of each method the model with the lowest total at so many served tokens, of those that reach a loss; cheapest
    first.

    Args:
        models: of :func:`candidates`.

    Returns:
        Its rows with ``total``: training plus served tokens times inference FLOPs per token.
    """
    kept = models[models["loss"] <= loss]
    kept = kept.assign(total=kept["train"] + tokens * kept["serve"])
    best = kept.loc[kept.groupby("method")["total"].idxmin()] if len(kept) else kept
    return best.sort_values("total", kind="stable").reset_index(drop=True)


def totals(models: pd.DataFrame, loss: float, tokens: np.ndarray) -> pd.DataFrame:
    """The total of each method's cheapest model along served tokens: ``method``, ``tokens``, ``total``, ``label``."""
    rows = [cheapest(models, loss, float(count)).assign(tokens=float(count)) for count in tokens]
    columns = ["method", "tokens", "total", "label"]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def break_even(models: pd.DataFrame, loss: float, one: str, other: str, low: float, high: float) -> list[float]:
    """The counts of served tokens between ``low`` and ``high`` at which the cheaper of two methods changes, ascending.

    Each method is served by its cheapest model at that count, of those that reach the loss.
    """
    sides = [models[(models["method"] == name) & (models["loss"] <= loss)] for name in (one, other)]
    if any(side.empty for side in sides):
        return []
    points = {low, high}
    lines = pd.concat(sides)[["train", "serve"]].to_numpy(dtype=float)
    for (a, b), (c, d) in itertools.combinations(lines.tolist(), 2):  # where two totals meet
        if b != d and low < (at := (c - a) / (b - d)) < high:
            points.add(at)
    ordered = sorted(points)

    def gap(tokens: float) -> float:
        first, second = (float((side["train"] + tokens * side["serve"]).min()) for side in sides)
        return first - second

    found, before = [], 0.0
    for left, right in itertools.pairwise(ordered):
        sign = math.copysign(1.0, gap(math.sqrt(left * right))) if gap(math.sqrt(left * right)) else 0.0
        if before and sign and sign != before:
            found.append(left)
        before = sign or before
    return found
