"""Figures of a sweep: pure functions from runs to Plotly figures, at most 10,000 points each."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy import stats

from haltscale.dashboard import style
from haltscale.dashboard.data import OPTIONS, asked_for, size_order, sound
from haltscale.dashboard.figures import MUTED, layout
from haltscale.platform.analysis import Refusal, SeedNoise
from haltscale.platform.analysis.estimates import LEVEL

MOST_LINES = 200
LOSS_BANDS = 6
"""Equally many runs in each; the best band is also the only one with thick and solid lines."""
MOST_TICKS = 6
APART = 0.05
"""Of an axis of parallel coordinates: how far apart the runs are that share a value."""
OPTION_NAMES = {"lam": "λ", "beta": "β", "l_max": "l_max", "tau": "τ", "size": "size", "seed": "seed"}
TARGETS = {"perplexity": "perplexity", "mean_steps": "mean latent steps"}
MAPPED = {"loss": "loss, nats/token", "mean_steps": "mean latent steps"}


def varying(runs: pd.DataFrame) -> list[str]:
    """The options with at least two values among runs of one method."""
    return [name for name in OPTION_NAMES if runs[name].nunique() > 1]


def judged(runs: pd.DataFrame) -> list[str]:
    """Everything that runs of one method were asked for and that differs among them: options, size and seed first, then
    any other field of their identities."""
    asked = asked_for(runs)
    return [*varying(runs), *(name for name in asked if runs[name].astype(str).nunique() > 1)]


def option_name(name: str) -> str:
    """A column as a reader knows it."""
    return OPTION_NAMES.get(name, name.replace("_", " "))


def setting_cells(runs: pd.DataFrame) -> pd.Series:
    """The values of λ, β, l_max and τ of each run, as one text."""
    return runs[list(OPTIONS)].map(lambda value: f"{value:g}").agg(" ".join, axis=1) if len(runs) else pd.Series([])


def reach(noise: SeedNoise | Refusal | None, count: int | pd.Series) -> Any:
    """Half the 95 % interval of a mean loss over ``count`` runs, from the seed noise of the study; NaN where that is
    unknown."""
    if not isinstance(noise, SeedNoise):
        return np.nan * count
    degrees = max(noise.runs - noise.groups, 1)
    return float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * noise.deviation.value / np.sqrt(count)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a sweep recommends."""

    headline: str
    support: str
    table: pd.DataFrame
    """A row per setting, best first: ``setting``, ``loss``, ``runs``, ``apart`` (told from the best)."""


def ranking(runs: pd.DataFrame, names: list[str], noise: SeedNoise | Refusal) -> Ranking | None:
    """The best setting of some options, and which others can be told from it; None where no option varies.

    With many settings the lowest of them is low by chance: the difference that tells two apart is Bonferroni's, over
    all settings that are compared with the best.
    """
    kept = runs[runs["loss"].notna() & (runs["state"] == "finished")]
    if not names or kept.empty:
        return None
    labels = kept[names].map(lambda v: f"{v:g}" if isinstance(v, float | int) else str(v))
    setting = labels.apply(lambda row: " · ".join(f"{OPTION_NAMES[n]} {row[n]}" for n in names), axis=1)
    losses = kept.groupby(setting.rename("setting"))["loss"]
    table = pd.DataFrame({"loss": losses.mean(), "runs": losses.size()}).sort_values("loss").reset_index()
    if len(table) < 2:
        return None
    best, count = table.iloc[0], len(table)
    if not isinstance(noise, SeedNoise):
        return Ranking(
            headline="No recommendation: the noise between seeds is unknown",
            support=f"{best['setting']} has the lowest of {count} losses, {style.three(best['loss'])} nats/token."
            " Give a few settings a second seed to tell whether that is more than chance.",
            table=table.assign(apart=False),
        )
    degrees = max(noise.runs - noise.groups, 1)
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / (count - 1), degrees))
    least = quantile * noise.deviation.value * np.sqrt(1 / table["runs"] + 1 / best["runs"])
    table = table.assign(apart=(table["loss"] - best["loss"]) > least)
    tied = table[~table["apart"]]
    needed = f"a difference of {style.three(float(least.iloc[1:].median()))} nats/token"
    if len(tied) == count:
        headline = f"No difference: none of the {count} settings can be told from the best one"
        support = (
            f"Losses span {style.three(float(table['loss'].min()))} to {style.three(float(table['loss'].max()))} "
            f"nats/token; two settings are told apart by {needed} (95 %, {count - 1} comparisons with the best)."
        )
    elif len(tied) == 1:
        headline = f"Use {best['setting']}: it has the lowest loss of {count} settings, beyond the noise"
        support = f"{style.three(best['loss'])} nats/token; every other setting is worse by more than {needed}."
    else:
        headline = f"{len(tied)} of {count} settings cannot be told from the best, {best['setting']}"
        shared = []
        for name in names:
            values = set(labels.loc[setting.isin(tied["setting"]), name])
            if len(values) < labels[name].nunique():
                shared.append(f"{OPTION_NAMES[name]} {' or '.join(sorted(values))}")
        support = (
            f"All of them have {', '.join(shared)}. " if shared else "They share no value of an option. "
        ) + f"Two settings are told apart by {needed} (95 %, {count - 1} comparisons with the best)."
    return Ranking(headline=headline, support=support, table=table)


GREY = "#9a9a9a"


def heat_maps(
    runs: pd.DataFrame, x: str, y: str, split: str | None, *, noise: SeedNoise | Refusal | None = None
) -> go.Figure:
    """Loss (left) and mean latent steps (right) over two options, a row of maps per value of a third.

    Each cell is the mean over whatever else varies, and says its number, ± half its interval, and its runs. Cells of
    the loss that cannot be told from the best one are grey.
    """
    kept = runs[sound(runs) & runs["loss"].notna() & runs[x].notna() & runs[y].notna()]
    values = sorted(kept[split].dropna().unique()) if split else [None]
    figure = make_subplots(
        rows=max(len(values), 1),
        cols=2,
        horizontal_spacing=0.2,
        vertical_spacing=0.36 / max(len(values), 1),
        subplot_titles=[
            f"{title}{f' · {OPTION_NAMES[str(split)]} {value:g}' if value is not None else ''}"
            for value in values
            for title in MAPPED.values()
        ],
    )
    keys = [y, *([str(split)] if split else [])]
    whole = kept.groupby([x, *keys])["loss"].agg(["mean", "size"])
    half = reach(noise, whole["size"])
    lowest = whole["mean"].min() if len(whole) else np.nan
    at = whole["mean"].idxmin() if len(whole) else None
    best = float(half.loc[at]) if at is not None else np.nan
    tied = (whole["mean"] - lowest) <= np.hypot(half, best)
    for row, value in enumerate(values, start=1):
        part = kept if value is None else kept[kept[str(split)] == value]
        for col, (target, title) in enumerate(MAPPED.items(), start=1):
            grid = part.pivot_table(index=y, columns=x, values=target, aggfunc="mean")
            counts = part.pivot_table(index=y, columns=x, values=target, aggfunc="count").reindex_like(grid)
            spans = kept.groupby([x, *keys])[target].mean()
            names = [
                [f"{v:g}" if isinstance(v, float | int) else str(v) for v in axis]
                for axis in (grid.columns, grid.index)
            ]
            text = _cells(grid, counts, noise if target == "loss" else None)
            grey = np.array(
                [
                    [
                        target == "loss" and bool(tied.get((column, line, value) if split else (column, line), False))
                        for column in grid.columns
                    ]
                    for line in grid.index
                ]
            )
            z = grid.to_numpy(dtype=float)
            shared = {
                "x": names[0], "y": names[1], "text": text, "texttemplate": "%{text}", "xgap": 2, "ygap": 2,
                "hovertemplate": f"{OPTION_NAMES[x]} %{{x}}, {OPTION_NAMES[y]} %{{y}}:<br>%{{text}}<extra></extra>",
            }  # fmt: skip
            figure.add_heatmap(
                z=np.where(grey, np.nan, z) if grey.size else z,
                zmin=float(spans.min()),
                zmax=float(spans.max()),
                colorscale="Cividis" if target == "mean_steps" else "Cividis_r",
                colorbar={"title": title, "x": 0.4 if col == 1 else 1.0, "len": 0.8, "thickness": 12},
                showscale=row == 1,
                hoverongaps=False,
                **shared,
                row=row,
                col=col,
            )
            if grey.any():
                figure.add_heatmap(
                    z=np.where(grey, 1.0, np.nan),
                    name="not told from the best",
                    colorscale=[[0, GREY], [1, GREY]],
                    showscale=False,
                    hoverongaps=False,
                    textfont={"color": "#000000"},
                    **shared,
                    row=row,
                    col=col,
                )
    figure.update_xaxes(title=OPTION_NAMES[x], type="category")
    figure.update_yaxes(title=OPTION_NAMES[y], type="category")
    return layout(figure, height=70 + 290 * max(len(values), 1), top=48)


def _cells(grid: pd.DataFrame, counts: pd.DataFrame, noise: SeedNoise | Refusal | None) -> list[list[str]]:
    """What stands in the cells: the mean, ± half its interval, the number of runs."""
    rows = []
    for line, count in zip(grid.to_numpy(dtype=float), counts.to_numpy(dtype=float), strict=True):
        row = []
        for cell, many in zip(line, count, strict=True):
            half = reach(noise, many) if many > 0 else np.nan
            parts = [f"{cell:.3f}" if np.isfinite(cell) else "–"]
            parts += [f"± {style.three(float(half))}"] if np.isfinite(half) else []
            parts += [f"n {many:.0f}"] if many > 0 else []
            row.append("<br>".join(parts))
        rows.append(row)
    return rows


def parallel(runs: pd.DataFrame, kind: str) -> go.Figure:
    """Parallel coordinates: a line per run through its options and results, in as many colours as ``LOSS_BANDS``.

    Drawn as plain lines: Plotly's own parallel coordinates need WebGL, which holds up a browser without a graphics card
    for seconds, and have neither dashes nor hover boxes.
    """
    kept = runs[sound(runs) & runs["loss"].notna()].sort_values("loss").head(MOST_LINES)
    axes = _axes(kept, kind)
    figure = go.Figure()
    bands = np.array_split(np.arange(len(kept)), min(LOSS_BANDS, len(kept)) or 1)
    places = np.array([*range(len(axes)), np.nan])
    for index, rows in reversed([*enumerate(bands)]):  # the best are drawn last, above the others
        band = kept.iloc[rows]
        heights = np.column_stack([*(axis["heights"][rows] for axis in axes), np.full(len(rows), np.nan)])
        text = np.column_stack([*(np.asarray(axis["text"], dtype=object)[rows] for axis in axes), [""] * len(rows)])
        labels = np.repeat([html.escape(label) for label in band["label"]], len(places))
        figure.add_scatter(
            x=np.tile(places, len(rows)),
            y=heights.ravel(),
            customdata=np.column_stack([labels, text.ravel()]),
            hovertemplate="%{customdata[0]}: %{customdata[1]}<extra></extra>",
            mode="lines",
            name=f"{style.three(float(band['loss'].min()))} to {style.three(float(band['loss'].max()))}"
            if len(band)
            else "no run",
            line={
                "color": style.line_color(len(bands) - 1 - index, len(bands) - 1),
                "width": 3 if index == 0 else 1.2,
                "dash": "solid" if index == 0 else "dot",
            },
            legendrank=index,
        )
    for place, axis in enumerate(axes):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": MUTED, "width": 1})
        for height, name in axis["ticks"]:
            figure.add_annotation(
                x=place,
                y=height,
                text=name,
                showarrow=False,
                xanchor="left",
                xshift=4,
                font={"size": 12},
                bgcolor="rgba(128,128,128,0.35)",
            )
    titles = [axis["title"] for axis in axes]
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=titles, showgrid=False, range=[-0.2, len(axes) - 0.5])
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    return layout(figure, height=420, top=60, legend_title="loss,<br>nats/token")


def _axes(runs: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """An axis for each option that varies, and for each result: the ``heights`` of the runs on it (0 to 1; NaN where a
    run has none), their values as ``text``, and ``ticks`` of (height, text).

    Args:
        runs: by loss. Those that share an option's value are set apart a little, the best lowest.
    """
    apart = APART * (np.arange(len(runs)) / max(len(runs) - 1, 1) - 0.5)
    axes: list[dict[str, Any]] = []
    for name in varying(runs):
        codes = sorted(runs[name].dropna().unique(), key=size_order if name == "size" else None)
        names = [html.escape(f"{v:g}" if isinstance(v, float) else str(v)) for v in codes]
        at = runs[name].map({value: index for index, value in enumerate(codes)})
        text = at.map(dict(enumerate(names))).fillna("–")
        title, most = OPTION_NAMES[name], len(codes) - 1
        shown = range(0, len(codes), -(-len(codes) // MOST_TICKS))
        ticks = [(index / most, names[index]) for index in shown]
        axes.append(
            {"heights": at.to_numpy(dtype=float) / most + apart, "ticks": ticks} | {"title": title, "text": text}
        )
    for name, title in (("mean_steps", "latent steps"), (f"flops_{kind}", f"FLOPs, {kind}"), ("loss", "loss")):
        values = runs[name].to_numpy(dtype=float)
        if not np.isfinite(values).any():
            continue
        scaled = np.log10(values) if name.startswith("flops") else values
        low, high = np.nanmin(scaled), np.nanmax(scaled)
        heights = (scaled - low) / (high - low) if high > low else np.where(np.isfinite(scaled), 0.5, np.nan)
        ends = {float(np.nanmin(values)): np.nanmin(heights), float(np.nanmax(values)): np.nanmax(heights)}
        ticks = [(float(height), style.three(value)) for value, height in ends.items()]
        told = [f"{title} {style.three(float(value))}" for value in values]
        axes.append({"title": title, "heights": heights, "ticks": ticks, "text": told})
    return axes


def importance(tables: dict[str, pd.DataFrame]) -> go.Figure:
    """Share of variance that each parameter explains alone; the bar's tick is what chance explains."""
    figure = go.Figure()
    patterns = {"loss": ("#0072B2", ""), "mean_steps": ("#E69F00", "/")}
    for target, table in tables.items():
        color, pattern = patterns[target]
        names = [html.escape(option_name(name)) for name in table["parameter"]]
        figure.add_bar(
            x=100 * table["share"],
            y=names,
            orientation="h",
            name={"loss": "of the loss", "mean_steps": "of the mean steps"}[target],
            marker={"color": color, "pattern": {"shape": pattern}},
            text=[f"{style.three(100 * share)} %" for share in table["share"]],
            textposition="outside",
            cliponaxis=False,
            customdata=100 * table["chance"],
            hovertemplate="%{y}: %{x:.3g} %, by chance up to %{customdata:.3g} %<extra></extra>",
        )
        figure.add_scatter(
            x=100 * table["chance"],
            y=names,
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 18, "color": MUTED, "line": {"width": 3}},
            name="what chance explains",
            showlegend=target == next(iter(tables)),
            hoverinfo="skip",
        )
    figure.update_xaxes(title="share of variance explained alone, %", range=[0, 115])
    figure.update_yaxes(autorange="reversed", automargin=True)
    rows = max((len(table) for table in tables.values()), default=1)
    return layout(figure, height=150 + 62 * rows)


def slice_of(
    runs: pd.DataFrame, table: pd.DataFrame, name: str, target: str, *, noise: SeedNoise | Refusal | None = None
) -> go.Figure:
    """Every run, and the mean, at each value of an option; the mean of a loss with its 95 % interval from the noise."""
    figure = go.Figure()
    kept = runs[sound(runs) & runs[target].notna() & runs[name].notna()]
    text = {value: f"{value:g}" if isinstance(value, float) else str(value) for value in table["value"]}
    sizes = sorted(set(kept["size"]), key=lambda size: (size_order(size), size))
    for index, size in enumerate(sizes):
        part = kept[kept["size"] == size]
        figure.add_scatter(
            x=part[name].map(lambda value: text.get(value, str(value))),
            y=part[target],
            mode="markers",
            name=html.escape(str(size)),
            marker={
                "symbol": style.MARKERS[index % len(style.MARKERS)],
                "color": style.line_color(index, len(sizes) - 1),
                "line": {"width": 1, "color": MUTED},
                "size": 9,
                "opacity": 0.75,
            },
            customdata=[html.escape(label) for label in part["label"]],
            hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
        )
    figure.add_scatter(
        x=[text[value] for value in table["value"]],
        y=table["mean"],
        mode="lines+markers",
        name="mean",
        line={"color": MUTED, "width": 3, "dash": "dash"},
        marker={"symbol": "line-ew-open", "size": 22, "line": {"width": 3}},
        error_y={
            "type": "data",
            "array": np.nan_to_num(reach(noise, table["runs"])),
            "visible": target == "loss" and isinstance(noise, SeedNoise),
            "thickness": 2,
            "color": MUTED,
        },
    )
    figure.update_xaxes(
        title=OPTION_NAMES[name], type="category", categoryorder="array", categoryarray=list(text.values())
    )
    figure.update_yaxes(title=TARGETS.get(target, f"{target}, nats/token"))
    return layout(figure, height=340, legend_title="size")
