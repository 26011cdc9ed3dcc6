"""The report: one file that holds the study, whatever state it is in, and asks no network for anything."""

import re

import pytest

from haltscale.dashboard import html_report
from haltscale.platform import cli
from haltscale.platform.store import StoreError

STUDY = "quick"


def test_a_study_in_one_file(author, tmp_path, capsys):
    author.troubled_study()
    out = tmp_path / "page.html"
    assert html_report.main([STUDY, "--out", str(out), "--store", author.store.root]) == 0
    page = out.read_text()
    body = page[page.index("<body>") :]
    assert not re.search(r'(src|href)="?https?:', body)
    assert "Loss against training compute" in body
    assert "vanilla, adaptive: 3 of the 6 runs that a fit needs" in body
    assert "ran out of memory" in body
    assert body.count("<figure") >= 3
    assert "adaptive · 4.2m · λ 1" in body


@pytest.mark.parametrize("plan", [[], ["a", "b"]])
def test_a_study_without_results(author, plan):
    author.plan(plan)
    assert "No run has been evaluated yet" in html_report.document(author.store, STUDY)


def test_text_from_the_store_is_escaped(author):
    author.begin("k", label="<script>alert(1)</script>")
    author.status("k", state="failed", error="<img src=x onerror=alert(2)>")
    author.plan(["k"])
    body = html_report.document(author.store, STUDY).split("<body>")[1]
    assert "<script>alert" not in body
    assert "<img" not in body
    assert "&lt;script&gt;alert(1)" in body


def test_an_unknown_study_is_a_sentence(author, capsys):
    author.plan([])
    with pytest.raises(StoreError, match="there are: quick"):
        html_report.document(author.store, "other")
    assert html_report.main(["other", "--store", author.store.root]) == 1
    assert "no study 'other'" in capsys.readouterr().err


def test_the_command_line_hands_the_report_over(monkeypatch):
    called: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda path, arguments: called.append(arguments))
    cli.main(["report", STUDY, "--out", "x.html"])
    assert called[0][1:] == ["-m", "haltscale.dashboard.html_report", STUDY, "--out", "x.html"]
