"""The figures of recipes.md, from the records beside it.

python studies/results/recipes_report.py            print them
python studies/results/recipes_report.py --write    put them into recipes.md, between its two markers
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunStore
from haltscale.studies import recipes, transfer

FOLDER = Path(__file__).parent
PAGE = FOLDER / "recipes.md"
SCRIPT = "studies/results/recipes_report.py"


def switches(store: RunStore) -> str:
    """A table for each method: what a switch is worth at equal FLOPs."""
    parts = []
    for method, rows in recipes.differences(store).groupby("method", sort=False):
        lines = [[row["variant"], *_figures(row)] for row in rows.to_dict("records")]
        headings = [str(method), "nats/token", "above the reference (95 %)", "verdict", "mean steps", "tokens"]
        parts.append(table(headings, lines))
    return "\n\n".join(parts)


def _figures(row: Mapping[Any, Any]) -> list[str]:
    apart = "–"
    if row["difference"] == row["difference"]:
        apart = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    return [f"{row['loss']:.4f}", apart, row["verdict"], f"{row['mean_steps']:.2f}", f"{row['tokens']:,.0f}"]


def rates(store: RunStore) -> str:
    """How much worse each learning rate is than the best of its size, by parametrisation."""
    lines = []
    for row in transfer.best_rates(store).to_dict("records"):
        above = [f"{row['above_best'][rate]:+.3f}" if rate in row["above_best"] else "–" for rate in transfer.RATES]
        lines.append([row["parametrisation"], row["size"], f"{row['loss']:.4f}", f"{row['best']:g}", *above])
    headings = ["parametrisation", "size", "nats/token", "best rate", *(f"{rate:g}" for rate in transfer.RATES)]
    return table(headings, lines)


def figures(store: RunStore) -> str:
    """All figures, as markdown."""
    parts = [f"### Switches, equal realised training FLOPs\n\n{switches(store)}"]
    if transfer.NAME in store.studies():
        parts.append(f"### Learning rates over sizes, nats/token above the best\n\n{rates(store)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
