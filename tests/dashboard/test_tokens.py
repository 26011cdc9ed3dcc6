"""Token text is untrusted: everything is made visible, and nothing is ever markup."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from haltscale.dashboard import data, tokens
from haltscale.dashboard.tokens import Colour

STUDY = "quick"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("a b", "a b"),
        ("\n", "↵"),
        ("\t", "⇥"),
        ("\x00", "\\x00"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x7f", "\\x7f"),
        ("\u202eevil", "\\u202eevil"),
        ("\u200b", "\\u200b"),
        ("\u0301", "◌\u0301"),
        ("\ufffd", "\ufffd"),
        ("🤖", "🤖"),
        ("<b>", "<b>"),
        ("", "∅"),
        (None, "∅"),
        (float("nan"), "∅"),
    ],
)
def test_visible(text, shown):
    assert tokens.visible(text) == shown


def test_nothing_invisible_is_left(nasty):
    for text in nasty:
        shown = tokens.visible(text)
        assert shown
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in shown)


def test_payload_is_plain_json(author, nasty):
    author.begin("k")
    author.probe("k", step=1, histogram=[0.4, 0.3, 0.2, 0.1], words=nasty)
    events = data.probe(author.store, STUDY, "k", 1)
    payload = json.loads(json.dumps(tokens.payload(events, identifier="x"), allow_nan=False))
    assert payload["most"] == 3
    assert len(payload["palette"]) == 4
    assert [token["steps"] for token in payload["tokens"]] == events["steps"].tolist()
    assert sum(payload["tokens"][0]["exit"]) == pytest.approx(1, abs=1e-3)
    assert [token["break"] for token in payload["tokens"]] == ["\n" in text for text in nasty]


def test_payload_of_a_probe_with_missing_values(author):
    author.begin("k")
    author.probe("k", step=1, histogram=[1.0])
    events = data.probe(author.store, STUDY, "k", 1).assign(
        nll=None, reach=None, exit=None, expected_steps=float("nan")
    )
    payload = tokens.payload(events, identifier="x")
    assert payload["tokens"][0] | {"text": ""} == {
        "text": "",
        "break": False,
        "steps": 0,
        "nll": None,
        "expected": None,
        "reach": [],
        "exit": [],
        "by_step": [],
        "level": 0,
        "shown": "0",
        "need": "",
    }


@pytest.mark.parametrize(
    ("colour", "shown", "levels"),
    [
        (Colour.STEPS, ["0", "1", "2", "1"], [0, 1, 2, 1]),
        (Colour.SURPRISAL, ["0.2", "3", "9", "–"], [0, 3, 6, 0]),
        (Colour.GAIN, ["–", "+0.5", "-1", "+0.001"], [0, 6, 0, 3]),
    ],
)
def test_a_token_carries_the_number_behind_its_colour(author, colour, shown, levels):
    author.begin("k")
    author.probe("k", step=1, histogram=[1.0, 0.0, 0.0], words=("a", "b", "c", "d"))
    events = data.probe(author.store, STUDY, "k", 1).assign(
        steps=[0, 1, 2, 1], nll=[0.2, 3.0, 9.0, None], nll_by_step=[None, [3.5, 3.0], [8.0, 8.5, 9.0], [1.001, 1.0]]
    )
    payload = tokens.payload(events, identifier="x", colour=colour)
    assert [token["shown"] for token in payload["tokens"]] == shown
    assert [token["level"] for token in payload["tokens"]] == levels
    assert sum(level["count"] for level in payload["levels"]) == 4
    assert len({level["background"] for level in payload["levels"]}) == len(payload["levels"])


def test_a_token_says_what_it_needs_where_that_is_known(author):
    author.begin("k")
    author.probe("k", step=1, histogram=[0.0, 1.0], words=("2?a ", "c ", "d "), needs=(-1, 2, 0))
    events = data.probe(author.store, "quick", "k", 1)
    found = tokens.payload(events, identifier="x")
    assert [(token["need"], token["shown"]) for token in found["tokens"]] == [("–", "1/–"), ("2", "1/2"), ("0", "1/0")]
    assert "needs" in found["legend"]
    other = tokens.payload(events, identifier="x", colour=tokens.Colour.SURPRISAL)
    assert "/" not in other["tokens"][0]["shown"]
    assert other["tokens"][1]["need"] == "2"
    unknown = tokens.payload(events.drop(columns="need"), identifier="x")
    assert [(token["need"], token["shown"]) for token in unknown["tokens"]] == [("", "1")] * 3


def test_a_long_probe_is_cut_and_says_so(author):
    author.begin("k")
    author.probe("k", step=1, histogram=[0.5, 0.5], words=("a",) * (tokens.MOST_TOKENS + 7))
    payload = tokens.payload(data.probe(author.store, STUDY, "k", 1), identifier="x")
    assert len(payload["tokens"]) == tokens.MOST_TOKENS
    assert payload["left_out"] == 7


def test_the_script_writes_text_nodes_only():
    script = Path(tokens.__file__).with_name("tokens.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(", script)
