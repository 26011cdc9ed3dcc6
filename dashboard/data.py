"""From the run store to DataFrames: everything the pages show, without Streamlit.

One damaged run must never take a page down, so every value read from a document goes through :func:`number`,
:func:`mapping` or :func:`words`, and a run that cannot be read becomes a row with a problem instead of an exception.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import pandas as pd

from haltscale.dashboard import style
from haltscale.platform import run_table
from haltscale.platform.analysis.runs import TUNING, budgets_of, parameters_named
from haltscale.platform.arms import arm, controls_of, is_control, shown
from haltscale.platform.documents import RUN
from haltscale.platform.run_table import mapping, number, words
from haltscale.platform.store import RunState, RunStore, RunView, StoreError

DEMO_TOKENS = 20e6
"""Runs shorter than this show the machinery and the halting, not what the method gains."""

UNREADABLE = (StoreError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a damaged folder may raise, pandas and pyarrow included (their errors are ValueErrors or OSErrors)."""


class FlopsKind(StrEnum):
    """How floating-point operations are counted; numbers of two kinds never share an axis."""

    REALISED = "realised"
    EXECUTED = "executed"
    PAPER = "paper"

    @property
    def meaning(self) -> str:
        return {
            FlopsKind.REALISED: "what the active positions needed, with the keys that they really attend to",
            FlopsKind.EXECUTED: "what the hardware was made to do, padding included",
            FlopsKind.PAPER: "6 · parameters · tokens · mean full passes per token, the paper's convention",
        }[self]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something in the store that could not be read, and what to do about it."""

    where: str
    what: str


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """A study as the pages see it."""

    name: str
    question: str = ""
    note: str = ""
    """What the study's authors say its figures can and cannot show."""
    planned_at: float = math.nan
    """Seconds since 1970."""
    corpus: Mapping[str, Any] = field(default_factory=dict)
    runs: pd.DataFrame
    """One row per run in the study's order; its columns are :data:`TEXT`, :data:`NUMBERS`, ``routed`` (whether a router
    of its own chooses its steps), ``steps_histogram``, ``by_document`` (whether its record has the nats of held-out
    documents), ``need`` (``NeedTally.result``; empty where the need for steps is not known), and the fields of the
    runs' identities."""
    problems: tuple[Problem, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    """Its study.json."""
    owner: str = ""
    """The process that is running the study, and its last heartbeat; empty where none is."""

    @property
    def active(self) -> bool:
        """Whether a run is being trained right now."""
        return bool((self.runs["state"] == RunState.RUNNING).any())

    @property
    def demo(self) -> bool:
        """Whether every run is too short to say anything about the method's gain."""
        tokens = self.runs["tokens"].max()
        return bool(pd.notna(tokens) and tokens < DEMO_TOKENS)

    @property
    def limits(self) -> str:
        """What runs of minutes can show and what they cannot."""
        longest = style.compact(float(self.runs["tokens"].max()))
        return (
            f"These runs train on at most {longest} tokens each. Runs this short show the machinery and the halting, "
            "not the method's gain: extra passes begin to pay at far larger budgets."
        )


TEXT = ("key", "label", "state", "method", "size", "series", "note", "role", "git_commit")
OPTIONS = ("lam", "beta", "l_max", "tau")
SHARED = (
    *("loss", "loss_standard_error", "perplexity", "bits_per_byte", "mean_steps", "expected_steps"),
    *("flops_realised", "flops_executed", "flops_paper"),
)
"""Numbers that records and evaluations both carry."""
NUMBERS = (
    *OPTIONS,
    *SHARED,
    *(
        "seed",
        "budget",
        "nominal",
        "epochs",
        "tokens",
        "tokens_done",
        "parameters",
        "parameters_once",
        "parameters_recurrent",
        "passes",
    ),
    *("wall_seconds", "inference_flops_realised", "inference_flops_executed", "inference_flops_paper", "heartbeat"),
    *(
        "tokens_per_second",
        "straggling",
        "step",
        "steps",
        "seconds_left",
        "well_steps",
        "badly_steps",
        "rank",
        "shade",
        "finished_at",
    ),
    *("needy_accuracy", "needy_steps", "need_rank_correlation"),
)
FACETS = ("method", "size", "nominal", "lam", "beta", "l_max", "seed")
"""What the runs can be filtered by."""


# ---- one value at a time -------------------------------------------------------------------------


def fractions(value: object) -> list[float]:
    """A histogram of fractions; an empty list when any entry is not a number."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    entries = [number(entry) for entry in value]
    return [] if any(math.isnan(entry) for entry in entries) else entries


def size_order(size: str) -> float:
    """The number behind a size's name (``1.8m`` -> 1.8e6), to sort by; unknown names come last."""
    return parameters_named(size)


# ---- one run -------------------------------------------------------------------------------------


def _frame(rows: pd.DataFrame) -> pd.DataFrame:
    """Metrics or evaluations with numeric columns, ordered by tokens, the last of rows written twice kept."""
    if rows.empty:
        return rows
    rows = rows.copy()
    for name in rows.columns:
        if name not in ("steps_histogram", "split", "need"):
            rows[name] = pd.to_numeric(rows[name], errors="coerce")
    if "steps_histogram" in rows:
        rows["steps_histogram"] = rows["steps_histogram"].map(fractions)
    if "step" in rows:
        rows = rows.dropna(subset="step").drop_duplicates("step", keep="last").sort_values("step")
    return rows.reset_index(drop=True)


def metrics(store: RunStore, study: str, key: str) -> pd.DataFrame:
    """Training metrics of a run; empty when there are none or they cannot be read.

    ``flops_realised_per_second`` is added: realised FLOPs over seconds between two logged steps.
    """
    try:
        rows = _frame(store.metrics(study, key))
    except UNREADABLE:
        return pd.DataFrame()
    if {"flops_realised", "seconds"} <= set(rows):
        # Both count from the beginning of the run, also when it was resumed; so the first row counts from zero.
        spent = rows[["flops_realised", "seconds"]].diff().fillna(rows.loc[:0, ["flops_realised", "seconds"]])
        rows["flops_realised_per_second"] = (spent["flops_realised"] / spent["seconds"]).where(spent["seconds"] > 0)
    return rows


def evaluations(store: RunStore, study: str, key: str) -> pd.DataFrame:
    """Held-out evaluations of a run; empty when there are none or they cannot be read."""
    try:
        rows = store.evaluations(study, key)
        return _frame(rows[rows["split"] == "validation"] if "split" in rows else rows)
    except UNREADABLE:
        return pd.DataFrame()


def probe_steps(store: RunStore, study: str, key: str) -> list[int]:
    """Training steps with token events."""
    try:
        return store.probe_steps(study, key)
    except UNREADABLE:
        return []


def halting_steps(store: RunStore, study: str, key: str) -> list[int]:
    """Training steps with telemetry of the validation split."""
    try:
        return store.halting_steps(study, key)
    except UNREADABLE:
        return []


def probe(store: RunStore, study: str, key: str, step: int) -> pd.DataFrame:
    """Token events of a run at a training step.

    Raises:
        StoreError: the file is damaged or lacks the columns that every probe has.
    """
    path = store.probe_path(study, key, step)
    try:
        events = store.probe(study, key, step)
    except Exception as error:  # pyarrow raises many kinds on a half-written file; the page shows them all alike
        raise StoreError(f"{path} cannot be read ({error}); the next evaluation writes a new one") from error
    missing = {"text", "steps", "nll"} - set(events.columns)
    if missing:
        raise StoreError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    events["steps"] = pd.to_numeric(events["steps"], errors="coerce").fillna(0).astype(int)
    for name in ("expected_steps", "reach", "exit", "nll_by_step"):
        if name not in events:
            events[name] = None
    return events


def run_row(view: RunView, evaluated: pd.DataFrame, trained: pd.DataFrame) -> dict[str, Any]:
    """One run as one row. Numbers come from its record, else from its last evaluation with a finite loss."""
    identity = mapping(view.spec.get("identity")) or mapping(view.record.get("identity"))
    options, record, status = mapping(identity.get("options")), view.record, view.status
    common = run_table.row(view)
    last: Mapping[Any, Any] = {}
    if "loss" in evaluated:
        finite = evaluated[evaluated["loss"].notna()]
        last = finite.iloc[-1].to_dict() if len(finite) else {}

    row: dict[str, Any] = {name: number(options.get(name)) for name in OPTIONS}
    for name in SHARED:
        # A record with a null loss is a result (the run diverged): an earlier evaluation must not stand in for it.
        row[name] = number(record.get(name)) if record else number(last.get(name))
    if math.isnan(row["perplexity"]) and row["loss"] < 700:
        row["perplexity"] = math.exp(row["loss"])
    halting = mapping(record.get("halting"))
    inference = mapping(record.get("inference_flops_per_token"))
    row |= {f"inference_flops_{kind}": number(inference.get(kind)) for kind in FlopsKind}
    recent = {
        name: number(trained[name].tail(20).median()) if name in trained else math.nan
        for name in ("tokens_per_second", "straggling")
    }
    row |= {
        "key": view.key,
        "label": words(view.spec.get("label")) or words(record.get("label")) or view.key,
        "state": view.state.value,
        "method": words(arm(identity)) or "unknown",
        "size": words(identity.get("size")) or "?",
        "series": "",
        "note": "",
        "role": words(view.spec.get("role")) or "comparison",
        "routed": run_table.routed(record or view.spec, identity),
        "git_commit": words(record.get("git_commit")),
        "seed": number(identity.get("seed")),
        "tokens": number(identity.get("tokens")),
        "tokens_done": number(record.get("tokens") if record else last.get("tokens")),
        **{name: number(common[name]) for name in ("parameters", "parameters_once", "parameters_recurrent", "budget")},
        "passes": number(record.get("passes_per_token")),
        "wall_seconds": number(record.get("wall_seconds")),
        "tokens_per_second": number(record.get("tokens_per_second")) if record else recent["tokens_per_second"],
        "straggling": recent["straggling"],
        "step": number(record.get("steps") if record else status.get("step")),
        "steps": number(record.get("steps") if record else status.get("steps")),
        "seconds_left": number(status.get("seconds_left")) if view.state is RunState.RUNNING else math.nan,
        "nominal": math.nan,
        "epochs": math.nan,
        "rank": 0.0,
        "shade": 0.0,
        "heartbeat": math.nan if view.silent_seconds is None else time.time() - view.silent_seconds,
        "finished_at": number(record.get("finished_at")),
        "well_steps": number(halting.get("well_predicted_mean_steps")),
        "badly_steps": number(halting.get("badly_predicted_mean_steps")),
        "steps_histogram": fractions(record.get("steps_histogram") if record else last.get("steps_histogram")),
        "need": mapping(record.get("need") if record else last.get("need")),
        "by_document": bool(mapping(record.get("held_out_by_document"))),
    }
    row |= {name: number(value) for name, value in run_table.need_figures(row["need"]).items()}
    if math.isnan(row["passes"]):
        row["passes"] = 1 + row["mean_steps"]

    # Whatever else makes the run what it is, so that an analysis can ask for it; no column of the above is covered.
    asked = {"configuration": common["configuration"], "setting": common["setting"], **run_table.rest_of(identity)}
    asked |= {name: run_table.scalar(value) for name, value in options.items()}
    row |= {name: value for name, value in asked.items() if name not in row}

    if record and math.isnan(row["loss"]):
        row["state"], row["note"] = "diverged", "its final loss is not a number; it is left out of the figures"
    elif view.problem:
        row["state"], row["note"] = "damaged", view.problem
    elif view.state in (RunState.FAILED, RunState.DIVERGED, RunState.CAPPED):
        row["note"] = words(status.get("error")) or "failed without saying why"
    elif view.state is RunState.STALLED:
        row["note"] = f"silent for {silence(view.silent_seconds)}; submit the study again to resume it"
    elif "loss" in trained and len(trained) and pd.isna(trained["loss"].iloc[-1]):
        row["note"] = f"its training loss is not a number at step {int(trained['step'].iloc[-1])}"
    return row


def silence(seconds: float | None) -> str:
    """How long ago a run gave its last sign of life, in words."""
    if seconds is None:
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


# ---- one study -----------------------------------------------------------------------------------


def empty_runs() -> pd.DataFrame:
    """A runs frame with every column and no row."""
    columns = (
        dict.fromkeys((*TEXT, "steps_histogram", "need", "by_document"), "object")
        | {"routed": "bool"}
        | dict.fromkeys(NUMBERS, "float64")
    )
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})


class Index(Protocol):
    """Rows of runs that have not changed since they were made; see :mod:`haltscale.dashboard.row_index`."""

    def known(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]: ...

    def stamps(self, key: str, *, with_record: bool) -> tuple[Any, ...]: ...

    def keep(self, made: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]], keys: Sequence[str]) -> None: ...


def study_rows(
    store: RunStore, name: str, keys: Sequence[str], index: Index | None = None
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The rows of a study's runs, and what could not be read.

    Args:
        index: rows are taken from it while the files of their runs stay the same, and put into it.
    """
    known = {} if index is None else index.known(keys)
    wanted = [key for key in keys if key not in known]
    before = {} if index is None else {key: index.stamps(key, with_record=False) for key in wanted}
    views = store.views(name, wanted)
    made = {key: _row(store, view) for key, view in views.items()}
    if index is not None:
        index.keep(
            {
                key: (before[key][: len(RUN)] if view.record else before[key], made[key])
                for key, view in views.items()
                if not view.problem
            },
            keys,
        )
    problems = [Problem(where=view.key, what=view.problem) for view in views.values() if view.problem]
    return [known[key] if key in known else made[key] for key in keys], problems


def load_study(store: RunStore, name: str) -> StudyView:
    """Read a study and all its runs. A study or run that cannot be read shows up in ``problems``."""
    problems, document = study_document(store, name)
    try:
        rows, more = study_rows(store, name, store.run_keys(name))
    except OSError as error:
        return StudyView(name=name, runs=empty_runs(), problems=(Problem(where=name, what=str(error)),))
    return as_view(store, name, document, runs_frame(rows, document), [*problems, *more])


def study_document(store: RunStore, name: str) -> tuple[list[Problem], Mapping[str, Any]]:
    """A study's own document, and why it cannot be read in full."""
    document: Mapping[str, Any] = {}
    try:
        document, problem = store.study(name), store.study_problem(name)
    except StoreError as error:
        problem = str(error)
    return [Problem(where=name, what=problem)] if problem else [], document


def runs_frame(rows: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> pd.DataFrame:
    """The runs as the pages draw them: the rows, with what depends on all of them."""
    frame = pd.DataFrame(rows) if rows else empty_runs()
    frame["nominal"] = nominal_budgets(frame)
    frame["epochs"] = frame["tokens_done"] / number(mapping(document.get("corpus")).get("train_tokens"))
    frame["label"] = _unique(frame)
    frame["series"] = series_names(frame)
    # A series keeps its dash and marker whatever the filters leave of the others.
    frame["rank"] = pd.factorize(frame["series"])[0].astype(float)
    frame["shade"] = frame.groupby("method")["rank"].transform(
        lambda ranks: (ranks.rank(method="dense") - 1) / max(ranks.nunique() - 1, 1)
    )
    return frame


def as_view(
    store: RunStore, name: str, document: Mapping[str, Any], runs: pd.DataFrame, problems: Sequence[Problem]
) -> StudyView:
    """A study with its runs, and who is running it now."""
    return StudyView(
        name=name,
        question=words(document.get("question")),
        note=words(document.get("note")),
        planned_at=number(document.get("planned_at")),
        corpus=mapping(document.get("corpus")),
        runs=runs,
        problems=tuple(problems),
        document=mapping(document),
        owner=_owner(store, name),
    )


def _owner(store: RunStore, name: str) -> str:
    """Who is running a study."""
    try:
        holder = store.holder(name)
    except UNREADABLE:
        return ""
    return "" if holder is None or holder.is_dead() else holder.description


def _row(store: RunStore, view: RunView) -> dict[str, Any]:
    if not view.record:
        return run_row(view, evaluations(store, view.study, view.key), metrics(store, view.study, view.key))
    # A record says it all: the telemetry of finished runs is read only by the pages that draw it.
    return run_row(view, _NONE, _NONE)


_NONE = pd.DataFrame()


def nominal_budgets(runs: pd.DataFrame) -> pd.Series:
    """The budget that each run belongs to, realised FLOPs to two digits: what its study planned, else the cluster of
    its compute; NaN for a run that is not finished and whose study planned no compute."""
    known = runs["flops_realised"].gt(0) & (runs["state"].eq("finished") | runs["budget"].gt(0))
    found = runs["budget"].astype(float).copy()
    part = runs[known]
    if len(part):
        labels = budgets_of(part, "flops_realised")
        for label in set(labels):
            own = part.index[labels == label]
            planned = part.loc[own, "budget"].dropna()
            centre = planned.iloc[0] if len(planned) else np.exp(np.log(part.loc[own, "flops_realised"]).mean())
            found.loc[own] = float(f"{centre:.1e}")
    return found


def budget_name(value: float) -> str:
    """A nominal budget as a filter and an address write it: ``3e11``."""
    return f"{value:.2g}".replace("e+", "e") if math.isfinite(value) else ""


PLANNED_PART = re.compile(r" · (?:flops|tokens|steps) [\d.e+]+")
"""What the platform's own labels say of a budget: the pages write it so that a person can read it."""


def _unique(runs: pd.DataFrame) -> list[str]:
    """Labels that name a run in a selection: method, size and options as the study wrote them; those that occur twice
    get their budget, their seed, the fields of their identities that differ, or the end of their key."""
    labels = [PLANNED_PART.sub("", str(label)) for label in runs["label"]]
    keys = [str(key) for key in runs["key"]]
    tokens = [f"{style.compact(count)} tokens" if count > 0 else "" for count in runs["tokens"]]
    budgets = [f"{style.power(value)} FLOPs" if value > 0 else "" for value in runs["nominal"]]
    seeds = [f"seed {seed:g}" for seed in runs["seed"]]
    by_compute = runs["budget"].gt(0).any()
    labels = _apart(labels, budgets if by_compute else tokens)
    labels = _apart(labels, seeds)
    labels = _apart(labels, _differences(runs, labels))
    labels = _apart(labels, tokens)
    return _apart(_apart(labels, [key[-6:] for key in keys]), keys)


def _apart(labels: list[str], suffixes: list[str]) -> list[str]:
    """The labels, those that occur with several suffixes with theirs."""
    kinds: dict[str, set[str]] = {}
    for label, suffix in zip(labels, suffixes, strict=True):
        kinds.setdefault(label, set()).add(suffix)
    return [
        f"{label} · {suffix}" if len(kinds[label]) > 1 and suffix else label
        for label, suffix in zip(labels, suffixes, strict=True)
    ]


def written(value: object) -> str:
    """A value of an identity in a label; empty where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def asked_for(runs: pd.DataFrame) -> list[str]:
    """The columns of what runs were asked for, beside :data:`OPTIONS`, size, seed and budget."""
    known = {*TEXT, *NUMBERS, "routed", "steps_histogram", "need", "by_document", "configuration", "setting", "code"}
    return [str(name) for name in runs if name not in known]


def _differences(runs: pd.DataFrame, labels: list[str]) -> list[str]:
    """What the fields of a run's identity are that differ among the runs of its label; three at most."""
    found = [""] * len(runs)
    by_label: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    shared = [places for places in by_label.values() if len(places) > 1]
    if not shared:
        return found
    fields = runs[[*OPTIONS, *asked_for(runs)]].map(written)
    names, texts = list(fields), fields.to_numpy()
    codes = np.column_stack([pd.factorize(fields[name])[0] for name in names])
    for places in shared:
        own = codes[places]
        differing = np.flatnonzero((own != own[0]).any(axis=0))[:3]
        for place in places:
            found[place] = " · ".join(f"{names[one]} {texts[place, one]}" for one in differing if texts[place, one])
    return found


def series_names(runs: pd.DataFrame) -> list[str]:
    """The line that each run belongs to: its method and lam, plus every other option that varies within the method."""
    symbols = style.SYMBOLS
    values = runs.groupby("method")[list(symbols)].nunique().to_dict()
    names = []
    for run in runs[["method", *symbols]].to_dict("records"):
        parts = [shown(str(run["method"]))]
        for name, symbol in symbols.items():
            if pd.notna(run[name]) and (name == "lam" or values[name][run["method"]] > 1):
                parts.append(f"{symbol} {run[name]:g}")
        names.append(" · ".join(parts))
    return names


def facets(runs: pd.DataFrame) -> dict[str, list[str]]:
    """The values of each of :data:`FACETS`, as text: methods in the study's order, the rest ascending."""
    known = runs[runs["method"] != "unknown"]
    found = {
        "method": in_order(known["method"]),
        "size": sorted(set(known["size"]), key=lambda size: (size_order(size), size)),
    }
    found["nominal"] = [budget_name(value) for value in sorted(known["nominal"].dropna().unique())]
    return found | {name: [f"{value:g}" for value in sorted(known[name].dropna().unique())] for name in FACETS[3:]}


def in_order(methods: Iterable[str]) -> list[str]:
    """Arms in the order of the study, each followed by its replay controls."""
    names = list(dict.fromkeys(map(str, methods)))
    subjects = [name for name in names if not (is_control(name) and name.partition("/")[0] in names)]
    return [one for name in subjects for one in (name, *controls_of(name, names))]


def select(view: StudyView, **chosen: Sequence[str]) -> StudyView:
    """The runs that pass the filters (any of :data:`FACETS`); an empty filter lets all pass.

    Runs without an option (vanilla has no lam) pass the filter on it.
    """
    runs = view.runs
    for name, values in chosen.items():
        if values and name in ("method", "size"):
            runs = runs[runs[name].isin(values)]
        elif values:
            text = budget_name if name == "nominal" else "{:g}".format
            runs = runs[runs[name].isna() | runs[name].map(text).isin(values)]
    return replace(view, runs=runs.reset_index(drop=True))


def compared(view: StudyView) -> StudyView:
    """The study without the runs that search for hyperparameters, unless it has no others."""
    others = view.runs[view.runs["role"] != TUNING]
    return view if others.empty else replace(view, runs=others.reset_index(drop=True))


def analysed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs as the analysis wants them (the columns of :func:`haltscale.platform.sweeps.report.results`)."""
    return runs.assign(tokens=runs["tokens_done"], passes_per_token=runs["passes"])


def telling(runs: pd.DataFrame, keys: Collection[str]) -> str:
    """The run that a page about halting opens with, of some keys: one whose steps a router gives, finished if possible,
    else one that takes steps, else any; of several the last in the study's order."""
    known = runs[runs["key"].isin(list(keys))]
    steps = known[known["l_max"].gt(0)]
    routed = steps[steps["routed"]]
    for choice in (routed[routed["state"] == "finished"], routed, steps[steps["state"] == "finished"], steps, known):
        if len(choice):
            return str(choice["key"].iloc[-1])
    return next(iter(keys))


def plotted(runs: pd.DataFrame, kind: FlopsKind) -> pd.DataFrame:
    """The runs that have a place in the scaling figure: a finite perplexity and a positive count of FLOPs."""
    return runs[runs["perplexity"].gt(0) & runs[f"flops_{kind}"].gt(0) & sound(runs)]


def best(runs: pd.DataFrame) -> pd.Series | None:
    """The run with the lowest perplexity, if any has one."""
    known = runs.dropna(subset="perplexity").sort_values("perplexity", kind="stable")
    return known.iloc[0] if len(known) else None


def sound(runs: pd.DataFrame) -> pd.Series:
    """Which runs may be drawn at all: diverged and damaged ones are listed, not drawn."""
    return ~runs["state"].isin(["diverged", "damaged"])


def needed(runs: pd.DataFrame) -> pd.DataFrame:
    """Steps given against steps needed, of runs on text whose need is known: a row per arm and need, seeds pooled.

    Returns:
        ``arm`` (its method, with the options, the size and the tokens where they differ), ``method``, ``runs``,
        ``need`` (NaN: no computation predicts the token), ``tokens``, ``accuracy``, ``loss`` (nats), ``mean_steps``,
        ``steps_histogram`` and ``rank_correlation`` (the mean of the runs' own). Means are over the tokens of all
        runs. Arms that take steps come first, each followed by its replay controls; needs ascend, the NaN first.
    """
    kept = runs[sound(runs) & runs["need"].map(bool).astype(bool)]
    lengths = kept.groupby("series")["tokens"].nunique().to_dict()
    found = []
    stepping = set(kept.loc[kept["mean_steps"].gt(0), "method"])
    order = sorted(in_order(kept["method"]), key=lambda method: method not in stepping)
    kept = kept.sort_values("method", key=lambda methods: methods.map(order.index), kind="stable")
    series_of = kept.groupby("method")["series"].nunique().to_dict()
    for (method, series, size, tokens), members in kept.groupby(
        ["method", "series", "size", "tokens"], sort=False, dropna=False
    ):
        parts = [series if series_of[method] > 1 else shown(str(method))]
        parts += [size] if kept["size"].nunique() > 1 else []
        parts += [f"{style.compact(number(tokens))} tokens"] if lengths[series] > 1 else []
        cells: dict[float, list[Mapping[str, Any]]] = {}
        for found_of in members["need"]:
            for row in map(mapping, found_of["by_need"] if isinstance(found_of.get("by_need"), list) else []):
                need = -1.0 if row.get("need", "") is None else number(row.get("need"))
                if need >= -1 and number(row.get("tokens")) > 0 and fractions(row.get("steps_histogram")):
                    cells.setdefault(need, []).append(row)
        for need in sorted(cells):
            weights = np.array([number(row["tokens"]) for row in cells[need]])
            histograms = [fractions(row["steps_histogram"]) for row in cells[need]]
            longest = max(map(len, histograms))
            padded = np.array([[*one, *[0.0] * (longest - len(one))] for one in histograms])
            found.append(
                {
                    "arm": " · ".join(map(str, parts)),
                    "method": str(method),
                    "runs": len(members),
                    "need": math.nan if need < 0 else need,
                    "tokens": float(weights.sum()),
                    **{
                        name: float(np.average([number(row.get(name)) for row in cells[need]], weights=weights))
                        for name in ("accuracy", "loss", "mean_steps")
                    },
                    "steps_histogram": np.average(padded, axis=0, weights=weights).tolist(),
                    "rank_correlation": float(members["need_rank_correlation"].mean()),
                }
            )
    columns = ("arm", "method", "runs", "need", "tokens", "accuracy", "loss", "mean_steps", "steps_histogram")
    return pd.DataFrame(found, columns=[*columns, "rank_correlation"])


def thinking(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a distribution of latent steps that is not all zeros by construction."""
    counted = runs[sound(runs) & (runs["steps_histogram"].map(len) > 0)]
    return counted[counted["l_max"].gt(0) | counted["mean_steps"].gt(0)]
