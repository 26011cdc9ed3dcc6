"""How files hold documents: one reader for each format, which holds no more than a document at a time.

A reader gives a shard's documents in a fixed order under names that do not depend on how a file was cut into shards.
What cannot be read raises a :class:`SourceError` that names file and place.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from haltscale.platform.corpora.sources import Source

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


class SourceError(ValueError):
    """A source cannot be read; the message names the file and the place in it."""


class Format(StrEnum):
    """How a source's files hold documents."""

    AUTO = "auto"
    """By the files' suffixes: .txt, .jsonl/.ndjson, .csv/.tsv, .parquet."""
    TEXT = "text"
    """One document a file."""
    LINES = "lines"
    """One document a line."""
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    UINT16 = "uint16"
    """Token ids as the authors store them: a flat little-endian array, documents divided by end-of-text."""
    UINT32 = "uint32"
    HUGGING_FACE = "hugging-face"
    """``path`` is a dataset's name on the Hub, or a folder with data files, read by ``datasets`` as a stream."""


SUFFIXES = {
    Format.TEXT: (".txt",),
    Format.LINES: (".txt",),
    Format.JSONL: (".jsonl", ".ndjson"),
    Format.CSV: (".csv", ".tsv"),
    Format.PARQUET: (".parquet",),
    Format.UINT16: (".bin", ".npy"),
    Format.UINT32: (".bin", ".npy"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TOKEN_FORMATS: dict[Format, np.dtype[Any]] = {Format.UINT16: np.dtype("<u2"), Format.UINT32: np.dtype("<u4")}


class InvalidUtf8(StrEnum):
    """What happens to a text that is not valid UTF-8."""

    ERROR = "error"
    """The corpus is refused; the message names file and byte."""
    REPLACE = "replace"
    """Each invalid sequence becomes U+FFFD, and the document is counted under ``replaced_utf8``."""


@dataclass(frozen=True)
class File:
    """A file of a source."""

    name: str
    """Relative to the source's path: part of its documents' names, the same wherever the source lies."""
    url: str
    """The path on its filesystem."""
    size: int
    """Bytes, as stored."""

    @property
    def compression(self) -> str | None:
        return next((codec for suffix, codec in COMPRESSIONS.items() if self.name.endswith(suffix)), None)


@dataclass(frozen=True)
class Shard:
    """A part of a source that one task reads."""

    files: tuple[File, ...]
    """Several small text files; else one."""
    first: int = 0
    """Byte, row group, token or shard (Hugging Face) at which to begin."""
    last: int | None = None
    """Where to stop, exclusive; None: at the end."""


Document = tuple[str, str | None]
"""A name, and its text; None where the source has a null."""


def bare_name(name: str) -> str:
    """A file's name without its compression."""
    return next((name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix)), name)


# ---- readers: one per format ----------------------------------------------------------------------------------------


def _read_texts(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    for file in shard.files:
        with _told(file), source.open(file) as stream:
            content = stream.read(source.longest_document_bytes + 1)
        if len(content) > source.longest_document_bytes:
            skipped["too_long"] += 1
        else:
            yield file.name, source.decode(content, file.url, 0, skipped)


def _read_lines(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    for offset, line in _lines(source, file, shard, skipped):
        yield f"{file.name}@{offset}", source.decode(line, file.url, offset, skipped)


def _read_jsonl(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    for offset, line in _lines(source, file, shard, skipped):
        text = source.decode(line, file.url, offset, skipped).strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise SourceError(f"{file.url} is no JSON in the line at byte {offset} ({error})") from None
        yield f"{file.name}@{offset}", _field(source, row, f"{file.url}, the line at byte {offset}")


def _read_csv(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    csv.field_size_limit(source.longest_document_bytes)
    lines = (
        source.decode(line, file.url, offset, skipped) + "\n" for offset, line in _lines(source, file, shard, skipped)
    )
    rows = csv.DictReader(lines, delimiter="\t" if ".tsv" in file.name else ",", strict=True)
    try:
        for index, row in enumerate(rows):
            yield f"{file.name}#{index}", _field(source, row, f"{file.url}, row {index}")
    except csv.Error as error:
        raise SourceError(f"{file.url} is no CSV at line {rows.line_num} ({error})") from None


def _read_parquet(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    with _told(file), source.open(file) as stream:
        table = open_parquet(stream, file)
        names = table.schema_arrow.names
        if source.text_field not in names:
            raise SourceError(_no_field(source, names, file.url))
        kind = table.schema_arrow.field(source.text_field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise SourceError(f"{file.url}: field {source.text_field!r} is {kind}, not text")
        groups = range(shard.first, table.num_row_groups if shard.last is None else shard.last)
        index = sum(table.metadata.row_group(group).num_rows for group in range(shard.first))
        for batch in table.iter_batches(batch_size=64, columns=[source.text_field], row_groups=list(groups)):
            for content in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                name = f"{file.name}#{index}"
                yield name, content if content is None else source.decode(content, f"{file.url}#{index}", 0, skipped)
                index += 1


def _read_hugging_face(source: Source, shard: Shard, skipped: Counter[str]) -> Iterator[Document]:
    stream = source.load_hugging_face()
    stream = stream.shard(num_shards=stream.num_shards, index=shard.first)
    for index, row in enumerate(stream):
        name = f"{shard.first}#{index}"
        yield name, _field(source, row, f"{source.path}, shard {shard.first}, row {index}")


READERS: dict[Format, Callable[[Source, Shard, Counter[str]], Iterator[Document]]] = {
    Format.TEXT: _read_texts,
    Format.LINES: _read_lines,
    Format.JSONL: _read_jsonl,
    Format.CSV: _read_csv,
    Format.PARQUET: _read_parquet,
    Format.HUGGING_FACE: _read_hugging_face,
}


def read_tokens(
    source: Source, shard: Shard, skipped: Counter[str], end_of_text: int, vocab_size: int
) -> Iterator[tuple[str, npt.NDArray[np.uint32]]]:
    """Documents whose first token lies in the shard; they may end behind it."""
    (file,) = shard.files
    kind = TOKEN_FORMATS[source.kind]
    last = file.size // kind.itemsize if shard.last is None else shard.last
    longest = source.longest_document_bytes // 4
    with _told(file), source.open(file) as stream:
        begin = max(0, shard.first - 1)  # the token before tells whether a document begins right here
        stream.seek(begin * kind.itemsize)
        pending: list[npt.NDArray[np.uint32]] = []
        started, held, position, too_long = shard.first == 0, 0, begin, False
        begun = begin
        while True:
            tokens = np.frombuffer(stream.read(CHUNK_BYTES), dtype=kind).astype(np.uint32)
            if len(tokens) and tokens.max() >= vocab_size:
                at = position + int(np.argmax(tokens >= vocab_size))
                raise SourceError(f"{file.url}: token {tokens.max()} at {at} is not in a vocabulary of {vocab_size}")
            ends = np.flatnonzero(tokens == end_of_text)
            for cut, end in zip([0, *(ends + 1)], [*ends, len(tokens)], strict=True):
                if started and not too_long:
                    pending.append(tokens[cut:end])
                    held += end - cut
                    too_long = held > longest
                    pending = [] if too_long else pending
                complete = end < len(tokens) or not len(tokens)
                if complete:
                    if too_long:
                        skipped["too_long"] += 1
                    elif held:
                        yield f"{file.name}@{begun}", np.concatenate(pending)
                    pending, held, too_long, started, begun = [], 0, False, True, position + int(end) + 1
                    if begun >= last:
                        return
            position += len(tokens)
            if not len(tokens):
                return


def _lines(source: Source, file: File, shard: Shard, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the shard; one that is too long is counted and never held."""
    with _told(file), source.open(file) as stream:
        offset = 0
        if shard.first:
            stream.seek(shard.first - 1)  # a line that begins before the shard is another's
            offset = shard.first - 1
        parts: list[bytes] = []
        held, own = 0, not shard.first
        begun = offset
        while chunk := stream.read(CHUNK_BYTES):
            cut = 0
            while (end := chunk.find(b"\n", cut)) >= 0:
                if own and held + end - cut <= source.longest_document_bytes:
                    line = b"".join([*parts, chunk[cut:end]]).removesuffix(b"\r")
                    yield begun, line.removeprefix(BOM) if begun == 0 else line
                elif own:
                    skipped["too_long"] += 1
                own, parts, held, cut, begun = True, [], 0, end + 1, offset + end + 1
                if shard.last is not None and begun >= shard.last:
                    return
            held += len(chunk) - cut
            if own and held <= source.longest_document_bytes:
                parts.append(chunk[cut:])
            else:
                parts = []
            offset += len(chunk)
        if own and held > source.longest_document_bytes:
            skipped["too_long"] += 1
        elif own and held:
            line = b"".join(parts).removesuffix(b"\r")
            yield begun, line.removeprefix(BOM) if begun == 0 else line


@contextlib.contextmanager
def _told(file: File) -> Iterator[None]:
    """Errors of reading become ones that name the file."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, EOFError) as error:
        raise SourceError(f"{file.url} cannot be read, it may be cut short ({error})") from error


def _field(source: Source, row: Any, where: str) -> str | None:
    if not isinstance(row, Mapping):
        raise SourceError(f"{where} is no object with fields")
    if source.text_field not in row:
        raise SourceError(_no_field(source, list(row), where))
    text = row[source.text_field]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: field {source.text_field!r} is {type(text).__name__}, not text")
    return text


def _no_field(source: Source, names: list[str], where: str) -> str:
    there = ", ".join(repr(name) for name in names)
    return f"{where} has no field {source.text_field!r}; there are: {there}. Give one of them as text_field"


def open_parquet(stream: Any, file: File) -> pq.ParquetFile:
    """A parquet file; a broken one is told by name."""
    with _told(file):
        return pq.ParquetFile(stream)
