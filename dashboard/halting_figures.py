"""Figures of how latent steps were allocated and whether they paid: pure functions, at most 10,000 points each."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from haltscale.dashboard import style
from haltscale.dashboard.data import in_order, number, size_order
from haltscale.dashboard.figures import MANY_RUNS, MOST_LEGEND, MUTED, layout, log_axis, short
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
    methods = in_order(runs["method"])
    kept = kept.sort_values("method", key=lambda names: names.map(methods.index), kind="stable")
    named: set[str] = set()
    for (method, size, tokens), part in kept.groupby(["method", "size", "tokens"], sort=False, dropna=False):
        index = methods.index(str(method))
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


RUNGS = {
    "fixed": "fixed: spread evenly",
    "shuffled": "shuffled: at other tokens",
    "posthoc": "post hoc: best training-free rule",
    "learned": "learned: the router",
    "oracle": "oracle: the best places, equal steps",
    "none": "none: no step anywhere",
    "full": "full: all steps everywhere",
}
"""Ways of halting on the same weights, from the one that knows least to the one that knows all; ``none`` and ``full``
take fewer and more steps and stand apart."""


def ladder_rows(found: Mapping[str, Any], run: str) -> pd.DataFrame:
    """The rungs of one run's ``controls`` evaluation: ``run``, ``rung``, ``mean``, ``low``, ``high`` (nats per token
    above the learned router's) and ``mean_steps``. Of the post-hoc rules it has the best."""
    rows = []
    for entry in found.get("arms") or [] if isinstance(found.get("arms"), list) else []:
        one = entry if isinstance(entry, Mapping) else {}
        name = str(one.get("name"))
        gap = one.get("minus_learned")
        gap = gap if isinstance(gap, Mapping) else dict.fromkeys(("mean", "low", "high"), 0.0)
        rung = "posthoc" if name.startswith("posthoc") else name
        if rung in RUNGS:
            rows.append(
                {"run": run, "rung": rung, "mean_steps": number(one.get("mean_steps"))}
                | {end: number(gap.get(end)) for end in ("mean", "low", "high")}
            )
    table = pd.DataFrame(rows, columns=["run", "rung", "mean_steps", "mean", "low", "high"]).dropna(subset="mean")
    table = table.sort_values("mean", kind="stable").drop_duplicates("rung")
    order = list(RUNGS)
    return table.sort_values("rung", key=lambda rungs: rungs.map(order.index)).reset_index(drop=True)


def ladder(rows: pd.DataFrame) -> go.Figure:
    """Loss of other ways of halting minus the learned router's on the same weights, a line per run, with 95 %
    intervals: a ladder that holds falls from top to bottom.

    Args:
        rows: of :func:`ladder_rows`, of several runs.
    """
    figure = go.Figure()
    names = [title for rung, title in RUNGS.items() if (rows["rung"] == rung).any()]
    for index, (run, part) in enumerate(rows.groupby("run", sort=False)):
        color = style.OTHER_COLORS[index % len(style.OTHER_COLORS)]
        figure.add_scatter(
            x=part["mean"],
            y=[RUNGS[rung] for rung in part["rung"]],
            mode="markers",
            name=short(str(run), 40),
            marker={"symbol": style.MARKERS[index % len(style.MARKERS)], "size": 11, "color": color},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (part["high"] - part["mean"]).fillna(0),
                "arrayminus": (part["mean"] - part["low"]).fillna(0),
                "thickness": 2,
            },
            customdata=part["mean_steps"],
            hovertemplate=f"{html.escape(str(run))}<br>%{{y}}: %{{x:+.4f}} nats/token at %{{customdata:.3g}} steps"
            "<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": MUTED, "dash": "dash", "width": 1.5})
    figure.update_xaxes(title="loss minus the learned router's, nats/token (right: the router is better)")
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names, range=[len(names) - 0.5, -0.5], automargin=True
    )
    return layout(figure, height=180 + 44 * max(len(names), 1))


def ladder_verdict(rows: pd.DataFrame) -> str:
    """Whether learned halting beats what knows less, and what is left to the oracle, in a sentence or two."""
    parts = []
    runs = rows["run"].nunique()
    for rung in ("fixed", "shuffled", "posthoc"):
        part = rows[rows["rung"] == rung]
        if len(part):
            better, worse = int((part["low"] > 0).sum()), int((part["high"] < 0).sum())
            parts.append(f"better than {rung} in {better}, worse in {worse} of {len(part)}")
    text = f"The learned router on the same weights ({runs} {'run' if runs == 1 else 'runs'}): {'; '.join(parts)}."
    best = rows[rows["rung"] == "oracle"]
    if len(best):
        text += f" The oracle saves {style.three(-float(best['mean'].mean()))} nats/token more at equal steps."
    return text if parts else ""


def need_name(need: float) -> str:
    """What a token needs, in words."""
    if pd.isna(need):
        return "unpredictable"
    return "none" if need == 0 else f"{need:.0f} step" if need == 1 else f"{need:.0f} steps"


def _ascending(needs: pd.Series) -> list[str]:
    return [need_name(need) for need in sorted(needs.unique(), key=lambda need: -1 if pd.isna(need) else need)]


PANELS_PER_ROW = 5
PANEL_PIXELS, PANEL_GAP = 130, 70


def steps_by_need(rows: pd.DataFrame) -> go.Figure:
    """Share of tokens by the latent steps that they got, a bar per need, a panel per arm.

    Args:
        rows: of :func:`haltscale.dashboard.data.needed`.
    """
    figure = go.Figure()
    groups = list(rows.groupby("arm", sort=False))
    if not groups:
        return layout(figure, height=200)
    down = -(-len(groups) // PANELS_PER_ROW)
    across = -(-len(groups) // down)
    tall = down * (PANEL_PIXELS + PANEL_GAP) - PANEL_GAP
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=PANEL_GAP / tall if down > 1 else 0,
        subplot_titles=[short(str(arm), 30) for arm, _ in groups],
    )
    most = max(map(len, rows["steps_histogram"])) - 1
    for index, (arm, members) in enumerate(groups):
        for step in range(most + 1):
            share = [100 * one[step] if step < len(one) else 0.0 for one in members["steps_histogram"]]
            color = style.step_color(step, most)
            figure.add_bar(
                orientation="h",
                x=share,
                y=[need_name(need) for need in members["need"]],
                name=f"{step} step" if step == 1 else f"{step} steps",
                legendgroup=str(step),
                showlegend=index == 0,
                marker={"color": color, "line": {"width": 1, "color": MUTED}},
                text=[str(step) if value >= 12 else "" for value in share],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": style.ink_on(color), "size": 12},
                customdata=members["tokens"],
                hovertemplate=f"{html.escape(str(arm))}<br>need: %{{y}} (%{{customdata:,}} tokens)<br>"
                f"%{{x:.3g}} % got {step}<extra></extra>",
                row=index // across + 1,
                col=index % across + 1,
            )
    needs = _ascending(rows["need"])[::-1]
    figure.update_layout(barmode="stack", bargap=0.2)
    figure.update_xaxes(range=[0, 100], tickvals=[0, 50, 100], ticksuffix=" %")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=needs, automargin=True)
    figure.update_yaxes(title="steps needed", col=1)
    figure.update_annotations(font={"size": 13})
    layout(figure, height=tall + 120, legend_title="latent steps given", top=84)
    return figure.update_layout(legend={"traceorder": "normal", "y": 1 + 26 / tall})


MEASURES = {"accuracy": "share that is right", "loss": "loss, nats/token"}


def measure_by_need(rows: pd.DataFrame, measure: str) -> go.Figure:
    """One of :data:`MEASURES` by the latent steps that the token needs, a bar per arm.

    Args:
        rows: of :func:`haltscale.dashboard.data.needed`.
    """
    figure = go.Figure()
    for index, (arm, members) in enumerate(rows.groupby("arm", sort=False)):
        first = members["method"].iloc[0]
        figure.add_bar(
            x=[need_name(need) for need in members["need"]],
            y=members[measure],
            name=short(str(arm)),
            marker={
                "color": style.method_color(str(first)),
                "pattern": {"shape": PATTERNS[index % len(PATTERNS)], "fillmode": "overlay", "size": 6},
                "line": {"width": 1, "color": MUTED},
            },
            customdata=members[["tokens", "mean_steps"]],
            hovertemplate=f"{html.escape(str(arm))}<br>need: %{{x}} (%{{customdata[0]:,}} tokens)<br>"
            f"{MEASURES[measure]}: %{{y:.3g}}<br>%{{customdata[1]:.3g}} latent steps<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(
        title="steps needed", type="category", categoryorder="array", categoryarray=_ascending(rows["need"])
    )
    figure.update_yaxes(title=MEASURES[measure], range=[0, 1] if measure == "accuracy" else None, rangemode="tozero")
    return layout(figure, height=360)


def need_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per arm: ``Arm``, ``Runs``, ``Rank corr.``, and accuracy, nats and latent steps by need.

    Args:
        rows: of :func:`haltscale.dashboard.data.needed`.
    """
    found = []
    for arm, members in rows.groupby("arm", sort=False):
        row = {"Arm": arm, "Runs": members["runs"].iloc[0], "Rank corr.": members["rank_correlation"].iloc[0]}
        for title, measure in (("Accuracy", "accuracy"), ("Nats", "loss"), ("Steps", "mean_steps")):
            row |= {
                f"{title}, {need_name(need)}": value
                for need, value in zip(members["need"], members[measure], strict=True)
            }
        found.append(row)
    return pd.DataFrame(found)


PATTERNS = ("", "/", ".", "x", "-", "\\", "+", "|")
"""Fillings of bars, so that no figure depends on colour alone."""


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
