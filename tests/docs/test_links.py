"""Every relative link of every page leads to a file, and every anchor to a heading."""

import re
from pathlib import Path

import pytest

from jobs import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "deploy/*.md", "benchmarks/*.md", "studies/results/*.md")
    for path in ROOT.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "LOG.md"} <= {path.name for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
