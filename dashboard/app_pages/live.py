"""Runs as they train: progress, time left, curves, how the steps spread over time, and why a run stopped."""

import math
import time

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, health, layout, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView, size_order

TITLE = "Live"
ICON = ":material/monitoring:"
ORDER = 7
MOST_CURVES = 12
MOST_CARDS = 12
SILENT_SECONDS = 30.0  # after which a running run says so; its lease is renewed every few seconds
ORDER_OF_STATES = ["running", "stalled", "failed", "diverged", "capped"]


def body(view: StudyView) -> None:
    layout.heading(view, "Live runs", says="Are the runs healthy, and when will they end?")
    layout.owner(view)
    runs = view.runs
    left = health.seconds_left(runs)
    if math.isfinite(left):
        st.markdown(
            f":material/schedule: **About {style.duration(left)} left for the whole study** "
            f"(until {layout.plain(health.clock(left))}), at the pace of its finished runs."
        )
    going = runs[runs["state"].isin(ORDER_OF_STATES)]
    if len(going):
        going = going.sort_values("state", key=lambda states: states.map(ORDER_OF_STATES.index), kind="stable")
        with st.grid(2):
            for _, run in going.head(MOST_CARDS).iterrows():
                card(view, run)
        if len(going) > MOST_CARDS:
            st.caption(f"and {len(going) - MOST_CARDS} runs more that are not finished; the page Studies lists all.")
    curves(view)
    planned = runs[runs["state"] == "planned"]
    if len(planned):
        with st.expander(f"{len(planned)} planned, not begun", icon=style.STATE_ICONS["planned"]):
            st.markdown("\n".join(f"- {layout.plain(label)}" for label in planned["label"]))


def card(view: StudyView, run: pd.Series) -> None:
    """One run that is not finished: how far it is, or what stopped it."""
    state = str(run["state"])
    with st.container(border=True, gap="small", height="stretch"):
        st.markdown(
            f":{style.STATE_COLORS[state]}-badge[{style.STATE_ICONS[state]} {state}] **{layout.plain(run['label'])}**"
        )
        if state in ORDER_OF_STATES and math.isfinite(run["step"]) and run["steps"] > 0:
            st.progress(min(max(run["step"] / run["steps"], 0.0), 1.0), text=progress_text(run))
        if state == "running":
            found = health.judge(
                data.metrics(store(), view.name, str(run["key"])),
                routes=bool(run["routed"]),
                l_max=float(run["l_max"]),
                silent=time.time() - run["heartbeat"] if math.isfinite(run["heartbeat"]) else 0.0,
            )
            if found.healthy:
                st.markdown(":green[:material/check_circle:] Healthy")
            else:
                st.markdown(f":orange[:material/warning:] **Look here:** {layout.plain('; '.join(found.reasons))}")
        if run["note"]:
            st.code(run["note"], language=None, wrap_lines=True)


def progress_text(run: pd.Series) -> str:
    parts = [f"step {run['step']:,.0f} of {run['steps']:,.0f}"]
    silent = time.time() - run["heartbeat"]
    if run["state"] == "running" and silent > SILENT_SECONDS:
        parts.append(f"silent for {data.silence(silent)}")
    if math.isfinite(run["seconds_left"]):
        parts.append(f"{style.duration(run['seconds_left'])} left, until {health.clock(run['seconds_left'])}")
    if math.isfinite(run["loss"]):
        parts.append(f"validation loss {style.three(run['loss'])} nats/token")
    if math.isfinite(run["tokens_per_second"]):
        parts.append(f"{style.compact(run['tokens_per_second'])} tokens/s")
    if run["straggling"] > 1:  # with one worker, or steps that are fixed, all are equally busy
        parts.append(f"busiest worker {style.three(run['straggling'])} times the mean latent steps")
    return layout.plain(" · ".join(parts))


def curves(view: StudyView) -> None:
    """Training curves of the chosen runs."""
    labels = dict(zip(view.runs["key"], view.runs["label"], strict=True))
    st.header("Training curves", anchor=False)
    begun = list(view.runs.loc[~view.runs["state"].isin(["planned", "damaged"]), "key"])
    if not begun:
        st.info("No run has begun yet.", icon=":material/hourglass_empty:")
        return
    chosen = st.multiselect(
        "Runs",
        begun,
        format_func=lambda key: labels.get(key, key),
        key="curves",
        bind="query-params",
        max_selections=MOST_CURVES,
        placeholder="Those of the size being trained, else of the largest",
    )
    chosen = chosen or suggested(view.runs, begun)
    shelf = store()
    found = {key: data.metrics(shelf, view.name, key) for key in chosen}
    silent = [labels[key] for key, rows in found.items() if rows.empty]
    found = {key: rows for key, rows in found.items() if not rows.empty}
    if found:
        held_out = {key: data.evaluations(shelf, view.name, key) for key in found}
        with st.container(border=True):
            layout.chart(
                figures.training_curves(view.runs, found, held_out),
                pd.concat([rows.assign(run=labels[key]) for key, rows in found.items()]),
                key="training-curves",
                title=f"{view.name}: training",
                alt=f"Loss, penalty, latent steps, gradient norm, learning rate, speed and balance of {len(found)} "
                "runs over tokens",
            )
            st.caption(
                "Diamonds on the loss are held-out evaluations. FLOP/s count what active positions needed, not what "
                "the hardware could do. Tokens halt differently, "
                "so workers take differently long and all wait for the busiest: where a run has several, the lowest "
                "panel shows the busiest one's latent steps over the mean of all (1 is even)."
            )
        spread(view, found)
    else:
        st.info("No run has logged a training step yet.", icon=":material/hourglass_empty:")
    if silent:
        st.caption(f":material/sensors_off: No training metrics: {layout.plain(', '.join(silent))}.")


def spread(view: StudyView, found: dict[str, pd.DataFrame]) -> None:
    """How the steps of one of the runs spread as it trains."""
    thinks = [key for key, rows in found.items() if "mean_steps" in rows and rows["mean_steps"].gt(0).any()]
    if not thinks:
        return
    with st.container(border=True):
        st.header("How halting changed in training", anchor=False)
        labels = dict(zip(view.runs["key"], view.runs["label"], strict=True))
        routed = view.runs[view.runs["key"].isin(thinks) & view.runs["l_max"].gt(0)]  # not those of fixed steps
        first = thinks.index(routed["key"].iloc[0]) if len(routed) else 0
        key = st.selectbox(
            "Run", thinks, index=first, format_func=lambda key: labels.get(key, key), key="spread", bind="query-params"
        )
        layout.chart(
            figures.steps_over_training(found[key]),
            found[key],
            key="steps-over-training",
            title=f"{labels[key]}: latent steps over training",
            alt=f"Share of training tokens by latent steps over training of {labels[key]}",
        )
        st.caption("Shares of the training tokens at each logged step.")


def suggested(runs: pd.DataFrame, begun: list[str]) -> list[str]:
    """The runs to draw when none is chosen: those of the size being trained, else of the largest."""
    known = runs[runs["key"].isin(begun)]
    running = known[known["state"] == "running"]
    order = known["size"].map(size_order)
    size = running["size"].iloc[0] if len(running) else known.loc[order == order.max(), "size"].iloc[0]
    peers = known[(known["size"] == size) & (known["state"] != "running")]
    return [str(key) for key in pd.concat([running, peers])["key"][:MOST_CURVES]]


layout.live(body)
