"""docs/troubleshooting.md quotes messages that exist, and knows every error class."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.compile(r"^\|(?: (?:`\w+Error`(?:, )?)+ \|)? `([^`]+)` \|", flags=re.MULTILINE)
VARIES = "\0"
FOLDERS = ("model", "platform", "dashboard")


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def texts(path: Path) -> Iterator[str]:
    """Every string of a file; what a formatted one inserts is VARIES."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


MESSAGES = [text for path in sources() for text in texts(path)]


def exists(quoted: str) -> bool:
    """Whether some string of the code has the quoted pieces in this order, `…` standing for anything."""
    pieces = [re.escape(piece) for piece in quoted.split("…") if piece]
    pattern = re.compile(".*".join(pieces), flags=re.DOTALL)
    return any(pattern.search(message) for message in MESSAGES)


@pytest.mark.parametrize("quoted", QUOTED.findall(PAGE))
def test_the_message_exists(quoted: str) -> None:
    assert exists(quoted), f"no string of the code is {quoted!r}: the page and the code have drifted apart"


def test_enough_is_quoted() -> None:
    assert len(QUOTED.findall(PAGE)) > 50
    assert not exists("…this is not a message of haltscale…")


def test_every_error_class_is_on_the_page() -> None:
    declared = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and re.fullmatch(r"[A-Z]\w*Error", node.name):
                declared.add(node.name)
    assert len(declared) > 20
    assert {name for name in declared if f"`{name}`" not in PAGE} == set()
