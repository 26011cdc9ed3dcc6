"""A study as one HTML file that needs no server and no network: ``haltscale report STUDY --out FILE.html``.

It has the views that were pinned to the study, in order, and where there are none the main pages.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from haltscale.dashboard import data, export, headless, style
from haltscale.dashboard.data import FlopsKind, StudyView, plotted
from haltscale.dashboard.notes import Note, Notes
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
VIEWS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("answer", {}),
    ("compute", {"fits": "true", "frontier": "true"}),
    ("sensitivity", {}),
    ("halting", {}),
)
"""The pages of a report without pinned views."""
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
    notes, damaged = Notes(store, study).all()
    parts = [*_head(view), *_targets(store, study)]
    for note in notes:
        parts += _pinned(store, note, study)
    for name in damaged:
        parts.append(f'<p class="refused">The note {_text(name)} cannot be read and is left out.</p>')
    if not notes and plotted(view.runs, FlopsKind.REALISED).empty:
        parts.append("<p>No run has been evaluated yet.</p>")
    elif not notes:
        for page, query in VIEWS:
            parts += _view(store, study, page, query)
    body = "\n".join([*parts, *_runs(view), *_meaning(view)])
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
        f'<p class="muted">{_text(view.limits)}</p>' if view.demo else "",
        *(f'<p class="refused">{_text(p.where)}: {_text(p.what)}</p>' for p in view.problems),
    ]


def _targets(store: RunStore, study: str) -> list[str]:
    """What the study set out to show or to reproduce, and whether it did."""
    rows = judged_targets(store, study)
    if rows.empty:
        return []
    names = {"claim": "target", "verdict": "verdict", "figure": "figure", "reason": "because", "source": "source"}
    return ["<h2>Targets of the study</h2>", _table(rows[list(names)].rename(columns=names))]


def _figure(figure: go.Figure, title: str, caption: str) -> str:
    copy = export.on_paper(figure).update_layout(
        font={"size": 13}, margin={"l": 20, "r": 20, "t": 60, "b": 20}, autosize=True
    )
    drawn = copy.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
    told = f"<figcaption>{_text(unmarked(caption))}</figcaption>" if caption else ""
    return f'<figure role="group" aria-label="{_text(title)}">{drawn}{told}</figure>'


def _table(frame: pd.DataFrame) -> str:
    cells = [
        "".join(f"<td>{_text(style.three(value) if isinstance(value, float) else value)}</td>" for value in row)
        for row in frame.itertuples(index=False)
    ]
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in frame.columns)
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


# ---- views -----------------------------------------------------------------------------------------


def _pinned(store: RunStore, note: Note, study: str) -> list[str]:
    """A pinned view under its own title and text."""
    text = "".join(f"<p>{_text(part)}</p>" for part in note.text.split("\n") if part.strip())
    link = f"{note.page}?{urlencode(note.query, doseq=True)}"
    drawn = _view(store, study, note.page, note.query, pinned=True)
    return [f"<h2>{_text(note.title)}</h2>", text, *drawn, f'<p class="muted">View: {_text(link)}</p>']


def _view(
    store: RunStore, study: str, page: str, query: Mapping[str, str | Sequence[str]], *, pinned: bool = False
) -> list[str]:
    """A page as it stands at an address. Under a pinned view's own title it has none."""
    try:
        drawn = headless.draw(store.root, page, {**query, "study": study})
    except StoreError as error:
        return [f'<p class="refused">{_text(error)}</p>']
    parts: list[str] = []
    shown = drawn.parts
    for place, part in enumerate(shown):
        if isinstance(part, headless.Chart):
            behind = shown[place + 1] if place + 1 < len(shown) else None
            caption = behind.text if isinstance(behind, headless.Said) and behind.kind == "caption" else ""
            parts.append(_figure(part.figure, part.about.title, caption))
        elif isinstance(part, pd.DataFrame):
            parts.append(_table(part.head(MOST_ROWS)))
        elif part.kind == "caption" and place and isinstance(shown[place - 1], headless.Chart):
            continue  # stands under its figure
        elif not (pinned and part.kind == "title"):
            parts.append(_said(part))
    return parts


def _said(part: headless.Said) -> str:
    """Words of a page as HTML."""
    tag = {"title": "h2", "header": "h3", "subheader": "h4"}.get(part.kind)
    if tag:
        return f"<{tag}>{_text(unmarked(part.text))}</{tag}>"
    lines = unmarked(part.text).split("\n")
    inner = "".join(f"<p>{_text(line)}</p>" for line in lines if line.strip())
    look = {"caption": "muted", "markdown": ""}.get(part.kind, "refused")
    return f'<div class="{look}">{inner}</div>' if look else inner


def unmarked(text: str) -> str:
    """The words of the pages' Markdown: without icons, colours, emphasis and what :func:`layout.plain` put before."""
    text = re.sub(r"(?<!\\):material/\w+:", "", text)
    text = re.sub(r"(?<!\\):[a-z]+(?:-badge)?\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?<!\\)(\*\*|\*|`)", "", text)
    return re.sub(r"\\([^\w\s])", r"\1", text).strip()


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
    corpus = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in view.corpus.items()
        if isinstance(value, str | int | float)
    )
    return [
        "<h2>What the numbers mean</h2>",
        f"<ul>{kinds}<li>Loss: nats per token on held-out documents.</li>",
        f"<li>Corpus: {_text(corpus)}.</li><li>Commits: {_text(commits) or 'unknown'}.</li></ul>",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; an unknown study ends with a sentence and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="haltscale report",
        description="Write a study as one self-contained HTML file: the views pinned to it in the dashboard, in order, "
        "else its main pages.",
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
