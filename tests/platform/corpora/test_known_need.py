"""Text with a known need: every answer is right, needs what it says, and the twin differs in nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltscale.platform.corpora.known_need import (
    ChainedLookups,
    known_need,
    need_of_chained_lookups,
    need_of_twin,
)
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.evaluation.need import UNPREDICTABLE, NeedOfCorpus

SMALL = ChainedLookups(symbols=5, most=2, questions=4)


def words_of(lookups: ChainedLookups, row: np.ndarray) -> list[str]:
    return [lookups.vocabulary[token] for token in row]


@given(symbols=st.integers(3, 8), most=st.integers(0, 4), questions=st.integers(1, 3), seed=st.integers(0, 99))
def test_answers_follow_from_the_edges(symbols: int, most: int, questions: int, seed: int) -> None:
    """By walking along the edges, one hop at a time."""
    for needed in (True, False):
        lookups = ChainedLookups(symbols=symbols, most=most, questions=questions, needed=needed, seed=seed)
        for row in lookups.documents(3):
            begin, *words = words_of(lookups, row)
            assert len(row) == lookups.length
            assert begin == "<|endoftext|>"
            edges, asked = words[:symbols], words[symbols:]
            after = dict(edge.split(">") for edge in edges)
            assert len(after) == symbols
            here, seen = next(iter(after)), set()
            while here not in seen:
                seen.add(here)
                here = after[here]
            assert len(seen) == symbols, "one cycle through all symbols"
            assert len(set(asked[0::2])) == questions, "all different"
            for question, answer in zip(asked[0::2], asked[1::2], strict=True):
                hops, symbol = re.fullmatch(r"(\d)\?(\w)", question).groups()  # type: ignore[union-attr]
                for _ in range(1 + (int(hops) if needed else 0)):
                    symbol = after[symbol]
                assert answer == symbol


def test_the_twin_has_the_same_surface() -> None:
    """The same edges and questions; and an answer is as often one symbol as another, in both."""
    needy, twin = SMALL.documents(4000), ChainedLookups(symbols=5, most=2, questions=4, needed=False).documents(4000)
    answers = slice(1 + 5 + 1, None, 2)
    other = np.ones(SMALL.length, dtype=bool)
    other[answers] = False
    assert (needy[:, other] == twin[:, other]).all()
    for documents in (needy, twin):
        counts = np.bincount(documents[:, answers].ravel())[-5:]
        assert counts.min() > 0.94 * counts.mean()


def test_documents_follow_from_the_seed_whatever_their_number() -> None:
    assert (SMALL.documents(10) == SMALL.documents(1000)[:10]).all()
    assert (ChainedLookups(symbols=5, most=2, questions=4, seed=1).documents(10) != SMALL.documents(10)).any()


def test_need_is_read_off_the_text() -> None:
    words = ["a>b", "b>a", "2?a", "b", "0?b", "a", "1?a"]
    assert need_of_chained_lookups(words) == [None, None, None, 2, None, 0, None]
    assert need_of_twin(words) == [None, None, None, 0, None, 0, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symbols": 2}, "symbols = 2"),
        ({"most": 10}, "most = 10"),
        ({"questions": 0.5}, "questions = 0.5"),
        ({"questions": 22}, "at most 21"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        known_need(lookups=ChainedLookups(**changes))
    with pytest.raises(ValueError, match="documents = 100"):
        known_need(documents=100)


def test_every_row_is_a_document_and_its_need_is_known() -> None:
    corpus = known_need(documents=300, validation_documents=20, lookups=SMALL)
    assert corpus.problems() == []
    assert known_need(documents=300, validation_documents=20, lookups=SMALL).fingerprint == corpus.fingerprint
    twin = known_need(
        documents=300, validation_documents=20, lookups=ChainedLookups(symbols=5, most=2, questions=4, needed=False)
    )
    assert twin.fingerprint != corpus.fingerprint
    prepared = prepare(corpus, SMALL.length)
    assert prepared.counts["train_documents"] == 279, "20 are held out, and the probe"
    assert prepared.rows == 278, "behind the last document stands no token to predict"
    need = NeedOfCorpus.of(prepared)
    assert need is not None
    held_out = prepared.validation()
    assert len(held_out) == 20
    for document in held_out:
        assert len(document.tokens) == SMALL.length
        needs = need(document)
        assert (needs[:5] == UNPREDICTABLE).all()
        assert (needs[5::2] == UNPREDICTABLE).all()
        assert (needs[6::2] >= 0).all()
        words = words_of(SMALL, document.tokens)
        assert needs[6::2].tolist() == [int(word[0]) for word in words[6::2]]
