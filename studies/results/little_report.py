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
from haltscale.platform.analysis.laws import fit_recurrence
from haltscale.platform.analysis.matched import document_frame
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.analysis.runs import TUNING
from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunState, RunStore, RunView
from haltscale.platform.sweeps import report
from haltscale.studies import little_text

FOLDER = Path(__file__).parent
PAGE = FOLDER / "little-text.md"
SCRIPT = "studies/results/little_report.py"
PLAIN, WIDER, PAPERS = "vanilla", "vanilla, wider", "adaptive, the paper's"
AROUND = ("lam", "beta", "l_max")
LADDER = ("fixed", "shuffled", "posthoc-change", "posthoc-divergence", "posthoc-confidence", "oracle", "none", "full")
KINDS = ("word_start", "word_inside", "number", "punctuation", "space")
SHOWN = slice(96, 176)
"""Tokens of the probe text that are shown with their steps."""


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
    name = "adaptive, labels" if options["gate_target"] == little_text.LABELS["gate_target"] else PAPERS
    if record["role"] != "control" and options["gate_target"] == "readout":
        changed = [name for name in AROUND if options[name] != little_text.PAPER[name]]
        name += "".join(f", {option} {options[option]:g}" for option in changed)
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
    found = {
        name: views
        for (name, tokens), views in arms(store, study).items()
        if tokens is at_tokens and not name.startswith(f"{PAPERS}, ")
    }
    plain = best_plain(found)
    references = list(dict.fromkeys((PLAIN, plain)))
    unique = store.study(study)["corpus"]["train_tokens"]
    rows = []
    for name, views in found.items():
        values = views[0].record.get("recipe", {}).get("values", {})
        row = [name, str(len(views)), f"{values.get('learning_rate', float('nan')):g}"]
        row += [f"{values.get('weight_decay', float('nan')):g}"]
        row += [f"{mean(views, 'loss'):.4f}", f"{np.mean([best_loss(store, view) for view in views]):.4f}"]
        row += ["–" if name == other else difference(views, found.get(other, [])) for other in references]
        row += [f"{mean(views, 'mean_steps'):.2f}", f"{mean(views, 'tokens') / unique:.1f}"]
        rows.append([*row, f"{mean(views, 'flops_realised'):.3g}"])
    headings = ["arm", "seeds", "rate", "weight decay", "nats/token, last", "best"]
    headings += [*(f"above {reference} (95 %)" for reference in references), "mean steps", "epochs", "realised FLOPs"]
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


def sensitivity_table(store: RunStore, study: str) -> str:
    """The paper's method with one option changed, each at its own recipe."""
    found = {name: views for (name, tokens), views in arms(store, study).items() if not tokens}
    rows = []
    for name, views in found.items():
        if not name.startswith(f"{PAPERS}, "):
            continue
        values = views[0].record["recipe"]["values"]
        row = [name.removeprefix(f"{PAPERS}, "), str(len(views))]
        row += [f"{values['learning_rate']:g}/{values['weight_decay']:g}", f"{mean(views, 'mean_steps'):.2f}"]
        row += [f"{mean(views, 'loss'):.4f}", difference(views, found.get(PAPERS, []))]
        rows.append(row)
    compared = ", ".join(f"{name} {little_text.PAPER[name]:g}" for name in AROUND)
    headings = ["changed", "seeds", "rate/decay", "mean steps", "nats/token", f"above {compared} (95 %)"]
    return table(headings, rows) if rows else "Not run yet."


def ladder_table(store: RunStore, study: str) -> str:
    """The finished weights of the paper's method, halted by other rules at equal mean steps, and at full depth: loss
    above the router's choice, where ``haltscale evaluate RUN --controls`` has measured it."""
    rows = []
    for view in arms(store, study).get((PAPERS, False), []):
        found = store.later_evaluations(study, view.key).get("controls")
        if not found:
            continue
        rules = {arm["name"]: arm for arm in found["arms"]}
        row = [str(view.record["identity"]["seed"]), f"{rules['learned']['mean_steps']:.3f}"]
        for name in LADDER:
            change = rules[name]["minus_learned"]
            row.append(f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]")
        rows.append(row)
    headings = ["seed", "mean steps", *(name.replace("posthoc-", "post hoc: ") for name in LADDER)]
    return table(headings, rows) if rows else "Not evaluated yet."


def where_table(store: RunStore, study: str) -> str:
    """Which tokens take the steps of the paper's method, and what the steps change for those that take them."""
    views = arms(store, study).get((PAPERS, False), [])
    summaries = [
        store.halting_summary(study, view.key, steps[-1])
        for view in views
        if (steps := store.halting_steps(study, view.key))
    ]
    if not summaries:
        return "Not run yet."
    every = sum(summary["tokens"] for summary in summaries)
    parts = {kind.replace("_", " "): [_of_class(summary, kind) for summary in summaries] for kind in KINDS}
    parts["the tenth that is easiest to predict"] = [summary["by_surprisal"][0] for summary in summaries]
    parts["the tenth that is hardest"] = [summary["by_surprisal"][-1] for summary in summaries]
    rows = []
    for name, found in parts.items():
        weights = np.array([row["tokens"] for row in found])
        steps, loss = (np.average([row[what] for row in found], weights=weights) for what in ("mean_steps", "loss"))
        rows.append([name, f"{weights.sum() / every:.0%}", f"{steps:.2f}", f"{loss:.2f}"])
    text = table(["tokens", "share", "mean steps", "nats/token"], rows)
    rows = []
    for k in range(1, 1 + max(len(summary["gain_by_step"]) for summary in summaries)):
        found = [row for summary in summaries for row in summary["gain_by_step"] if row["step"] == k]
        share = sum(row["tokens"] for row in found) / sum(summary["oracle"]["tokens"] for summary in summaries)
        rows.append([str(k), f"{share:.1%}", ", ".join(f"{row['mean']:+.3f}" for row in found)])
    headings = ["after step", "tokens that take it", "loss minus that after no step, by seed, nats/token"]
    return f"{text}\n\n{table(headings, rows)}"


def _of_class(summary: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return next(dict(row) for row in summary["by_token_class"] if row["value"] == kind)


def passage(store: RunStore, study: str) -> str:
    """A passage of the probe text; tokens that take latent steps in the first seed carry their number."""
    views = arms(store, study).get((PAPERS, False), [])
    if not views:
        return "Not run yet."
    view = views[0]
    tokens = store.probe(study, view.key, store.probe_steps(study, view.key)[-1])[SHOWN]
    shown = [
        text.replace("\n", " ") + (f"<sub>{steps}</sub>" if steps else "")
        for text, steps in zip(tokens["text"], tokens["steps"], strict=True)
    ]
    return "> " + "".join(shown).strip()


def recurrence(store: RunStore, study: str) -> str:
    """phi, or why it cannot be told."""
    frame = report.results(store, study)
    found = fit_recurrence(frame[frame["role"].ne(TUNING)])
    if isinstance(found, Refusal):
        return f"phi, the worth of a pass, is not identified: {found.reason}."
    rows = [
        [method, f"{phi.value:.2f} [{phi.low:.2f}, {phi.high:.2f}]", phi.problem or "identified"]
        for method, phi in found.phi.items()
    ]
    return table(["method", "phi, the worth of a pass (95 %)", ""], rows)


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
        heading = (
            "**Other rules on the same weights** (the paper's method; nats/token above its router, 95 % over documents)"
        )
        parts.append(f"{heading}\n\n{ladder_table(store, study)}")
        parts.append(f"**Where the latent steps go** (the paper's method)\n\n{where_table(store, study)}")
        parts.append(f"A passage of the probe text, latent steps as subscripts:\n\n{passage(store, study)}")
        parts.append(f"**Sensitivity of the paper's method**\n\n{sensitivity_table(store, study)}")
        parts.append(f"**Worth of a pass**\n\n{recurrence(store, study)}")
        parts.append(f"**Claims**\n\n{targets_table(store, study)}")
        parts.append(f"**Tuning**\n\n{tuning_table(store, study)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
