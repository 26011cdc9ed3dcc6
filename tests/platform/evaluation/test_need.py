"""Steps against need, counted as a reader would count them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from haltscale.model import Flops
from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus
from haltscale.platform.evaluation.held_out import TokenEvents
from haltscale.platform.evaluation.need import NeedOfCorpus, NeedTally

WORDS = ["", "a", "1", "2", "?"]


def need_of(words: list[str]) -> list[int | None]:
    return [None if word == "?" else int(word) if word.isdigit() else 0 for word in words]


def document(tokens: list[int]) -> HeldOutDocument:
    return HeldOutDocument(name="x", source="s", bytes=1, tokens=np.array([0, *tokens]))


def events(documents: list[HeldOutDocument], steps: np.ndarray, nll: np.ndarray, correct: np.ndarray) -> TokenEvents:
    lengths = [len(one.tokens) - 1 for one in documents]
    n = sum(lengths)
    return TokenEvents(
        document=np.repeat(np.arange(len(documents)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        token_id=np.concatenate([one.tokens[1:] for one in documents]),
        nll=nll,
        entropy=nll,
        confidence=nll,
        correct=correct,
        steps=steps,
        exit=np.zeros((n, 4), dtype=np.float32),
        sampled=np.zeros(0, dtype=np.int64),
        nll_by_step=np.zeros((0, 4), dtype=np.float32),
        entropy_by_step=np.zeros((0, 4), dtype=np.float32),
        flops=Flops(),
    )


def test_figures_by_need() -> None:
    stream = np.random.default_rng(0)
    documents = [document(stream.integers(1, 5, length).tolist()) for length in (50, 7, 31)]
    steps = stream.integers(0, 4, 88).astype(np.uint8)
    nll, correct = stream.random(88).astype(np.float32), stream.random(88) < 0.5
    every = events(documents, steps, nll, correct)
    tally = NeedTally(NeedOfCorpus(need_of, WORDS), documents)
    tally.add(every)
    found = tally.result()
    needs = [need for one in documents for need in need_of([WORDS[token] for token in one.tokens[1:]])]
    assert [row["need"] for row in found["by_need"]] == [None, 0, 1, 2]
    for row in found["by_need"]:
        here = np.array([need == row["need"] for need in needs])
        assert row["tokens"] == here.sum()
        assert row["accuracy"] == pytest.approx(correct[here].mean())
        assert row["loss"] == pytest.approx(nll[here].mean())
        assert row["mean_steps"] == pytest.approx(steps[here].mean())
        assert row["steps_histogram"] == pytest.approx([(steps[here] == k).mean() for k in range(4)])
    needy = np.array([bool(need) for need in needs])
    assert found["needy"]["accuracy"] == pytest.approx(correct[needy].mean())
    assert found["rank_correlation"] == pytest.approx(spearmanr([need or 0 for need in needs], steps).statistic)


def test_steps_that_never_vary_have_no_rank_correlation() -> None:
    documents = [document([1, 2, 3, 4])]
    tally = NeedTally(NeedOfCorpus(need_of, WORDS), documents)
    tally.add(events(documents, np.zeros(4, np.uint8), np.ones(4, np.float32), np.ones(4, bool)))
    assert tally.result()["rank_correlation"] is None


def test_a_need_that_cannot_be_imported_is_named(tmp_path) -> None:
    corpus = PreparedCorpus(folder=tmp_path, counts={"name": "mine", "need": "no.such:thing", "vocab_size": 5})
    with pytest.raises(ValueError, match=r"corpus mine: its need, no.such:thing, cannot be imported"):
        NeedOfCorpus.of(corpus)
    assert NeedOfCorpus.of(PreparedCorpus(folder=tmp_path, counts={"name": "mine"})) is None
