"""The key: what changes a result changes it, and nothing else does."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model import METHODS, SIZES, Method
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.identity import canonical_json, digest, encodable
from haltscale.platform.initial_model import InitialModel

BASE = RunConfig(method=Method.ADAPTIVE, options=METHODS[Method.ADAPTIVE].options())
START = InitialModel(
    source="/models/a",
    sha256="0",
    tokenizer_sha256="1",
    shape=SIZES["0.6m"],
    vocab_size=300,
    context=64,
    rope_theta=1e4,
    norm_eps=1e-6,
    tie_embeddings=False,
)
OTHER_RUN: dict[str, Any] = {
    "method": Method.SHUFFLED,
    "size": "1.8m",
    "options": replace(BASE.options, lam=0.7),  # type: ignore[type-var]
    "precision": Precision.FP32,
    "init_from": START,
}
"""Another value of the fields that are no numbers."""


def another(value: Any) -> Any:
    """A value that differs, of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, StrEnum):
        return next(member for member in type(value) if member != value)
    return 1 if value is None else value + 1


def key(run: RunConfig, corpus: str = "corpus", fingerprint: str = "f00") -> str:
    return run.key(corpus, fingerprint)


@pytest.mark.parametrize("name", [field.name for field in fields(RunConfig)])
def test_every_field_of_a_run_is_in_its_key(name):
    changed = replace(BASE, **{name: OTHER_RUN.get(name) or another(getattr(BASE, name))})
    assert changed != BASE
    assert key(changed) != key(BASE)


OPTIONS = [(method, field.name) for method in METHODS for field in fields(METHODS[method].options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_every_option_of_every_method_is_in_the_key(method, name):
    options: Any = METHODS[method].options()
    run = RunConfig(method=Method(method), options=options)
    changed = replace(run, options=replace(options, **{name: another(getattr(options, name))}))
    assert key(changed) != key(run)


def test_a_start_is_in_the_key_and_no_start_is_not():
    """Runs that start from random weights keep the keys that they had before there was a choice."""
    assert "init_from" not in BASE.identity("corpus", "f00")
    started = replace(BASE, init_from=START, size="imported")
    others = [{"sha256": "2"}, {"tokenizer_sha256": "2"}, {"rope_theta": 5e5}, {"shape": SIZES["1.8m"]}]
    runs = [started, *(replace(started, init_from=replace(START, **other)) for other in others)]
    assert len({key(run) for run in runs}) == len(runs)
    assert RunConfig.from_identity(json.loads(json.dumps(started.identity("corpus", "f00")))) == started


def test_corpus_and_semantics_are_in_the_key(monkeypatch):
    assert len({key(BASE), key(BASE, "other"), key(BASE, fingerprint="f01")}) == 3
    before = key(BASE)
    monkeypatch.setattr("haltscale.platform.config.SEMANTICS_VERSION", 1_000_000)
    assert key(BASE) != before


def test_execution_is_not_in_the_key():
    names = {field.name for field in fields(ExecutionConfig)}
    assert not names & set(BASE.identity("corpus", "f00"))
    assert not names & {field.name for field in fields(RunConfig)}


def test_the_key_is_readable_and_safe_as_a_folder():
    assert re.fullmatch(r"adaptive-0\.6m-[0-9a-f]{12}", key(BASE))


def test_the_key_never_changes():
    """Written down once: a key that moves makes every finished run of every store look unfinished."""
    assert digest({"b": [1, 2.5, None, True], "a": "λ"}, length=16) == "cf4fc66c97666a9c"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", list(SIZES)[:2])
def test_a_run_is_read_back_from_its_identity(method, size):
    run = RunConfig(
        method=Method(method), size=size, options=METHODS[method].options(), tokens=12345, learning_rate=1.0, seed=7
    )
    identity = json.loads(json.dumps(run.identity("corpus", "f00")))
    back = RunConfig.from_identity(identity)
    assert back == run
    assert key(back) == key(run)
    assert type(back.precision) is Precision
    assert type(back.method) is Method


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_options_read_back_have_their_types(method, name):
    """The models compare options with ``is``: a plain string in the place of an enum's member would silently be
    another model."""
    options: Any = METHODS[method].options()
    if isinstance(getattr(options, name), StrEnum):
        for member in type(getattr(options, name)):
            run = RunConfig(method=Method(method), options=replace(options, **{name: member}))
            back = RunConfig.from_identity(json.loads(json.dumps(run.identity("corpus", "f00"))))
            assert getattr(back.options, name) is member


def test_equal_numbers_are_equal():
    assert canonical_json({"x": 1}) == canonical_json({"x": 1.0})
    assert key(replace(BASE, clip=1)) == key(replace(BASE, clip=1.0))
    assert canonical_json(-0.0) == canonical_json(0)
    assert canonical_json((1, 2)) == canonical_json([1, 2])


@dataclass(frozen=True)
class Inner:
    value: Any


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"run\.options\.lam"):
        replace(BASE, options=replace(BASE.options, lam=value)).identity("corpus", "f00")  # type: ignore[type-var]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Path("x"), np.int64(3), np.zeros(2), print, Inner])
def test_what_has_no_encoding_is_refused_and_named(value):
    with pytest.raises(TypeError, match=r"where\.a\[1\]\.value is a "):
        encodable({"a": [0, Inner(value)]}, "where")


def test_keys_must_be_strings():
    with pytest.raises(TypeError, match="no string"):
        encodable({1: "x"})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_an_encoding_is_json_and_stable(value):
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text
    assert text.isascii()


@given(st.dictionaries(st.text(), values, max_size=6), st.randoms())
def test_insertion_order_does_not_matter(document, shuffler):
    names = list(document)
    shuffler.shuffle(names)
    assert digest({name: document[name] for name in names}) == digest(document)


@given(values, values)
def test_other_values_have_other_encodings(one, other):
    """Up to what JSON itself cannot tell apart."""
    same = json.dumps(encodable(one), sort_keys=True) == json.dumps(encodable(other), sort_keys=True)
    assert (canonical_json(one) == canonical_json(other)) == same


def test_dataclasses_are_encoded_by_their_fields():
    assert encodable(Inner(value=Inner(value=2.0))) == {"value": {"value": 2}}
    assert set(encodable(BASE)) == {field.name for field in dataclasses.fields(RunConfig)}
