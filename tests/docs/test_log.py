"""The index of LOG.md is complete, its links resolve, and the newest finding comes first."""

import re

from jobs import ROOT

LOG = (ROOT / "LOG.md").read_text(encoding="utf-8")
INDEX = LOG.partition("\n## 2")[0]
HEADINGS = re.findall(r"^### (.+)$", LOG, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """The fragment that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def test_the_index_lists_every_finding_once_in_the_order_of_the_page() -> None:
    listed = re.findall(r"^\| \d{4}-\d\d-\d\d \| \[[^]]+\]\(#([^)]+)\) \| \S", INDEX, flags=re.MULTILINE)
    assert listed == [anchor(heading) for heading in HEADINGS]
    assert len(set(listed)) == len(listed)


def test_every_link_resolves() -> None:
    anchors = {anchor(heading) for heading in HEADINGS}
    assert set(re.findall(r"\]\(#([^)]+)\)", LOG)) == anchors


def test_dates_descend_and_agree_with_the_index() -> None:
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d) · ", LOG, flags=re.MULTILINE)
    assert dates == sorted(dates, reverse=True)
    of_findings = []
    for section in re.split(r"^## (?=\d)", LOG, flags=re.MULTILINE)[1:]:
        of_findings += [section[:10]] * len(re.findall(r"^### ", section, flags=re.MULTILINE))
    assert re.findall(r"^\| (\d{4}-\d\d-\d\d) \|", INDEX, flags=re.MULTILINE) == of_findings
