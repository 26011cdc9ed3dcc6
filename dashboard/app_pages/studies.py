"""Every study of the store, and the chosen one run by run: state, progress, cost, and what went wrong."""

import math
import time

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, layout, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView, sound

TITLE = "Studies"
ICON = ":material/science:"
ORDER = 8
MOST_STUDIES = 30
MOST_FAILURES = 12
ENDED = ["finished", "diverged", "capped", "stopped"]
TROUBLED = ["failed", "stalled", "damaged", "diverged", "capped"]
NUMBER = st.column_config.NumberColumn


def body(view: StudyView) -> None:
    layout.heading(view, "Studies", says="Which studies are there, how far are they, and what went wrong?")
    others(view)
    st.header(layout.plain(view.name), anchor=False)
    layout.owner(view)
    cost(view)
    if view.note:
        st.caption(f":material/info: {layout.plain(view.note)}")
    troubles(view)
    runs(view)


def others(view: StudyView) -> None:
    """A row per study of the store."""
    names = store().studies()
    shown = [view.name, *(name for name in names if name != view.name)][:MOST_STUDIES]
    rows = []
    for name in shown:
        one = store().view(name)
        states = one.runs["state"].value_counts()
        ended = int(states.reindex(ENDED).fillna(0).sum())
        rows.append(
            {
                "study": name,
                "question": one.question,
                "progress": ended / len(one.runs) if len(one.runs) else math.nan,
                "runs": len(one.runs),
                "running": int(states.get("running", 0)),
                "wrong": int(states.reindex(TROUBLED).fillna(0).sum()),
                "flops": float(one.runs["flops_realised"].sum()),
                "hours": float(one.runs["wall_seconds"].sum()) / 3600,
                "last": last_sign(one.runs),
            }
        )
    layout.table(
        pd.DataFrame(rows),
        key="studies-table",
        alt=f"{len(rows)} studies with their progress and cost",
        column_config={
            "study": st.column_config.TextColumn("Study", pinned=True),
            "question": st.column_config.TextColumn("Question", width="large"),
            "progress": st.column_config.ProgressColumn("Runs ended", min_value=0, max_value=1, format="percent"),
            "runs": NUMBER("Runs"),
            "running": NUMBER("Running"),
            "wrong": NUMBER("In trouble", help=f"{', '.join(TROUBLED[:-1])} or {TROUBLED[-1]}"),
            "flops": NUMBER("Training FLOPs, realised", format="scientific"),
            "hours": NUMBER("Training, h", format="%.2f"),
            "last": st.column_config.DatetimeColumn("Last sign of life", format="distance"),
        },
    )
    if len(names) > len(shown):
        st.caption(f"and {len(names) - len(shown)} studies more; choose one in the sidebar.")


def last_sign(runs: pd.DataFrame) -> pd.Timestamp | None:
    """When a run of the study last wrote something."""
    latest = runs[["heartbeat", "finished_at"]].max().max()
    return pd.Timestamp(latest, unit="s", tz="UTC") if pd.notna(latest) and 0 < latest < time.time() + 1e6 else None


def cost(view: StudyView) -> None:
    """The chosen study in numbers."""
    known = view.runs
    ended = known[known["state"] == "finished"]
    left = known["seconds_left"].max()
    with st.grid(4):
        for label, value, about in (
            ("Runs finished", f"{len(ended)} of {len(known)}", None),
            (
                "Training, hours",
                style.three(float(known["wall_seconds"].sum()) / 3600),
                "Of finished runs, on the clock.",
            ),
            (
                "Training FLOPs, realised",
                style.scientific(float(known["flops_realised"].sum())),
                "Finished runs, and the others as far as they were evaluated.",
            ),
            ("Longest running run", f"{style.duration(left)} left" if math.isfinite(left) else "–", None),
        ):
            st.metric(label, value, border=True, height="stretch", help=about)


def troubles(view: StudyView) -> None:
    """What went wrong, with the store's own words."""
    wrong = view.runs[view.runs["note"].ne("") & view.runs["state"].ne("finished")]
    for problem in (one for one in view.problems if one.where != view.name):  # the study's stands above
        st.warning(
            f"**The folder of run {layout.plain(problem.where)} is damaged.** {layout.plain(problem.what)}",
            icon=":material/broken_image:",
        )
    wrong = wrong[wrong["state"] != "damaged"]
    if len(wrong):
        with st.expander(f"{len(wrong)} runs in trouble", icon=":material/error:", expanded=True):
            for _, run in wrong.head(MOST_FAILURES).iterrows():
                state = str(run["state"])
                st.markdown(
                    f":{style.STATE_COLORS[state]}-badge[{style.STATE_ICONS[state]} {state}] "
                    f"**{layout.plain(run['label'])}**"
                )
                st.code(run["note"], language=None, wrap_lines=True)
            if len(wrong) > MOST_FAILURES:
                st.caption(f"and {len(wrong) - MOST_FAILURES} more, in the table.")


def runs(view: StudyView) -> None:
    """Every run's numbers; the files have all columns and all kinds of FLOPs."""
    columns = {
        "state": st.column_config.MultiselectColumn(
            "State", options=list(style.STATE_COLORS), color=list(style.STATE_COLORS.values()), width="small"
        ),
        "label": st.column_config.TextColumn("Run", pinned=True),
        "size": st.column_config.TextColumn("Size"),
        "lam": NUMBER("λ", format="%g"),
        "beta": NUMBER("β", format="%g"),
        "l_max": NUMBER("l_max", format="%d"),
        "seed": NUMBER("Seed", format="%d"),
        "tokens_done": NUMBER("Tokens", format="compact"),
        "loss": NUMBER("Loss, nats/token", format="%.3f"),
        "perplexity": NUMBER("Perplexity", format="%.1f"),
        "bits_per_byte": NUMBER("Bits/byte", format="%.3f"),
        "mean_steps": NUMBER("Latent steps", format="%.2f"),
        "passes": NUMBER("Passes/token", format="%.2f"),
        "needy_accuracy": NUMBER("Needy accuracy", format="%.3f", help="Of the tokens that need a latent step."),
        "needy_steps": NUMBER("Needy steps", format="%.2f", help="Latent steps of the tokens that need one."),
        "need_rank_correlation": NUMBER(
            "Rank corr.", format="%.3f", help="Spearman's, between steps needed and steps given, over all tokens."
        ),
        **{f"flops_{kind}": NUMBER(f"FLOPs, {kind}", format="scientific") for kind in data.FlopsKind},
        "wall_seconds": NUMBER("Training, s", format="%d"),
        "tokens_per_second": NUMBER("Tokens/s", format="compact"),
        "note": st.column_config.TextColumn("Note"),
    }
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    left.subheader("Runs", anchor=False)
    kept = [name for name in columns if name in ("loss", "state") or view.runs[name].replace("", pd.NA).notna().any()]
    shown = view.runs[kept].assign(state=view.runs["state"].map(lambda state: [state]))
    layout.table(shown, key="runs-table", alt=f"{len(shown)} runs with their numbers", column_config=columns)
    every = view.runs[[*data.TEXT, *(name for name in data.NUMBERS if name not in ("rank", "shade"))]]
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        layout.table_files(every, name=f"{view.name}-runs", title=f"Runs of {view.name}")
    apart = int((~sound(view.runs)).sum())
    if apart:
        st.caption(f"{apart} diverged or damaged runs are listed here and drawn nowhere.")


layout.live(body)
