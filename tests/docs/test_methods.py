"""docs/methods.md lists every method and every option with its default, and no other."""

import re
from dataclasses import fields

import pytest

from haltscale.model import METHODS
from haltscale.model.adaptive import AdaptiveOptions
from haltscale.model.config import EmbeddingScale, Parametrisation
from haltscale.model.loop_options import LoopOptions
from haltscale.model.step_source import SourceOptions
from haltscale.platform.config import Optimizer, RunConfig

from jobs import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
SHARED = {"adaptive": AdaptiveOptions, "Loops": LoopOptions, "Source of steps": SourceOptions}


def defaults(kind: type) -> dict[str, str]:
    return {field.name: str(field.default) for field in fields(kind)}  # type: ignore[arg-type]


def own_defaults(kind: type) -> dict[str, str]:
    """The fields that a class of options adds to those of its bases."""
    inherited = [base for base in kind.__mro__[1:-1] if base is not object]
    names = {name for base in inherited for name in defaults(base)}
    return {name: default for name, default in defaults(kind).items() if name not in names}


def test_every_method_has_one_row() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", SECTIONS["Methods"], flags=re.MULTILINE)) == sorted(map(str, METHODS))


@pytest.mark.parametrize("section", SHARED)
def test_shared_options(section: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", SECTIONS[section], flags=re.MULTILINE)
    assert dict(rows) == own_defaults(SHARED[section])


def test_options_of_the_other_methods() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]*)` \|", SECTIONS["Other methods"], flags=re.MULTILINE)
    expected = [
        (method, *option)
        for method, entry in METHODS.items()
        if entry.options is not AdaptiveOptions
        for option in own_defaults(entry.options).items()
    ]
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("base", [LoopOptions, SourceOptions])
def test_who_shares_options(base: type) -> None:
    section = next(name for name, kind in SHARED.items() if kind is base)
    named = SECTIONS[section].partition("options of ")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", named)) == {m for m, entry in METHODS.items() if issubclass(entry.options, base)}


def test_most_passes() -> None:
    for method, formula in re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]+) \|", SECTIONS["Methods"], flags=re.MULTILINE):
        options = METHODS[method].options()
        python = formula.replace("`", "").replace(")(", ") * (")
        assert eval(python, {}, vars(options)) == METHODS[method].max_passes(options), method


def test_choices_for_any_method() -> None:
    known = {field.name for field in fields(RunConfig)}
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", SECTIONS["Choices for any method"], flags=re.MULTILINE))
    assert set(rows) <= known
    for name, members in (
        ("parametrisation", Parametrisation),
        ("optimizer", Optimizer),
        ("embedding_scale", EmbeddingScale),
    ):
        assert set(re.findall(r"`(\w+)`", rows[name])) == set(members)
