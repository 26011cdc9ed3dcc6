"""Where the thinking went: latent steps per run, over training, and on easy against hard tokens."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, shell
from haltscale.dashboard.data import StudyView
from haltscale.dashboard.shelf import store

TITLE = "Halting"
ICON = ":material/hourglass_top:"
ORDER = 2


def body(view: StudyView) -> None:
    shell.heading(view, "Where the thinking went")
    counted = data.thinking(view.runs)
    if counted.empty:
        st.info(
            "No run that may think has reported its halting yet. The distribution of latent steps appears with the "
            "first evaluation.",
            icon=":material/hourglass_empty:",
        )
        return
    with st.container(border=True):
        st.subheader("How many latent steps the tokens got", anchor=False)
        st.plotly_chart(
            figures.steps_share(counted),
            key="steps-share",
            config=shell.PLOTLY,
            alt=f"Share of validation tokens by latent steps in {len(counted)} runs",
        )
        st.caption(
            "Validation tokens, by the latent steps that ran before the token was emitted. A run that is not finished "
            "stands at its last evaluation; runs that cannot think are left out."
        )
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        over_training(view, counted)
    with right, st.container(border=True, height="stretch"):
        easy_and_hard(counted)
    shell.honest(view)


def over_training(view: StudyView, counted: pd.DataFrame) -> None:
    """The distribution of steps as training goes on, of one run."""
    st.subheader("How halting changed in training", anchor=False)
    labels = dict(zip(counted["key"], counted["label"], strict=True))
    keys = list(labels)
    finished = [index for index, state in enumerate(counted["state"]) if state == "finished"]
    key = st.selectbox(
        "Run",
        keys,
        index=finished[0] if finished else 0,
        format_func=lambda key: labels.get(key, key),
        key="halting-run",
        bind="query-params",
    )
    shelf = store()
    rows, source = data.evaluations(shelf, view.name, key), "validation tokens at each evaluation"
    if len(rows) < 2:
        rows, source = data.metrics(shelf, view.name, key), "training tokens at each logged step"
    if "steps_histogram" not in rows:
        st.info("This run has written no telemetry of its steps.", icon=":material/sensors_off:")
        return
    st.plotly_chart(
        figures.steps_over_training(rows),
        key="steps-over-training",
        config=shell.PLOTLY,
        alt=f"Share of tokens by latent steps over training of {labels.get(key, key)}",
    )
    st.caption(f"Shares of {source}.")


def easy_and_hard(counted: pd.DataFrame) -> None:
    """Whether the steps went to the tokens that are hard."""
    st.subheader("Easy against hard tokens", anchor=False)
    known = counted.dropna(subset=["well_steps", "badly_steps"])
    if known.empty:
        st.info(
            "Finished runs that may think show here what easy and hard tokens got.", icon=":material/hourglass_empty:"
        )
        return
    st.plotly_chart(
        figures.easy_and_hard(known),
        key="easy-and-hard",
        config=shell.PLOTLY,
        alt=f"Mean latent steps of well- and badly-predicted tokens in {len(known)} runs",
    )
    st.caption(
        "Well predicted is the quarter of tokens with the lowest NLL, badly predicted the quarter with the highest. "
        "A router that spends its steps where they may help gives badly-predicted tokens (diamonds) more than "
        "well-predicted ones (circles)."
    )


shell.live(body)
