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

from haltscale.model import (
    METHODS,
    SIZES,
    AdaptiveOptions,
    GateTarget,
    Method,
    ModelConfig,
    RouterKind,
    StepsFrom,
    build_model,
)
from haltscale.platform import config
from haltscale.platform.config import Optimizer, Precision, RunConfig, Schedule
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.identity import SEMANTICS, canonical_json, digest, encodable
from haltscale.platform.initial_model import InitialModel
from haltscale.platform.store import RunStore

BASE = RunConfig(
    method=Method.ADAPTIVE,
    options=METHODS[Method.ADAPTIVE].options(),
    tokens=244 * 4096,
    precision=Precision.BF16,
    schedule=Schedule.WSD,
)
"""On the schedule on which every field has a say."""
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
    if isinstance(value, tuple):
        return (*value, (0.5, 1.0))
    return 1 if value is None else value + 1


def key(run: RunConfig, corpus: str = "corpus", fingerprint: str = "f00") -> str:
    return run.key(corpus, fingerprint)


def test_what_muon_alone_uses_is_in_no_other_key():
    assert key(replace(BASE, muon_rate=2.0, muon_momentum=0.9)) == key(BASE)


@pytest.mark.parametrize("name", [field.name for field in fields(RunConfig)])
def test_every_field_of_a_run_is_in_its_key(name):
    base = replace(BASE, tokens=10 * BASE.batch_tokens) if name == "tokens" else BASE
    if name.startswith("muon_"):  # AdamW has no use for them
        base = replace(base, optimizer=Optimizer.MUON)
    other = OTHER_RUN.get(name) or another(getattr(base, name))
    changed = replace(base, **{name: 11 * BASE.batch_tokens if name == "tokens" else other})
    assert changed != base
    assert key(changed) != key(base)


OPTIONS = [(method, field.name) for method in METHODS for field in fields(METHODS[method].options)]  # type: ignore[arg-type]


SAY: dict[str, dict[str, Any]] = {
    "steps_schedule": {"steps_from": StepsFrom.SHUFFLED},
    "steps_seed": {"steps_from": StepsFrom.SHUFFLED},
    "gain_margin": {"gate_target": GateTarget.GAIN},
    "gain_weight": {"gate_target": GateTarget.GAIN},
    "warmup_loss": {"gate_warmup": 0.1},
    "depth_curve": {"depth_growth": 0.1},
}
"""What gives an option a say that has none by default."""


def options_with_a_say(method: str, name: str) -> Any:
    return replace(METHODS[method].options(), **SAY.get(name, {}))  # type: ignore[type-var]


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_every_option_of_every_method_is_in_the_key(method, name):
    options = options_with_a_say(method, name)
    run = RunConfig(method=Method(method), options=options, precision=Precision.BF16)
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


def test_the_fingerprint_of_the_corpus_is_in_the_key_and_its_name_is_not():
    assert key(BASE, fingerprint="f01") != key(BASE)
    assert key(BASE, "other") == key(BASE)
    assert BASE.identity("other", "f00")["corpus"] == "other"


@pytest.mark.parametrize("part", SEMANTICS)
def test_each_part_of_the_code_has_a_version_in_the_key(monkeypatch, part):
    before = key(BASE)
    monkeypatch.setitem(SEMANTICS, part, 1_000_000)
    assert key(BASE) != before


def test_a_mended_method_makes_its_own_runs_stale_and_no_others(monkeypatch):
    runs = {
        method: RunConfig(method=Method(method), options=entry.options(), precision=Precision.BF16)
        for method, entry in METHODS.items()
    }
    before = {method: key(run) for method, run in runs.items()}
    monkeypatch.setitem(METHODS, Method.PONDER2, replace(METHODS[Method.PONDER2], semantics=77))
    assert [method for method, run in runs.items() if key(run) != before[method]] == [Method.PONDER2]


def test_the_shape_behind_a_size_is_in_the_key(monkeypatch):
    before = key(BASE)
    monkeypatch.setitem(SIZES, "0.6m", replace(SIZES["0.6m"], ffn=176))
    assert key(BASE) != before


def test_a_precision_that_is_left_to_the_machine_identifies_nothing():
    run = replace(BASE, precision=Precision.AUTO)
    with pytest.raises(ValueError, match="resolve it first"):
        key(run)
    assert {key(run.resolved()), key(run.resolved(on_gpu=True))} <= {
        key(replace(BASE, precision=precision)) for precision in (Precision.BF16, Precision.FP32)
    }


SAME = [
    ({"tokens": 1_000_000}, {"tokens": 1_000_000 // 4096 * 4096}),
    ({"schedule": Schedule.COSINE, "decay_fraction": 0.5}, {"schedule": Schedule.COSINE}),
    ({"schedule": Schedule.LINEAR, "decay_fraction": 0.5}, {"schedule": Schedule.LINEAR}),
    ({"schedule": Schedule.CONSTANT, "final_learning_rate_fraction": 0.7}, {"schedule": Schedule.CONSTANT}),
    ({"warmup_tokens": 4096, "warmup_fraction": 0.5}, {"warmup_tokens": 4096}),
    ({"flops": 1e12, "tokens": 8192}, {"flops": 1e12}),
    ({"flops": 10**12}, {"flops": 1e12}),
    ({"clip": 1}, {"clip": 1.0}),
    ({"learning_rate": 0.1 + 0.2}, {"learning_rate": 0.3}),
    ({"learning_rate": np.float64(0.25)}, {"learning_rate": 0.25}),
    ({"learning_rate": np.float32(0.25)}, {"learning_rate": 0.25}),
    ({"seed": np.int64(3)}, {"seed": 3}),
    ({"tokens": 8192.0}, {"tokens": 8192}),
    ({"schedule": "wsd", "precision": "fp32"}, {"schedule": Schedule.WSD, "precision": Precision.FP32}),
    ({"init_from": START, "size": "imported"}, {"init_from": START, "size": "0.6m"}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_computes_the_same_has_one_key(one, other):
    assert key(replace(BASE, **one)) == key(replace(BASE, **other))
    start = {"vocab_size": 300} if "init_from" in one else {}
    assert (
        replace(BASE, **one, context=64).problems(**start) == replace(BASE, **other, context=64).problems(**start) == []
    )


def test_text_is_the_member_that_it_names():
    """The code compares options with ``is``."""
    given = RunConfig(method="adaptive", options=AdaptiveOptions(router="none"), schedule="wsd")  # type: ignore[arg-type]
    assert given.method is Method.ADAPTIVE
    assert given.options.router is RouterKind.NONE  # type: ignore[attr-defined]
    config = ModelConfig(
        method="adaptive",  # type: ignore[arg-type]
        shape=SIZES["0.6m"],
        vocab_size=64,
        context=32,
        options=AdaptiveOptions(router="none"),  # type: ignore[arg-type]
    )
    assert len(build_model(config, seed=0).latent_loop.routers) == 0  # type: ignore[union-attr, arg-type]


# ---- time goes on ---------------------------------------------------------------------------------------------------

GOLDEN = {
    "adaptive": "adaptive-0.6m-31004d506877",
    "mor": "mor-0.6m-753ec06fa141",
    "vanilla": "vanilla-0.6m-1af5cd1efe36",
}
"""Keys of each method's defaults, of key schema 2. They never change: what is finished in every store would be trained
again."""


@pytest.mark.parametrize("method", GOLDEN)
def test_keys_never_change(method):
    run = RunConfig(method=Method(method), options=METHODS[method].options(), precision=Precision.BF16)
    assert key(run) == GOLDEN[method]


@given(st.dictionaries(st.sampled_from(["lam", "beta", "tau", "router_bias"]), st.floats(0.01, 1.0)), st.integers(0, 9))
def test_a_new_field_with_a_default_keeps_every_key(options, seed):
    """Of the run and of a method's options, whatever the run is: what a later version adds."""

    @dataclass(frozen=True, kw_only=True)
    class LaterRun(RunConfig):
        momentum: float = 0.9

    @dataclass(frozen=True, kw_only=True)
    class LaterOptions(AdaptiveOptions):
        patience: int = 3

    now = replace(BASE, options=AdaptiveOptions(**options), seed=seed)
    before = key(now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, Method.ADAPTIVE, replace(METHODS[Method.ADAPTIVE], options=LaterOptions))
        patch.setattr(config, "RunConfig", LaterRun)
        values = {field.name: getattr(now, field.name) for field in fields(RunConfig)}
        later = LaterRun(**values | {"options": LaterOptions(**options)})
        assert key(later) == before
        assert key(replace(later, momentum=0.8)) != before
        assert key(replace(later, options=replace(later.options, patience=4))) != before  # type: ignore[type-var]
        old = json.loads(json.dumps(now.identity("corpus", "f00")))
        assert key(LaterRun.from_identity(old)) == before, "read by the later version"


def test_a_changed_default_keeps_every_key(monkeypatch):
    changed = replace(BASE, clip=0.5)
    keys = key(BASE), key(changed)
    monkeypatch.setitem(config.KEY_DEFAULTS, "clip", 1.0)
    monkeypatch.setattr(RunConfig.__dataclass_fields__["clip"], "default", 0.5)
    assert (key(replace(BASE, clip=1.0)), key(changed)) == keys


def test_every_published_key_has_an_alias_of_today():
    """Records of schema 1 are found under the key that their run has now, and none of them is trained again, but for
    methods that were mended since."""
    store = RunStore(Path(__file__).parents[2] / "studies" / "results")
    views = [view for study in store.studies() for view in store.runs(study)]
    assert len(views) > 200
    for view in views:
        if "schema" in view.record["identity"]:
            continue
        assert config.run_key(view.record["identity"]) == view.key, "the key that it was published under"
        identity = config.current_identity(view.record)
        assert identity["precision"] == view.record["precision"] != "auto"
        run = RunConfig.from_identity(identity)
        mended = METHODS[run.method].semantics != 1
        alias = run.key(identity["corpus"], identity["corpus_fingerprint"])
        assert (alias == config.run_key(identity)) != mended
    found = {(view.study, config.run_key(config.current_identity(view.record))) for view in views}
    assert len(found) == len(views), "two runs of a study are not one"


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
        method=Method(method),
        size=size,
        options=METHODS[method].options(),
        tokens=3 * 4096,
        learning_rate=1.0,
        precision=Precision.BF16,
        seed=7,
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
    options = options_with_a_say(method, name)
    if isinstance(getattr(options, name), StrEnum):
        for member in type(getattr(options, name)):
            changed = replace(options, **{name: member})
            run = RunConfig(method=Method(method), options=changed, precision=Precision.BF16)
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


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Path("x"), np.zeros(2), print, Inner])
def test_what_has_no_encoding_is_refused_and_named(value):
    with pytest.raises(TypeError, match=r"where\.a\[1\]\.value is a "):
        encodable({"a": [0, Inner(value)]}, "where")


def test_keys_must_be_strings():
    with pytest.raises(TypeError, match="not a string"):
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
