"""Generated parts of markdown pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from haltscale.platform.markdown import END, begin, report_main, table, with_figures

SCRIPT = "studies/results/some.py"
MARKED = f"a {begin(SCRIPT)} old {END} b"
NEW = f"a {begin(SCRIPT)}\n\nnew\n\n{END} b"


def test_a_table_has_a_rule_below_its_headings() -> None:
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_figures_replace_what_is_between_the_markers() -> None:
    assert with_figures(MARKED, SCRIPT, "new") == NEW
    assert with_figures(NEW, SCRIPT, "new") == NEW


@pytest.mark.parametrize("page", ["no markers", f"{begin(SCRIPT)} no end", f"no beginning {END}"])
def test_a_missing_marker_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        with_figures(page, SCRIPT, "new")


def test_a_report_prints_or_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKED)
    monkeypatch.setattr(sys, "argv", ["some.py"])
    report_main("Some figures.", page, SCRIPT, lambda: "new")
    assert capsys.readouterr().out == "new\n"
    assert page.read_text() == MARKED
    monkeypatch.setattr(sys, "argv", ["some.py", "--write"])
    report_main("Some figures.", page, SCRIPT, lambda: "new")
    assert page.read_text() == NEW
