"""Results as a table: a DataFrame for notebooks, a printed one for terminals and job logs."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haltscale.platform import run_table
from haltscale.platform.analysis.estimates import Refusal
from haltscale.platform.analysis.matched import SAME_STEPS, document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.analysis.recipes import recipe_warning
from haltscale.platform.analysis.runs import TUNING
from haltscale.platform.analysis.targets import judge, targets_of
from haltscale.platform.arms import OLD_CONTROLS, arm, is_control
from haltscale.platform.identity import canonical_json
from haltscale.platform.store import RunState, RunStore, RunView, StoreError

PRINTED = {
    "run": "run",
    "state": "state",
    "parameters": "params",
    "tokens": "tokens",
    "loss": "nats/token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "mean_steps": "steps",
    "needy_accuracy": "needy accuracy",
    "needy_steps": "needy steps",
    "need_rank_correlation": "rank corr.",
    "easy_steps": "easy",
    "hard_steps": "hard",
    "passes_per_token": "passes",
    "flops_realised": "realised FLOPs",
    "flops_paper": "paper FLOPs",
    "wall_seconds": "seconds",
    "tokens_per_second": "tokens/s",
}


def results(store: RunStore, study: str, keys: list[str] | None = None) -> pd.DataFrame:
    """One row per run (:func:`haltscale.platform.run_table.row`): its label, state, identity and, where it is finished,
    its figures (units as in the record).

    Args:
        keys: the runs and their order; all of the study's by default.
    """
    if keys is not None:
        return table(store.views(study, keys).values())
    found = table(store.runs(study))
    document = {} if store.study_problem(study) else store.study(study)
    if len(found) and (planned := set(document.get("tuning") or ())):  # those that have no spec yet
        found["role"] = found["role"].mask(found["key"].isin(planned), TUNING)
    waiting = pd.DataFrame([row for row in document.get("waiting") or [] if isinstance(row, dict)])
    return pd.concat([found, waiting.assign(key="", state="waiting")], ignore_index=True) if len(waiting) else found


def table(views: Iterable[RunView]) -> pd.DataFrame:
    """:func:`results` of runs that have been read already."""
    return pd.DataFrame(run_table.rows(views))


def judged_targets(store: RunStore, study: str) -> pd.DataFrame:
    """The study's targets with their outcomes (:func:`haltscale.platform.analysis.judge`); empty where it has none."""
    if store.study_problem(study) or not (targets := targets_of(document := store.study(study))):
        return pd.DataFrame()
    views = list(store.runs(study))
    frame = table(views)
    if len(frame) and (planned := set(document.get("tuning") or ())):
        frame["role"] = frame["role"].mask(frame["key"].isin(planned), TUNING)
    documents = {view.key: document_frame(view.record) for view in views}
    return judge(targets, frame, documents=documents, prefer=subjects(document))


def subjects(document: Mapping[str, Any]) -> dict[str, int]:
    """How often the controls in a study's ``study.json`` name a run as their subject, by key."""
    pairs = run_table.mapping(document.get("controls"))
    return dict(Counter(run_table.words(run_table.mapping(pair).get("of")) for pair in pairs.values()))


def show_targets(frame: pd.DataFrame, *, title: str) -> None:
    """Print targets with their outcomes."""
    if len(frame):
        show(frame[["claim", "verdict", "figure", "reason", "source"]], title=title)


def control_differences(store: RunStore, study: str) -> pd.DataFrame:
    """What each kind of control costs over its subject on the held-out text, paired by document and seed.

    Returns:
        A row per subject (all seeds together) and kind: ``subject`` (label), ``control`` (its kind), ``seeds``,
        ``documents``, ``subject_steps`` and ``control_steps`` (means), ``subject_flops`` and ``control_flops``
        (realised, in training), ``difference`` in nats per token with ``low`` and ``high`` (NaN where there are none),
        ``problem``: why the difference carries no verdict, and ``warning``: whose recipe is not its own
        (:func:`~haltscale.platform.analysis.recipes.recipe_warning`). Above 0 the subject is better. Old controls,
        which differ in more than where their steps are, get no difference.
    """
    try:
        pairs = store.study(study).get("controls") or {}
        views = store.views(study, sorted({*pairs, *(one["of"] for one in pairs.values())}))
    except (StoreError, TypeError, KeyError, AttributeError):
        return pd.DataFrame()
    groups: dict[tuple[str, str], list[tuple[RunView, RunView]]] = {}
    for key, pair in pairs.items():
        control, subject = views.get(key), views.get(pair["of"])
        if control is None or subject is None or not control.record or not subject.record:
            continue
        identity = dict(subject.record.get("identity") or {})
        identity.pop("seed", None)
        groups.setdefault((str(pair["kind"]), canonical_json(identity)), []).append((control, subject))
    rows = [_difference(kind, members) for (kind, _), members in groups.items()]
    return pd.DataFrame(rows)


def _difference(kind: str, members: list[tuple[RunView, RunView]]) -> dict[str, Any]:
    controls, subjects = ([pair[side].record for pair in members] for side in (0, 1))
    means = {
        f"{name}_{short}": sum(float(record.get(field) or 0) for record in records) / len(records)
        for name, records in (("subject", subjects), ("control", controls))
        for short, field in (("steps", "mean_steps"), ("flops", "flops_realised"))
    }
    identity = controls[0].get("identity") or {}
    replays, old = is_control(arm(identity)), arm(identity) in OLD_CONTROLS
    row = {
        "subject": str(members[0][1].label).partition(" · seed")[0],
        "control": f"{kind} (old control)" if old else kind,
        "seeds": len(members),
        "documents": len((subjects[0].get("held_out_by_document") or {}).get("tokens") or []),
        **means,
        **dict.fromkeys(["difference", "low", "high"], math.nan),
        "problem": "",
        "warning": _recipe_warning({"the subject": subjects, f"the {kind} control": controls}),
    }
    if old:
        return {**row, "problem": "an old control: it differs in more than where the steps are"}
    sums = [[document_frame(record) for record in records] for records in (controls, subjects)]
    found = paired_difference(sums[0], sums[1])
    if isinstance(found, Refusal):
        return {**row, "problem": found.reason}
    row |= {"difference": found.value, "low": found.low, "high": found.high}
    apart = abs(means["control_steps"] - means["subject_steps"])
    if replays and apart > SAME_STEPS * max(means["subject_steps"], 1e-9):
        row["problem"] = f"mean steps differ: {means['subject_steps']:.3f} and {means['control_steps']:.3f}"
    orders = [
        [(record.get("tokens"), record.get("sequence_digest")) for record in side] for side in (controls, subjects)
    ]
    if any(one[0] == other[0] and one[1] != other[1] for one, other in zip(*orders, strict=True)):
        row["problem"] = "the runs saw other texts, or in another order"
    return row


def _recipe_warning(sides: Mapping[str, list[Mapping[str, Any]]]) -> str:
    rows = [{"arm": side, **run_table.recipe_figures(one)} for side, records in sides.items() for one in records]
    return recipe_warning(pd.DataFrame(rows))


def show_plan(frame: pd.DataFrame, *, title: str, as_json: bool = False) -> None:
    """Print a plan (:meth:`Study.plan`) as a table, or all of it as a JSON list of rows."""
    if as_json:
        print_json(frame)
        return
    headings = {"flops_expected": "realised FLOPs", "flops_bound": "at most", "memory_bytes": "memory (bytes)"}
    headings |= {"device_hours": "device hours"}
    shown = frame.drop(columns=[name for name in ("method", "size") if name in frame])
    shown = shown.drop(
        columns=[name for name in ("seconds", "flops_expected") if name in frame and frame[name].isna().all()]
    )
    show(shown.rename(columns=headings), title=title)
    counts = ", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items())
    _console().print(f"{len(frame)} runs: {counts}", markup=False)


def say(text: str) -> None:
    """Print a sentence below a table."""
    _console().print(text, markup=False)


JSON_SCHEMA = 1
"""Of what ``--json`` prints: ``{"schema": 1, "runs": [...]}``. Rows may gain fields; none is renamed, dropped or given
another unit without a new number."""


def print_json(frame: pd.DataFrame) -> None:
    """Print a plan or results for scripts; see :data:`JSON_SCHEMA`."""
    runs = json.loads(frame.to_json(orient="records", double_precision=15))
    sys.stdout.write(json.dumps({"schema": JSON_SCHEMA, "runs": runs}, indent=1) + "\n")


def show_results(frame: pd.DataFrame, *, title: str, note: str = "", as_json: bool = False) -> None:
    """Print the results, the study's note, failed runs with their errors, and how to look further; or JSON rows."""
    if as_json:
        print_json(frame)
        return
    every = len(frame)
    if "role" in frame and not (frame["role"] == TUNING).all():
        frame = frame[frame["role"] != TUNING]
    columns = {name: heading for name, heading in PRINTED.items() if name in frame}
    if "state" in columns and (frame["state"] == RunState.FINISHED).all():
        columns.pop("state")
    show(frame[list(columns)].rename(columns=columns), title=title)
    console = _console()
    if "easy_steps" in frame and frame["easy_steps"].notna().any():
        console.print(
            "steps: mean latent steps per held-out token; easy, hard: on the quarter of them predicted best, worst"
            "; passes: per training token",
            style="dim",
        )
    for row in frame.to_dict("records"):
        if row.get("error"):
            console.print(f"{row['run']}: {row['error']}", style="red", markup=False)
    if every > len(frame):
        console.print(f"{every - len(frame)} tuning runs are not shown", style="dim")
    finished = frame[frame["state"] == RunState.FINISHED] if "state" in frame else frame
    if shared := shared_work(finished):
        console.print(shared, style="dim", markup=False)
    if warning := recipe_warning(finished):
        console.print(f"recipes: {warning}", style="dim", markup=False)
    if note:
        console.print(note, markup=False)
    console.print("See it: make dashboard (or: haltscale dashboard)", markup=False)


def shared_work(frame: pd.DataFrame) -> str:
    """What branches did not train again, in a sentence; empty where no run is one."""
    if "shared_flops" not in frame or "flops_realised" not in frame:
        return ""
    branches = frame[frame["shared_flops"].notna()]
    if branches.empty:
        return ""
    once, every = branches["shared_flops"].sum(), frame["flops_realised"].sum()
    return f"{len(branches)} runs began in another: {once:.3g} of {every:.3g} realised FLOPs were not trained again"


def show(frame: pd.DataFrame, *, title: str) -> None:
    """Print a DataFrame as a table, numbers to 3 significant digits."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    columns = {str(name): [_text(value) for value in frame[name]] for name in frame.columns}
    for name, cells in columns.items():
        numeric = not any(isinstance(value, str) for value in frame[name])
        width = max(map(len, [*cells, *name.split()]))  # a heading may be folded between its words, a value never
        table.add_column(
            Text(name), justify="right" if numeric else "left", no_wrap=not numeric, min_width=width, overflow="fold"
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))  # text of the store is not markup
    console = _console()
    unbounded = console.options.update(max_width=10_000)
    needed = console.measure(table, options=unbounded).minimum
    console.width = max(console.width, needed)  # a narrow terminal wraps lines, it hides nothing
    console.print(table)


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else 170)


def _text(value: Any) -> str:
    """A cell: 3 significant digits (4 where the third would hide a difference), thousands and millions as k and M."""
    if value is None or value is pd.NA or value != value:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 0.9995e9:
        return f"{value:.2e}"
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if magnitude >= 0.9995 * unit:  # what would round up to 1000 of the smaller unit
            return f"{value / unit:.3g}{name}"
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.2f}" if 0.1 <= magnitude < 10 else f"{value:.3g}"
