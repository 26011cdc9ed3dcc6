"""Figures of where the thinking went and whether it paid: pure functions, at most 10,000 points each."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from haltscale.dashboard import style
from haltscale.dashboard.data import number, size_order
from haltscale.dashboard.figures import MANY_RUNS, MOST_LEGEND, MUTED, layout, log_axis
from haltscale.platform import arms

DIMENSIONS = {
    "by_surprisal": "surprisal (deciles of the token's NLL; 0 is predicted best)",
    "by_frequency": "frequency (0 the most frequent tokens, 9 the rarest)",
    "by_position": "place in the context window, from",
    "by_token_class": "what the token looks like",
}


def steps_by(rows: pd.DataFrame, dimension: str) -> go.Figure:
    """Mean latent steps with their 95 % interval along a dimension, and the loss beside them.

    Args:
        rows: ``value``, ``tokens``, ``mean_steps``, ``low``, ``high``, ``loss`` (nats).
    """
    figure = go.Figure()
    names = [html.escape(str(value)) for value in rows["value"]]
    figure.add_scatter(
        x=names,
        y=rows["mean_steps"],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (rows["high"] - rows["mean_steps"]).fillna(0),
            "arrayminus": (rows["mean_steps"] - rows["low"]).fillna(0),
            "thickness": 2,
        },
        mode="lines+markers",
        name="mean latent steps",
        line={"color": "#0072B2", "width": 3},
        marker={"size": 10},
        customdata=rows["tokens"],
        hovertemplate="%{x}: %{y:.3g} latent steps, %{customdata:,} tokens<extra></extra>",
    )
    figure.add_scatter(
        x=names,
        y=rows["loss"],
        mode="lines+markers",
        name="loss (right axis)",
        yaxis="y2",
        line={"color": "#D55E00", "dash": "dot", "width": 2},
        marker={"symbol": "diamond", "size": 8},
        hovertemplate="%{x}: %{y:.3g} nats/token<extra></extra>",
    )
    figure.update_xaxes(title=DIMENSIONS[dimension], type="category")
    figure.update_yaxes(title="mean latent steps", rangemode="tozero")
    layout(figure, height=360)
    return figure.update_layout(
        yaxis2={
            "title": "loss, nats/token",
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "tickformat": ".3~g",
            "rangemode": "tozero",
        }
    )


def gains(rows: pd.DataFrame) -> go.Figure:
    """Nats after step k minus nats after step 0, by how many steps the token took. Below 0 the steps paid.

    Args:
        rows: ``depth``, ``step``, ``tokens``, ``mean``, ``low``, ``high``.
    """
    figure = go.Figure()
    most = int(rows["depth"].max()) if len(rows) else 1
    for index, (depth, part) in enumerate(rows.assign(depth=rows["depth"].astype(int)).groupby("depth")):
        color = style.line_color(int(str(depth)), most)
        figure.add_scatter(
            x=[0, *part["step"]],
            y=[0.0, *part["mean"]],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [0, *(part["high"] - part["mean"]).fillna(0)],
                "arrayminus": [0, *(part["mean"] - part["low"]).fillna(0)],
            },
            mode="lines+markers",
            name=f"halted after {depth}",
            line={"color": color, "width": 3, "dash": style.DASHES[index % len(style.DASHES)]},
            marker={
                "symbol": style.MARKERS[index % len(style.MARKERS)],
                "size": 9,
                "line": {"width": 1, "color": MUTED},
            },
            customdata=[int(part["tokens"].iloc[0])] * (len(part) + 1),
            hovertemplate="after %{x} steps: %{y:.3g} nats (%{customdata:,} tokens)<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"})
    figure.update_xaxes(title="latent step k", dtick=1)
    figure.update_yaxes(title="NLL(k) − NLL(0), nats")
    return layout(figure, height=360, legend_title="tokens that")


def calibration(rows: pd.DataFrame) -> go.Figure:
    """How often the likeliest token is right, by how likely the model held it.

    Args:
        rows: ``from``, ``tokens``, ``confidence``, ``accuracy``.
    """
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": MUTED, "dash": "dash"}, name="calibrated", hoverinfo="skip"
    )
    figure.add_scatter(
        x=rows["confidence"],
        y=rows["accuracy"],
        mode="lines+markers",
        name="model",
        line={"color": "#0072B2", "width": 3},
        marker={"size": 10},
        customdata=rows["tokens"],
        hovertemplate="held %{x:.3g} likely, right %{y:.3g} (%{customdata:,} tokens)<extra></extra>",
    )
    figure.update_xaxes(title="mean confidence", range=[0, 1])
    figure.update_yaxes(title="share that is right", range=[0, 1])
    return layout(figure, height=360)


def controls(runs: pd.DataFrame) -> go.Figure:
    """Loss against mean latent steps of the router and of what it must beat, a line per method, size and budget."""
    figure = go.Figure()
    kept = runs[runs["loss"].notna() & runs["mean_steps"].notna()]
    kept = kept.assign(order=kept["size"].map(size_order)).sort_values(["order", "mean_steps"])
    methods = list(dict.fromkeys(kept["method"]))
    named: set[str] = set()
    for (method, size, tokens), part in kept.groupby(["method", "size", "tokens"], sort=False, dropna=False):
        index = methods.index(method)
        detail = html.escape(f"{size}, {style.compact(number(tokens))} tokens")
        figure.add_scatter(
            x=part["mean_steps"],
            y=part["loss"],
            mode="lines+markers",
            name=html.escape(arms.shown(str(method))),
            legendgroup=str(method),
            showlegend=method not in named,
            line={
                "color": style.method_color(str(method)),
                "dash": style.DASHES[index % len(style.DASHES)],
                "width": 1,
            },
            marker={"symbol": style.MARKERS[index % len(style.MARKERS)], "size": 9},
            customdata=[html.escape(label) for label in part["label"]],
            hovertemplate=f"%{{customdata}} ({detail}): %{{y:.3f}} nats/token, %{{x:.3g}} latent steps<extra></extra>",
        )
        named.add(str(method))
    figure.update_xaxes(title="mean latent steps per token", rangemode="tozero")
    figure.update_yaxes(title="validation loss, nats/token")
    return layout(figure, height=400)


def inference(runs: pd.DataFrame, kind: str) -> go.Figure:
    """Loss against inference FLOPs per token: a marker per run."""
    figure = go.Figure()
    column = f"inference_flops_{kind}"
    kept = runs[runs["loss"].notna() & runs[column].gt(0)]
    brief, named = kept["series"].nunique() > MOST_LEGEND, set()
    for name, part in kept.groupby("series", sort=False):
        index, group = int(part["rank"].iloc[0]), str(part["method"].iloc[0]) if brief else str(name)
        figure.add_scatter(
            x=part[column],
            y=part["loss"],
            mode="markers",
            name=html.escape(group),
            legendgroup=group,
            showlegend=group not in named,
            marker={
                "color": style.shade(style.method_color(str(part["method"].iloc[0])), float(part["shade"].iloc[0])),
                "symbol": style.MARKERS[index % len(style.MARKERS)],
                "size": 11 if len(kept) <= MANY_RUNS else 7,
            },
            customdata=[html.escape(label) for label in part["label"]],
            hovertemplate="%{customdata}: %{y:.3f} nats/token at %{x:.3g} FLOPs per token<extra></extra>",
        )
        named.add(group)
    log_axis(figure, "x", kept[column], f"inference FLOPs per token, {kind}")
    figure.update_yaxes(title="validation loss, nats/token")
    return layout(figure, height=420)


def dial(rows: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Loss against inference FLOPs of single checkpoints as tau or l_max is turned; a star is how it was trained.

    Args:
        rows: by run label: ``dial``, ``value``, ``own``, ``loss``, ``flops_realised``, ``mean_steps``.
    """
    figure = go.Figure()
    for index, (label, table) in enumerate(rows.items()):
        for turned, part in table.groupby("dial"):
            part = part.sort_values("flops_realised")
            figure.add_scatter(
                x=part["flops_realised"],
                y=part["loss"],
                mode="lines+markers",
                name=html.escape(f"{label} · {turned}"),
                line={"dash": "solid" if turned == "tau" else "dot", "color": style.OTHER_COLORS[index % 5]},
                marker={
                    "symbol": ["star" if own else style.MARKERS[index % len(style.MARKERS)] for own in part["own"]],
                    "size": [15 if own else 9 for own in part["own"]],
                },
                customdata=part[["value", "mean_steps"]],
                hovertemplate=f"{turned} %{{customdata[0]:.3g}}: %{{y:.3f}} nats/token, "
                "%{customdata[1]:.3g} latent steps<extra></extra>",
            )
    figure.update_xaxes(title="inference FLOPs per token, realised")
    figure.update_yaxes(title="validation loss, nats/token")
    return layout(figure, height=420)


def table_of(rows: object, columns: Sequence[str]) -> pd.DataFrame:
    """Rows of a summary as a table with these columns; whatever is no row is passed over."""
    found: list[Mapping[str, Any]] = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    table = pd.DataFrame([{name: row.get(name) for name in columns} for row in found], columns=list(columns))
    for name in columns:
        if name not in ("value", "name", "dial", "own"):
            table[name] = [number(value) for value in table[name]]
    return table
