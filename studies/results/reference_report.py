"""The figures of reference.md, from the records beside it.

python studies/results/reference_report.py            print them
python studies/results/reference_report.py --write    put them into reference.md, between its two markers
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from haltscale.platform.analysis import (
    LawFit,
    Refusal,
    SeedNoise,
    equivalent,
    fit_power_law,
    fit_recurrence,
    fit_surface,
    importance,
    isoflop,
    matched_points,
    mean_difference,
    pareto,
    seed_noise,
    usable,
    verdict,
)
from haltscale.platform.analysis.estimates import Estimate
from haltscale.platform.arms import OLD_CONTROLS, controls_of, shown
from haltscale.platform.markdown import report_main, table
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps import report
from haltscale.studies import reference, reference_tuning

FOLDER = Path(__file__).parent
PAGE = FOLDER / "reference.md"
SCRIPT = "studies/results/reference_report.py"


def load(store: RunStore) -> pd.DataFrame:
    """The finished runs of the reference study, with the ``budget`` (FLOPs) of each, and whether it is ``compared``:
    has the one setting of its method that all points share."""
    frame = usable(report.results(store, "reference"), ["flops_realised"]).runs
    logs = np.log(np.array(reference.BUDGETS))
    nearest = np.abs(np.log(frame["flops_realised"].to_numpy(dtype=float))[:, None] - logs).argmin(axis=1)
    frame["budget"] = np.array(reference.BUDGETS)[nearest]
    frame = frame.reindex(columns=frame.columns.union([*reference.COMPARED], sort=False))
    other = pd.concat([frame[name] != value for name, value in reference.COMPARED.items()], axis=1).any(axis=1)
    frame["compared"] = ~(frame["method"].eq("adaptive") & other)
    return frame


def estimated(value: Estimate | Refusal) -> str:
    """A number with its interval, or why there is none."""
    if isinstance(value, Refusal):
        return f"none: {value.reason}"
    number = f"{value.value:.3g} [{value.low:.3g} to {value.high:.3g}]"
    return number if value.identifiable else f"{number}, {value.problem}"


def published(store: RunStore) -> str:
    """How much of each study has run, of what it plans for the methods whose rates are tuned."""
    rows = []
    for study, sweep in (("reference", reference.sweep()), ("reference-tuning", reference_tuning.sweep())):
        runs, planned = report.results(store, study), len(sweep)
        seconds, flops = runs["wall_seconds"].sum(), runs["flops_realised"].sum()
        rows.append([study, str(len(runs)), str(planned), f"{seconds / 3600:.1f}", f"{flops:.2g}"])
    waiting = [m for m in [*reference.METHODS, reference.Method.FIXED] if m not in reference.rates()]
    text = table(["study", "runs finished", "planned now", "hours of training", "realised FLOPs"], rows)
    return f"{text}\n\nMethods that wait for their learning rates: {', '.join(waiting) or 'none'}."


def losses(frame: pd.DataFrame) -> str:
    """Held-out loss by method, size and budget; the mean where there are several seeds."""
    frame = frame[frame["compared"]]
    points = sorted({(b, s) for b, s in zip(frame["budget"], frame["size"], strict=True)}, key=_order)
    rows = []
    for method in dict.fromkeys(["vanilla", "adaptive", "shuffled", "fixed", *map(str, reference.METHODS)]):
        cells = [method]
        for budget, size in points:
            found = frame[frame["method"].eq(method) & frame["budget"].eq(budget) & frame["size"].eq(size)]["loss"]
            several = f" ({len(found)})" if len(found) > 1 else ""
            cells.append(f"{found.mean():.3f}{several}" if len(found) else "–")
        if set(cells[1:]) != {"–"}:
            rows.append(cells)
    return table(["method", *(f"{budget:.0e}, {size}" for budget, size in points)], rows)


def _order(point: tuple[float, str]) -> tuple[float, int]:
    return point[0], reference.LADDER.index(point[1])


def paired(frame: pd.DataFrame, method: str, control: str) -> pd.DataFrame:
    """A row per point (``size``, ``budget``, ``seed``) that both have: ``difference`` in loss, nats per token."""
    one, other = (frame[frame["method"].eq(m) & frame["compared"]] for m in (method, control))
    return matched_points(one, other, "budget")


def against(frame: pd.DataFrame, pairs: list[tuple[str, str]]) -> str:
    """Mean differences in loss at equal budget, size and seed."""
    rows = []
    for method, control in pairs:
        found = paired(frame, method, control)
        if len(found):
            value = mean_difference(found["difference"])
            better = int((found["difference"] < 0).sum())
            budgets = found.groupby("budget")["difference"].mean()
            trend = ", ".join(f"{difference:+.3f} at {budget:.0e}" for budget, difference in budgets.items())
            decided = "none: old control" if control in OLD_CONTROLS else verdict(value)
            rows.append([f"{method} − {control}", f"{better} of {len(found)}", estimated(value), decided, trend])
    return table(["", "lower at", "mean difference, nats/token", "verdict", "by budget, FLOPs"], rows)


def halting(frame: pd.DataFrame) -> str:
    """The adaptive runs beside their controls: steps and loss."""
    rows = []
    for run in sorted(frame[frame["method"].eq("adaptive") & frame["compared"]].to_dict("records"), key=_run_order):
        cells = [f"{run['budget']:.0e}, {run['size']}, seed {run['seed']:.0f}"]
        cells += [f"{run[name]:.2f}" for name in ("mean_steps", "easy_steps", "hard_steps")] + [f"{run['loss']:.3f}"]
        for control in ("shuffled", "fixed"):
            same = frame[
                frame["method"].eq(control)
                & frame["budget"].eq(run["budget"])
                & frame["size"].eq(run["size"])
                & frame["seed"].eq(run["seed"])
            ]
            cells.append(f"{same['loss'].iloc[0]:.3f} at {same['mean_steps'].iloc[0]:.2f}" if len(same) else "–")
        rows.append(cells)
    old = [f"{shown(control)} at steps" for control in OLD_CONTROLS[::-1]]
    return table(["point", "steps", "easy", "hard", "learned", *old], rows)


def same_weights(store: RunStore, frame: pd.DataFrame) -> str:
    """The compared adaptive runs' weights with other halting at evaluation, where ``haltscale evaluate --controls`` has
    read them: differences in loss at the same tokens, and how far the router is from the best depth of each token."""
    rows, differences = [], []
    for run in sorted(frame[frame["method"].eq("adaptive") & frame["compared"]].to_dict("records"), key=_run_order):
        found = store.later_evaluations("reference", run["key"]).get("controls")
        if not found or not found["oracle"]:
            continue
        arms, oracle = {arm["name"]: arm for arm in found["arms"]}, found["oracle"]
        less = {name: arms[name]["minus_learned"] for name in ("shuffled", "fixed", "full")}
        differences.append({name: change["mean"] for name, change in less.items()})
        cells = [f"{run['budget']:.0e}, {run['size']}, seed {run['seed']:.0f}", f"{arms['learned']['mean_steps']:.2f}"]
        cells += [f"{change['mean']:+.4f} [{change['low']:+.4f} to {change['high']:+.4f}]" for change in less.values()]
        cells += [f"{oracle[name]['mean']:.3f}" for name in ("router_gap", "gap")]
        related = oracle["rank_correlation"]  # none where the steps never vary
        cells.append("–" if related is None else f"{related:.2f}")
        rows.append(cells)
    if not rows:
        return "No run has been evaluated with `--controls` yet."
    means = [estimated(mean_difference(pd.Series([row[name] for row in differences]))) for name in differences[0]]
    headings = ["point", "steps", *(f"{name} − learned" for name in differences[0])]
    headings += ["router − oracle", "full depth − oracle", "rank correlation"]
    return table(headings, [*rows, [f"mean over {len(rows)}", "", *means, "", "", ""]])


def _run_order(run: Mapping[Hashable, Any]) -> tuple[float, int, float]:
    return float(run["budget"]), reference.LADDER.index(run["size"]), float(run["seed"])


def frontier(frame: pd.DataFrame, noise: SeedNoise | Refusal) -> str:
    """The runs that none beats in both compute and loss, with the interval that seeds give a single run."""
    reach = None if isinstance(noise, Refusal) else 1.96 * noise.deviation.value
    rows = []
    for run in pareto(frame[frame["compared"]]).to_dict("records"):
        interval = f" [{run['loss'] - reach:.3f} to {run['loss'] + reach:.3f}]" if reach else ""
        numbers = [f"{run['loss']:.3f}{interval}", f"{run['bits_per_byte']:.3f}", f"{run['mean_steps']:.2f}"]
        rows.append([f"{run['flops_realised']:.2e}", run["method"], run["size"], *numbers])
    return table(["realised FLOPs", "method", "size", "nats/token", "bits/byte", "steps"], rows)


def exponents(frame: pd.DataFrame) -> str:
    """Laws of each method, or why there are none."""
    runs = frame[frame["compared"]]
    rows: list[list[str]] = []
    laws: dict[str, LawFit | Refusal] = {}
    for name, own in runs.groupby("method", sort=True):
        method = str(name)
        laws[method], surface, profiles = fit_power_law(pareto(own)), fit_surface(own), isoflop(own)
        found = {
            "alpha of L(C), best runs": _of(laws[method], "alpha"),
            "m of N_opt = k C^m, isoFLOP": profiles if isinstance(profiles, Refusal) else profiles.exponent,
            "a of L(N, D)": _of(surface, "a"),
            "b of L(N, D)": _of(surface, "b"),
        }
        rows += [[method, quantity, estimated(value)] for quantity, value in found.items()]
    if {"adaptive", "vanilla"} <= set(laws):
        rows.append(
            ["adaptive", "vanilla's FLOPs for the same loss", estimated(_worth(laws["adaptive"], laws["vanilla"]))]
        )
    recurrence = fit_recurrence(runs)
    if isinstance(recurrence, Refusal):
        return table(["method", "quantity", "value"], [*rows, ["all", "phi, worth of a pass", estimated(recurrence)]])
    rows += [[method, "phi, worth of a pass", estimated(phi)] for method, phi in recurrence.phi.items()]
    for control in controls_of("adaptive", recurrence.phi):
        rows.append(["adaptive", f"phi minus {control}'s", estimated(recurrence.advantage("adaptive", control))])
    return table(["method", "quantity", "value"], rows)


def _of(law: LawFit | Refusal, name: str) -> Estimate | Refusal:
    return law if isinstance(law, Refusal) else law.estimates[name]


def _worth(method: LawFit | Refusal, control: LawFit | Refusal) -> Estimate | Refusal:
    worth = equivalent(method, control)
    return worth if isinstance(worth, Refusal) else worth.mean


def pressed(frame: pd.DataFrame) -> str:
    """lam x beta x l_max at one point."""
    size, budget = reference.PRESSED
    runs = frame[
        frame["method"].eq("adaptive") & frame["size"].eq(size) & frame["budget"].eq(budget) & frame["seed"].eq(0)
    ].sort_values(["l_max", "lam", "beta"])
    rows = [
        [*(f"{run[name]:g}" for name in ("lam", "beta", "l_max")), f"{run['loss']:.3f}", f"{run['mean_steps']:.2f}"]
        for run in runs.to_dict("records")
    ]
    shares = importance(runs, ["lam", "beta", "l_max"])
    text = table(["λ", "β", "l_max", "nats/token", "steps"], rows)
    if isinstance(shares, Refusal):
        return f"{text}\n\nShares of the loss's variance: none, {shares.reason}."
    parts = [f"{r['parameter']} {r['share']:.0%} (chance: {r['chance']:.0%})" for r in shares.to_dict("records")]
    return f"{text}\n\nShares of the loss's variance, each alone: {', '.join(parts)}."


def tuned(store: RunStore) -> str:
    """Losses of the rates that were tried."""
    rows: dict[tuple[str, str], dict[float, float]] = {}
    for run in store.runs("reference-tuning"):
        identity = run.record["identity"]
        at = rows.setdefault((identity["method"], identity["size"]), {})
        at[identity["learning_rate"]] = run.record["loss"]
    rates = sorted({rate for found in rows.values() for rate in found})
    cells = [
        [method, size, *(_marked(found, rate) for rate in rates)] for (method, size), found in sorted(rows.items())
    ]
    edges = [
        f"{method} {size}"
        for (method, size), found in sorted(rows.items())
        if min(found, key=found.__getitem__) in _ends(found)
    ]
    text = table(["method", "size", *(f"{rate:g}" for rate in rates)], cells)
    return f"{text}\n\nBest at an end of what was tried, which only bounds the best rate: {', '.join(edges) or 'none'}."


def _ends(found: dict[float, float]) -> tuple[float, float]:
    return min(found), max(found)


def _marked(found: dict[float, float], rate: float) -> str:
    if rate not in found:
        return "–"
    return f"**{found[rate]:.3f}**" if found[rate] == min(found.values()) else f"{found[rate]:.3f}"


def answer(frame: pd.DataFrame) -> str:
    """The study's question, and what its controls say, in a sentence each."""
    openings = {
        "vanilla": "At equal realised FLOPs, the loss of adaptive is",
        "adaptive/shuffled": "Beside its own steps at other tokens, it is",
        "adaptive/fixed": "Beside its own steps spread evenly, it is",
    }
    lines = []
    for control, beginning in openings.items():
        found = paired(frame, "adaptive", control)
        value = mean_difference(found["difference"])
        number = (
            value.reason if isinstance(value, Refusal) else f"{estimated(value)} nats/token over {len(found)} points"
        )
        lines.append(f"- {beginning} **{verdict(value)}**: {number}.")
    lines.append("- The published *shuffled* and *fixed* are old controls, which enter no verdict (docs/controls.md).")
    return "\n".join(lines)


def figures(store: RunStore) -> str:
    """All of it."""
    frame = load(store)
    noise = seed_noise(frame)
    deviation = noise if isinstance(noise, Refusal) else noise.deviation
    others = [str(m) for m in dict.fromkeys(frame["method"]) if m != "vanilla"]
    parts = {
        "The answer so far": answer(frame),
        "What has run": published(store),
        "Held-out loss, nats per token": losses(frame),
        "Is it worth its FLOPs?": against(frame, [(method, "vanilla") for method in others]),
        "Is it where, or how long?": against(
            frame, [("adaptive", control) for control in ("adaptive/shuffled", "adaptive/fixed", "shuffled", "fixed")]
        )
        + "\n\n"
        + halting(frame),
        "Same weights, other halting": same_weights(store, frame),
        "Seeds": f"Standard deviation between seeds, nats/token: {estimated(deviation)}.",
        "Frontier": frontier(frame, noise),
        "Exponents": exponents(frame),
        "How hard to press": pressed(frame),
        "Learning rates": tuned(store),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


if __name__ == "__main__":
    report_main(__doc__, PAGE, SCRIPT, lambda: figures(RunStore(FOLDER)))
