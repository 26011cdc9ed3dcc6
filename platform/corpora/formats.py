"""How files hold documents: one reader for each format, which holds no more than a document at a time.

A reader gives a shard's documents in a fixed order under names that do not depend on how a file was cut into shards.
What cannot be read raises a :class:`SourceError` that names file and place.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from haltscale.platform.corpora.compression import compression
from haltscale.platform.corpora.csv_rows import CsvError, CsvScanner

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


def printable(text: str) -> str:
    """A text that UTF-8 can hold: file names that are not UTF-8, and halves of surrogate pairs, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class SourceError(ValueError):
    """A source cannot be read; the message names the file and the place in it.

    ``line`` is the number of the line, where a whole JSONL file was read to it; else None.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(printable(message))
        self.line = line


class Format(StrEnum):
    """How a source's files hold documents."""

    AUTO = "auto"
    """By the files' suffixes: .txt, .jsonl/.ndjson, .csv/.tsv, .parquet, .arrow/.feather."""
    TEXT = "text"
    """One document a file."""
    LINES = "lines"
    """One document a line."""
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    ARROW = "arrow"
    """Arrow's IPC files and streams, Feather (version 2) included."""
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
    Format.ARROW: (".arrow", ".feather"),
    Format.UINT16: (".bin", ".npy"),
    Format.UINT32: (".bin", ".npy"),
}
TOKEN_FORMATS: dict[Format, np.dtype[Any]] = {Format.UINT16: np.dtype("<u2"), Format.UINT32: np.dtype("<u4")}
SEEKABLE_FORMATS = {Format.PARQUET, Format.ARROW, *TOKEN_FORMATS}
"""Read in parts, so not through a compression."""


class InvalidUtf8(StrEnum):
    """What happens to a text that is not valid UTF-8."""

    ERROR = "error"
    """The corpus is refused; the message names file and byte."""
    REPLACE = "replace"
    """Each invalid sequence becomes U+FFFD, and the document is counted under ``replaced_utf8``."""


class Quoting(StrEnum):
    """What quotation marks mean in CSV and TSV."""

    AUTO = "auto"
    """They quote, and a quoted cell that looks like several rows is refused: then say which of the others it is."""
    DOUBLE = "double"
    """They quote; within a quoted cell they are doubled (RFC 4180)."""
    NONE = "none"
    """They are letters like any other, as the usual TSV has them."""


@dataclass(frozen=True)
class File:
    """A file of a source."""

    name: str
    """Relative to the source's path: part of its documents' names, the same wherever the source lies."""
    url: str
    """The path on its filesystem."""
    size: int
    """Bytes, as stored; 0 also where a server does not say."""

    @property
    def compression(self) -> str | None:
        return compression(self.name)


@dataclass(frozen=True)
class Shard:
    """A part of a source that one task reads."""

    files: tuple[File, ...]
    """Several small text files; else one."""
    first: int = 0
    """Byte, row group, token or shard (Hugging Face) at which to begin."""
    last: int | None = None
    """Where to stop, exclusive; None: at the end."""


class Readable(Protocol):
    """What the readers need of a source."""

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> Format: ...
    @property
    def text_field(self) -> str: ...
    @property
    def longest_document_bytes(self) -> int: ...
    @property
    def delimiter(self) -> str | None: ...
    @property
    def quoting(self) -> Quoting: ...
    def open(self, file: File) -> Any: ...
    def decode(self, content: bytes, where: str, offset: int, counted: Counter[str]) -> str: ...
    def load_hugging_face(self) -> Any: ...


Document = tuple[str, str | None]
"""A name, and its text; None where the source has a null."""


# ---- readers: one per format ----------------------------------------------------------------------------------------


def _read_texts(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    for file in shard.files:
        with named_errors(file), source.open(file) as stream:
            content = read_at_most(stream, source.longest_document_bytes + 1)
        if len(content) > source.longest_document_bytes:
            counted["too_long"] += 1
        else:
            yield file.name, source.decode(_without_bom(content, 0, counted), file.url, 0, counted)


def _read_lines(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    for offset, line in _lines(source, file, shard, counted):
        yield f"{file.name}@{offset}", source.decode(line, file.url, offset, counted)


def _read_jsonl(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    for offset, _, row in json_rows(source, file, shard, counted, (source.text_field,)):
        yield f"{file.name}@{offset}", _field(source, row, f"{file.url}, the line at byte {offset}")


def json_rows(
    source: Readable, file: File, shard: Shard, counted: Counter[str], fields: tuple[str, ...]
) -> Iterator[tuple[int, int, Any]]:
    """(offset, number of the line in the shard, value) of the JSON lines that begin there, without blank lines.

    Raises:
        SourceError: a line is not JSON, or holds one of these fields twice.
    """
    for number, (offset, line) in enumerate(_lines(source, file, shard, counted), start=1):
        text = source.decode(line, file.url, offset, counted).strip()
        if not text:
            continue
        place = f"the line at byte {offset}"
        try:
            row, repeated = json.loads(text), _repeated(text, fields)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file.url} is not valid JSON in {place} ({error})", number) from None
        if repeated:
            message = f"{file.url}, {place} has the field {repeated!r} more than once: keep one of them"
            raise SourceError(message, number)
        yield offset, number, row


def _repeated(text: str, fields: tuple[str, ...]) -> str | None:
    """Which of the fields a JSON object holds twice: the parser would take the last of them silently."""
    suspects = [field for field in fields if text.count(json.dumps(field)) > 1]
    if not suspects:
        return None
    pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    names = Counter(pair[0] for pair in pairs if isinstance(pair, tuple))
    return next((field for field in suspects if names[field] > 1), None)


def _read_csv(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    delimiter = source.delimiter or ("\t" if ".tsv" in file.name.rsplit("/", 1)[-1].lower() else ",")
    with named_errors(file), source.open(file) as stream:
        first = read_at_most(stream, max(CHUNK_BYTES, len(BOM)))
        if not first:
            counted["empty_file"] += 1
        unmarked = _without_bom(first, 0, counted)
        scanner = CsvScanner(
            itertools.chain([unmarked], iter(lambda: stream.read(CHUNK_BYTES), b"")),
            offset=len(first) - len(unmarked),
            delimiter=delimiter.encode(),
            quotes=source.quoting is not Quoting.NONE,
            reject_swallowed_rows=source.quoting is Quoting.AUTO,
            longest=source.longest_document_bytes,
        )
        try:
            rows = scanner.rows()
            names = [(cell.content or b"").decode("utf-8", "replace") for cell in next(rows, [])]
            if not names:
                return
            column = _only(source, names, file.url)
            index = 0
            for row in rows:
                cell = row[column]
                if cell.content is None:
                    counted["too_long"] += 1
                    continue
                yield f"{file.name}#{index}", source.decode(cell.content, file.url, cell.offset, counted)
                index += 1
        except CsvError as error:
            raise SourceError(f"{file.url} is not valid CSV: {error}") from None


def _read_parquet(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    with named_errors(file), source.open(file) as stream:
        table = open_parquet(stream, file)
        _check_text_column(source, table.schema_arrow, file)
        groups = range(shard.first, table.num_row_groups if shard.last is None else shard.last)
        index = sum(table.metadata.row_group(group).num_rows for group in range(shard.first))
        for batch in table.iter_batches(batch_size=64, columns=[source.text_field], row_groups=list(groups)):
            place = batch.schema.get_field_index(source.text_field)
            yield from _column_texts(source, file, batch.column(place), index, counted)
            index += len(batch)


def _read_arrow(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    (file,) = shard.files
    with named_errors(file), source.open(file) as stream:
        magic = stream.read(6)
        stream.seek(0)
        if magic[:4] == b"FEA1":
            raise SourceError(f"{file.url} is Feather of version 1, which is not read: write it as version 2")
        opened = (pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream)(pa.PythonFile(stream, mode="r"))
        _check_text_column(source, opened.schema, file)
        place, index = opened.schema.get_field_index(source.text_field), 0
        many = opened.num_record_batches if magic == b"ARROW1" else None
        batches = opened if many is None else (opened.get_batch(number) for number in range(many))
        for batch in batches:
            yield from _column_texts(source, file, batch.column(place), index, counted)
            index += len(batch)


BYTES_OF = {
    **{kind: kind for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())},
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
"""Arrow's types that hold text (older writers give it no logical type), and those of their bytes."""


def _check_text_column(source: Readable, schema: pa.Schema, file: File) -> None:
    kind = schema.field(_only(source, schema.names, file.url)).type
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in BYTES_OF:
        raise SourceError(f"{file.url}: field {source.text_field!r} is {kind}, not text")


def _column_texts(
    source: Readable, file: File, column: pa.Array, first: int, counted: Counter[str]
) -> Iterator[Document]:
    for index, content in enumerate(_column_bytes(column), start=first):
        place = f"{file.url}#{index}"
        yield f"{file.name}#{index}", content if content is None else source.decode(content, place, 0, counted)


def _column_bytes(column: pa.Array) -> list[bytes | None]:
    """The texts' bytes, which need not be UTF-8. They are checked before: of a damaged file, what Arrow reads may point
    outside its memory."""
    if isinstance(column, pa.DictionaryArray):
        column.indices.validate(full=True)
        words = _column_bytes(column.dictionary)
        places = column.indices.to_pylist()
        if any(place is not None and not 0 <= place < len(words) for place in places):
            raise pa.ArrowInvalid("an index points outside its dictionary")
        return [None if place is None else words[place] for place in places]
    raw = column if column.type == BYTES_OF[column.type] else column.view(BYTES_OF[column.type])
    raw.validate(full=True)
    found: list[bytes | None] = raw.to_pylist()
    return found


def _read_hugging_face(source: Readable, shard: Shard, counted: Counter[str]) -> Iterator[Document]:
    index = 0
    try:
        stream = source.load_hugging_face()
        stream = stream.shard(num_shards=stream.num_shards, index=shard.first)
        for index, row in enumerate(stream):
            name = f"{shard.first}#{index}"
            yield name, _field(source, row, f"{source.path}, shard {shard.first}, row {index}")
    except SourceError:
        raise
    except Exception as error:  # the library raises what its readers and its network stack raise
        where = f"dataset {source.path!r}, shard {shard.first}, cannot be read after row {index}"
        raise SourceError(f"{where} ({type(error).__name__}: {error})") from error


READERS: dict[Format, Callable[[Readable, Shard, Counter[str]], Iterator[Document]]] = {
    Format.TEXT: _read_texts,
    Format.LINES: _read_lines,
    Format.JSONL: _read_jsonl,
    Format.CSV: _read_csv,
    Format.PARQUET: _read_parquet,
    Format.ARROW: _read_arrow,
    Format.HUGGING_FACE: _read_hugging_face,
}
"""Each counts what it leaves out (``too_long``) and what it alters (``byte_order_mark``) by reason."""


def read_tokens(
    source: Readable, shard: Shard, counted: Counter[str], end_of_text: int, vocab_size: int
) -> Iterator[tuple[str, npt.NDArray[np.uint32]]]:
    """Documents whose first token lies in the shard; they may end behind it."""
    (file,) = shard.files
    kind = TOKEN_FORMATS[source.kind]
    last = file.size // kind.itemsize if shard.last is None else shard.last
    longest = source.longest_document_bytes // 4
    with named_errors(file), source.open(file) as stream:
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
                        counted["too_long"] += 1
                    elif held:
                        yield f"{file.name}@{begun}", np.concatenate(pending)
                    pending, held, too_long, started, begun = [], 0, False, True, position + int(end) + 1
                    if begun >= last:
                        return
            position += len(tokens)
            if not len(tokens):
                return


def _lines(source: Readable, file: File, shard: Shard, counted: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the shard; one that is too long is counted and never held."""
    with named_errors(file), source.open(file) as stream:
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
                    yield begun, _without_bom(line, begun, counted)
                elif own:
                    counted["too_long"] += 1
                own, parts, held, cut, begun = True, [], 0, end + 1, offset + end + 1
                if shard.last is not None and begun >= shard.last:
                    return
            held += len(chunk) - cut
            if own and held <= source.longest_document_bytes:
                parts.append(chunk[cut:])
            else:
                parts = []
            offset += len(chunk)
        if not offset:
            counted["empty_file"] += 1
        if own and held > source.longest_document_bytes:
            counted["too_long"] += 1
        elif own and held:
            yield begun, _without_bom(b"".join(parts).removesuffix(b"\r"), begun, counted)


def _without_bom(content: bytes, offset: int, counted: Counter[str]) -> bytes:
    """Bytes that begin at ``offset`` of a file, without the byte order mark that may begin it."""
    if offset or not content.startswith(BOM):
        return content
    counted["byte_order_mark"] += 1
    return content.removeprefix(BOM)


def read_at_most(stream: Any, count: int) -> bytes:
    """So many bytes, fewer only at the end of the file; one call of some streams gives less."""
    parts, left = [], count
    while left and (part := stream.read(min(left, CHUNK_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def named_errors(file: File) -> Iterator[None]:
    """Errors of reading become ones that name the file."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, lzma.LZMAError, zlib.error, MemoryError) as error:
        reason = str(error) or "its header declares more data than fits into memory"  # as damaged lengths may
        raise SourceError(f"{file.url} cannot be read, it may be cut short ({reason})") from error


def _field(source: Readable, row: Any, where: str) -> str | None:
    if not isinstance(row, Mapping):
        raise SourceError(f"{where} is not an object with fields")
    if source.text_field not in row:
        raise SourceError(_no_field(source, list(row), where))
    text = row[source.text_field]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: field {source.text_field!r} is {type(text).__name__}, not text")
    return text


def _only(source: Readable, names: list[str], where: str) -> int:
    """Where among the columns the text field is."""
    if source.text_field not in names:
        raise SourceError(_no_field(source, names, where))
    if (count := names.count(source.text_field)) > 1:
        raise SourceError(f"{where} has {count} columns called {source.text_field!r}: rename all but one")
    return names.index(source.text_field)


def _no_field(source: Readable, names: list[str], where: str) -> str:
    there = ", ".join(repr(name) for name in names)
    return f"{where} has no field {source.text_field!r}; available: {there}. Give one of them as text_field"


def open_parquet(stream: Any, file: File) -> pq.ParquetFile:
    """A parquet file; the error for a broken one names it."""
    with named_errors(file):
        return pq.ParquetFile(stream)
