"""Text token by token: its latent steps, how hard it was, what the steps gained; and the tokens that think longest."""

from pathlib import Path

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, layout, tokens
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView
from haltscale.dashboard.search import LEAST_SEEN, Order, place, ranking, search
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
    local = found and "file" in shelf.fs.protocol
    if not local or not shelf.local_path(view.name, key, "halting", f"events-{found[-1]:08d}.parquet").is_file():
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
    names = ["before", "token", "after"]
    shown = table.drop(columns="document_index")
    shown = shown.assign(**{name: [tokens.visible(one) if one else "" for one in table[name]] for name in names})
    number = st.column_config.NumberColumn
    chosen = st.dataframe(
        shown,
        hide_index=True,
        placeholder="–",
        key="found-tokens",
        alt=f"The first {len(shown)} held-out tokens: {order}",
        height=320,
        on_select="rerun",
        selection_mode="single-row",
        column_config={
            "before": st.column_config.TextColumn("Before", width="medium"),
            "token": st.column_config.TextColumn("Token"),
            "after": st.column_config.TextColumn("After", width="medium"),
            "steps": number("Latent steps"),
            "expected_steps": number("Expected steps", format="%.2f"),
            "nll": number("NLL, nats", format="%.2f"),
            "gain": number("Gain of the steps, nats", format="%.3f", help="Of a sample of tokens."),
            "confidence": number("Confidence", format="%.2f"),
        },
    )
    st.caption("Select a row to open the text around it.")
    rows = chosen["selection"]["rows"]
    files = (str(events), shelf.stamp(str(events)), str(shelf.local_path(view.name, key, "model", "tokenizer.json")))
    if rows and rows[0] < len(table):
        found_row = table.iloc[rows[0]]
        document, position = int(found_row["document_index"]), int(found_row["position"])
        with st.container(border=True):
            around = _place(*files, document, position)
            tokens.show(
                tokens.payload(around, identifier=f"{view.name}/{key}/{document}/{position}", colour=Colour.STEPS),
                key="found-place",
            )
            st.caption(
                f"{layout.plain(found_row['document'])}, position {position:,}: the token "
                f"{layout.plain(tokens.visible(found_row['token']))} and the text around it."
            )
    layout.table_files(table.assign(key=key), name=f"{view.name}-{key}-tokens", title=f"Held-out tokens: {order}")
    st.header("Token types by latent steps", anchor=False)
    try:
        types = _ranking(*files)
    except StoreError as error:
        st.warning(layout.plain(error), icon=":material/broken_image:")
        return
    if types.empty:
        st.info(f"No token type occurs {LEAST_SEEN} times.", icon=":material/search_off:")
        return
    layout.table(
        types.assign(token=[tokens.visible(one) for one in types["token"]]),
        key="token-types",
        alt=f"{len(types)} token types by their mean latent steps",
        height=320,
        column_config={
            "token": st.column_config.TextColumn("Token type", pinned=True),
            "occurrences": number("Occurrences"),
            "mean_steps": number("Mean latent steps", format="%.2f"),
            "error": number("Standard error", format="%.2f"),
            "nll": number("Mean NLL, nats", format="%.2f"),
            "gain": number("Mean gain, nats", format="%.3f"),
        },
    )
    st.caption(f"Types with at least {LEAST_SEEN} occurrences in the held-out text; sort by a column's heading.")


@st.cache_data(max_entries=32, show_spinner="Searching …")
def _search(events: str, stamp: str, tokenizer: str, order: str, text: str) -> pd.DataFrame:
    return search(Path(events), Path(tokenizer), Order(order), text=text)


@st.cache_data(max_entries=16, show_spinner="Counting …")
def _ranking(events: str, stamp: str, tokenizer: str) -> pd.DataFrame:
    return ranking(Path(events), Path(tokenizer))


@st.cache_data(max_entries=32, show_spinner=False)
def _place(events: str, stamp: str, tokenizer: str, document: int, position: int) -> pd.DataFrame:
    return place(Path(events), Path(tokenizer), document, position)


layout.live(body)
