"""Figures of paired differences: pure functions, at most 10,000 points each."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from haltscale.dashboard import style
from haltscale.dashboard.figures import MUTED, layout
from haltscale.platform.analysis import Comparison, Estimate

MOST_ROWS = 60
LOWER, HIGHER, OPEN = "#0072B2", "#D55E00", "#8C8C8C"
"""Colours of a difference below 0, above 0, and whose interval includes 0; the symbol differs too."""


def _look(low: float, high: float) -> tuple[str, str, str]:
    """Colour, symbol and words of an interval."""
    if high < 0:
        return LOWER, "triangle-left", "lower loss"
    if low > 0:
        return HIGHER, "triangle-right", "higher loss"
    return OPEN, "circle", "not decided"


def forest_rows(comparison: Comparison, arm: str, provisional: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows of :func:`forest`, top down: ``name``, ``difference``, ``low``, ``high``, ``kind`` (all, cell,
    provisional), ``basis``, ``seeds``."""
    overall, rows = comparison.overall, []
    if isinstance(overall, Estimate) and len(comparison.cells) > 1:
        rows.append(
            {"name": f"{arm}: all {len(comparison.points)} points", "kind": "all", "basis": "points"}
            | {"difference": overall.value, "low": overall.low, "high": overall.high, "seeds": len(comparison.points)}
        )
    unit = "tokens" if comparison.x == "tokens" else "FLOPs"
    for cell in comparison.cells.to_dict("records"):
        budget = style.compact(cell["budget"]) if unit == "tokens" else style.power(cell["budget"])
        seeds = "1 seed" if cell["seeds"] == 1 else f"{cell['seeds']} seeds"
        named = {"name": f"{budget} {unit} · {cell['size']} · {seeds}", "kind": "cell"}
        rows.append(named | {str(name): value for name, value in cell.items()})
    for one in [] if provisional is None else provisional.to_dict("records"):
        budget = style.compact(one["budget"]) if unit == "tokens" else style.power(one["budget"])
        rows.append(
            {"name": f"{budget} {unit} · {one['size']} · seed {one['seed']:g} so far", "kind": "provisional"}
            | {"difference": one["difference"], "low": math.nan, "high": math.nan, "basis": "unfinished", "seeds": 1}
        )
    columns = ["name", "kind", "difference", "low", "high", "basis", "seeds"]
    return pd.DataFrame(rows, columns=columns).head(MOST_ROWS)


def forest(rows: pd.DataFrame, arm: str, reference: str) -> go.Figure:
    """Paired differences in loss with their 95 % intervals: a row per cell, the mean over all points on top.

    Args:
        rows: of :func:`forest_rows`.
    """
    figure = go.Figure()
    one, other = html.escape(arm), html.escape(reference)
    names = [html.escape(str(name)) for name in rows["name"]]
    seen: set[str] = set()
    for name, row in zip(names, rows.to_dict("records"), strict=True):
        low, high = float(row["low"]), float(row["high"])
        known = math.isfinite(low) and math.isfinite(high)
        color, symbol, words = _look(low, high) if known else (MUTED, "circle-open", "no interval")
        if row["kind"] == "provisional":
            color, symbol, words = MUTED, "circle-open-dot", "unfinished pair, no verdict"
        figure.add_scatter(
            x=[row["difference"]],
            y=[name],
            mode="markers",
            name=words,
            legendgroup=words,
            showlegend=words not in seen,
            marker={"color": color, "size": 18 if row["kind"] == "all" else 11}
            | {"symbol": "diamond" if row["kind"] == "all" else symbol, "line": {"width": 1.5, "color": color}},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - row["difference"] if known else 0],
                "arrayminus": [row["difference"] - low if known else 0],
                "thickness": 4 if row["kind"] == "all" else 2.5,
                "width": 6,
                "color": color,
                "visible": known,
            },
            hovertemplate=f"{name}<br>%{{x:+.3f}} nats/token"
            + (f" [{style.signed(low)}, {style.signed(high)}]<br>interval over {row['basis']}" if known else "")
            + "<extra></extra>",
        )
        seen.add(words)
    figure.add_vline(x=0, line={"color": MUTED, "width": 1.5, "dash": "dash"})
    figure.update_xaxes(title=f"loss of {one} − loss of {other}, nats/token<br>← {one} is better | worse →")
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names, range=[len(names) - 0.5, -0.5], automargin=True
    )
    return layout(figure, height=150 + 30 * max(len(names), 1), top=40)


def every_arm(found: Mapping[str, Comparison], reference: str) -> go.Figure:
    """The mean difference of every arm to one reference, best first; arms without an interval are left out."""
    rows = pd.DataFrame(
        [
            {"name": arm, "kind": "cell", "basis": f"{len(one.points)} points", "seeds": len(one.points)}
            | {"difference": one.overall.value, "low": one.overall.low, "high": one.overall.high}
            for arm, one in found.items()
            if isinstance(one.overall, Estimate)
        ],
        columns=["name", "kind", "difference", "low", "high", "basis", "seeds"],
    ).sort_values("difference", kind="stable")
    return forest(rows, "the arm", reference)
