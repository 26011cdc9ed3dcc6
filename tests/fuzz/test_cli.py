"""Whatever stands on the command line or in a point of a study: an answer or a sentence, never a traceback."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haltscale.platform import cli
from haltscale.platform.config import ConfigError, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps.sweep import grid
from haltscale.studies import quickstart

EXAMPLES = max(25, settings().max_examples // 4)
quietly = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

words = st.one_of(
    st.text(alphabet=st.characters(exclude_characters="\0"), max_size=12),
    st.sampled_from(
        ["", "-1", "0", "1e999", "nan", "inf", "null", "true", "[]", "{}", "[[1]]", "/", "..", "../../etc", "~"]
    ),
    st.sampled_from(
        ["~nouser/x", "quick/x", "quick/x@latest", "quick/x@-1", "s3:", "\udce9", "10" * 200, "none", "0x10"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


def answered(arguments: list[str]) -> int:
    """Run the command line: its exit code. Any exception but SystemExit fails the test."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main(arguments)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


@quietly
@given(
    verb=st.sampled_from(["status", "results", "generate", "evaluate", "serve", "export"]),
    name=words, option=st.sampled_from(["--tokens", "--port", "--limit", "--device", "--shots", "--temperature"]),
    value=words,
)  # fmt: skip
def test_arguments_of_the_verbs(root, verb, name, option, value):
    more = {"generate": ["a prompt"], "export": [str(Path(root) / "out")]}.get(verb, [])
    assert answered([verb, name, *more, "--store", root, f"{option}={value}"]) in (0, 1, 2)
    assert answered([verb, name, *more, "--store", root]) in (0, 1, 2)


names = st.sampled_from([*RunConfig.__dataclass_fields__, *ExecutionConfig.__dataclass_fields__, "lam", "x", ""])


@quietly
@given(name=names, value=words)
def test_overridden_fields(name, value):
    if name == "init_from":  # a name may be one of the Hub's: that asks a network
        return
    with contextlib.suppress(ConfigError), tempfile.TemporaryDirectory() as folder:
        quickstart.study().overridden([f"{name}={value}"]).plan(RunStore(folder))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2) | st.tuples(inner)
    ),
    max_leaves=4,
)  # fmt: skip


@quietly
@given(name=names, value=values)
def test_points_of_a_study(name, value):
    if name == "init_from" and isinstance(value, str):
        return
    from dataclasses import replace

    with contextlib.suppress(ConfigError), tempfile.TemporaryDirectory() as folder:
        point = grid(**{name: [value] if isinstance(value, list) else value, "method": "adaptive"} if name else {})
        replace(quickstart.study(), sweep=point).plan(RunStore(folder))
