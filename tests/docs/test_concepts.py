"""The glossary defines each term once, and the code names in it exist."""

import re
from dataclasses import fields

import pytest

from haltscale.model import HaltingTrace
from haltscale.model.adaptive import AdaptiveOptions
from haltscale.platform.run_table import RESULTS

from jobs import ROOT

PAGE = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
TERMS = [term.lower() for term in re.findall(r"\*\*([^*]+)\*\*", PAGE)]
PAPERS = {"the paper": "2602.08220", "ACT": "1603.08983", "PonderNet": "2107.05407"}


def test_no_term_is_defined_twice() -> None:
    assert len(TERMS) > 50
    assert len(TERMS) == len(set(TERMS))


@pytest.mark.parametrize("paper", PAPERS)
def test_the_sources_are_linked(paper: str) -> None:
    assert f"https://arxiv.org/abs/{PAPERS[paper]}" in PAGE


def test_code_names_exist() -> None:
    options = {field.name for field in fields(AdaptiveOptions)}
    assert {"lam", "beta", "l_max", "tau", "mixture", "router"} <= options & set(re.findall(r"`(\w+)`", PAGE))
    kinds = re.findall(r"`(flops_\w+)`", PAGE)
    assert len(kinds) == 3
    assert set(kinds) <= set(RESULTS)
    assert {"reach_BTK", "exit_BTK"} <= {field.name for field in fields(HaltingTrace)}
