"""Paired differences against plain loops, and whether their intervals cover what they claim."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.analysis import Estimate, Refusal
from haltscale.platform.analysis.paired import document_sums, paired_difference


def sums(tokens: list[int], nats: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"tokens": tokens, "nats": nats}, index=[f"d{n}" for n in range(len(tokens))])


def test_sums_by_document():
    found = document_sums(["b", "a", "b"], np.array([1.0, 2.0, 4.0], dtype=np.float32))
    assert found.to_dict("index") == {"a": {"tokens": 1, "nats": 2.0}, "b": {"tokens": 2, "nats": 5.0}}


@given(
    tokens=st.lists(st.integers(1, 500), min_size=2, max_size=8),
    seeds=st.integers(1, 4),
    draw=st.integers(0, 10**6),
)
def test_the_value_is_the_mean_over_seeds_of_differences_per_token(tokens, seeds, draw):
    stream = np.random.default_rng(draw)
    arm, reference = ([sums(tokens, stream.normal(3, 1, len(tokens)).tolist()) for _ in range(seeds)] for _ in range(2))
    found = paired_difference(arm, reference, bootstraps=200)
    assert isinstance(found, Estimate)
    wanted = [
        sum(a["nats"].iloc[d] - b["nats"].iloc[d] for d in range(len(tokens))) / sum(tokens)
        for a, b in zip(arm, reference, strict=True)
    ]
    assert found.value == pytest.approx(sum(wanted) / seeds)
    assert found.low <= found.high


def test_what_both_share_cancels():
    """Documents and seeds that differ by tens of nats, and an arm that is 0.01 nats a token better on each."""
    stream = np.random.default_rng(0)
    tokens = [100, 300, 50, 700]
    reference = [sums(tokens, (stream.normal(4, 2, 4) * tokens).tolist()) for _ in range(3)]
    arm = [one.assign(nats=one["nats"] - 0.01 * one["tokens"]) for one in reference]
    found = paired_difference(arm, reference)
    assert found.value == found.low == found.high == pytest.approx(-0.01)


def test_the_interval_covers():
    """Of a hundred samples with a known difference, about 95 intervals hold it: documents and seeds both vary."""
    hits = []
    for sample in range(100):
        stream = np.random.default_rng(sample)
        tokens = stream.integers(200, 400, 40)
        by_document = stream.normal(0, 0.05, 40)
        arm, reference = [], []
        for _ in range(12):
            shift = 0.02 + stream.normal(0, 0.01) + by_document + stream.normal(0, 0.02, 40)
            base = stream.normal(3, 1, 40)
            reference.append(sums(tokens.tolist(), (base * tokens).tolist()))
            arm.append(sums(tokens.tolist(), ((base + shift) * tokens).tolist()))
        found = paired_difference(arm, reference, bootstraps=400)
        hits.append(found.low <= 0.02 <= found.high)
    assert 85 <= sum(hits) <= 99


def test_seeds_widen_the_interval():
    stream = np.random.default_rng(1)
    tokens = [100] * 30
    base = [sums(tokens, [300.0] * 30) for _ in range(4)]
    alike = [one.assign(nats=one["nats"] + stream.normal(1, 1, 30)) for one in base]
    apart = [one.assign(nats=one["nats"] + shift) for one, shift in zip(alike, (-20, 20, -10, 10), strict=True)]
    first, second = paired_difference(alike, base), paired_difference(apart, base)
    assert second.high - second.low > 3 * (first.high - first.low)
    assert first.excludes(0.0)
    assert not second.excludes(0.0)


@pytest.mark.parametrize(
    ("arm", "reference", "reason"),
    [
        ([], [], "0 runs"),
        ([sums([1, 2], [1, 1])], [sums([1, 2], [1, 1])] * 2, "each seed needs both"),
        ([sums([1, 2], [1, 1])], [sums([1, 3], [1, 1])], "same documents"),
        ([sums([1, 2], [1, 1])], [sums([1, 2, 3], [1, 1, 1])], "same documents"),
        ([sums([5], [1])], [sums([5], [2])], "1 document"),
    ],
)
def test_what_cannot_be_paired_is_refused(arm, reference, reason):
    found = paired_difference(arm, reference)
    assert isinstance(found, Refusal)
    assert reason in found.reason
