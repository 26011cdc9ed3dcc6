"""Figures of halting and training: pure functions from DataFrames to Plotly figures, at most 10,000 points each.

Colour says the method; dash and marker say the series, so that no figure depends on colour alone. Backgrounds, fonts
and grid lines are left to the page's theme, which follows the reader's light or dark mode.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from haltscale.dashboard import style
from haltscale.dashboard.data import size_order

MOST_POINTS = 10_000
CURVE_POINTS = 4_000
"""Points of a figure of curves: each has a few hundred then, and a browser draws it in a fraction of a second."""
MANY_RUNS = 100
"""More markers than this are drawn small, faint and without their standard errors."""
MOST_LEGEND = 14
"""A legend with more series than this names methods only; hover boxes still name every run."""
MUTED = "rgba(128,128,128,0.9)"


def log_axis(figure: go.Figure, axis: str, values: pd.Series, title: str, **where: int) -> None:
    """A logarithmic axis with a margin around the values and ticks written in full; ``row`` and ``col`` say which."""
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    update(type="log", title=title, **where)
    if len(values):
        margin = max(0.12 * math.log10(values.max() / values.min()), 0.006)
        low, high = math.log10(values.min()) - margin, math.log10(values.max()) + margin
        ticks, names = style.log_ticks(10**low, 10**high)
        update(range=[low, high], tickvals=ticks, ticktext=names, **where)


def steps_share(runs: pd.DataFrame) -> go.Figure:
    """Share of tokens by executed latent steps, a bar per run, with the mean written at its end."""
    shown = runs[runs["steps_histogram"].map(len) > 0]
    shown = shown.assign(order=shown["size"].map(size_order)).sort_values(["order", "lam"], kind="stable")
    most = max((len(histogram) for histogram in shown["steps_histogram"]), default=1) - 1
    figure = go.Figure()
    keys = list(shown["key"])
    for step in range(most + 1):
        share = [100 * histogram[step] if step < len(histogram) else 0.0 for histogram in shown["steps_histogram"]]
        color = style.step_color(step, most)
        figure.add_bar(
            orientation="h",
            x=share,
            y=keys,
            customdata=[html.escape(label) for label in shown["label"]],
            name=_steps(step),
            marker={"color": color, "line": {"width": 1, "color": MUTED}},
            text=[f"{step}: {value:.0f} %" if value >= 9 else (str(step) if value >= 3 else "") for value in share],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": style.ink_on(color), "size": 12},
            hovertemplate="%{customdata}<br>" + _steps(step) + ": %{x:.3g} % of tokens<extra></extra>",
        )
    for key, mean in zip(keys, shown["mean_steps"], strict=True):
        if math.isfinite(mean):
            figure.add_annotation(
                x=101, y=key, text=f"mean {style.three(mean)}", showarrow=False, xanchor="left", font={"size": 12}
            )
    figure.update_layout(barmode="stack", bargap=0.25, legend={"traceorder": "normal"})
    figure.update_xaxes(title="share of validation tokens, %", range=[0, 112], tickvals=[0, 25, 50, 75, 100])
    _name_rows(figure, shown)
    return layout(figure, height=130 + 38 * max(len(shown), 1), legend_title="latent steps before the token")


def steps_over_training(rows: pd.DataFrame) -> go.Figure:
    """Share of tokens by executed latent steps over training, as a stacked area over tokens seen."""
    figure = go.Figure()
    if "steps_histogram" in rows and "tokens" in rows:
        rows = rows[rows["steps_histogram"].map(len) > 0]
        most = max((len(histogram) for histogram in rows["steps_histogram"]), default=1) - 1
        rows = thin(rows, CURVE_POINTS // (most + 1))
        for step in range(most + 1):
            color = style.step_color(step, most)
            figure.add_scatter(
                x=rows["tokens"],
                y=[100 * histogram[step] if step < len(histogram) else 0.0 for histogram in rows["steps_histogram"]],
                mode="lines",
                stackgroup="steps",
                name=_steps(step),
                line={"width": 0.5, "color": MUTED},
                fillcolor=color,
                hovertemplate=_steps(step) + ": %{y:.3g} %<extra></extra>",
            )
    figure.update_layout(hovermode="x unified", legend={"traceorder": "normal"})
    figure.update_xaxes(title="tokens trained on", tickformat=".3~s")
    figure.update_yaxes(title="share of tokens, %", range=[0, 100])
    return layout(figure, height=380, legend_title="latent steps")


def easy_and_hard(runs: pd.DataFrame) -> go.Figure:
    """Mean latent steps on well- and badly-predicted tokens, one pair per run."""
    shown = runs.dropna(subset=["well_steps", "badly_steps"])
    shown = shown.assign(order=shown["size"].map(size_order)).sort_values(["order", "lam"], kind="stable")
    figure = go.Figure()
    for key, well, badly in zip(shown["key"], shown["well_steps"], shown["badly_steps"], strict=True):
        figure.add_scatter(
            x=[well, badly],
            y=[key, key],
            mode="lines",
            line={"color": MUTED, "width": 3},
            showlegend=False,
            hoverinfo="skip",
        )
    for name, column, color, symbol in (
        ("well predicted", "well_steps", "#009E73", "circle"),
        ("badly predicted", "badly_steps", "#D55E00", "diamond"),
    ):
        figure.add_scatter(
            x=shown[column],
            y=shown["key"],
            customdata=[html.escape(label) for label in shown["label"]],
            mode="markers",
            name=name,
            marker={"color": color, "symbol": symbol, "size": 13},
            cliponaxis=False,  # a mean of zero steps sits on the axis
            hovertemplate="%{customdata}<br>" + name + ": %{x:.3g} latent steps<extra></extra>",
        )
    figure.update_xaxes(title="mean latent steps per token", rangemode="tozero")
    _name_rows(figure, shown)
    return layout(figure, height=150 + 34 * max(len(shown), 1), legend_title="tokens")


def _name_rows(figure: go.Figure, shown: pd.DataFrame) -> None:
    """A row per run from the top down. Rows go by key and are named by label: labels may be cut, keys never agree."""
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(shown["key"]),
        tickvals=list(shown["key"]),
        ticktext=[short(label) for label in shown["label"]],
        range=[len(shown) - 0.5, -0.5],
        automargin=True,
    )


def nll_by_steps(events: pd.DataFrame) -> go.Figure:
    """How hard the tokens were (NLL) by the latent steps they got: a box per number of steps, quartiles and 5–95 %."""
    figure = go.Figure()
    most = most_steps(events)
    events = events.assign(nll=pd.to_numeric(events["nll"], errors="coerce")).dropna(subset="nll")
    names = []
    for step in sorted(set(events["steps"].astype(int).tolist())):
        group = events[events["steps"] == step]
        low, q1, median, q3, high = np.percentile(group["nll"], [5, 25, 50, 75, 95])
        color = style.step_color(step, most)
        names.append(f"{step}<br><span style='font-size:11px'>{len(group)} tokens</span>")
        figure.add_box(
            x=[names[-1]],
            q1=[q1],
            median=[median],
            q3=[q3],
            lowerfence=[low],
            upperfence=[high],
            mean=[group["nll"].mean()],
            name=_steps(step),
            fillcolor=color,
            line={"color": MUTED, "width": 2},
            showlegend=False,
        )
    figure.update_xaxes(title="latent steps before the token", type="category")
    figure.update_yaxes(title="NLL of the token, nats", rangemode="tozero")
    return layout(figure, height=340, top=16)


def steps_by_nll(events: pd.DataFrame, groups: int = 5) -> go.Figure:
    """Mean latent steps of the probe's tokens, from the best to the worst predicted fifth, with a standard error."""
    figure = go.Figure()
    events = events.assign(nll=pd.to_numeric(events["nll"], errors="coerce")).dropna(subset="nll").sort_values("nll")
    parts = [part for part in np.array_split(np.arange(len(events)), groups) if len(part)]
    means, errors, names = [], [], []
    for part in parts:
        group = events.iloc[part]
        means.append(float(group["steps"].mean()))
        errors.append(float(group["steps"].std(ddof=1) / math.sqrt(len(group))) if len(group) > 1 else 0.0)
        names.append(f"{style.three(group['nll'].iloc[0])}<br>to {style.three(group['nll'].iloc[-1])}")
    figure.add_bar(
        x=names,
        y=means,
        error_y={"type": "data", "array": errors, "color": MUTED, "thickness": 1.5},
        marker={"color": style.method_color("adaptive")},
        text=[style.three(mean) for mean in means],
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": "#ffffff"},
        hovertemplate="NLL %{x} nats: %{y:.3g} latent steps<extra></extra>",
    )
    figure.update_xaxes(title="NLL of the token, nats (fifths of the probe)", type="category")
    figure.update_yaxes(title="mean latent steps", rangemode="tozero")
    return layout(figure, height=340, top=16)


def most_steps(events: pd.DataFrame) -> int:
    """The most latent steps that the probe's tokens could take, which sets the colour scale."""
    widths = events["exit"].map(lambda masses: len(masses) - 1 if hasattr(masses, "__len__") else 0)
    return int(max(events["steps"].max(), widths.max())) if len(events) else 0


PANELS = (
    ("loss", "training loss, nats/token", 0.5),
    ("mean_steps", "latent steps/token", 0.26),
    ("cross_entropy", "cross-entropy,<br>nats/token", 0.22),
    ("penalty", "halting penalty,<br>nats/token", 0.22),
    ("grad_norm", "gradient norm", 0.22),
    ("learning_rate", "learning rate", 0.18),
    ("tokens_per_second", "tokens/s", 0.22),
    ("flops_realised_per_second", "FLOP/s, realised", 0.22),
    ("straggling", "busiest worker,<br>times the mean", 0.22),
)
"""Column of the metrics, title of the axis, height relative to the others'."""


ALWAYS = ("loss", "mean_steps", "tokens_per_second")
"""Panels that are there whatever the runs have logged."""


def training_curves(
    runs: pd.DataFrame, metrics: dict[str, pd.DataFrame], evaluations: Mapping[str, pd.DataFrame] | None = None
) -> go.Figure:
    """Loss, penalty, latent steps, gradient norm, learning rate, speed and balance of the workers over tokens, a line
    per run; a panel for each that a run has logged. Cross-entropy has its own where a penalty sets it apart from the
    loss.

    Balance is the most over the mean latent steps of the workers, step by step: all wait for the busiest. It has a
    panel where a run has workers that differ.

    Args:
        metrics: a frame of :func:`haltscale.dashboard.data.metrics` per run key.
        evaluations: of :func:`haltscale.dashboard.data.evaluations` per run key: held-out losses, as diamonds.
    """
    shown = runs[runs["key"].isin(metrics)]
    uneven = any("straggling" in rows and rows["straggling"].gt(1).any() for rows in metrics.values())
    logged = {name for rows in metrics.values() for name in rows if rows[name].notna().any()}
    logged -= set() if uneven else {"straggling"}
    if not any("penalty" in rows and rows["penalty"].gt(0).any() for rows in metrics.values()):
        logged -= {"penalty", "cross_entropy"}
    panels = [panel for panel in PANELS if panel[0] in ALWAYS or panel[0] in logged]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.04,
        row_heights=[share for *_, share in panels],
    )
    most = CURVE_POINTS // max(len(panels) * len(shown), 1)
    for index, (_, run) in enumerate(shown.iterrows()):
        rows = thin(metrics[str(run["key"])], most)
        color, name = style.shade(style.method_color(str(run["method"])), run["shade"]), short(str(run["label"]))
        for place, (column, title, _) in enumerate(panels, start=1):
            if column not in rows or "tokens" not in rows:
                continue
            ends = [0] * (len(rows) - 1) + [9]  # a marker where the curve stands now
            what, digits = title.replace("<br>", " "), ".3~s" if "second" in column else ".3~g"
            figure.add_scatter(
                x=rows["tokens"],
                y=rows[column],
                mode="lines+markers",
                name=name,
                legendgroup=str(run["key"]),
                showlegend=place == 1,
                line={"color": color, "dash": style.DASHES[index % len(style.DASHES)], "width": 2},
                marker={"symbol": style.MARKERS[index % len(style.MARKERS)], "size": ends, "opacity": 1},
                hovertemplate=f"{name}<br>{what}: %{{y:{digits}}}<br>%{{x:.3~s}} tokens<extra></extra>",
                row=place,
                col=1,
            )
        held = (evaluations or {}).get(str(run["key"]), pd.DataFrame())
        if {"tokens", "loss"} <= set(held):
            figure.add_scatter(
                x=held["tokens"],
                y=held["loss"],
                mode="markers",
                name=f"{name}, held out",
                legendgroup=str(run["key"]),
                showlegend=False,
                marker={"symbol": "diamond", "size": 8, "color": color, "line": {"width": 1, "color": MUTED}},
                hovertemplate=f"{name}<br>held-out loss %{{y:.3f}} nats/token<br>%{{x:.3~s}} tokens<extra></extra>",
                row=1,
                col=1,
            )
    for place, (column, title, _) in enumerate(panels, start=1):
        figure.update_yaxes(title=title, row=place, col=1)
        if column not in ("loss", "straggling", "cross_entropy"):
            figure.update_yaxes(rangemode="tozero", row=place, col=1)
        if "second" in column:
            figure.update_yaxes(tickformat=".3~s", row=place, col=1)
    figure.update_xaxes(title="tokens trained on", tickformat=".3~s", row=len(panels), col=1)
    return layout(figure, height=270 + 150 * len(panels))


def thin(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most ``most`` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, max(most, 2)).round().astype(int))]


def _steps(step: int) -> str:
    return f"{step} step" if step == 1 else f"{step} steps"


def short(label: str, most: int = 48) -> str:
    """A label for an axis: escaped, and cut when it would eat the figure."""
    return html.escape(label if len(label) <= most else f"{label[: most - 1]}…")


def layout(figure: go.Figure, *, height: int, legend_title: str = "", top: int = 56) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": top, "b": 8},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "title": {"text": legend_title}},
        hoverlabel={"align": "left"},
        uirevision="keep",  # a live update keeps the reader's zoom
    )
    return figure


def as_html(figure: go.Figure, title: str) -> bytes:
    """A page of its own that works without a network: the drawing library is inside."""
    return str(_alone(figure, title).to_html(include_plotlyjs=True, full_html=True)).encode()


def _alone(figure: go.Figure, title: str) -> go.Figure:
    copy = go.Figure(figure)
    return copy.update_layout(
        template="plotly_white", title=html.escape(title), margin={"l": 60, "r": 30, "t": 110, "b": 60}
    )


def point_count(figure: go.Figure) -> int:
    """Points in a figure, over all its traces."""
    counts: Sequence[int] = [len(trace.x) for trace in figure.data if trace.x is not None]
    return sum(counts)
