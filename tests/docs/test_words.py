"""The field's terms, and none of the private ones that they replaced, in the pages and in what the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [
    path
    for folder in ("model", "platform")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "registry.py"  # still says "dealt"
]
REPLACED = {
    r"\bis none of\b": "must be one of a, b (got 'x')",
    r"\bforetell|\bforetold\b": "predict",
    r"\bdealt\b": "assign, spread, permute",
    r"\bhardly pays?\b": "not yet worth its cost",
    r"\bhow hard to press\b": "halting penalty",
    r"\bwhere the thinking went\b": "how latent steps were allocated",
    r"\bbecomes of\b": "how it is handled",
    r"\bas asked\b": "as requested",
    r"\bin trouble\b": "failed, diverged or stalled",
    r"\bgoes on where\b|\bgoes on from\b|\bwent on from\b": "resumes from",
    r"\bis told\b|\bare told\b|\bwas told\b": "gets an error, is reported",
    r"\bwhat we make of it\b": "discussion",
    r"\btake along\b": "download",
    r"\blong to think\b|\bthinks\b": "take latent steps",
}


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def strings(path: Path) -> Iterator[str]:
    """Every string of a file: messages, help texts, docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = [
    (path, re.sub(r"\s+", " ", text))
    for path, texts in [*((path, [prose(path)]) for path in PAGES), *((path, strings(path)) for path in CODE)]
    for text in texts
]


@pytest.mark.parametrize("word", REPLACED)
def test_replaced_words_do_not_return(word: str) -> None:
    pattern = re.compile(word, flags=re.IGNORECASE)
    found = [f"{path.relative_to(ROOT)}: {text[:80]!r}" for path, text in TEXTS if pattern.search(text)]
    assert found == [], f"write: {REPLACED[word]}"
