"""What the numbers mean and where they come from: provenance, kinds of FLOPs, fit settings, downloads."""

import json

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, fit_jobs, layout, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import FlopsKind, StudyView, mapping, number, words
from haltscale.platform import analysis
from haltscale.platform.analysis.estimates import LEVEL
from haltscale.platform.analysis.fitting import DELTA, STARTS
from haltscale.platform.analysis.laws import MIN_BUDGETS, MIN_RANGE, MIN_RUNS

TITLE = "Methods and definitions"
ICON = ":material/description:"
ORDER = 10


def body(view: StudyView) -> None:
    layout.heading(view, "Methods and definitions", says="What do the numbers mean, and where do they come from?")
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        st.header("What is counted", anchor=False)
        lines = [f"- **FLOPs, {kind}**: {kind.meaning}." for kind in FlopsKind]
        lines += [
            "- **Loss**: nats per token on held-out documents; **bits per byte** compares tokenizers.",
            "- **Latent steps**: passes of the stack on top of a token's first; **passes** are steps + 1, as trained.",
            "- **Parameters**: all, embeddings and head too; a step uses attention, MLP and norms again.",
        ]
        st.markdown("\n".join(lines))
    with right, st.container(border=True, height="stretch"):
        st.header("How laws are fitted", anchor=False)
        st.markdown(
            f"- Sum of Huber losses (δ = {DELTA:g}) of log-residuals; {STARTS} starts of L-BFGS.\n"
            f"- {100 * LEVEL:.0f} % intervals of a bootstrap over runs, {fit_jobs.BOOTSTRAPS} resamples here.\n"
            f"- Refused under {MIN_RUNS} runs, {MIN_BUDGETS} different values of an input, or a range below "
            f"a factor of {MIN_RANGE:g}.\n"
            "- Runs that are not finished, that diverged, or that only tuned hyperparameters never enter.\n"
            "- A parameter at its bound, or an exponent whose interval is twice its value, is called not identifiable."
        )
    provenance(view)
    left_out(view)
    with st.container(border=True):
        st.header("Download the study", anchor=False)
        every = view.runs[[*data.TEXT, *(name for name in data.NUMBERS if name not in ("rank", "shade"))]]
        with st.container(horizontal=True):
            layout.table_files(every, name=f"{view.name}-all", title=f"Runs of {view.name}")
            layout.download("Records, JSON", lambda: records(view), f"{view.name}-records.json", "application/json")
        st.caption("The whole study as one page that needs no server:")
        st.code(f"haltscale report {view.name} --out {view.name}.html", language=None)


def provenance(view: StudyView) -> None:
    """Code, versions and machines behind the runs."""
    st.header("Where the numbers come from", anchor=False)
    facts: dict[tuple[str, str, str, str], int] = {}
    shelf = store()
    for run in shelf.views(view.name, [key for key in view.runs["key"] if known(shelf, view.name, key)]).values():
        if run.record:
            machine, versions = mapping(run.record.get("machine")), mapping(run.record.get("versions"))
            told = ", ".join(f"{name} {value}" for name, value in versions.items())
            where = ", ".join(f"{value}" for value in machine.values() if value)
            fact = (words(run.record.get("git_commit"))[:12], told, where, words(run.record.get("precision")))
            facts[fact] = facts.get(fact, 0) + 1
    rows = [
        {"runs": count, "commit": commit, "versions": versions, "machine": machine, "precision": precision}
        for (commit, versions, machine, precision), count in facts.items()
    ]
    if rows:
        layout.table(pd.DataFrame(rows), key="provenance", alt="Commits, versions and machines of the finished runs")
    else:
        st.info("No run is finished yet.", icon=":material/hourglass_empty:")
    corpus(view)


CORPUS = {
    "name": "name",
    "train_documents": "training documents",
    "train_tokens": "training tokens",
    "validation_documents": "held-out documents",
    "validation_tokens": "held-out tokens",
    "bytes_per_token": "bytes per token",
    "vocab_size": "vocabulary",
    "context": "context, tokens",
    "fingerprint": "fingerprint",
}


def corpus(view: StudyView) -> None:
    """The corpus in a table; what a person does not look for stays in study.json."""
    rows = [
        {"corpus": title, "value": value if isinstance(value, str) else style.three(number(value))}
        for name, title in CORPUS.items()
        if isinstance(value := view.corpus.get(name), str | int | float)
    ]
    if rows:
        layout.table(pd.DataFrame(rows), key="corpus", alt="The corpus of the study")


def known(shelf: object, study: str, key: str) -> bool:
    """Whether a key can be asked for at all."""
    try:
        shelf.path(study, key)  # type: ignore[attr-defined]
    except data.UNREADABLE:
        return False
    return True


def left_out(view: StudyView) -> None:
    """The runs that no fit uses."""
    table = analysis.usable(data.analysed(view.runs), ["flops_realised", "parameters", "tokens"]).left_out
    if len(table):
        with st.expander(f"{len(table)} runs that no law is fitted to", icon=":material/block:"):
            labels = view.runs.set_index("key")["label"]
            layout.table(
                table.assign(run=table["key"].map(labels))[["run", "reason"]],
                key="left-out",
                alt="Runs left out, and why",
            )


def records(view: StudyView) -> bytes:
    """Every record as it stands in the store."""
    shelf = store()
    keys = [key for key in view.runs["key"] if known(shelf, view.name, key)]
    found = {key: dict(run.record) for key, run in shelf.views(view.name, keys).items() if run.record}
    return json.dumps(found, indent=1).encode()


layout.live(body)
