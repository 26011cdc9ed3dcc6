"""Validation perplexity against training compute for every method and size, and every run's numbers."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, shell, style
from haltscale.dashboard.data import FlopsKind, StudyView, plotted

TITLE = "Scaling"
ICON = ":material/insights:"
ORDER = 1


def body(view: StudyView) -> None:
    shell.heading(view, "Perplexity against training compute")
    kind = FlopsKind(
        st.segmented_control(
            "Count FLOPs as",
            [kind.value for kind in FlopsKind],
            default=FlopsKind.REALISED.value,
            required=True,
            key="flops",
            bind="query-params",
        )
    )
    st.caption(f"**{kind.value.capitalize()}**: {kind.meaning}. Numbers of two kinds never share an axis.")
    summary(view, kind)
    chart(view, kind)
    shell.honest(view)
    table(view, kind)
    for problem in view.problems:
        st.warning(
            f"**The folder of run {shell.plain(problem.where)} is damaged.** {shell.plain(problem.what)}",
            icon=":material/broken_image:",
        )


def summary(view: StudyView, kind: FlopsKind) -> None:
    """The study in four numbers."""
    runs = view.runs
    shown = plotted(runs, kind)
    finished = shown[shown["state"] == "finished"]
    thinking = finished[finished["l_max"].gt(0)]
    with st.grid(4):
        st.metric(
            "Runs finished", f"{int((runs['state'] == 'finished').sum())} of {len(runs)}", border=True, height="stretch"
        )
        best = data.best(finished)
        st.metric(
            "Lowest perplexity",
            style.three(best["perplexity"]) if best is not None else "–",
            border=True,
            height="stretch",
            help=f"of {shell.plain(best['label'])}" if best is not None else None,
        )
        steps = (
            f"{style.three(thinking['mean_steps'].mean())} of {thinking['l_max'].max():.0f}" if len(thinking) else "–"
        )
        st.metric(
            "Latent steps per token",
            steps,
            border=True,
            height="stretch",
            help="Mean over the finished runs that may think, of the most they may take.",
        )
        st.metric(
            f"Training FLOPs, {kind}",
            style.scientific(float(shown[f"flops_{kind}"].sum())) if len(shown) else "–",
            border=True,
            height="stretch",
            help="Sum over all runs so far.",
        )


def chart(view: StudyView, kind: FlopsKind) -> None:
    shown = plotted(view.runs, kind)
    if shown.empty:
        st.info(
            "No run has been evaluated yet. The first points appear here as hollow markers at the first evaluation.",
            icon=":material/hourglass_empty:",
        )
        return
    figure = figures.scaling(view.runs, kind)
    with st.container(border=True):
        best = shown.sort_values("perplexity").iloc[0]
        st.plotly_chart(
            figure,
            key="scaling",
            config=shell.PLOTLY,
            alt=f"Perplexity against {kind} training FLOPs of {len(shown)} runs; "
            f"lowest {style.three(best['perplexity'])} for {best['label']}",
        )
        left, right = st.columns([5, 1], vertical_alignment="center")
        left.caption(
            "Each line is a method through its sizes, each marker a run; hollow markers are runs without a result yet, "
            "at their last evaluation. Bars are one standard error of the loss over the validation tokens. Lower "
            "and further left is better."
        )
        with right, st.container(horizontal_alignment="right"):
            shell.download(
                "Figure",
                lambda: figures.as_html(figure, f"{view.name}: perplexity against {kind} training FLOPs"),
                f"{view.name}-scaling-{kind}.html",
                "text/html",
            )


def table(view: StudyView, kind: FlopsKind) -> None:
    """Every run's numbers; the file has all columns and all kinds of FLOPs."""
    number = st.column_config.NumberColumn
    columns = {
        "state": st.column_config.MultiselectColumn(
            "State", options=list(style.STATE_COLORS), color=list(style.STATE_COLORS.values()), width="small"
        ),
        "label": st.column_config.TextColumn("Run", pinned=True),
        "size": st.column_config.TextColumn("Size"),
        "lam": number("λ", format="%g"),
        "l_max": number("l_max", format="%d"),
        "tokens_done": number("Tokens", format="compact"),
        "loss": number("Loss, nats/token", format="%.3f"),
        "perplexity": number("Perplexity", format="%.1f"),
        "bits_per_byte": number("Bits/byte", format="%.3f"),
        "mean_steps": number("Latent steps", format="%.2f"),
        "passes": number("Passes/token", format="%.2f"),
        f"flops_{kind}": number(f"FLOPs, {kind}", format="scientific"),
        "wall_seconds": number("Wall time, s", format="%d"),
        "tokens_per_second": number("Tokens/s", format="compact"),
    }
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    left.subheader("Runs", anchor=False)
    shown = view.runs[list(columns)].assign(state=view.runs["state"].map(lambda state: [state]))
    st.dataframe(
        shown,
        column_config=columns,
        hide_index=True,
        placeholder="",
        key="runs-table",
        alt="All runs with their numbers",
    )
    with right, st.container(horizontal_alignment="right"):
        shell.download("Table", csv(view.runs), f"{view.name}-runs.csv", "text/csv")


def csv(runs: pd.DataFrame) -> str:
    columns = [*data.TEXT, *(name for name in data.NUMBERS if name != "rank")]
    return str(runs[columns].to_csv(index=False))


shell.live(body)
