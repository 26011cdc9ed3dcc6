"""Figures of the scaling page: pure functions from runs and fits to Plotly figures, at most 10,000 points each.

Colour says the method, shade the value of its option, dash and marker the series: no figure depends on colour alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from haltscale.dashboard import style
from haltscale.dashboard.data import FlopsKind, plotted, sound
from haltscale.dashboard.figures import MANY_RUNS, MOST_LEGEND, MUTED, layout, log_axis
from haltscale.platform import arms
from haltscale.platform.analysis import Estimate, HeldOut, IsoFlop, LawFit, Multiplier

MOST_DIRECT = 4
"""Series up to which each has its name at the end of its line."""
FAINT = "rgba(128,128,128,0.28)"
"""What is drawn of methods that are not highlighted."""


class Axis(StrEnum):
    """What the horizontal axis of the loss shows."""

    FLOPS = "training FLOPs"
    TOKENS = "training tokens"
    EPOCHS = "epochs"
    PARAMETERS = "parameters"
    INFERENCE = "inference FLOPs per token"
    SECONDS = "training seconds"

    def column(self, kind: FlopsKind) -> str:
        """The column of the runs."""
        return {
            Axis.FLOPS: f"flops_{kind}",
            Axis.TOKENS: "tokens_done",
            Axis.EPOCHS: "epochs",
            Axis.PARAMETERS: "parameters",
            Axis.INFERENCE: f"inference_flops_{kind}",
            Axis.SECONDS: "wall_seconds",
        }[self]

    def named(self, kind: FlopsKind) -> str:
        """Name and unit."""
        match self:
            case Axis.FLOPS | Axis.INFERENCE:
                return f"{self.value}, {kind}"
            case Axis.EPOCHS:
                return "epochs: training tokens over tokens of the corpus"
            case Axis.SECONDS:
                return "training, seconds on the clock"
            case _:
                return self.value


class Join(StrEnum):
    """Which means the lines join."""

    SIZE = "each size over budgets"
    BEST = "best size of each budget"
    NONE = "none"


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


def means(shown: pd.DataFrame, x: str) -> pd.DataFrame:
    """Means over seeds (geometric, as the axes are logarithmic) of finished runs: a row per series, size and budget.

    Args:
        shown: runs with ``y``; a budget is the nominal one, else the planned tokens.
    """
    finished = shown[shown["state"] == "finished"]
    place = finished["nominal"].where(finished["nominal"].notna(), finished["tokens"]).fillna(0.0)
    logs = pd.DataFrame(
        {"x": np.log(finished[x]), "y": np.log(finished["y"]), "place": place, "tokens": finished["tokens"].fillna(0.0)}
        | {name: finished[name] for name in ("series", "method", "size")}
    )
    if logs["place"].nunique() and not finished["budget"].gt(0).any():
        logs["place"] = logs["tokens"].where(logs["tokens"] > 0, logs["place"])
    found = logs.groupby(["series", "method", "size", "place"], sort=False)[["x", "y"]].agg(["mean", "size"])
    rows = pd.DataFrame(
        {"x": np.exp(found[("x", "mean")]), "y": np.exp(found[("y", "mean")]), "seeds": found[("x", "size")]}
    )
    return rows.reset_index()


def default_join(runs: pd.DataFrame) -> Join:
    """Sizes are joined over budgets where a series has several budgets at a size, else the best of each budget."""
    finished = runs[runs["state"] == "finished"]
    several = finished.groupby(["series", "size"])["nominal"].nunique().gt(1).any() if len(finished) else False
    return Join.SIZE if several else Join.BEST


def scaling(
    runs: pd.DataFrame,
    kind: FlopsKind,
    *,
    axis: Axis = Axis.FLOPS,
    measure: Measure = Measure.LOSS,
    join: Join = Join.BEST,
    focus: Collection[str] | None = None,
    laws: Mapping[str, LawFit] | None = None,
    frontier: pd.DataFrame | None = None,
    outside: pd.DataFrame | None = None,
) -> go.Figure:
    """Validation loss or perplexity against an axis of the reader's choice, log-log: a marker per run, lines through
    the means over seeds of finished runs. Hollow markers are runs without a result yet, at their last evaluation.

    Args:
        focus: series in colour; the others are grey. All, by default.
        laws: by method; each is drawn with its band over the compute of its runs, and dotted up to the page's largest.
        frontier: of :func:`haltscale.platform.analysis.pareto`.
        outside: results from elsewhere (:func:`haltscale.dashboard.outside.read`), drawn hollow, part of no fit.
    """
    figure = go.Figure()
    shown, x = plotted(runs, kind), axis.column(kind)
    shown = shown[shown[x].gt(0)]
    shown = shown.assign(y=measure.of(shown["loss"]))
    for method, law in (laws or {}).items():
        _add_law(figure, method, law, measure, float(shown[x].max()))
    brief, many = shown["series"].nunique() > MOST_LEGEND, len(shown) > MANY_RUNS
    several = shown.groupby("method")["series"].nunique().gt(1).to_dict()
    order = list(dict.fromkeys(shown["series"]))
    lit = set(order if focus is None else focus)
    every = means(shown, x)
    ends: list[tuple[float, float, str, str]] = []
    for name in sorted(order, key=lambda one: one in lit):  # what is highlighted is drawn last, above the rest
        members = shown[shown["series"] == name]
        index, method = int(members["rank"].iloc[0]), str(members["method"].iloc[0])
        color = style.method_color(method)
        if several[method] and (focus is None or sum(one in lit for one in set(shown["series"])) > 1):
            color = style.shade(color, float(members["shade"].iloc[0])) if focus is None else color
        faint = name not in lit
        color = FAINT if faint else color
        dash = style.DASHES[index % len(style.DASHES)]
        marker = style.MARKERS[index % len(style.MARKERS)]
        group = "other runs" if faint else method if brief and focus is None else str(name)
        own = every[every["series"] == name]
        line = {"color": color, "dash": dash, "width": 2 if focus is None else 3}
        if not faint and not (
            laws and method in laws
        ):  # a fitted law says what the line would, and the runs are easier to see
            path = _path(own, join)
            if len(path["x"]):
                figure.add_scatter(
                    **path, mode="lines", line=line, legendgroup=group, showlegend=False, hoverinfo="skip", name="means"
                )
        if len(own) and not faint:
            last = own.sort_values(["x", "y"]).iloc[-1]
            unique = sum(one.split(" · ")[0] == arms.shown(method) for one in lit) == 1
            ends.append((float(last["x"]), float(last["y"]), arms.shown(method) if unique else str(name), color))
        finished = members[members["state"] == "finished"]
        for part, symbol, detail in (
            (finished, marker, "result"),
            (members[members["state"] != "finished"], f"{marker}-open", "so far"),
        ):
            if len(part):
                error = part["loss_standard_error"].fillna(0)
                figure.add_scatter(
                    x=part[x],
                    y=part["y"],
                    mode="markers",
                    name=f"{name}, {detail}",
                    marker={
                        "color": color,
                        "symbol": symbol,
                        "size": 5 if faint else 7 if many else 10,
                        "opacity": 0.7 if faint or many else 1,
                        "line": {"width": 1 if many or faint else 2, "color": color},
                    },
                    # A standard error of the loss is a factor on the perplexity.
                    error_y={
                        "type": "data",
                        "array": error if measure is Measure.LOSS else part["y"] * np.expm1(error),
                        "visible": not many and not faint and bool(part["loss_standard_error"].gt(0).any()),
                        "thickness": 1.5,
                        "width": 3,
                    },
                    legendgroup=group,
                    showlegend=False,
                    customdata=part["key"],
                    hovertext=[_hover(run, kind) for run in part.to_dict("records")],
                    hovertemplate="%{hovertext}<extra></extra>",
                )
        if any(trace.legendgroup == group and trace.showlegend is not False for trace in figure.data):
            continue
        # The legend's entry shows line and marker together, whatever the series has so far.
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers" if laws or faint else "lines+markers",
            name=html.escape(group),
            line=line,
            marker={"color": color, "symbol": marker if len(finished) or faint else f"{marker}-open", "size": 10},
            legendgroup=group,
            legendrank=2000 if faint else 1000,
        )
    if frontier is not None and len(frontier) > 1:
        figure.add_scatter(
            x=frontier[x],
            y=measure.of(frontier["loss"]),
            mode="lines",
            line={"shape": "hv", "color": MUTED, "width": 5},
            opacity=0.4,
            name="Pareto frontier",
            hoverinfo="skip",
        )
    across, down = shown[x], shown["y"]
    if outside is not None and len(outside) and axis is Axis.FLOPS:
        value = measure.of(outside["loss"])
        figure.add_scatter(
            x=outside["flops"],
            y=value,
            mode="markers",
            name="from elsewhere",
            marker={"symbol": "star-open", "size": 14, "color": MUTED, "line": {"width": 2, "color": MUTED}},
            hovertext=[
                f"<b>{html.escape(str(row['label']))}</b><br>{style.three(row['loss'])} nats/token at "
                f"{style.power(row['flops'])} FLOPs<br>{html.escape(str(row['source']))}"
                for row in outside.to_dict("records")
            ],
            hovertemplate="%{hovertext}<extra>from elsewhere, in no fit</extra>",
        )
        across, down = pd.concat([across, outside["flops"]]), pd.concat([down, pd.Series(value)])
    log_axis(figure, "x", across, axis.named(kind))
    log_axis(figure, "y", pd.concat([down * 0.997, down * 1.003]), measure.axis)
    figure.update_xaxes(showgrid=True)
    if len(ends) <= MOST_DIRECT and len(order) > 1:
        _name_ends(figure, ends)
    return layout(figure, height=540)


def together(runs: pd.DataFrame, kind: FlopsKind, *, axis: Axis, measure: Measure, join: Join) -> go.Figure:
    """Runs of several studies on one pair of axes: colour says the method; marker and dash, which study.

    Args:
        runs: of :func:`haltscale.dashboard.several.joined`.
    """
    figure, x = go.Figure(), axis.column(kind)
    shown = plotted(runs, kind)
    shown = shown[shown[x].gt(0)]
    shown = shown.assign(y=measure.of(shown["loss"]))
    studies = list(dict.fromkeys(shown["study"]))
    many = len(shown) > MANY_RUNS
    for (study, method), members in shown.groupby(["study", "method"], sort=False):
        place, color = studies.index(study), style.method_color(str(method))
        marker, dash = style.MARKERS[place % len(style.MARKERS)], style.DASHES[place % len(style.DASHES)]
        group = f"{html.escape(arms.shown(str(method)))} · {html.escape(str(study))}"
        every = means(members, x)
        for series in dict.fromkeys(every["series"]):
            path = _path(every[every["series"] == series], join)
            if len(path["x"]):
                figure.add_scatter(
                    **path, mode="lines", line={"color": color, "dash": dash, "width": 2}, legendgroup=group,
                    showlegend=False, hoverinfo="skip", name="means",
                )  # fmt: skip
        finished = members["state"].eq("finished")
        figure.add_scatter(
            x=members[x],
            y=members["y"],
            mode="markers",
            name=group,
            legendgroup=group,
            marker={
                "color": color,
                "symbol": [marker if done else f"{marker}-open" for done in finished],
                "size": 7 if many else 11,
                "line": {"width": 1.5, "color": color},
            },
            customdata=members["key"],
            hovertext=[_hover(run, kind) for run in members.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    log_axis(figure, "x", shown[x], axis.named(kind))
    log_axis(figure, "y", pd.concat([shown["y"] * 0.997, shown["y"] * 1.003]), measure.axis)
    figure.update_xaxes(showgrid=True)
    return layout(figure, height=540)


def _path(own: pd.DataFrame, join: Join) -> dict[str, list[float | None]]:
    """The line through a series' means: a piece per size, or its best size at each budget."""
    x: list[float | None] = []
    y: list[float | None] = []
    if join is Join.NONE or own.empty:
        return {"x": x, "y": y}
    if join is Join.SIZE:
        for _, part in own.groupby("size", sort=False):
            part = part.sort_values("x")
            x += [*part["x"], None]
            y += [*part["y"], None]
        return {"x": x[:-1], "y": y[:-1]}
    best = own.loc[own.groupby("place")["y"].idxmin()].sort_values("x")
    return {"x": list(best["x"]), "y": list(best["y"])}


def _name_ends(figure: go.Figure, ends: list[tuple[float, float, str, str]]) -> None:
    """Names of series to the right of their last mean, lower ones moved down where two would stand on each other."""
    if not ends:
        return
    low, high = figure.layout.xaxis.range
    figure.update_xaxes(range=[low, high + 0.16 * (high - low)])
    bottom, top = figure.layout.yaxis.range
    gap, last = 0.045 * (top - bottom), math.inf
    for x, y, name, color in sorted(ends, key=lambda end: -end[1]):
        at = min(math.log10(y), last - gap)
        last = at
        figure.add_annotation(
            x=math.log10(x),
            y=at,
            text=html.escape(name if len(name) <= 24 else f"{name[:23]}…"),
            showarrow=False,
            xanchor="left",
            xshift=10,
            font={"size": 13, "color": color},
        )


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


MOST_PANELS = 12


def isoflop_points(runs: pd.DataFrame, methods: Sequence[str]) -> go.Figure:
    """Loss against parameters, a panel per method, a line per nominal budget through the means over seeds.

    The axes are shared, so that methods can be compared; a budget has one colour and one dash in all panels.
    """
    shown = runs[runs["method"].isin(methods) & (runs["state"] == "finished") & sound(runs)]
    shown = shown[shown["loss"].gt(0) & shown["parameters"].gt(0) & shown["nominal"].gt(0)]
    names = [name for name in methods if (shown["method"] == name).any()][:MOST_PANELS]
    if not names:
        return layout(go.Figure(), height=200)
    across = min(len(names), 4)
    down = -(-len(names) // across)
    tall = 230 * down
    figure = make_subplots(
        rows=down, cols=across, shared_xaxes=True, shared_yaxes=True, subplot_titles=[html.escape(n) for n in names],
        horizontal_spacing=0.02, vertical_spacing=60 / tall if down > 1 else 0,
    )  # fmt: skip
    budgets = sorted(shown["nominal"].unique())
    for place, name in enumerate(names):
        where = {"row": place // across + 1, "col": place % across + 1}
        for index, budget in enumerate(budgets):
            part = shown[(shown["method"] == name) & (shown["nominal"] == budget)]
            if part.empty:
                continue
            mean = np.exp(np.log(part.set_index("size")[["parameters", "loss"]]).groupby(level=0, sort=False).mean())
            mean = mean.sort_values("parameters")
            color, title = style.line_color(index, max(len(budgets) - 1, 1)), f"{style.power(budget)} FLOPs"
            best = mean["loss"].to_numpy() == mean["loss"].min()
            inside = len(mean) > 2 and not best[0] and not best[-1]
            figure.add_scatter(
                x=mean["parameters"],
                y=mean["loss"],
                mode="lines+markers",
                name=title,
                legendgroup=title,
                showlegend=not any(trace.legendgroup == title for trace in figure.data),
                line={"color": color, "dash": style.DASHES[index % len(style.DASHES)], "width": 2},
                marker={
                    "symbol": ["star" if one and inside else style.MARKERS[index % len(style.MARKERS)] for one in best],
                    "size": [14 if one and inside else 8 for one in best],
                    "color": color,
                    "line": {"width": 1, "color": MUTED},
                },
                customdata=part.groupby("size").size().reindex(mean.index),
                hovertemplate=f"{html.escape(name)}, {title}<br>%{{x:.3s}} parameters: %{{y:.3f}} nats/token, mean of "
                "%{customdata} runs<extra></extra>",
                **where,
            )
    ticks, text = style.log_ticks(float(shown["parameters"].min()) * 0.9, float(shown["parameters"].max()) * 1.1)
    kept = ticks[:: -(-len(ticks) // 3)]
    figure.update_xaxes(type="log", tickvals=kept, ticktext=[style.compact(one) for one in kept])
    figure.update_yaxes(type="log")
    low, high = float(shown["loss"].min()) * 0.98, float(shown["loss"].max()) * 1.02
    ticks, text = style.log_ticks(low, high)
    figure.update_yaxes(range=[math.log10(low), math.log10(high)], tickvals=ticks, ticktext=text)
    figure.update_xaxes(title="parameters", row=down)
    figure.update_yaxes(title="loss, nats/token", col=1)
    layout(figure, height=tall + 140, legend_title="nominal budget", top=90)
    return figure.update_layout(legend={"y": 1 + 30 / tall})


def best_size(found: IsoFlop) -> go.Figure:
    """N_opt(C) and D_opt(C) at the budgets with a minimum, with their 95 % intervals (:func:`optima`)."""
    figure = make_subplots(cols=2, rows=1, horizontal_spacing=0.14)
    table = optima(found)
    for col, (name, title) in enumerate(
        (("parameters", "best size, parameters"), ("tokens", "tokens at the best size"))
    ):
        low, high = ("low", "high") if name == "parameters" else ("tokens_low", "tokens_high")
        figure.add_scatter(
            x=table["budget"],
            y=table[name],
            mode="lines+markers",
            line={"color": "#0072B2", "width": 2},
            marker={"symbol": "star", "size": 14},
            error_y={"type": "data", "symmetric": False, "array": table[high] - table[name]}
            | {"arrayminus": table[name] - table[low], "thickness": 2},
            showlegend=False,
            hovertemplate=f"%{{x:.3g}} FLOPs: {title} %{{y:.3s}}<extra></extra>",
            row=1,
            col=col + 1,
        )
        log_axis(figure, "x", table["budget"], "budget, FLOPs", row=1, col=col + 1)
        log_axis(figure, "y", pd.concat([table[low], table[high]]), title, row=1, col=col + 1)
    return layout(figure, height=340, top=24)


def optima(found: IsoFlop) -> pd.DataFrame:
    """The minima with the tokens that their budgets leave: ``tokens``, ``tokens_low``, ``tokens_high`` beside
    :attr:`IsoFlop.minima`. Tokens times parameters over FLOPs is taken from the budget's own runs."""
    table = found.minima
    ratios = []
    for profile in found.profiles:
        if profile.parameters is None:
            continue
        runs = profile.runs
        product = runs["tokens"].astype(float) * runs["parameters"].astype(float)
        ratios.append(float(np.exp(np.log(product).mean())))
    product = pd.Series(ratios, index=table.index, dtype=float)
    return table.assign(
        tokens=product / table["parameters"], tokens_low=product / table["high"], tokens_high=product / table["low"]
    )


def isoflop(found: IsoFlop, kind: FlopsKind) -> go.Figure:
    """Loss against parameters, a line per budget from dark (small) to light (large), a star at each minimum."""
    figure = go.Figure()
    most = len(found.profiles) - 1
    for index, profile in enumerate(found.profiles):
        color, name = style.line_color(index, most), f"{style.power(float(f'{profile.budget:.2g}'))} FLOPs"
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
