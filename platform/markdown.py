"""Markdown pages whose figures are generated: tables, and text between two markers of a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

END = "<!-- end of figures -->"
"""Marker after the generated part."""


def begin(script: str) -> str:
    """The marker before the generated part, which names the script that writes it (a path from the repository)."""
    return f"<!-- figures: python {script} --write -->"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *rows])


def with_figures(page: str, script: str, figures: str) -> str:
    """The page with the text between its markers replaced.

    Args:
        page: markdown with the lines ``begin(script)`` and ``END``.
        script: that writes the figures.
        figures: markdown.

    Raises:
        ValueError: a marker is missing.
    """
    before, first, rest = page.partition(begin(script))
    _, last, after = rest.partition(END)
    if not first or not last:
        raise ValueError(f"the page needs the lines {begin(script)} and {END}")
    return f"{before}{first}\n\n{figures}\n\n{last}{after}"


def report_main(description: str, page: Path, script: str, figures: Callable[[], str]) -> None:
    """Command line of a report: print the figures, or with ``--write`` put them into the page.

    Args:
        description: for ``--help``.
        page: file with the two markers.
        script: path of the report from the repository's root.
        figures: makes the markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the figures into {page.name}")
    options = parser.parse_args()
    text = figures()
    if options.write:
        page.write_text(with_figures(page.read_text(encoding="utf-8"), script, text), encoding="utf-8")
    else:
        sys.stdout.write(text + "\n")
