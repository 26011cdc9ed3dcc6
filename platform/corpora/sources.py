"""Where documents come from: files of any common format, local or remote, and Hugging Face datasets.

A source is a description. It lists its files, cuts them into shards that are read independently of each other, and
reads a shard's documents (:mod:`haltscale.platform.corpora.formats`).

What cannot be read stops the preparation with a :class:`SourceError` that names file and place; what is not a document
(an empty file, a null, a text that a filter refuses) is skipped and counted by reason. ``docs/corpora.md`` lists both.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from haltscale.platform.corpora.compression import bare_name, open_compressed, packed_suffix
from haltscale.platform.corpora.formats import (
    BOM,
    READERS,
    SEEKABLE_FORMATS,
    SUFFIXES,
    TOKEN_FORMATS,
    File,
    Format,
    InvalidUtf8,
    Quoting,
    Shard,
    SourceError,
    json_rows,
    named_errors,
    open_parquet,
    read_at_most,
    read_tokens,
)
from haltscale.platform.durable import write_json
from haltscale.platform.identity import digest, encodable
from haltscale.platform.store import haltscale_home

SHARD_BYTES = 8 << 20
"""Least size of a shard; the rows do not depend on it."""
MOST_SHARDS = 4096
"""Of a source: in larger ones, shards grow."""
FORMATS = ", ".join(kind for kind in Format if kind is not Format.AUTO)
PART_NAME = re.compile(r"(?P<stem>.*)-\d+-of-(?P<parts>\d+)\b.*", re.DOTALL)
"""How datasets that are saved in parts call them."""
MOST_NAMED = 10
"""Files that one message names; the others are counted."""
CHOICES: dict[str, type[StrEnum]] = {"format": Format, "invalid_utf8": InvalidUtf8, "quoting": Quoting}
FIELD_TYPES = (
    *((name, str, False) for name in ("path", "text_field", "keep", "split")),
    *((name, str, True) for name in ("delimiter", "config", "revision")),
    *((name, int, False) for name in ("min_characters", "longest_document_bytes")),
    *((name, int, True) for name in ("documents", "max_characters")),
)
"""Name, type, and whether None will do."""
LATER_FIELDS: dict[str, tuple[Any, ...]] = {"delimiter": (None,), "quoting": (Quoting.AUTO, Quoting.DOUBLE)}
"""Fields that are in a source's identity only where they have another value than these, so that older fingerprints stay
what they are. (AUTO reads what DOUBLE reads, or refuses.)"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where some documents of a corpus come from, and which of them are taken."""

    path: str
    """Absolute path (text or ``pathlib.Path``) of a file or a folder, a glob, or any fsspec URL (``s3://``, ``gs://``,
    ``hf://``, ``https://``); ``.gz``, ``.zst``, ``.bz2``, ``.xz`` and ``.lz4`` are read through. A path that exists is
    that path, whatever signs are in its name."""
    format: Format = Format.AUTO
    text_field: str = "text"
    """The field, column or key that holds a document's text; unused in plain text and token arrays."""
    delimiter: str | None = None
    """Of CSV: one ASCII character. None: a tab in ``.tsv`` files, else a comma."""
    quoting: Quoting = Quoting.AUTO
    """Of CSV: what quotation marks mean."""
    weight: float | None = None
    """Share of the training rows in a mixture, relative to the other sources' weights. None: rows are drawn as often as
    there are; then no source of the corpus may have a weight."""
    documents: int | None = None
    """At most so many documents, the first in order that pass the filters; None: all."""
    min_characters: int = 0
    max_characters: int | None = None
    """Texts shorter or longer than these are skipped, counted as ``filtered``."""
    keep: str = ""
    """A predicate ``module:function`` from a text to whether it is kept. Its name is in the fingerprint, its code is
    not: give a changed predicate a new name."""
    invalid_utf8: InvalidUtf8 = InvalidUtf8.ERROR
    longest_document_bytes: int = 256 << 20
    """A longer text file or line is skipped without being held in memory, counted as ``too_long``."""
    config: str | None = None
    """Of a Hugging Face dataset: its configuration."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    revision: str | None = None
    """Of a Hugging Face dataset: a commit or tag; None takes the newest, and its commit goes into the fingerprint."""

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) in list(choices):
                object.__setattr__(self, name, choices(value))  # a plain text is as good

    # ---- what there is ----------------------------------------------------------------------------------------------

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.path)
        return fs, root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "://" not in str(self.path) or self.path.startswith("file://")

    @cached_property
    def kind(self) -> Format:
        """The format, read off the suffixes where it is AUTO; AUTO where they do not tell."""
        if self.format is not Format.AUTO:
            return self.format
        found = {kind for kind, ends in SUFFIXES.items() for file in self._all_files if _ends(file, ends)}
        found -= {Format.LINES, *TOKEN_FORMATS}
        if len(found) > 1:
            found -= {Format.ARROW}  # datasets of the Hub's library keep Arrow files beside what they are made from
        return found.pop() if len(found) == 1 else Format.AUTO

    @cached_property
    def _listing(self) -> tuple[bool, list[File]]:
        """Whether the path is a folder, and every file that it names, in the order of their names."""
        fs, root = self._filesystem
        is_pattern = any(sign in root for sign in "*?[") and not fs.exists(root)
        is_folder = False
        if is_pattern:
            literal = _literal_part(root) if self.is_local else ""
            base = literal or root[: min(root.find(sign) for sign in "*?[" if sign in root)].rsplit("/", 1)[0]
            found = fs.glob(glob.escape(literal) + root[len(literal) :], detail=True)
        elif fs.isfile(root):
            found, base = {root: fs.info(root)}, root.rsplit("/", 1)[0]
        elif self.is_local:
            found, base, is_folder = dict.fromkeys(_walk(root) if fs.exists(root) else ()), root, True
        else:
            found, base, is_folder = fs.find(root, detail=True), root, True
        files = []
        for url, info in found.items():
            size = _local_size(url) if self.is_local else int(info.get("size") or 0)
            if not (os.path.isdir(url) if self.is_local else info.get("type") == "directory"):
                files.append(File(name=url.removeprefix(base).lstrip("/"), url=url, size=size))
        return is_folder, sorted(files, key=lambda file: file.name)

    @property
    def _all_files(self) -> list[File]:
        return self._listing[1]

    @cached_property
    def files(self) -> list[File]:
        """The files that hold documents, in the order of their names.

        Where the format is given, files may be called anything: all that a path or a pattern names are read. Of a
        folder those with the format's suffix are, or all where none has it.
        """
        if self.kind is Format.HUGGING_FACE:
            return self._all_files
        is_folder, files = self._listing
        named = [file for file in files if _ends(file, SUFFIXES.get(self.kind, ()))]
        if self.format is Format.AUTO or self.kind is Format.AUTO:
            return named
        return named if is_folder and named else files

    @property
    def other_files(self) -> dict[str, int]:
        """How many files below the path are not read, by suffix."""
        read = {file.url for file in self.files}
        names = [PurePosixPath(file.name).name for file in self._all_files if file.url not in read]
        return dict(sorted(Counter(PurePosixPath(name).suffix or name for name in names).items()))

    def type_problems(self) -> list[str]:
        """Fields that hold something of another type than they should."""
        found = []
        for name, kind, is_optional in FIELD_TYPES:
            value = getattr(self, name)
            if not (isinstance(value, kind) and not isinstance(value, bool)) and not (is_optional and value is None):
                what = "a text" if kind is str else "a whole number"
                found.append(f"{name} must be {what}{' or None' if is_optional else ''} (got {value!r})")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in list(choices):
                found.append(f"{name} must be one of {', '.join(choices)} (got {getattr(self, name)!r})")
        return found

    def problems(self) -> list[str]:
        """What is wrong with the description."""
        if found := self.type_problems():
            return found
        for name in ("documents", "max_characters", "longest_document_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} must be an integer above 0 (got {value!r})")
        if self.weight is not None and not (isinstance(self.weight, int | float) and 0 < self.weight < float("inf")):
            found.append(f"weight must be a number above 0 (got {self.weight!r}); to exclude a source, remove it")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            found.append(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or self.delimiter in '"\r\n' or self.delimiter > "~"
        ):
            found.append(
                f"delimiter must be one ASCII character, no quotation mark or line end (got {self.delimiter!r})"
            )
        if self.keep:
            try:
                if not callable(_predicate(self.keep)):
                    found.append(f"keep {self.keep!r} is not a function")
            except Exception as error:  # the module's own, too
                what = "is not an importable module:function"
                found.append(f"keep {self.keep!r} {what} ({type(error).__name__}: {error})")
        return found

    def file_problems(self) -> list[str]:
        """What is wrong with the files, as far as a glance shows."""
        if self.format is Format.HUGGING_FACE:
            try:
                self.identity()
            except SourceError as error:
                return [str(error)]
            return []
        if self.type_problems():
            return []  # among those of the description
        if self.is_local and not self.path.removeprefix("file://").startswith("/"):
            return [f"path {self.path!r} is not an absolute path"]  # jobs and workers run in folders of their own
        try:
            if not self._all_files:
                fs, root = self._filesystem
                there = fs.exists(root)
                return [f"path {self.path} " + ("contains no *.txt or other file" if there else "does not exist")]
        except (OSError, ImportError, ValueError) as error:
            return [f"path {self.path} cannot be listed ({type(error).__name__}: {error})"]
        kinds = [self.kind] if self.kind is not Format.AUTO else list(SUFFIXES)
        ends = tuple(end for kind in kinds for end in SUFFIXES[kind])
        read = {file.url for file in self.files}
        packed = [file for file in self._all_files if packed_suffix(file.name)]
        packed = [file for file in packed if file.url in read or _ends(file, ends, packed=True)]
        if packed:
            reason = "is an archive, or compressed in a way that is not read: unpack it"
            return _named(reason, [file.url for file in packed])
        if self.kind is Format.AUTO:
            return [
                f"path {self.path}: its files' suffixes do not determine one format: give format=, one of {FORMATS}"
            ]
        if not self.files:
            return [f"path {self.path} contains no {' or '.join('*' + end for end in SUFFIXES[self.kind])} file"]
        if found := [*(self._unreadable() if self.is_local else []), *self._mixed_parts()]:
            return found
        if self.kind in TOKEN_FORMATS:
            return [f"{file.url} {problem}" for file in self.files if (problem := self._token_problem(file))]
        if self.kind in SEEKABLE_FORMATS and (compressed := [file.url for file in self.files if file.compression]):
            return _named(f"is compressed: {self.kind} files are read in parts, unpack it first", compressed)
        try:
            self._first_document()
        except SourceError as error:
            return [str(error)]
        return []

    def _unreadable(self) -> list[str]:
        """Local files that are not there (links to nowhere), no regular files, or not to be read."""
        reasons: dict[str, list[str]] = {}
        for file in self.files:
            try:
                is_regular = stat.S_ISREG(os.stat(file.url).st_mode)
            except OSError as error:
                link = " (a link to nowhere)" if os.path.islink(file.url) else ""
                reasons.setdefault(f"cannot be read: {error.strerror}{link}", []).append(file.url)
                continue
            if not is_regular:
                reasons.setdefault("is not a regular file", []).append(file.url)
            elif not os.access(file.url, os.R_OK):
                reasons.setdefault("cannot be read: permission denied", []).append(file.url)
        return [problem for reason, urls in reasons.items() for problem in _named(reason, urls)]

    def _mixed_parts(self) -> list[str]:
        """Files of two saves of one dataset in one folder: ``train-00000-of-00003`` beside ``train-00000-of-00005``."""
        parts: dict[str, set[str]] = {}
        for file in self.files if self._listing[0] else []:
            if found := PART_NAME.fullmatch(file.name):
                parts.setdefault(found["stem"], set()).add(found["parts"])
        return [
            f"path {self.path}: {stem} is there in {' and in '.join(sorted(counts))} parts: remove those of an older"
            " save, or name the ones to read by a glob"
            for stem, counts in sorted(parts.items())
            if len(counts) > 1
        ]

    def _token_problem(self, file: File) -> str:
        if file.compression:
            return "is compressed: token arrays are read in parts, unpack it first"
        if file.size % TOKEN_FORMATS[self.kind].itemsize:
            return f"is not a whole number of {self.kind}"
        with self.open(file) as stream:
            has_header = stream.read(6) == b"\x93NUMPY"
        return "has a NumPy header: write the bare array with ndarray.tofile" if has_header else ""

    def _first_document(self) -> None:
        """Read one document of the first file that holds one, so that a wrong text field is reported at once."""
        if self.kind in (Format.TEXT, Format.LINES):
            return
        for file in self.files[:8]:
            if next(READERS[self.kind](self, Shard(files=(file,)), Counter()), None):
                return

    # ---- identity ---------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What makes up the documents, JSON-able: everything but where they lie, and their weight.

        Raises:
            SourceError: files cannot be read, a dataset cannot be found, or a field has another type than it should.
        """
        if problems := self.type_problems():
            raise SourceError("; ".join(problems))
        left_out = {"path", "weight", "format", "revision"}
        left_out |= {name for name, defaults in LATER_FIELDS.items() if getattr(self, name) in defaults}
        described = {name: value for name, value in encodable(self).items() if name not in left_out}
        try:
            return {**described, "format": str(self.kind), "contents": self._contents}
        except SourceError:
            raise
        except (OSError, ImportError, ValueError) as error:
            raise SourceError(f"path {self.path} cannot be read ({type(error).__name__}: {error})") from error

    @cached_property
    def _contents(self) -> str:
        """Digest of the contents. Local files are hashed (once, until they change); remote ones are known by the
        checksum, ETag or version that their filesystem tells, so that nothing is downloaded for it."""
        if self.kind is Format.HUGGING_FACE and not self.has_local_files:
            from huggingface_hub import HfApi  # only here is a network needed

            try:
                return f"{self.path}@{HfApi().dataset_info(self.path, revision=self.revision).sha}"
            except Exception as error:  # the library raises what its network stack raises
                reason = f"{type(error).__name__}: {error}"
                raise SourceError(f"dataset {self.path!r} cannot be found ({reason})") from error
        if self.is_local:
            return digest(self._local_contents(), length=64)
        return digest({file.name: _remote_version(self._filesystem[0], file) for file in self.files}, length=64)

    @property
    def has_local_files(self) -> bool:
        """Whether its files are on this machine; a dataset may also be a name on the Hub, which looks like a path."""
        return self.is_local and (self.kind is not Format.HUGGING_FACE or os.path.isdir(self.path))

    def _local_contents(self) -> dict[str, str]:
        """SHA-256 of each file; kept in the home folder by size and modification time, as git does.

        A text file that begins with a byte order mark, which older versions took for text, is known by another name.
        """
        if unreadable := self._unreadable():
            raise SourceError("; ".join(unreadable))
        texts = self.kind is Format.TEXT
        key = [self.path, "text"] if texts else self.path
        kept_in = haltscale_home() / "hashes" / f"{digest(key, length=32)}.json"
        kept = _kept_hashes(kept_in)
        hashes, fresh = {}, {}
        for file in self.files:
            found = os.stat(file.url)
            stamp = [found.st_size, found.st_mtime]
            if kept.get(file.name, [None])[:-1] == stamp:
                hashes[file.name] = kept[file.name][-1]
            else:
                with open(file.url, "rb") as stream:
                    hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
                if texts and self._begins_with_bom(file):
                    hashes[file.name] += " without its byte order mark"
            if time.time() - found.st_mtime > 2:  # a younger file may change again within the clock's resolution
                fresh[file.name] = [*stamp, hashes[file.name]]
        if fresh != kept:
            try:
                kept_in.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept_in, fresh)
            except OSError:
                pass  # a home that cannot be written is reported where it matters
        return hashes

    def _begins_with_bom(self, file: File) -> bool:
        try:
            with named_errors(file), self.open(file) as stream:
                return read_at_most(stream, len(BOM)) == BOM
        except SourceError:  # reported by the pass that reads everything
            return False

    def stamp(self, shard: Shard) -> str:
        """Of a shard's local files, size and time of modification; a kept shard of files that changed is not used."""
        if not self.has_local_files:
            return ""
        stats = [os.stat(file.url) for file in shard.files]
        return digest([[found.st_size, found.st_mtime_ns] for found in stats], length=16)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """The source cut into parts, in order."""
        if self.kind is Format.HUGGING_FACE:
            return [
                Shard(files=(), first=index, last=index + 1) for index in range(self.load_hugging_face().num_shards)
            ]
        least = max(SHARD_BYTES, sum(file.size for file in self.files) // MOST_SHARDS)
        if self.kind is Format.TEXT:
            return list(_grouped(self.files, least))
        return [shard for file in self.files for shard in self._cut(file, least)]

    def _cut(self, file: File, least: int) -> list[Shard]:
        """A file's shards; a compressed or quoted stream can only be read from its beginning."""
        if file.compression or self.kind in (Format.CSV, Format.ARROW) or file.size < 2 * least:
            return [Shard(files=(file,))]
        if self.kind is Format.PARQUET:
            if not self.is_local:
                return [Shard(files=(file,))]
            with self.open(file) as stream:
                groups = open_parquet(stream, file).metadata.num_row_groups
            each = max(1, groups * least // file.size)
            return [Shard(files=(file,), first=n, last=min(n + each, groups)) for n in range(0, groups, each)]
        size = TOKEN_FORMATS[self.kind].itemsize if self.kind in TOKEN_FORMATS else 1
        starts = range(0, file.size // size, least // size)
        return [Shard(files=(file,), first=n, last=min(n + starts.step, starts.stop)) for n in starts]

    def documents_of(
        self, shard: Shard, counted: Counter[str], *, end_of_text: int = 0, vocab_size: int = 1 << 32
    ) -> Iterator[tuple[str, str | npt.NDArray[np.uint32]]]:
        """A shard's documents that pass the filters, in order.

        Args:
            shard: one of :meth:`shards`.
            counted: counts what is left out and what is altered, by reason; filled on the way.
            end_of_text: the id that divides a token array's documents.
            vocab_size: of the tokenizer of a token array.

        Raises:
            SourceError: something cannot be read.
        """
        if self.kind in TOKEN_FORMATS:
            yield from read_tokens(self, shard, counted, end_of_text, vocab_size)
            return
        keep = _predicate(self.keep) if self.keep else None
        most = self.max_characters or sys.maxsize
        for name, text in READERS[self.kind](self, shard, counted):
            if text is None:
                counted["null"] += 1
            elif not text:
                counted["empty"] += 1
            elif not self.min_characters <= len(text) <= most or (
                keep is not None and not self._kept(keep, text, name)
            ):
                counted["filtered"] += 1
            else:
                yield name, self._valid(text, name, counted)

    def _kept(self, keep: Callable[[str], bool], text: str, name: str) -> bool:
        try:
            return bool(keep(text))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise SourceError(f"keep {self.keep!r} fails on document {name} of {self.path} ({reason})") from error

    def _valid(self, text: str, name: str, counted: Counter[str]) -> str:
        """The text, without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.invalid_utf8 is InvalidUtf8.ERROR:
                where = f"document {name} of {self.path}"
                raise SourceError(f"{where} is not UTF-8 (character {error.start}: {error.reason})") from None
            counted["replaced_utf8"] += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def open(self, file: File) -> Any:
        """A file's bytes, unpacked.

        Raises:
            EOFError: a compressed file is empty: even an empty text would have a header.
        """
        fs = self._filesystem[0]
        if file.compression and not file.size:  # it is empty, or its server does not say
            with fs.open(file.url, "rb") as probe:
                if not probe.read(1):
                    raise EOFError(f"it is empty, without even the header of a {file.compression} file")
        raw = fs.open(file.url, "rb")
        return open_compressed(raw, file.compression) if file.compression else raw

    def decode(self, content: bytes, where: str, offset: int, counted: Counter[str]) -> str:
        """A text from its bytes, which begin at ``offset`` of ``where``."""
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.invalid_utf8 is InvalidUtf8.ERROR:
                utf16 = not offset and content.startswith((b"\xff\xfe", b"\xfe\xff"))
                advice = "; it looks like UTF-16, convert it" if utf16 else ""
                place = f"byte {offset + error.start}: {error.reason}"
                raise SourceError(f"{where} is not UTF-8 ({place}){advice}") from None
            counted["replaced_utf8"] += 1
            return content.decode("utf-8", "replace")

    def load_hugging_face(self) -> Any:
        """The dataset as a stream."""
        import datasets  # takes seconds

        options = {"name": self.config, "split": self.split, "revision": self.revision}
        return datasets.load_dataset(self.path, streaming=True, **options)

    def bare(self) -> Source:
        """A copy without the list of files, to send to a worker."""
        return replace(self, format=self.kind)


def hugging_face(name: str, config: str | None = None, split: str = "train", **more: Any) -> Source:
    """A Hugging Face dataset, read as a stream; ``more``: other fields of :class:`Source`."""
    return Source(path=name, config=config, split=split, format=Format.HUGGING_FACE, **more)


RECIPES = {
    "pile": hugging_face("monology/pile-uncopyrighted"),
    "fineweb-edu": hugging_face("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "wikitext-103": hugging_face("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": hugging_face("allenai/c4", "en"),
}
"""Well-known corpora by name. They need a network; ``dataclasses.replace`` changes a field."""


def _grouped(files: list[File], least: int) -> Iterator[Shard]:
    group: list[File] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.size or least  # a web server's listing tells no sizes, and a shard must not hold everything then
        if size >= least:
            yield Shard(files=tuple(group))
            group, size = [], 0
    if group:
        yield Shard(files=tuple(group))


def _predicate(path: str) -> Callable[[str], bool]:
    module, _, name = path.partition(":")
    found: Callable[[str], bool] = getattr(importlib.import_module(module), name)
    return found


def _ends(file: File, ends: tuple[str, ...], *, packed: bool = False) -> bool:
    """Whether a file is called like one of a format; ``packed``: below the suffix of an archive, too."""
    name = bare_name(file.name).lower()
    if packed and (suffix := packed_suffix(file.name)):
        name = bare_name(name.removesuffix(suffix))
    return name.endswith(ends)


def _named(reason: str, urls: list[str]) -> list[str]:
    """A sentence for each of the first files, and one for how many more there are."""
    more = [f"and {len(urls) - MOST_NAMED} more files: the same"] if len(urls) > MOST_NAMED else []
    return [*(f"{url} {reason}" for url in urls[:MOST_NAMED]), *more]


def _literal_part(pattern: str) -> str:
    """The folders at a pattern's beginning that exist under exactly that name, as ``[2024]`` may; no trailing slash."""
    parts = pattern.split("/")
    lengths = (len(parts) - 1 - n for n in range(len(parts) - 1))
    return next((path for n in lengths if os.path.isdir(path := "/".join(parts[:n]))), "")


def _walk(root: str) -> Iterator[str]:
    """All files below a local folder, through links to folders, but not in circles, nor into haltscale's own home.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen, home = {os.path.realpath(root)}, os.path.realpath(haltscale_home())
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        for name in list(folders):
            path = os.path.join(folder, name)
            target = os.path.realpath(path)
            above = f"{os.path.realpath(folder)}/"
            is_circle = os.path.islink(path) and (target in seen or above.startswith(f"{target}/"))
            if is_circle or target == home:  # what is prepared from documents is none
                folders.remove(name)
            if os.path.islink(path):
                seen.add(target)
        yield from (os.path.join(folder, name) for name in names)


def _local_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # a link to nowhere: a problem of its own


def _kept_hashes(path: Path) -> dict[str, list[Any]]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {name: entry for name, entry in kept.items() if isinstance(entry, list) and len(entry) > 1}


def _remote_version(fs: Any, file: File) -> str:
    info = fs.info(file.url)
    found = next((info[key] for key in ("ETag", "etag", "md5Hash", "checksum", "blob_id") if info.get(key)), None)
    return str(found or fs.ukey(file.url))


def read_json_lines(path: str | os.PathLike[str], fields: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line of a JSONL file, as a corpus reads it: compressed or not, without a byte order mark,
    without blank lines.

    Args:
        path: of the file.
        fields: none of them may stand in a line twice.

    Raises:
        SourceError: the file cannot be read or is not UTF-8, or a line is not JSON or repeats a field.
    """
    url = os.path.abspath(path)
    file = File(name=os.path.basename(url), url=url, size=_local_size(url))
    source = Source(path=url, format=Format.JSONL)
    for _, number, row in json_rows(source, file, Shard(files=(file,)), Counter(), fields):
        yield number, row
