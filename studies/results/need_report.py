"""The figures of known-need.md, from the records beside it.

python studies/results/need_report.py            print them
python studies/results/need_report.py --write    put them into known-need.md, between its two markers
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunStore, RunView
from haltscale.platform.sweeps import report
from haltscale.studies import known_need

FOLDER = Path(__file__).parent
PAGE = FOLDER / "known-need.md"
SCRIPT = "studies/results/need_report.py"
STUDIES = {"known-need": "Text with need", "known-need-twin": "The twin, without need"}
ORDER = ("adaptive, labels", "shuffled", "fixed", "vanilla, equal FLOPs", "vanilla, equal tokens")


def arm_of(view: RunView, controls: dict[str, Any]) -> str:
    """What a run is in the study."""
    identity = view.record["identity"]
    kind = (controls.get(view.key) or {}).get("kind")
    if kind:
        return "vanilla, equal FLOPs" if kind == "dense" else str(kind)
    if identity["method"] == "vanilla":
        return "vanilla, equal tokens"
    if identity["options"]["gate_target"] == known_need.LEARNS["gate_target"]:
        return "adaptive, labels"
    return f"adaptive, the paper's gates, λ {identity['options']['lam']:g}"


def arms(store: RunStore, study: str) -> dict[str, list[RunView]]:
    """The finished runs by arm, each arm's by seed."""
    controls = store.study(study).get("controls", {})
    found: dict[str, list[RunView]] = {}
    for view in sorted(store.runs(study), key=lambda view: view.record["identity"]["seed"]):
        found.setdefault(arm_of(view, controls), []).append(view)
    named = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*named, *sorted(set(found) - set(named))]}


def by_need(views: Iterable[RunView], need: int | None, figure: str) -> float:
    """The mean over seeds of a figure of the tokens that need so many steps."""
    rows = [row for view in views for row in view.record["need"]["by_need"] if row["need"] == need]
    return float(np.mean([row[figure] for row in rows])) if rows else float("nan")


def slashed(values: Iterable[float], digits: int = 2) -> str:
    """Numbers after one another; nothing for those that are missing."""
    return " / ".join(f"{value:.{digits}f}" for value in values if not np.isnan(value))


def correlations(views: list[RunView]) -> str:
    """The rank correlation of each seed."""
    found = [view.record["need"]["rank_correlation"] for view in views]
    return ", ".join("–" if value is None else f"{value:.2f}" for value in found)


def arms_table(store: RunStore, study: str) -> str:
    """Accuracy, steps and loss of every arm."""
    rows = []
    for name, views in arms(store, study).items():
        needs = sorted({row["need"] for row in views[0].record["need"]["by_need"]} - {None})
        rows.append(
            [
                name,
                str(len(views)),
                slashed(by_need(views, need, "accuracy") for need in needs),
                slashed(by_need(views, need, "mean_steps") for need in needs),
                slashed([by_need(views, None, "mean_steps")]),
                f"{np.mean([view.record['mean_steps'] for view in views]):.3f}",
                f"{np.mean([view.record['loss'] for view in views]):.4f}",
                correlations(views),
                f"{np.mean([view.record['flops_realised'] for view in views]):.3g}",
            ]
        )
    headings = ["arm", "seeds", "accuracy by need", "steps by need", "steps, unpredictable tokens", "mean steps"]
    headings += ["nats/token", "rank correlation of steps with need", "realised FLOPs"]
    return table(headings, rows)


def differences_table(store: RunStore, study: str) -> str:
    """What each control costs over adaptive, paired by seed and document."""
    rows = []
    for row in report.control_differences(store, study).to_dict("records"):
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        steps = f"{row['subject_steps']:.3f} / {row['control_steps']:.3f}"
        flops = f"{row['control_flops'] / row['subject_flops']:.3f}"
        rows.append([row["control"], str(row["seeds"]), str(row["documents"]), steps, flops, interval, row["problem"]])
    headings = ["control", "seeds", "documents", "mean steps, adaptive / control", "FLOPs over adaptive's"]
    return table([*headings, "nats/token above adaptive (95 %)", "remark"], rows)


def figures(store: RunStore) -> str:
    """All figures, as markdown."""
    parts = []
    for study, title in STUDIES.items():
        if study in store.studies():
            parts += [f"### {title}", arms_table(store, study), differences_table(store, study)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
