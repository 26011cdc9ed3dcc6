"""What kind of token each entry of a vocabulary is: how frequent in the training text, and what it looks like."""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from haltscale.platform.corpora.corpus import PreparedCorpus

FREQUENCY_CLASSES = 10


class TokenClass(StrEnum):
    """What a token looks like; its first character that is not white space decides."""

    WORD_START = "word_start"
    """Letters after white space."""
    WORD_INSIDE = "word_inside"
    """Letters that continue a word, or begin one without white space before it."""
    NUMBER = "number"
    PUNCTUATION = "punctuation"
    """Punctuation and symbols."""
    SPACE = "space"
    """White space alone."""
    OTHER = "other"
    """Special tokens, and pieces of characters."""


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """Look-up tables over the vocabulary."""

    frequency: npt.NDArray[np.uint8]
    """``(vocabulary,)``: 0 to 9. Class 0 holds the most frequent tokens, which make up a tenth of the running text;
    class 9 the rarest, those that never occur included."""
    look: npt.NDArray[np.int8]
    """``(vocabulary,)``: index into ``list(TokenClass)``."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, counts: npt.NDArray[np.int64]) -> TokenKinds:
        """From a tokenizer and how often each token occurs."""
        return cls(frequency=frequency_classes(counts), look=token_classes(tokenizer, len(counts)))

    @classmethod
    def of_corpus(cls, corpus: PreparedCorpus) -> TokenKinds:
        """From a prepared corpus: its tokenizer, and how often each token occurs in its training documents."""
        return _kinds_of_folder(corpus.folder)


@functools.lru_cache(maxsize=2)
def _kinds_of_folder(folder: Path) -> TokenKinds:
    return TokenKinds.of(Tokenizer.from_file(str(folder / "tokenizer.json")), np.load(folder / "token_counts.npy"))


def frequency_classes(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The class of each token: by the share of running text that more frequent tokens make up."""
    order = np.argsort(-counts, kind="stable")
    total = max(int(counts.sum()), 1)
    before = np.cumsum(counts[order]) - counts[order]
    classes = np.empty(len(counts), dtype=np.uint8)
    classes[order] = np.minimum(before * FREQUENCY_CLASSES // total, FREQUENCY_CLASSES - 1)
    return classes


def token_classes(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int8]:
    """The look of each token, as an index into ``list(TokenClass)``."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    looks = list(TokenClass)
    pieces = tokenizer.decode_batch([[index] for index in range(vocab_size)], skip_special_tokens=False)
    classes = [TokenClass.OTHER if i in special else _look(piece) for i, piece in enumerate(pieces)]
    return np.array([looks.index(one) for one in classes], dtype=np.int8)


def _look(piece: str) -> TokenClass:
    bare = piece.lstrip()
    if not bare:
        return TokenClass.SPACE if piece else TokenClass.OTHER
    category = unicodedata.category(bare[0])
    if bare[0] == "\N{REPLACEMENT CHARACTER}":
        return TokenClass.OTHER
    if category[0] in "LM":
        return TokenClass.WORD_START if len(bare) < len(piece) else TokenClass.WORD_INSIDE
    return {"N": TokenClass.NUMBER, "P": TokenClass.PUNCTUATION, "S": TokenClass.PUNCTUATION}.get(
        category[0], TokenClass.OTHER
    )
