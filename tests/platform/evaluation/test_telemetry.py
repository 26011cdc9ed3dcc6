"""Telemetry files against brute force: cubes against a pandas groupby, summaries by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from haltscale.model import Flops
from haltscale.platform.evaluation import telemetry
from haltscale.platform.evaluation.halting_summary import alarms, gain_by_step, oracle, summarise_halting
from haltscale.platform.evaluation.held_out import TokenEvents
from haltscale.platform.evaluation.telemetry import EVENT_COLUMNS, EventsFile, EventsWriter, Quantiles, build_cube
from haltscale.platform.evaluation.token_kinds import TokenClass, TokenKinds, frequency_classes

L_MAX, CONTEXT, VOCABULARY = 3, 16, 60


def kinds() -> TokenKinds:
    stream = np.random.default_rng(5)
    return TokenKinds(
        frequency=stream.integers(0, 10, VOCABULARY).astype(np.uint8),
        look=stream.integers(0, len(TokenClass), VOCABULARY).astype(np.int8),
    )


def drawn(n: int, seed: int = 0, *, sampled: float = 0.3) -> TokenEvents:
    """Random events that keep the rules: masses sum to 1, the last step's nll is the token's own."""
    stream = np.random.default_rng(seed)
    steps = stream.integers(0, L_MAX + 1, n)
    mass = stream.random((n, L_MAX + 1)) * (np.arange(L_MAX + 1) <= steps[:, None])
    nll = stream.gamma(2.0, 2.0, n).astype(np.float32)
    at = np.flatnonzero(stream.random(n) < sampled)
    by_step = stream.gamma(2.0, 2.0, (len(at), L_MAX + 1)).astype(np.float32)
    by_step[np.arange(len(at)), steps[at]] = nll[at]
    by_step[np.arange(L_MAX + 1) > steps[at][:, None]] = np.nan
    return TokenEvents(
        document=np.sort(stream.integers(0, 3, n)),
        position=stream.integers(0, 70, n),
        token_id=stream.integers(0, VOCABULARY, n),
        nll=nll,
        entropy=stream.random(n).astype(np.float32),
        confidence=stream.random(n).astype(np.float32),
        correct=stream.random(n) < 0.4,
        steps=steps.astype(np.uint8),
        exit=(mass / mass.sum(1, keepdims=True)).astype(np.float32),
        sampled=at,
        nll_by_step=by_step,
        entropy_by_step=by_step,
        flops=Flops(),
    )


def written(tmp_path, *parts: TokenEvents) -> EventsFile:
    writer = EventsWriter(tmp_path / "events.parquet", kinds(), step=7, context=CONTEXT, documents=["a", "b", "c"])
    for part in parts:
        writer.add(part)
    writer.close()
    return EventsFile(path=tmp_path / "events.parquet")


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    monkeypatch.setattr(telemetry, "ROW_GROUP", 400)


def test_events_come_back(tmp_path):
    parts = [drawn(n, seed) for seed, n in enumerate([150, 700, 1, 350])]
    file = written(tmp_path, *parts)
    whole, table = TokenEvents.concatenate(parts), pd.read_parquet(file.path)
    assert list(table.columns) == list(EVENT_COLUMNS)
    assert file.metadata == {"step": 7, "context": CONTEXT, "documents": ["a", "b", "c"]}
    for name in ("document", "position", "token_id", "steps", "nll", "correct"):
        assert table[name].tolist() == getattr(whole, name).tolist()
    for name in ("entropy", "confidence", "expected_steps"):
        np.testing.assert_allclose(table[name].astype(float), getattr(whole, name), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.stack(table["exit"].to_list()), whole.exit, atol=1e-3)
    assert np.flatnonzero(table["nll_by_step"].notna()).tolist() == whole.sampled.tolist()
    for cell, values in zip(table["nll_by_step"].dropna(), whole.nll_by_step, strict=True):
        np.testing.assert_array_equal(cell, values[~np.isnan(values)])


def test_a_split_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokens"):
        written(tmp_path)


def brute_force(table: pd.DataFrame, edges) -> pd.DataFrame:
    place = table["position"] % CONTEXT
    exits = np.stack(table["exit"].to_list()).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(exits * np.log(exits), axis=1)
    table = table.assign(
        surprisal=[sum(nll >= edge for edge in edges) for nll in table["nll"]],
        position_from=[0 if p == 0 else 2 ** int(math.log2(p)) for p in place],
        router_entropy=entropy,
    )
    for name in telemetry.CUBE_MEASURES:
        table[name] = table[name].astype(np.float64)
        table[f"{name}2"] = table[name] ** 2
    measures = {f"{name}_sum": (name, "sum") for name in telemetry.CUBE_MEASURES}
    squares = {f"{name}_sum2": (f"{name}2", "sum") for name in telemetry.CUBE_MEASURES}
    table["token_class"] = table["token_class"].astype(str)
    grouped = table.groupby(list(telemetry.CUBE_DIMENSIONS), observed=True)
    return grouped.agg(tokens=("nll", "size"), **measures, **squares).reset_index()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_cube_equals_a_pandas_groupby(tmp_path, seed):
    file = written(tmp_path, drawn(1300, seed), drawn(40, seed + 10))
    edges = np.array([0.5, 1, 2, 3, 4, 5, 6, 7, 9], dtype=np.float32)
    cube = build_cube(file, edges)
    expected = brute_force(pd.read_parquet(file.path), edges)
    dimensions = list(telemetry.CUBE_DIMENSIONS)
    cube, expected = (frame.sort_values(dimensions, ignore_index=True) for frame in (cube, expected))
    pd.testing.assert_frame_equal(cube[expected.columns], expected, check_dtype=False, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=200),
    st.floats(0.01, 0.99),
)
def test_quantiles_within_their_promise(values, share):
    """That share of the numbers lies below the quantile, and no more than that share (and one) clearly below."""
    numbers = np.array(values, dtype=np.float32)
    quantiles = Quantiles()
    for part in np.array_split(numbers, 3):
        quantiles.add(part)
    [found] = quantiles.at([share])
    assert (numbers < found).mean() >= share - 1e-9
    assert (numbers < found * (1 - 2**-8) - 1e-30).sum() <= share * len(numbers) + 1


def test_deciles_hold_a_tenth_each():
    numbers = np.random.default_rng(0).gamma(2.0, 2.0, 50_000).astype(np.float32)
    quantiles = Quantiles()
    quantiles.add(numbers)
    edges = quantiles.at([k / 10 for k in range(1, 10)])
    counts = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=10)
    np.testing.assert_allclose(counts / len(numbers), 0.1, atol=0.003)


def test_the_summary_against_the_events(tmp_path):
    parts = [drawn(900, 0), drawn(500, 1)]
    file, whole = written(tmp_path, *parts), TokenEvents.concatenate(parts)
    edges = np.quantile(whole.nll, np.arange(1, 10) / 10).astype(np.float32)
    quarters = np.quantile(whole.nll, [0.25, 0.75]).astype(np.float32)
    summary = summarise_halting(file, build_cube(file, edges), quarters=quarters, l_max=L_MAX)
    json.dumps(summary, allow_nan=False)
    assert summary["tokens"] == 1400
    np.testing.assert_allclose(summary["steps_histogram"], np.bincount(whole.steps) / 1400)
    deciles = np.searchsorted(edges, whole.nll, side="right")
    for row in summary["by_surprisal"]:
        steps = whole.steps[deciles == row["value"]]
        half = 1.96 * steps.std(ddof=1) / math.sqrt(len(steps))
        assert (row["tokens"], row["mean_steps"]) == (len(steps), pytest.approx(steps.mean()))
        assert (row["low"], row["high"]) == (pytest.approx(steps.mean() - half), pytest.approx(steps.mean() + half))
        assert row["loss"] == pytest.approx(whole.nll[deciles == row["value"]].mean(), rel=1e-5)
    for name in ("by_position", "by_frequency", "by_token_class"):
        assert sum(row["tokens"] for row in summary[name]) == 1400
    assert {row["value"] for row in summary["by_token_class"]} <= set(map(str, TokenClass))
    easy = whole.nll <= quarters[0]
    assert summary["difficulty"]["well_predicted_mean_steps"] == pytest.approx(whole.steps[easy].mean())
    bins = summary["calibration"]["bins"]
    assert sum(row["tokens"] for row in bins) == 1400
    error = sum(row["tokens"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / 1400
    assert summary["calibration"]["expected_error"] == pytest.approx(error)
    assert summary["oracle"]["tokens"] == len(whole.sampled)
    assert summary["gain_by_step"][0]["tokens"] == (whole.steps[whole.sampled] >= 1).sum()
    assert summary["alarms"] == []


def test_gains_and_oracle_by_hand():
    nan = math.nan
    steps = np.array([0, 1, 2, 2])
    nll = np.array([[3, nan, nan], [3, 1, nan], [3, 2, 2.5], [1, 2, 4]])
    assert [(row["step"], row["tokens"], row["mean"]) for row in gain_by_step(steps, nll)] == [
        (1, 3, pytest.approx((-2 - 1 + 1) / 3)),
        (2, 2, pytest.approx((-0.5 + 3) / 2)),
    ]
    found = oracle(steps, nll)
    assert found["loss"] == pytest.approx((3 + 1 + 2.5 + 4) / 4)
    assert found["oracle_loss"] == pytest.approx((3 + 1 + 2 + 1) / 4)
    assert found["mean_depth"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert found["stopped_there"] == pytest.approx(0.5)
    assert oracle(steps[:0], nll[:0]) is None


@pytest.mark.parametrize(
    ("histogram", "l_max", "said"),
    [
        ([1, 0, 0], 2, "no token takes a step"),
        ([0, 0, 1], 2, "takes all steps"),
        ([0, 1, 0], 2, "all take 1"),
        ([0.5, 0.5, 0], 2, None),
        ([1], 0, None),
    ],
)
def test_a_collapsed_router_raises_an_alarm(histogram, l_max, said):
    found = alarms(np.array(histogram, dtype=float), l_max=l_max)
    assert (len(found) == 1 and said in found[0]) if said else found == []


# Kinds of tokens -----------------------------------------------------------------------------------------------------


def test_frequency_classes_share_the_running_text():
    counts = np.random.default_rng(0).zipf(1.3, 4000).clip(max=10**6).astype(np.int64)
    counts[:50] = 0
    classes = frequency_classes(counts)
    assert (classes[:50] == 9).all()
    for high, low in zip(range(9), range(1, 10), strict=True):  # no rarer token in a more frequent class
        if (classes == high).any() and (classes == low).any():
            assert counts[classes == high].min() >= counts[classes == low].max()
    uniform = frequency_classes(np.full(1000, 7))
    assert np.bincount(uniform).tolist() == [100] * 10


def test_looks_of_tokens():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "the law, the law is 12 ünder\n\n (the) 12 $"
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text] * 5, trainer)
    made = TokenKinds.of(tokenizer, np.ones(tokenizer.get_vocab_size(), dtype=np.int64))

    def look(piece: str) -> str:
        [index] = tokenizer.encode(piece).ids
        return list(TokenClass)[made.look[index]]

    assert look(" the") == "word_start"
    assert look("a") == "word_inside"
    assert look(" 12") == "number"
    assert look(",") == look("$") == "punctuation"
    assert look("\n") == "space"
    assert look("<|end|>") == "other"
    assert list(TokenClass)[made.look[tokenizer.token_to_id("Ã")]] == "other"  # half a character
