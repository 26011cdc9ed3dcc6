"""Write with a finished model and see how long it thinks before each token; a CPU is enough for small ones."""

import time

import pandas as pd
import streamlit as st

from haltscale.dashboard import layout, style, tokens
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView

TITLE = "Playground"
ICON = ":material/play_lesson:"
ORDER = 9
MOST_PARAMETERS = 5e8
MOST_CHARACTERS = 2_000
PROMPT = "My fellow citizens, "


def body(view: StudyView) -> None:
    layout.heading(view, "Playground", says="How does a finished model halt on a text of your own?")
    shelf = store()
    runs = view.runs[(view.runs["state"] == "finished") & ~view.runs["parameters"].gt(MOST_PARAMETERS)]
    local = "file" in shelf.fs.protocol
    runs = runs[[local and shelf.local_path(view.name, key, "model", "config.json").is_file() for key in runs["key"]]]
    if runs.empty:
        st.info(
            "No finished run of this study has a model on this machine that a page can run "
            f"(at most {style.compact(MOST_PARAMETERS)} parameters).",
            icon=":material/model_training:",
        )
        return
    labels = dict(zip(runs["key"], runs["label"], strict=True))
    thinking = [index for index, most in enumerate(runs["l_max"]) if most > 0]
    with st.form("playground"):
        key = st.selectbox(
            "Model", list(labels), index=thinking[-1] if thinking else 0, format_func=lambda key: labels.get(key, key),
            key="model",
        )  # fmt: skip
        prompt = st.text_area("Text to continue", PROMPT, max_chars=MOST_CHARACTERS, key="prompt")
        left, middle, right = st.columns(3)
        count = left.slider("Tokens to write", 1, 100, 40, key="new-tokens")
        temperature = middle.slider(
            "Temperature", 0.0, 1.5, 0.8, 0.1, key="temperature", help="0 takes the likeliest token."
        )
        seed = right.number_input("Seed", 0, 10_000, 0, key="sampling-seed")
        go = st.form_submit_button("Write", icon=":material/edit:")
    if go:
        st.session_state["written"] = written(view.name, str(key), prompt, count, temperature, int(seed))
    found = st.session_state.get("written")
    if found is None:
        return
    events, told = found
    if events.empty:
        st.warning(layout.plain(told), icon=":material/error:")
        return
    with st.container(border=True):
        tokens.show(tokens.payload(events, identifier=told), key="written-map")
        st.caption(layout.plain(told))


def written(study: str, key: str, prompt: str, count: int, temperature: float, seed: int) -> tuple[pd.DataFrame, str]:
    """The continuation as token events, and what it cost; an empty frame and the reason where there is none."""
    from haltscale.platform.inference import (
        text_generation,  # torch takes seconds to import, and no other page needs it
    )
    from haltscale.platform.inference.models import ModelFolderError

    try:
        with st.spinner("Thinking …"):
            model = loaded(str(store().local_path(study, key, "model")))
            began = time.perf_counter()
            cost = text_generation.Cost()
            sampling = text_generation.Sampling(temperature=temperature, seed=seed)
            found = list(text_generation.write(model, [prompt], new_tokens=count, sampling=sampling, cost=cost))
    except (ModelFolderError, text_generation.GenerationError) as error:
        return pd.DataFrame(), str(error)
    events = pd.DataFrame(
        {"text": [one.text for one in found], "steps": [one.steps for one in found], "nll": [one.nll for one in found]}
    )
    for name in ("expected_steps", "reach", "exit", "nll_by_step"):
        events[name] = None
    seconds = time.perf_counter() - began
    mean = float(events["steps"].mean()) if len(events) else 0.0
    return events, (
        f"{len(events)} tokens in {style.three(seconds)} s, {style.three(mean)} latent steps per token, "
        f"{style.scientific(cost.flops_realised)} realised FLOPs with the prompt."
    )


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def loaded(folder: str):  # type: ignore[no-untyped-def]
    """A model, kept for all readers of the page."""
    from haltscale.platform.inference.models import load_model

    return load_model(folder)


layout.live(body)
