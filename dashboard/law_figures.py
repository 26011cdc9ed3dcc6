"""Figures of the scaling page: pure functions from runs and fits to Plotly figures, at most 10,000 points each.

Colour says the method, shade the value of its option, dash and marker the series: no figure depends on colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from haltscale.dashboard import style
from haltscale.dashboard.data import FlopsKind, plotted
from haltscale.dashboard.figures import MANY_RUNS, MOST_LEGEND, MUTED, layout, log_axis
from haltscale.platform.analysis import Estimate, HeldOut, IsoFlop, LawFit, Multiplier

MOST_NAMES = 16
"""More markers than this would write their sizes over each other."""


class Measure(StrEnum):
    """What the vertical axis shows."""

    LOSS = "loss"
    PERPLEXITY = "perplexity"

    @property
    def axis(self) -> str:
        """Name and unit."""
        return {
            Measure.LOSS: "validation loss, nats/token",
            Measure.PERPLEXITY: "validation perplexity",
        }[self]

    def of(self, loss: pd.Series | np.ndarray) -> pd.Series | np.ndarray:
        """The measure of a loss in nats per token."""
        return loss if self is Measure.LOSS else np.exp(loss)


def _hover(run: Mapping[Any, Any], kind: FlopsKind) -> str:
    """A run's details for a hover box. Labels come from the store, so they are escaped."""
    error = f" ± {style.three(run['loss_standard_error'])}" if run["loss_standard_error"] > 0 else ""
    lines = [
        f"<b>{html.escape(str(run['label']))}</b>",
        f"perplexity {style.three(run['perplexity'])} · loss {style.three(run['loss'])}{error} nats/token",
        f"{style.scientific(run[f'flops_{kind}'])} {kind} training FLOPs",
        f"{style.compact(run['tokens_done'])} of {style.compact(run['tokens'])} tokens",
    ]
    if math.isfinite(run["mean_steps"]):
        lines.append(f"{style.three(run['mean_steps'])} latent steps per token on average")
    if run["state"] != "finished":
        lines.append(f"{run['state']}: its last evaluation")
    return "<br>".join(lines)


def scaling(
    runs: pd.DataFrame,
    kind: FlopsKind,
    *,
    measure: Measure = Measure.LOSS,
    laws: Mapping[str, LawFit] | None = None,
    frontier: pd.DataFrame | None = None,
) -> go.Figure:
    """Validation loss or perplexity against training FLOPs, log-log: a line per series, a marker per run.

    The line joins the means over seeds (geometric, as the axes are logarithmic) of finished runs; fitted laws take its
    place. Hollow markers are
    runs without a result yet, at their last evaluation.

    Args:
        laws: by method; each is drawn with its band over the compute of its runs, and dotted up to the page's largest.
        frontier: of :func:`haltscale.platform.analysis.pareto`.
    """
    figure = go.Figure()
    shown, flops = plotted(runs, kind), f"flops_{kind}"
    shown = shown.assign(y=measure.of(shown["loss"]))
    for method, law in (laws or {}).items():
        _add_law(figure, method, law, measure, float(shown[flops].max()))
    brief, many = shown["series"].nunique() > MOST_LEGEND, len(shown) > MANY_RUNS
    for name, members in shown.groupby("series", sort=False):
        index, method = int(members["rank"].iloc[0]), str(members["method"].iloc[0])
        color = style.shade(style.method_color(method), float(members["shade"].iloc[0]))
        if members["method"].nunique() == 1 and (shown["method"] == method).sum() == len(members):
            color = style.method_color(method)  # a method with a single series has its own colour
        dash = style.DASHES[index % len(style.DASHES)]
        marker = style.MARKERS[index % len(style.MARKERS)]
        group = method if brief else str(name)
        finished = members[members["state"] == "finished"]
        line = {"color": color, "dash": dash, "width": 2}
        if not laws:  # a fitted law says what the line would, and the runs are easier to see without
            logs = finished.assign(x=np.log(finished[flops]), y=np.log(finished["y"]))
            means = logs.groupby(["size", "tokens"], dropna=False)[["x", "y"]].mean().map(math.exp).sort_values("x")
            figure.add_scatter(
                x=means["x"],
                y=means["y"],
                mode="lines",
                line=line,
                legendgroup=group,
                showlegend=False,
                hoverinfo="skip",
            )
        for part, symbol, detail in (
            (finished, marker, "result"),
            (members[members["state"] != "finished"], f"{marker}-open", "so far"),
        ):
            if len(part):
                error = part["loss_standard_error"].fillna(0)
                figure.add_scatter(
                    x=part[flops],
                    y=part["y"],
                    mode="markers",
                    name=f"{name}, {detail}",
                    marker={
                        "color": color,
                        "symbol": symbol,
                        "size": 6 if many else 11,
                        "opacity": 0.6 if many else 1,
                        "line": {"width": 1 if many else 2, "color": color},
                    },
                    # A standard error of the loss is a factor on the perplexity.
                    error_y={
                        "type": "data",
                        "array": error if measure is Measure.LOSS else part["y"] * np.expm1(error),
                        "visible": not many and bool(part["loss_standard_error"].gt(0).any()),
                        "thickness": 1.5,
                        "width": 3,
                    },
                    legendgroup=group,
                    showlegend=False,
                    customdata=part["key"],
                    hovertext=[_hover(run, kind) for run in part.to_dict("records")],
                    hovertemplate="%{hovertext}<extra></extra>",
                )
        if brief and any(trace.legendgroup == group and trace.showlegend is not False for trace in figure.data):
            continue
        # The legend's entry shows line and marker together, whatever the series has so far.
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers" if laws else "lines+markers",
            name=html.escape(group),
            line={**line, "color": style.method_color(method) if brief else color},
            marker={"color": color, "symbol": marker if len(finished) else f"{marker}-open", "size": 10},
            legendgroup=group,
        )
    if frontier is not None and len(frontier) > 1:
        figure.add_scatter(
            x=frontier[flops],
            y=measure.of(frontier["loss"]),
            mode="lines",
            line={"shape": "hv", "color": MUTED, "width": 5},
            opacity=0.4,
            name="Pareto frontier",
            hoverinfo="skip",
        )
    log_axis(figure, "x", shown[flops], f"training FLOPs, {kind}")
    log_axis(figure, "y", pd.concat([shown["y"] * 0.997, shown["y"] * 1.003]), measure.axis)
    figure.update_xaxes(showgrid=True)
    _name_sizes(figure, shown, flops)
    return layout(figure, height=540)


def _add_law(figure: go.Figure, method: str, law: LawFit, measure: Measure, largest: float) -> None:
    """A fitted law: solid with its band where the runs are, dotted beyond."""
    color = style.method_color(method)
    low, high = law.domain
    curve = law.curve(low, high)
    figure.add_scatter(
        x=pd.concat([curve["x"], curve["x"][::-1]]),
        y=measure.of(pd.concat([curve["high"], curve["low"][::-1]])),
        fill="toself",
        fillcolor=style.translucent(color, 0.16),
        line={"width": 0},
        hoverinfo="skip",
        legendgroup=method,
        showlegend=False,
        name=f"{method}, 95 % band",
    )
    estimates = law.estimates
    exponent = estimates["alpha"]
    told = f"α {style.three(exponent.value)}" if exponent.identifiable else "α not identifiable"
    figure.add_scatter(
        x=curve["x"],
        y=measure.of(curve["loss"]),
        mode="lines",
        line={"color": color, "width": 3},
        legendgroup=method,
        name=f"{html.escape(method)}: fit, {told}",
        hovertemplate=f"{html.escape(method)}: fit %{{y:.3g}} at %{{x:.3g}} FLOPs<extra></extra>",
    )
    if largest > high * 1.05:
        beyond = law.curve(high, largest, 30)
        figure.add_scatter(
            x=beyond["x"],
            y=measure.of(beyond["loss"]),
            mode="lines",
            line={"color": color, "width": 2, "dash": "dot"},
            legendgroup=method,
            showlegend=False,
            hovertemplate=f"{html.escape(method)}: extrapolated %{{y:.3g}} at %{{x:.3g}} FLOPs<extra></extra>",
        )


def _name_sizes(figure: go.Figure, shown: pd.DataFrame, flops: str) -> None:
    """Write the sizes under the markers: once per series when they are few, else once each under the best run. Not
    where all are of one size."""
    if shown["size"].nunique() < 2:
        return
    lowest = shown.sort_values("y")
    named = lowest.drop_duplicates(["series", "size"])  # seeds stand too close for a name each
    if len(named) > MOST_NAMES:
        named = lowest.drop_duplicates("size")
    for size, x, y in zip(named["size"], named[flops], named["y"], strict=True):
        figure.add_annotation(
            x=math.log10(x),
            y=math.log10(y),
            text=html.escape(str(size)),
            showarrow=False,
            yshift=-17,
            font={"size": 12, "color": MUTED},
        )


def held_out(found: Mapping[str, HeldOut]) -> go.Figure:
    """Error of predicting a budget that the law has not seen, by method; stars are extrapolations."""
    figure = go.Figure()
    for index, (method, one) in enumerate(found.items()):
        table = one.budgets
        marker = style.MARKERS[index % len(style.MARKERS)]
        figure.add_scatter(
            x=table["budget"],
            y=100 * table["error"],
            mode="lines+markers",
            name=html.escape(method),
            line={"color": style.method_color(method), "dash": style.DASHES[index % len(style.DASHES)]},
            marker={
                "size": [16 if far else 9 for far in table["extrapolated"]],
                "symbol": ["star" if far else marker for far in table["extrapolated"]],
            },
            hovertemplate=f"{html.escape(method)}: %{{y:.3g}} % at %{{x:.3g}} FLOPs<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    budgets = pd.concat([one.budgets["budget"] for one in found.values()]) if found else pd.Series(dtype=float)
    log_axis(figure, "x", budgets, "held-out budget, FLOPs")
    figure.update_yaxes(title="predicted over observed loss − 1, %")
    return layout(figure, height=340)


def isoflop(found: IsoFlop, kind: FlopsKind) -> go.Figure:
    """Loss against parameters, a line per budget from dark (small) to light (large), a star at each minimum."""
    figure = go.Figure()
    most = len(found.profiles) - 1
    for index, profile in enumerate(found.profiles):
        color, name = style.line_color(index, most), f"{style.scientific(profile.budget)} FLOPs"
        marker = style.MARKERS[index % len(style.MARKERS)]
        curve = profile.curve()
        figure.add_scatter(
            x=curve["parameters"],
            y=curve["loss"],
            mode="lines",
            line={"color": color, "width": 2.5, "dash": style.DASHES[index % len(style.DASHES)]},
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=profile.runs["parameters"],
            y=profile.runs["loss"],
            mode="markers",
            marker={"color": color, "symbol": marker, "size": 9, "line": {"width": 1, "color": MUTED}},
            name=name,
            legendgroup=name,
            customdata=[html.escape(str(key)) for key in profile.runs["key"]],
            hovertemplate=f"%{{customdata}}<br>%{{x:.3s}} parameters: %{{y:.3f}} nats/token<br>{name}<extra></extra>",
        )
    minima = found.minima
    figure.add_scatter(
        x=minima["parameters"],
        y=minima["loss"],
        mode="markers",
        marker={"symbol": "star", "size": 17, "color": "#D55E00", "line": {"width": 1.5, "color": "#ffffff"}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": minima["high"] - minima["parameters"],
            "arrayminus": minima["parameters"] - minima["low"],
            "thickness": 1.5,
        },
        name="minimum",
        hovertemplate="best at %{x:.3s} parameters: %{y:.3f} nats/token<extra></extra>",
    )
    sizes = pd.concat([profile.runs["parameters"] for profile in found.profiles]).astype(float)
    log_axis(figure, "x", sizes, "parameters")
    figure.update_xaxes(tickformat=".3~s")
    figure.update_yaxes(title=Measure.LOSS.axis)
    return layout(figure, height=460, legend_title=f"budget, {kind}")


def multipliers(found: Mapping[str, Multiplier], reference: str) -> go.Figure:
    """How much more the reference needs for a method's loss, over the losses that both reach."""
    figure = go.Figure()
    for index, (method, one) in enumerate(found.items()):
        color, table = style.method_color(method), one.table
        figure.add_scatter(
            x=pd.concat([table["loss"], table["loss"][::-1]]),
            y=pd.concat([table["high"].clip(upper=1e3), table["low"][::-1].clip(lower=1e-3)]),
            fill="toself",
            fillcolor=style.translucent(color, 0.16),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=method,
        )
        figure.add_scatter(
            x=table["loss"],
            y=table["multiplier"],
            mode="lines",
            line={"color": color, "width": 3, "dash": style.DASHES[index % len(style.DASHES)]},
            name=html.escape(method),
            legendgroup=method,
            hovertemplate=f"{html.escape(reference)} needs %{{y:.3g}} times as much as {html.escape(method)} for"
            " %{x:.3g} nats/token<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": MUTED, "width": 1.5, "dash": "dash"})
    figure.update_xaxes(title="validation loss, nats/token (better to the right)", autorange="reversed")
    # The bands may run off the figure: the range is that of the curves and of "as much", with room for an interval.
    curves = [one.table["multiplier"] for one in found.values()]
    shown = pd.concat([*curves, pd.Series([1.0])]).clip(1e-3, 1e3)
    reach = pd.Series([float(shown.min()) / 3, float(shown.max()) * 3])
    log_axis(figure, "y", reach, f"what {html.escape(reference)} needs, times")
    return layout(figure, height=380)


def intervals(found: Mapping[str, Estimate], title: str, marks: Mapping[float, str]) -> go.Figure:
    """Numbers with their intervals, a row each, and vertical lines at what they are to be compared with."""
    figure = go.Figure()
    for method, one in found.items():
        if not one.identifiable:
            continue
        figure.add_scatter(
            x=[one.value],
            y=[html.escape(method)],
            mode="markers+text",
            text=[style.three(one.value)],
            textposition="top center",
            marker={"size": 13, "symbol": "diamond", "color": style.method_color(method)},
            error_x={
                "type": "data", "symmetric": False, "array": [one.high - one.value],
                "arrayminus": [one.value - one.low], "thickness": 3, "width": 8,
            },
            showlegend=False,
            hovertemplate=f"{html.escape(method)}: %{{x:.3g}} [{style.three(one.low)}, {style.three(one.high)}]"
            "<extra></extra>",
        )  # fmt: skip
    for value, name in marks.items():
        figure.add_vline(x=value, line={"color": MUTED, "dash": "dash", "width": 1.5}, annotation_text=name)
    figure.update_xaxes(title=title)
    figure.update_yaxes(automargin=True)
    return layout(figure, height=120 + 60 * max(len(found), 1), top=40)


def predicted(laws: Mapping[str, LawFit]) -> go.Figure:
    """Observed against fitted loss, and the residuals against parameters."""
    figure = make_subplots(cols=2, rows=1, horizontal_spacing=0.12)
    for index, (method, law) in enumerate(laws.items()):
        fitted = law.predict(law.form.points(law.runs))
        marker = {
            "color": style.method_color(method), "symbol": style.MARKERS[index % len(style.MARKERS)], "size": 8,
        }  # fmt: skip
        shared = {"mode": "markers", "marker": marker, "name": html.escape(method), "legendgroup": method}
        figure.add_scatter(
            x=fitted, y=law.runs["loss"], **shared, row=1, col=1,
            hovertemplate=f"{html.escape(method)}: fitted %{{x:.3f}}, observed %{{y:.3f}} nats/token<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=law.runs["parameters"], y=100 * law.residuals, **shared, showlegend=False, row=1, col=2,
            hovertemplate=f"{html.escape(method)}: %{{y:.2f}} % at %{{x:.3s}} parameters<extra></extra>",
        )  # fmt: skip
    losses = pd.concat([law.runs["loss"] for law in laws.values()]).astype(float)
    ends = [float(losses.min()), float(losses.max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": MUTED, "dash": "dash"}, showlegend=False, hoverinfo="skip", row=1,
        col=1,
    )  # fmt: skip
    figure.add_hline(y=0, line={"color": MUTED, "dash": "dash"}, row=1, col=2)
    figure.update_xaxes(title="fitted loss, nats/token", row=1, col=1)
    figure.update_yaxes(title="observed loss, nats/token", row=1, col=1)
    sizes = pd.concat([law.runs["parameters"] for law in laws.values()]).astype(float)
    log_axis(figure, "x", sizes, "parameters", row=1, col=2)
    figure.update_yaxes(title="residual, %", row=1, col=2)
    return layout(figure, height=380)
