"""The figures of little-text.md, from the records beside it.

python studies/results/little_report.py            print them
python studies/results/little_report.py --write    put them into little-text.md, between its two markers
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haltscale.platform.analysis.estimates import Refusal
from haltscale.platform.analysis.matched import document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunState, RunStore, RunView
from haltscale.platform.sweeps import report
from haltscale.studies import little_text

FOLDER = Path(__file__).parent
PAGE = FOLDER / "little-text.md"
SCRIPT = "studies/results/little_report.py"
PLAIN, WIDER = "vanilla", "vanilla, wider"


def arm_of(record: Mapping[str, Any]) -> str:
    """What a run is in the study."""
    identity = record["identity"]
    method, options = str(identity["method"]), identity["options"]
    if method == "vanilla":
        name = WIDER if identity["size"] == little_text.WIDER else PLAIN
        spent = record["flops_realised"] / little_text.FLOPS
        less = [share for share in little_text.LESS if abs(spent / share - 1) < 0.02]
        less = [] if record["role"] == "tuning" else less
        return f"{name}, {less[0]:g} of the FLOPs" if less else name
    if method == "looped" and options["injection"] != "none":
        return "looped, embedding injected"
    if method != "adaptive":
        return method
    name = (
        "adaptive, labels" if options["gate_target"] == little_text.LABELS["gate_target"] else "adaptive, the paper's"
    )
    replayed = options["steps_from"]
    return name if replayed == "router" else f"{name}: steps {replayed}"


def arms(store: RunStore, study: str, *, role: str = "comparison") -> dict[tuple[str, bool], list[RunView]]:
    """The finished runs by arm, and by whether they are compared at equal tokens; each arm's by seed."""
    found: dict[tuple[str, bool], list[RunView]] = {}
    for view in sorted(store.runs(study), key=lambda view: view.spec["identity"]["seed"]):
        if view.state is RunState.FINISHED and view.record["role"] == role:
            identity = view.record["identity"]
            at_tokens = identity["flops"] is None and identity["tokens"] == little_text.TOKENS
            found.setdefault((arm_of(view.record), at_tokens), []).append(view)
    return found


def difference(arm: list[RunView], reference: list[RunView]) -> str:
    """Nats per token above the reference, paired within the seeds that both have."""
    sides = [{view.record["identity"]["seed"]: view.record for view in views} for views in (arm, reference)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return "no reference"
    found = paired_difference(*([document_frame(side[seed]) for seed in seeds] for side in sides))
    if isinstance(found, Refusal):
        return found.reason
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def best_loss(store: RunStore, view: RunView) -> float:
    """The lowest held-out loss of a run's evaluations, in nats per token."""
    return float(store.evaluations(view.study, view.key)["loss"].min())


def best_plain(found: Mapping[str, list[RunView]]) -> str:
    """The plain arm of the lowest mean loss, at whatever budget and width: chosen in its own favour."""
    plain = {name: mean(views, "loss") for name, views in found.items() if name.startswith(PLAIN)}
    return min(plain, key=plain.__getitem__, default=PLAIN)


def mean(views: list[RunView], name: str) -> float:
    """The mean of a figure of the records."""
    return float(np.mean([float(view.record[name] or 0) for view in views]))


def arms_table(store: RunStore, study: str, *, at_tokens: bool) -> str:
    """Every arm of one comparison: its loss and what it is above the plain models."""
    found = {name: views for (name, tokens), views in arms(store, study).items() if tokens is at_tokens}
    plain = best_plain(found)
    unique = store.study(study)["corpus"]["train_tokens"]
    rows = []
    for name, views in found.items():
        values = views[0].record.get("recipe", {}).get("values", {})
        row = [name, str(len(views)), f"{values.get('learning_rate', float('nan')):g}"]
        row += [f"{values.get('weight_decay', float('nan')):g}"]
        row += [f"{mean(views, 'loss'):.4f}", f"{np.mean([best_loss(store, view) for view in views]):.4f}"]
        row += ["–" if name == other else difference(views, found.get(other, [])) for other in (PLAIN, plain)]
        row += [f"{mean(views, 'mean_steps'):.2f}", f"{mean(views, 'tokens') / unique:.1f}"]
        rows.append([*row, f"{mean(views, 'flops_realised'):.3g}"])
    headings = ["arm", "seeds", "rate", "weight decay", "nats/token, last", "best", "above vanilla (95 %)"]
    headings += [f"above {plain} (95 %)", "mean steps", "epochs", "realised FLOPs"]
    return table(headings, rows) if rows else "Not run yet."


def targets_table(store: RunStore, study: str) -> str:
    """The targets with their outcomes."""
    rows = report.judged_targets(store, study)
    names = ["claim", "source", "verdict", "figure", "reason"]
    return table(names, rows[names].astype(str).to_numpy().tolist())


def controls_table(store: RunStore, study: str) -> str:
    """What replaying a router's steps elsewhere costs."""
    rows = []
    for row in report.control_differences(store, study).to_dict("records"):
        interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        steps = f"{row['subject_steps']:.3f} / {row['control_steps']:.3f}"
        rows.append([row["subject"], row["control"], str(row["seeds"]), steps, interval, row["problem"]])
    headings = ["subject", "control", "seeds", "mean steps, subject / control", "nats/token above it (95 %)", "remark"]
    return table(headings, rows) if rows else "Not run yet."


def tuning_table(store: RunStore, study: str) -> str:
    """What was tried for each arm, and how flat its optimum is."""
    rows = []
    for (name, _), views in arms(store, study, role="tuning").items():
        losses = sorted(
            (view.record["loss"], view.record["identity"]["learning_rate"], view.record["identity"]["weight_decay"])
            for view in views
        )
        shown = ", ".join(f"{rate:g}/{decay:g}: {loss - losses[0][0]:+.3f}" for loss, rate, decay in losses[1:])
        rows.append([name, f"{losses[0][1]:g}/{losses[0][2]:g}", f"{losses[0][0]:.4f}", shown])
    return table(["arm", "best rate/decay", "nats/token", "the others, above it"], rows) if rows else "Not run yet."


def state(store: RunStore, study: str) -> str:
    """How much of the plan is published."""
    plan = little_text.study(study).plan(store)
    done, every = int((plan["state"] == "finished").sum()), len(plan)
    if done == every:
        return f"All {every} runs are published."
    return f"**Provisional**: {done} of {every} planned runs are published."


def figures(store: RunStore) -> str:
    """All figures, as markdown."""
    parts = []
    for study in little_text.UNIQUE:
        if study not in store.studies():
            continue
        corpus = store.study(study)["corpus"]
        parts.append(f"### {corpus['train_tokens']:,} unique tokens (`{study}`)\n\n{state(store, study)}")
        parts.append(f"**Equal realised training FLOPs**\n\n{arms_table(store, study, at_tokens=False)}")
        parts.append(f"**Equal tokens**\n\n{arms_table(store, study, at_tokens=True)}")
        parts.append(f"**Does it matter where the steps are?**\n\n{controls_table(store, study)}")
        parts.append(f"**Claims**\n\n{targets_table(store, study)}")
        parts.append(f"**Tuning**\n\n{tuning_table(store, study)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
