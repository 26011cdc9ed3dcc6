"""Text token by token: its latent steps, how hard it was, what the steps gained; and the tokens that think longest."""

from pathlib import Path

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, layout, tokens
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView
from haltscale.dashboard.search import Order, search
from haltscale.dashboard.tokens import Colour
from haltscale.platform.store import StoreError

TITLE = "Tokens"
ICON = ":material/match_word:"
ORDER = 4


def body(view: StudyView) -> None:
    layout.heading(view, "Token by token", says="Which tokens get the steps, and what do the steps gain there?")
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
    with st.container(horizontal=True, vertical_alignment="bottom"):
        colour = Colour(
            st.segmented_control(
                "Colour by",
                [one.value for one in Colour],
                default=Colour.STEPS.value,
                required=True,
                key="colour",
                bind="query-params",
            )
        )
        beside = st.toggle("Two side by side", key="beside", bind="query-params")
    if not beside:
        text(view, keys, labels, steps, colour, "")
        return
    for column, which in zip(st.columns(2), ("", "-2"), strict=True):
        with column:
            text(view, keys, labels, steps, colour, which)


def text(
    view: StudyView, keys: list[str], labels: dict[str, str], steps: dict[str, list[int]], colour: Colour, which: str
) -> None:
    """One checkpoint's reading of the probe text; ``which`` tells two on one page apart."""
    left, right = st.columns(2)
    with left:
        key = st.selectbox(
            "Run",
            keys,
            index=keys.index(data.telling(view.runs, keys)),
            format_func=lambda key: labels.get(key, key),
            key=f"run{which}",
            bind="query-params",
        )
    with right:
        step = layout.choose_step(steps[key], key=f"step{which}")
    try:
        events = store().events(view.name, key, step)
    except StoreError as error:
        st.warning(layout.plain(error), icon=":material/broken_image:")
        return
    if events.empty:
        st.info("The probe text of this evaluation is empty.", icon=":material/hourglass_empty:")
        return
    with st.container(border=True):
        tokens.show(
            tokens.payload(events, identifier=f"{view.name}/{key}/{step}", colour=colour), key=f"token-map{which}"
        )
        st.caption(
            f"Colour and number: {tokens.legend(events, colour)}. Click a token for its way through the steps. Spaces, "
            "line breaks and control characters are spelled out; the text is shown as it is, never interpreted."
        )
    if which or st.session_state.get("beside"):
        return
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        st.header("NLL by latent steps", anchor=False)
        layout.chart(
            figures.nll_by_steps(events),
            events[["position", "text", "steps", "nll"]],
            key="nll-by-steps",
            title="NLL of the probe's tokens by latent steps",
            alt="NLL of the probe's tokens by the latent steps they got",
        )
        st.caption(
            "Boxes are quartiles with the median, whiskers the 5th and 95th percentile, the dashed line the mean."
        )
    with right, st.container(border=True, height="stretch"):
        st.header("Latent steps by NLL", anchor=False)
        layout.chart(
            figures.steps_by_nll(events),
            events[["position", "text", "steps", "nll"]],
            key="steps-by-nll",
            title="Mean latent steps by NLL",
            alt="Mean latent steps of the probe's tokens from the best to the worst predicted fifth",
        )
        st.caption("From the best predicted fifth of the probe's tokens to the worst; bars carry a standard error.")
    corpus(view, key)


def corpus(view: StudyView, key: str) -> None:
    """The held-out tokens with the most latent steps, or other extremes."""
    shelf = store()
    found = data.halting_steps(shelf, view.name, key)
    st.header("Search the held-out text", anchor=False)
    if not found or "file" not in shelf.fs.protocol:
        st.info("This run has written no events of its held-out tokens on this machine.", icon=":material/sensors_off:")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        order = Order(
            st.selectbox("First", [one.value for one in Order], key="first", bind="query-params", width=260)
            or Order.STEPS
        )
        wanted = st.text_input("Text in the token", key="find", bind="query-params", max_chars=40, width=220)
    events = shelf.local_path(view.name, key, "halting", f"events-{found[-1]:08d}.parquet")
    try:
        table = _search(
            str(events), shelf.stamp(str(events)), str(shelf.local_path(view.name, key, "model", "tokenizer.json")),
            str(order), wanted or "",
        )  # fmt: skip
    except StoreError as error:
        st.warning(layout.plain(error), icon=":material/broken_image:")
        return
    if table.empty:
        st.info("No held-out token is like that.", icon=":material/search_off:")
        return
    shown = table.assign(token=[tokens.visible(one) for one in table["token"]])
    number = st.column_config.NumberColumn
    layout.table(
        shown,
        key="found-tokens",
        alt=f"The first {len(shown)} held-out tokens: {order}",
        height=320,
        column_config={
            "token": st.column_config.TextColumn("Token", pinned=True),
            "steps": number("Latent steps"),
            "expected_steps": number("Expected steps", format="%.2f"),
            "nll": number("NLL, nats", format="%.2f"),
            "gain": number("Gain of the steps, nats", format="%.3f"),
            "confidence": number("Confidence", format="%.2f"),
        },
    )
    layout.download("Table, CSV", lambda: layout.csv(table).encode(), f"{view.name}-{key}-tokens.csv", "text/csv")


@st.cache_data(max_entries=32, show_spinner="Searching …")
def _search(events: str, stamp: str, tokenizer: str, order: str, text: str) -> pd.DataFrame:
    return search(Path(events), Path(tokenizer), Order(order), text=text)


layout.live(body)
