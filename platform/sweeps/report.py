"""Results as a table: a DataFrame for notebooks, a printed one for terminals and job logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from haltscale.platform.arms import arm
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

RECURRENT = ("attention", "mlp", "norms")
"""Groups of parameters that a latent step uses again; the rest (embedding, head, router) is used once per token."""


def results(store: RunStore, study: str, keys: list[str] | None = None) -> pd.DataFrame:
    """One row per run: its label, state and, where it is finished, its figures (units as in the record).

    Args:
        keys: the runs and their order; all of the study's by default.
    """
    return table(store.views(study, keys).values() if keys is not None else store.runs(study))


def table(views: Iterable[RunView]) -> pd.DataFrame:
    """:func:`results` of runs that have been read already."""
    rows = []
    for view in views:
        record = view.record
        identity = record.get("identity") or view.spec.get("identity", {})
        halting = record.get("halting", {})
        groups = record.get("parameters", {})
        recurrent = sum(groups.get(name, 0) for name in RECURRENT) if groups else None
        rows.append(
            {
                "run": view.label,
                "key": view.key,
                "state": str(view.state),
                "method": arm(identity) or None,
                "size": identity.get("size"),
                "seed": identity.get("seed"),
                **{name: value for name, value in identity.get("options", {}).items() if name != "steps_schedule"},
                "role": view.spec.get("role", "comparison"),
                "parameters": record.get("parameters_total"),
                "parameters_recurrent": recurrent,
                "parameters_once": sum(groups.values()) - recurrent if groups else None,
                **{name: record.get(name) for name in ("tokens", "loss", "loss_standard_error", "perplexity")},
                **{name: record.get(name) for name in ("bits_per_byte", "mean_steps", "expected_steps")},
                "easy_steps": halting.get("well_predicted_mean_steps"),
                "hard_steps": halting.get("badly_predicted_mean_steps"),
                **{name: record.get(name) for name in ("passes_per_token", "flops_realised", "flops_executed")},
                **{name: record.get(name) for name in ("flops_paper", "wall_seconds", "tokens_per_second")},
                "error": view.status.get("error") or view.problem,
            }
        )
    return pd.DataFrame(rows)


def show_plan(frame: pd.DataFrame, *, title: str, as_json: bool = False) -> None:
    """Print a plan (:meth:`Study.plan`) as a table, or all of it as a JSON list of rows."""
    if as_json:
        _print_json(frame)
        return
    headings = {"flops_expected": "realised FLOPs", "flops_bound": "at most", "memory_bytes": "memory (bytes)"}
    shown = frame.drop(columns=[name for name in ("method", "size") if name in frame])
    shown = shown.drop(
        columns=[name for name in ("seconds", "flops_expected") if name in frame and frame[name].isna().all()]
    )
    show(shown.rename(columns=headings), title=title)
    counts = ", ".join(f"{count} {state}" for state, count in frame["state"].value_counts().items())
    _console().print(f"{len(frame)} runs: {counts}", markup=False)


def _print_json(frame: pd.DataFrame) -> None:
    sys.stdout.write(frame.to_json(orient="records", indent=1) + "\n")


def show_results(frame: pd.DataFrame, *, title: str, note: str = "", as_json: bool = False) -> None:
    """Print the results, the study's note, failed runs with their errors, and how to look further; or JSON rows."""
    if as_json:
        _print_json(frame)
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
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    columns = {str(name): [_text(value) for value in frame[name]] for name in frame.columns}
    for name, cells in columns.items():
        numeric = not any(isinstance(value, str) for value in frame[name])
        width = max(map(len, [*cells, *name.split()]))  # a heading may be folded between its words, a value never
        table.add_column(
            name, justify="right" if numeric else "left", no_wrap=not numeric, min_width=width, overflow="fold"
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
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
