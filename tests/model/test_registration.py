"""Methods of other packages: by entry point and by importable path, and what is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from haltscale.model import (
    METHODS,
    SIZES,
    AdaptiveModel,
    AdaptiveOptions,
    Method,
    MethodEntry,
    MethodError,
    ModelConfig,
    VanillaModel,
    VanillaOptions,
    config_from_dict,
    config_problems,
)

MODULE = """
from haltscale.model import MethodEntry, VanillaModel, VanillaOptions
ENTRY = MethodEntry(VanillaOptions, VanillaModel, lambda _: 1, "another one")
NOT_ONE = 3
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a module ``stranger_method`` on the import path, and a distribution with these entry points."""
    known = set(METHODS)

    def install(source: str = MODULE, **points: str) -> None:
        (tmp_path / "stranger_method.py").write_text(source)
        info = tmp_path / "stranger-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[haltscale.methods]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))
        METHODS.refresh()

    yield install
    monkeypatch.undo()
    sys.modules.pop("stranger_method", None)
    METHODS.refresh()
    for name in set(METHODS._entries) - known:
        del METHODS[name]


def data_of(method: str) -> dict:
    config = ModelConfig(method=method, shape=SIZES["0.6m"], vocab_size=64, context=32, options=VanillaOptions())
    return config.to_dict()


def test_an_entry_point_is_imported_when_it_is_used(add) -> None:
    add(other="stranger_method:ENTRY")
    assert "other" in METHODS
    assert [name for name in METHODS if name not in list(Method)] == ["other"]
    assert "stranger_method" not in sys.modules
    assert METHODS["other"].summary == "another one"
    assert METHODS.package("other") == "stranger"
    config = config_from_dict(data_of("other"))
    assert config.method == "other"
    assert type(config.method) is str
    assert not config_problems(config)
    assert type(config_from_dict(data_of("vanilla")).method) is Method


@pytest.mark.parametrize(
    ("source", "value", "told"),
    [
        ("raise RuntimeError('no licence')", "stranger_method:ENTRY", "RuntimeError: no licence"),
        (MODULE, "stranger_method:MISSING", "AttributeError"),
        (MODULE, "no_such_module:ENTRY", "ModuleNotFoundError"),
        (MODULE, "stranger_method:NOT_ONE", "must be a haltscale.model.MethodEntry (got int"),
    ],
)
def test_one_that_cannot_be_used_names_its_package_and_harms_no_other(add, source: str, value: str, told: str) -> None:
    add(source, other=value)
    with pytest.raises(MethodError, match="method 'other' of package stranger") as caught:
        METHODS["other"]
    assert told in str(caught.value)
    shape = SIZES["0.6m"]
    config = ModelConfig(method="other", shape=shape, vocab_size=64, context=32, options=VanillaOptions())
    (problem,) = config_problems(config)
    assert told in problem
    assert "adaptive" in METHODS.with_option("lam")
    assert METHODS.named("adaptive") is Method.ADAPTIVE


@pytest.mark.parametrize("name", ["adaptive", "a/b"])
def test_a_name_that_is_taken_or_is_none_is_ignored(add, caplog: pytest.LogCaptureFixture, name: str) -> None:
    add(**{name: "stranger_method:ENTRY"})
    with caplog.at_level(logging.WARNING):
        assert list(METHODS) == list(Method)
    assert f"method {name!r} of package stranger is ignored" in caplog.text
    assert METHODS["adaptive"].model is AdaptiveModel


def test_a_path_names_a_method_where_a_user_gives_it(add) -> None:
    add()
    path = "stranger_method:ENTRY"
    with pytest.raises(ValueError, match=f"set HALTSCALE_METHODS={path}"):
        config_from_dict(data_of(path))
    assert "stranger_method" not in sys.modules, "nothing that a file names is imported"
    assert METHODS.named(path) == path
    assert config_from_dict(data_of(path)).method == path


def test_a_path_in_the_environment_is_known(add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTSCALE_METHODS", "stranger_method:ENTRY")
    add()
    assert config_from_dict(data_of("stranger_method:ENTRY")).method == "stranger_method:ENTRY"


@pytest.mark.parametrize("name", ["nonsense", "", None, 3, "os:system:x", "no_such_module:ENTRY"])
def test_what_is_no_method_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="method"):
        METHODS.named(name)


def test_a_router_needs_a_bound() -> None:
    with pytest.raises(ValueError, match="give every_step"):
        MethodEntry(AdaptiveOptions, AdaptiveModel, lambda o: 1 + o.l_max, "unpriced")


@dataclass(frozen=True, kw_only=True)
class _Plain(VanillaOptions):
    pass


def test_what_an_entry_says_of_controls() -> None:
    assert [name for name in Method if METHODS[name].replays] == ["adaptive", "mor", "ponder3", "adaponder"]
    assert [name for name in Method if METHODS[name].routed and not METHODS[name].replays] == ["shuffled"]
    own = MethodEntry(_Plain, VanillaModel, lambda _: 1, "x", every_step=lambda o: ("vanilla", VanillaOptions()))
    assert own.routed
    assert not own.replays
