"""Figures of what a model costs over its life: pure functions, at most 10,000 points each."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from haltscale.dashboard import style
from haltscale.dashboard.data import in_order
from haltscale.dashboard.figures import MUTED, layout, log_axis
from haltscale.platform import arms


def totals(table: pd.DataFrame, served: float, kind: str, crossings: Sequence[float] = ()) -> go.Figure:
    """Training plus serving against served tokens, a line per method; the reader's number of tokens is a vertical line,
    break-even points are stars.

    Args:
        table: of :func:`haltscale.platform.analysis.costs.totals`.
        crossings: served tokens at break-even.
    """
    figure = go.Figure()
    methods = in_order(table["method"])
    for index, method in enumerate(methods):
        part = table[table["method"] == method]
        figure.add_scatter(
            x=part["tokens"],
            y=part["total"],
            mode="lines",
            name=html.escape(arms.shown(method)),
            line={"color": style.method_color(method), "dash": style.DASHES[index % len(style.DASHES)], "width": 3},
            customdata=[html.escape(str(label)) for label in part["label"]],
            hovertemplate="%{customdata}<br>%{x:.3g} tokens served: %{y:.3g} FLOPs<extra></extra>",
        )
    lowest = table.groupby("tokens")["total"].min()
    for at in crossings:
        figure.add_vline(x=at, line={"color": MUTED, "width": 1, "dash": "dot"}, annotation_text="break-even")
    if len(table):
        figure.add_vline(x=served, line={"color": MUTED, "width": 2}, annotation_text=f"{style.compact(served)} served")
    log_axis(figure, "x", pd.Series(sorted(set(table["tokens"]))), "tokens served")
    log_axis(figure, "y", pd.concat([lowest, table["total"]]), f"training + serving, {kind} FLOPs")
    return layout(figure, height=460)
