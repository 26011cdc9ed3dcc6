"""Results as a table: a DataFrame for notebooks, a printed one for terminals and job logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haltscale.platform import run_table
from haltscale.platform.store import RunState, RunStore, RunView

PRINTED = {
    "run": "run",
    "state": "state",
    "parameters": "params",
    "tokens": "tokens",
    "loss": "nats/token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "mean_steps": "steps",
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
    waiting = pd.DataFrame([row for row in store.study(study).get("waiting", []) if isinstance(row, dict)])
    return pd.concat([found, waiting.assign(key="", state="waiting")], ignore_index=True) if len(waiting) else found


def table(views: Iterable[RunView]) -> pd.DataFrame:
    """:func:`results` of runs that have been read already."""
    return pd.DataFrame(run_table.rows(views))


def show_plan(frame: pd.DataFrame, *, title: str, as_json: bool = False) -> None:
    """Print a plan (:meth:`Study.plan`) as a table, or all of it as a JSON list of rows."""
    if as_json:
        print_json(frame)
        return
    headings = {"flops_expected": "realised FLOPs", "flops_bound": "at most", "memory_bytes": "memory (bytes)"}
    shown = frame.drop(columns=[name for name in ("method", "size") if name in frame])
    shown = shown.drop(
        columns=[name for name in ("seconds", "flops_expected") if name in frame and frame[name].isna().all()]
    )
    show(shown.rename(columns=headings), title=title)
    counts = ", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items())
    _console().print(f"{len(frame)} runs: {counts}", markup=False)


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
    if note:
        console.print(note, markup=False)
    console.print("See it: make dashboard (or: haltscale dashboard)", markup=False)


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
        table.add_row(*map(Text, row))  # text of the store is no markup
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
