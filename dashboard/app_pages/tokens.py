"""The probe text token by token: how many latent steps each token got, and how hard it was."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, shell, tokens
from haltscale.dashboard.data import StudyView
from haltscale.dashboard.shelf import store
from haltscale.platform.store import StoreError

TITLE = "Tokens"
ICON = ":material/match_word:"
ORDER = 3
LATEST = "latest"


def body(view: StudyView) -> None:
    shell.heading(view, "Token by token")
    shelf = store()
    steps = {key: data.probe_steps(shelf, view.name, key) for key in view.runs["key"]}
    keys = [key for key, found in steps.items() if found]
    if not keys:
        st.info(
            "No run has read the probe text yet. Each evaluation writes it, with the latent steps of every token.",
            icon=":material/hourglass_empty:",
        )
        return
    labels = dict(zip(view.runs["key"], view.runs["label"], strict=True))
    left, right = st.columns(2)
    with left:
        key = st.selectbox(
            "Run",
            keys,
            index=keys.index(preferred(view.runs, keys)),
            format_func=lambda key: labels.get(key, key),
            key="run",
            bind="query-params",
        )
    with right:
        step = choose_step(steps[key])
    try:
        events = shelf.events(view.name, key, step)
    except StoreError as error:
        st.warning(shell.plain(error), icon=":material/broken_image:")
        return
    if events.empty:
        st.info("The probe text of this evaluation is empty.", icon=":material/hourglass_empty:")
        return
    with st.container(border=True):
        tokens.show(tokens.payload(events, identifier=f"{view.name}/{key}/{step}"), key="token-map")
        st.caption(
            "Colour and number say how many latent steps ran before the token was emitted. Spaces, line breaks and "
            "control characters are spelled out; the text is shown as it is, never interpreted."
        )
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        st.subheader("What the steps were spent on", anchor=False)
        st.plotly_chart(
            figures.nll_by_steps(events),
            key="nll-by-steps",
            config=shell.PLOTLY,
            alt="NLL of the probe's tokens by the latent steps they got",
        )
        st.caption(
            "Boxes are quartiles with the median, whiskers the 5th and 95th percentile, the dashed line the mean."
        )
    with right, st.container(border=True, height="stretch"):
        st.subheader("What the tokens got", anchor=False)
        st.plotly_chart(
            figures.steps_by_nll(events),
            key="steps-by-nll",
            config=shell.PLOTLY,
            alt="Mean latent steps of the probe's tokens from the best to the worst predicted fifth",
        )
        st.caption("From the best predicted fifth of the probe's tokens to the worst; bars carry a standard error.")


def preferred(runs: pd.DataFrame, keys: list[str]) -> str:
    """The run to open with: of those that may think, finished ones first, then the latest in the study's order."""
    candidates = runs[runs["key"].isin(keys)]
    thinking = candidates[candidates["l_max"].gt(0)]
    finished = thinking[thinking["state"] == "finished"]
    for choice in (finished, thinking, candidates):
        if len(choice):
            return str(choice["key"].iloc[-1])
    return keys[0]


def choose_step(found: list[int]) -> int:
    """A slider over the evaluations whose last place is always the newest, so that a live page follows the run."""
    if len(found) < 2:
        st.markdown(f"Training step  \n**{found[0]:,}**, the only evaluation so far")
        return found[0]
    choice = st.select_slider(
        "Training step",
        [*map(str, found[:-1]), LATEST],
        value=LATEST,
        format_func=lambda step: f"{found[-1]:,} (latest)" if step == LATEST else f"{int(step):,}",
        key="step",
        bind="query-params",
    )
    return found[-1] if choice == LATEST else int(choice)


shell.live(body)
