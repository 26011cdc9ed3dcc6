"""A study as one HTML file that needs no server and no network: ``haltscale report STUDY --out FILE.html``."""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from haltscale.dashboard import data, figures, halting_figures, law_figures, style, sweep_figures
from haltscale.dashboard.data import FlopsKind, StudyView, plotted
from haltscale.platform import analysis
from haltscale.platform.analysis import Estimate, LawFit, Refusal
from haltscale.platform.store import RunStore, StoreError
from haltscale.platform.sweeps.report import judged_targets

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1.5rem;
       color: light-dark(#14202b, #e6ecf1); background: light-dark(#fff, #0f151b); }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } .muted { color: light-dark(#55636f, #a3b1bd); }
figure { margin: 1rem 0; background: #fff; border: 1px solid #d5dde5; border-radius: .5rem; padding: .5rem; }
figcaption { color: #55636f; padding: 0 .5rem; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid light-dark(#d5dde5, #2e3b47); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .refused { border-left: 4px solid #E69F00; padding-left: 1rem; }
"""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
"""The page needs no other, whatever the text of the store says."""
COLUMNS = {
    "label": "run",
    "state": "state",
    "parameters": "parameters",
    "tokens_done": "tokens",
    "loss": "loss, nats/token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "mean_steps": "latent steps",
    "passes": "passes/token",
    "flops_realised": "FLOPs, realised",
    "flops_paper": "FLOPs, paper",
    "wall_seconds": "training, s",
}
MOST_RUNS = 2_000
MOST_ROWS = 40


def document(store: RunStore, study: str) -> str:
    """The page.

    Raises:
        StoreError: there is no such study, or it cannot be read.
    """
    if study not in store.studies():
        known = ", ".join(store.studies()) or "none"
        raise StoreError(f"no study {study!r} in {store.root}; there are: {known}")
    view = data.load_study(store, study)
    for problem in view.problems:
        if problem.where == study and view.runs.empty:
            raise StoreError(problem.what)
    parts = [
        *_head(view),
        *_targets(store, study),
        *_scaling(view),
        *_sweep(view),
        *_halting(view),
        *_runs(view),
        *_meaning(view),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(study)} · haltscale</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head>\n<body><main>{body}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _head(view: StudyView) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in view.runs["state"].value_counts().items())
    flops = style.scientific(float(view.runs["flops_realised"].sum()))
    hours = style.three(float(view.runs["wall_seconds"].sum()) / 3600)
    return [
        f"<h1>{_text(view.name)}</h1>",
        f"<p><strong>{_text(view.question)}</strong></p>" if view.question else "",
        f"<p>{_text(states) or 'no runs'}; {flops} realised training FLOPs, {hours} h of training.</p>",
        f'<p class="muted">{_text(view.note)}</p>' if view.note else "",
        *(f'<p class="refused">{_text(p.where)}: {_text(p.what)}</p>' for p in view.problems),
    ]


def _targets(store: RunStore, study: str) -> list[str]:
    """What the study set out to show or to reproduce, and whether it did."""
    rows = judged_targets(store, study)
    if rows.empty:
        return []
    names = {"claim": "target", "verdict": "verdict", "figure": "figure", "reason": "because", "source": "source"}
    return ["<h2>Targets of the study</h2>", _table(rows[list(names)].rename(columns=names))]


def _figure(figure: go.Figure, caption: str) -> str:
    copy = go.Figure(figure).update_layout(template="plotly_white", margin={"l": 60, "r": 30, "t": 90, "b": 60})
    drawn = copy.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
    return (
        f'<figure role="group" aria-label="{_text(caption)}">{drawn}<figcaption>{_text(caption)}</figcaption></figure>'
    )


def _table(frame: pd.DataFrame) -> str:
    cells = [
        "".join(f"<td>{_text(style.three(value) if isinstance(value, float) else value)}</td>" for value in row)
        for row in frame.itertuples(index=False)
    ]
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in frame.columns)
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _refused(reasons: dict[str, str]) -> str:
    lines = "".join(f"<li>{_text(who)}: {_text(reason)}</li>" for who, reason in reasons.items())
    return f'<div class="refused">Not fitted:<ul>{lines}</ul></div>' if reasons else ""


def told(one: Estimate) -> str:
    """A number with its interval, or why there is none."""
    if not one.identifiable:
        return one.problem
    return f"{style.three(one.value)} [{style.three(one.low)}, {style.three(one.high)}]"


def _scaling(view: StudyView) -> list[str]:
    kind, runs = FlopsKind.REALISED, data.analysed(view.runs)
    if plotted(view.runs, kind).empty:
        return ["<p>No run has been evaluated yet.</p>"]
    laws: dict[str, LawFit] = {}
    refused: dict[str, str] = {}
    for method, part in runs.groupby("method", sort=False):
        found = analysis.fit_power_law(part, f"flops_{kind}")
        if isinstance(found, Refusal):
            refused[str(method)] = found.reason
        else:
            laws[str(method)] = found
    figure = law_figures.scaling(view.runs, kind, laws=laws or None, frontier=analysis.pareto(runs, f"flops_{kind}"))
    parts = [
        "<h2>Loss against training compute</h2>",
        _figure(figure, "Validation loss against realised training FLOPs"),
    ]
    if laws:
        rows = [
            {"method": method, **{name: told(one) for name, one in law.estimates.items()}, "runs": len(law.runs)}
            for method, law in laws.items()
        ]
        parts += ["<h3>L(C) = E + A C^−α, 95 % intervals</h3>", _table(pd.DataFrame(rows))]
    reference = "vanilla" if "vanilla" in laws else next(iter(laws), "")
    multipliers = {}
    for method, law in laws.items():
        if method != reference:
            compared = analysis.equivalent(law, laws[reference])
            if isinstance(compared, Refusal):
                refused[f"{method} against {reference}"] = compared.reason
            else:
                multipliers[method] = compared
    if multipliers:
        parts.append(
            _figure(
                law_figures.multipliers(multipliers, reference),
                f"How many times as much realised compute {reference} needs for the same loss: "
                + "; ".join(f"{method} {told(one.mean)}" for method, one in multipliers.items()),
            )
        )
    phi = analysis.fit_recurrence(runs)
    if isinstance(phi, Refusal):
        refused["φ, what a pass is worth"] = phi.reason
    else:
        marks = {0.0: "worth nothing", 1.0: "worth a new block"}
        parts.append(_figure(law_figures.intervals(phi.phi, "φ", marks), f"What a pass is worth. {phi.note}"))
    noise = analysis.seed_noise(runs)
    if isinstance(noise, Refusal):
        refused["seed noise"] = noise.reason
    else:
        parts.append(f"<p>Seed noise: {_text(told(noise.deviation))} nats/token.</p>")
    return [*parts, _refused(refused)]


def _sweep(view: StudyView) -> list[str]:
    parts = []
    for method, part in view.runs[view.runs["role"] != "tuning"].groupby("method", sort=False):
        names = [name for name in ("lam", "beta", "l_max") if part[name].nunique() > 1]
        if len(names) > 1:
            largest = max(part["size"], key=data.size_order)
            figure = sweep_figures.heat_maps(
                part[part["size"] == largest], names[0], names[1], names[2] if len(names) > 2 else None
            )
            parts += [
                f"<h2>Sweep of {_text(method)}, {_text(largest)}</h2>",
                _figure(figure, "Perplexity and latent steps"),
            ]
    return parts


def _halting(view: StudyView) -> list[str]:
    counted = data.thinking(view.runs).head(MOST_ROWS)
    if counted.empty:
        return []
    shares = figures.steps_share(counted)
    parts = ["<h2>Allocation of latent steps</h2>", _figure(shares, "Share of validation tokens by latent steps")]
    known = counted.dropna(subset=["well_steps", "badly_steps"])
    if len(known):
        parts.append(_figure(figures.easy_and_hard(known), "Mean latent steps of well- and badly-predicted tokens"))
    runs = view.runs[data.sound(view.runs) & view.runs["mean_steps"].gt(0)].head(500)
    parts.append(_figure(halting_figures.controls(runs), "Loss against mean latent steps"))
    return parts


def _runs(view: StudyView) -> list[str]:
    kept = [name for name in COLUMNS if view.runs[name].notna().any()]
    parts = ["<h2>Runs</h2>", _table(view.runs[kept].head(MOST_RUNS).rename(columns=COLUMNS))]
    if len(view.runs) > MOST_RUNS:
        parts.append(f"<p>and {len(view.runs) - MOST_RUNS} more.</p>")
    wrong = view.runs[view.runs["note"] != ""]
    parts += [
        f'<p class="refused">{_text(label)}: {_text(note)}</p>'
        for label, note in zip(wrong["label"], wrong["note"], strict=True)
    ]
    return parts


def _meaning(view: StudyView) -> list[str]:
    kinds = "".join(f"<li>FLOPs, {kind}: {_text(kind.meaning)}.</li>" for kind in FlopsKind)
    commits = ", ".join(sorted({commit[:12] for commit in view.runs["git_commit"] if commit}))
    corpus = ", ".join(f"{name} {value}" for name, value in view.corpus.items())
    return [
        "<h2>What the numbers mean</h2>",
        f"<ul>{kinds}<li>Loss: nats per token on held-out documents.</li>",
        f"<li>Corpus: {_text(corpus)}.</li><li>Commits: {_text(commits) or 'unknown'}.</li></ul>",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; an unknown study ends with a sentence and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="haltscale report",
        description="Write a study as one self-contained HTML file.",
        epilog="example: haltscale report quickstart --out quickstart.html",
    )
    parser.add_argument("study", help="a study in the store")
    parser.add_argument("--out", type=Path, help="the file to write (default: STUDY.html)")
    parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
    options = parser.parse_args(argv)
    try:
        page = document(RunStore(options.store), options.study)
    except (StoreError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    target = options.out or Path(f"{options.study}.html")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        sys.stderr.write(f"error: {target} cannot be written ({error}): name another file with --out\n")
        return 1
    sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
