"""The figures of gate-ablation.md, from the records beside it.

python studies/results/gate_report.py            print them
python studies/results/gate_report.py --write    put them into gate-ablation.md, between its two markers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from haltscale.platform.analysis.estimates import Refusal
from haltscale.platform.analysis.matched import document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.api import Study, grid
from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunState, RunStore, RunView
from haltscale.studies import gate_ablation, gate_ablation_english, gate_ablation_twin, known_need

FOLDER = Path(__file__).parent
PAGE = FOLDER / "gate-ablation.md"
SCRIPT = "studies/results/gate_report.py"
STUDIES = {
    "Text with need, equal tokens": gate_ablation.study,
    "The twin, without need, equal tokens": gate_ablation_twin.study,
    "English, equal realised training FLOPs": gate_ablation_english.study,
}
NEEDS = "steps: unpredictable / need 0 / 1 / 2"
NO_NEED = "steps: unpredictable / need 0"
BASES = {
    "recipe": ("The recipe without", gate_ablation.RECIPE, gate_ablation.WITHOUT),
    "paper": ("The paper's method with", gate_ablation.PAPER, gate_ablation.WITH),
}


def difference(arm: list[RunView], reference: list[RunView]) -> str:
    """Nats per token above the reference, with its interval."""
    found = paired_difference(*([document_frame(view.record) for view in side] for side in (arm, reference)))
    if isinstance(found, Refusal):
        return found.reason
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def seeds(views: list[RunView], *path: str, digits: int = 2) -> str:
    """A figure of each seed's record."""
    found: list[Any] = []
    for view in views:
        value: Any = view.record
        for name in path:
            value = (value or {}).get(name)
        found.append(value)
    return ", ".join("–" if value is None else f"{value:.{digits}f}" for value in found)


def steps_by_need(views: list[RunView]) -> str:
    """Mean steps of the tokens that cannot be predicted, then of those that need 0, 1, ... steps."""
    rows = [[row["mean_steps"] for row in view.record["need"]["by_need"]] for view in views]
    return " / ".join(f"{steps:.2f}" for steps in np.mean(rows, axis=0))


def variant(study: Study, views: Mapping[str, RunView], point: Mapping[str, Any]) -> list[RunView]:
    """The finished runs of a variant, by seed; none unless all are there."""
    runs = replace(study, sweep=grid(seed=known_need.SEEDS, **point)).runs
    found = [views.get(study.key(run)) for run in sorted(runs, key=lambda run: run.seed)]
    return [view for view in found if view] if all(view and view.state is RunState.FINISHED for view in found) else []


def section(store: RunStore, study: Study) -> str:
    """The tables of one study."""
    views = {view.key: view for view in store.runs(study.name)}
    english = study.name == gate_ablation_english.study().name
    twin = study.name == gate_ablation_twin.study().name
    plain: list[RunView] = []
    if english:
        plain = variant(study, views, {"method": "vanilla", "learning_rate": gate_ablation_english.RATES["vanilla"]})
    parts = []
    for name, (title, base, changes) in BASES.items():
        shared = {"learning_rate": gate_ablation_english.RATES[name]} if english else {}
        first = variant(study, views, {**base, **shared})
        rows = []
        for change, options in changes.items():
            runs = variant(study, views, {**base, **shared, **options})
            if not runs or not first:
                rows.append([change, "not run"])
                continue
            row = [change, f"{np.mean([view.record['loss'] for view in runs]):.4f}"]
            row.append("–" if runs == first else difference(runs, first))
            if english:
                row.append(difference(runs, plain) if plain else "not run")
            else:
                if not twin:
                    row += [seeds(runs, "need", "rank_correlation"), seeds(runs, "need", "needy", "accuracy")]
                row.append(steps_by_need(runs))
            row += [seeds(runs, "mean_steps"), f"{np.mean([view.record['flops_realised'] for view in runs]):.3g}"]
            rows.append(row)
        headings = [title, "nats/token", "above the base (95 %)"]
        more = ["rank correlation", "accuracy on needy tokens", NEEDS]
        if english or twin:
            more = ["above vanilla (95 %)"] if english else [NO_NEED]
        headings += [*more, "mean steps", "realised FLOPs"]
        parts.append(table(headings, [[*row, *[""] * (len(headings) - len(row))] for row in rows]))
    return "\n\n".join(parts)


def figures(store: RunStore) -> str:
    """All figures, as markdown."""
    parts = []
    for title, make in STUDIES.items():
        study = make()
        if study.name in store.studies():
            parts.append(f"### {title}\n\n{section(store, study)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
