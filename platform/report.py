"""Results as a table: a DataFrame for notebooks, a printed one for terminals and job logs."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from haltscale.platform.store import RunStore

PRINTED = {
    "run": "run",
    "state": "state",
    "parameters": "parameters",
    "tokens": "tokens",
    "loss": "loss (nats)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "mean_steps": "mean steps",
    "easy_steps": "easy",
    "hard_steps": "hard",
    "passes_per_token": "passes/token",
    "flops_realised": "FLOPs realised",
    "flops_paper": "FLOPs paper",
    "wall_seconds": "seconds",
    "tokens_per_second": "tokens/s",
}


def results(store: RunStore, study: str, keys: list[str] | None = None) -> pd.DataFrame:
    """One row per run: its label, state and, where it is finished, its figures (units as in the record).

    Args:
        keys: the runs and their order; all of the study's by default.
    """
    views = [store.run(study, key) for key in keys] if keys is not None else list(store.runs(study))
    rows = []
    for view in views:
        record = view.record
        identity = record.get("identity") or view.spec.get("identity", {})
        halting = record.get("halting", {})
        rows.append(
            {
                "run": view.label,
                "key": view.key,
                "state": str(view.state),
                "method": identity.get("method"),
                "size": identity.get("size"),
                "seed": identity.get("seed"),
                **identity.get("options", {}),
                "parameters": record.get("parameters_total"),
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


def show_results(frame: pd.DataFrame, *, title: str, note: str = "") -> None:
    """Print the results, the study's note, failed runs with their errors, and how to look further."""
    columns = {name: heading for name, heading in PRINTED.items() if name in frame}
    show(frame[list(columns)].rename(columns=columns), title=title)
    console = _console()
    if "easy_steps" in frame and frame["easy_steps"].notna().any():
        console.print(
            "easy / hard: mean latent steps on the quarter of held-out tokens that the model predicts best / worst",
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
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if numeric else "left", no_wrap=not numeric)
    for row in frame.itertuples(index=False):
        table.add_row(*[_text(value) for value in row])
    _console().print(table)


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else 160, soft_wrap=False)


def _text(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 1e7:
        return f"{value:.2e}"
    if float(value).is_integer() and magnitude >= 1:
        return f"{int(value):,}"
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.3g}" if magnitude < 1 else f"{value:#.4g}".rstrip(".")
