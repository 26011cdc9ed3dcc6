"""What finished models can do, and for how many inference FLOPs: held-out loss, tasks, the compute dial."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import halting_figures, layout, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import UNREADABLE, FlopsKind, StudyView, mapping, number, words
from haltscale.dashboard.halting_figures import table_of

TITLE = "Evaluations"
ICON = ":material/checklist:"
ORDER = 6
MOST_READ = 60
TASK = (
    "task",
    "items",
    "accuracy",
    "accuracy_normalised",
    "chance",
    "gold_bits_per_byte",
    "mean_steps",
    "flops_realised",
)
DIAL = ("dial", "value", "own", "loss", "loss_standard_error", "mean_steps", "flops_realised")


def body(view: StudyView) -> None:
    layout.heading(view, "Evaluations", says="What can the finished models do, at which inference FLOPs?")
    kind = layout.flops_kind()
    finished = view.runs[(view.runs["state"] == "finished") & view.runs["loss"].notna()]
    held_out(view, finished, kind)
    found, unread = later(view)
    if finished.empty and not found:
        st.info(
            "No run is finished: a finished run brings its model and its evaluation.", icon=":material/hourglass_empty:"
        )
        return
    tasks(found)
    dials(found)
    controls(found)
    if not found:
        st.info(
            "No model of these runs has been evaluated further. Tasks, the compute dial and the controls of one "
            "checkpoint appear here after:",
            icon=":material/checklist:",
        )
        st.code(f"haltscale evaluate {view.name}/{finished['key'].iloc[-1]} --controls --dial", language=None)
    if unread:
        st.warning(f"Evaluations of {unread} runs cannot be read.", icon=":material/broken_image:")


def held_out(view: StudyView, finished: pd.DataFrame, kind: FlopsKind) -> None:
    """Held-out loss against the FLOPs of reading a token."""
    column = f"inference_flops_{kind}"
    if not finished[column].gt(0).any():
        return
    with st.container(border=True):
        st.header("Held-out loss against inference FLOPs", anchor=False)
        layout.chart(
            halting_figures.inference(finished, kind),
            finished[["label", "method", "size", "loss", "loss_standard_error", "bits_per_byte", "mean_steps", column]],
            key="inference",
            title=f"{view.name}: loss against inference FLOPs per token",
            alt=f"Validation loss against {kind} inference FLOPs per token of {len(finished)} runs",
        )
        st.caption("A marker per finished run. FLOPs of one forward reading of a held-out token, halting included.")


def later(view: StudyView) -> tuple[dict[str, dict[str, dict]], int]:
    """What `haltscale evaluate` found of models and of training checkpoints, by label and name, and how many runs have
    unreadable evaluations. Finished runs come first."""
    shelf, found, unread = store(), {}, 0
    runs = view.runs.sort_values("state", key=lambda state: state != "finished", kind="stable")
    for run in runs.head(MOST_READ).to_dict("records"):
        key, label = str(run["key"]), str(run["label"])
        try:
            found[label] = shelf.later_evaluations(view.name, key)
            for step in shelf.evaluated_steps(view.name, key):
                found[f"{label} @ step {step:,}"] = shelf.later_evaluations(view.name, key, step)
        except UNREADABLE:
            unread += 1
    unread += sum(any("problem" in one for one in every.values()) for every in found.values())
    read = {label: {n: one for n, one in every.items() if "problem" not in one} for label, every in found.items()}
    return {label: every for label, every in read.items() if every}, unread


def tasks(found: dict[str, dict[str, dict]]) -> None:
    """Scores of tasks."""
    rows = [
        {"run": label, "task": name, **{column: number(one.get(column)) for column in TASK[1:]}}
        for label, every in found.items()
        for name, one in every.items()
        if "accuracy" in one
    ]
    if not rows:
        return
    st.header("Tasks", anchor=False)
    table = pd.DataFrame(rows)
    percent = st.column_config.NumberColumn
    layout.table(
        table,
        key="tasks",
        alt=f"{len(table)} task scores",
        column_config={
            "run": st.column_config.TextColumn("Run", pinned=True),
            "task": st.column_config.TextColumn("Task"),
            "items": percent("Items"),
            "accuracy": percent("Accuracy", format="percent"),
            "accuracy_normalised": percent("Accuracy, length-normalised", format="percent"),
            "chance": percent("Chance", format="percent"),
            "gold_bits_per_byte": percent("Bits/byte of the answers", format="%.3f"),
            "mean_steps": percent("Latent steps", format="%.2f"),
            "flops_realised": percent("FLOPs per token, realised", format="scientific"),
        },
    )
    st.caption("Small models are near chance on multiple choice: bits per byte of the right answers tell them apart.")
    layout.table_files(table, name="tasks", title="Scores of tasks")


def dials(found: dict[str, dict[str, dict]]) -> None:
    """Loss against inference FLOPs of single checkpoints."""
    tables = {label: table_of(every["dial"].get("points"), DIAL) for label, every in found.items() if "dial" in every}
    tables = {label: table for label, table in tables.items() if len(table)}
    if not tables:
        return
    with st.container(border=True):
        st.header("The compute dial: one checkpoint at many prices", anchor=False)
        layout.chart(
            halting_figures.dial(tables),
            pd.concat([table.assign(run=label) for label, table in tables.items()]),
            key="dial",
            title="Loss against inference FLOPs as tau or l_max is turned",
            alt=f"Loss against inference FLOPs per token of {len(tables)} checkpoints",
        )
        st.caption("Solid: tau is turned; dotted: l_max; a star is the value that the model was trained with.")


def controls(found: dict[str, dict[str, dict]]) -> None:
    """The learned halting of one checkpoint against other sources of steps."""
    rows = []
    for label, every in found.items():
        for arm in mapping(every.get("controls")).get("arms") or []:
            one = mapping(arm)
            gap = mapping(one.get("minus_learned"))
            mean, low, high = (style.three(number(gap.get(name))) for name in ("mean", "low", "high"))
            rows.append(
                {
                    "run": label,
                    "halting": words(one.get("name")),
                    "loss, nats/token": number(one.get("loss")),
                    "latent steps": number(one.get("mean_steps")),
                    "minus learned, nats": f"{mean} [{low}, {high}]" if gap else "–",
                }
            )
    if rows:
        st.header("One checkpoint, its steps dealt otherwise", anchor=False)
        layout.table(pd.DataFrame(rows), key="arms", alt="Learned halting against other sources of steps")
        st.caption("Paired over documents, with 95 % intervals; above 0 the learned router is better.")


layout.live(body)
