"""Where documents come from: files of any common format, local or remote, and Hugging Face datasets.

A source is a description. It lists its files, cuts them into shards that are read independently of each other, and
reads a shard's documents (:mod:`haltscale.platform.corpora.formats`).

What cannot be read stops the preparation with a :class:`SourceError` that names file and place; what is no document
(an empty file, a null, a text that a filter refuses) is skipped and counted by reason. ``docs/corpora.md`` lists both.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from haltscale.platform.corpora.formats import (
    READERS,
    SUFFIXES,
    TOKEN_FORMATS,
    File,
    Format,
    InvalidUtf8,
    Shard,
    SourceError,
    bare_name,
    open_parquet,
    read_tokens,
)
from haltscale.platform.identity import digest, encodable
from haltscale.platform.store import haltscale_home

SHARD_BYTES = 8 << 20
"""Least size of a shard; the rows do not depend on it."""
MOST_SHARDS = 4096
"""Of a source: in larger ones, shards grow."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where some documents of a corpus come from, and which of them are taken."""

    path: str
    """Absolute path of a file or a folder, a glob, or any fsspec URL (``s3://``, ``gs://``, ``hf://``, ``https://``);
    ``.gz`` and ``.zst`` are read through."""
    format: Format = Format.AUTO
    text_field: str = "text"
    """The field, column or key that holds a document's text; unused in plain text and token arrays."""
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

    # ---- what there is ----------------------------------------------------------------------------------------------

    @cached_property
    def _filesystem(self) -> tuple[Any, str]:
        fs, root = fsspec.core.url_to_fs(self.path)
        return fs, root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return "://" not in self.path or self.path.startswith("file://")

    @cached_property
    def kind(self) -> Format:
        """The format, read off the suffixes where it is AUTO; AUTO where they do not tell."""
        if self.format is not Format.AUTO:
            return self.format
        found = {
            kind for kind, ends in SUFFIXES.items() for file in self._all_files if bare_name(file.name).endswith(ends)
        }
        found -= {Format.LINES, *TOKEN_FORMATS}
        return found.pop() if len(found) == 1 else Format.AUTO

    @cached_property
    def _all_files(self) -> list[File]:
        fs, root = self._filesystem
        if any(sign in root for sign in "*?["):
            found, base = fs.glob(root, detail=True), root[: min(root.find(s) for s in "*?[" if s in root)]
            base = base.rsplit("/", 1)[0]
        elif fs.isfile(root):
            found, base = {root: fs.info(root)}, root.rsplit("/", 1)[0]
        else:
            found, base = fs.find(root, detail=True), root
        files = [
            File(name=url.removeprefix(base).lstrip("/"), url=url, size=int(info.get("size") or 0))
            for url, info in found.items()
            if info.get("type") != "directory"
        ]
        return sorted(files, key=lambda file: file.name)

    @cached_property
    def files(self) -> list[File]:
        """The files that hold documents, in the order of their names."""
        ends = SUFFIXES.get(self.kind, ())
        named = [file for file in self._all_files if bare_name(file.name).endswith(ends)]
        single = self.kind is Format.HUGGING_FACE or (len(self._all_files) == 1 and self.format is not Format.AUTO)
        return self._all_files if single else named  # a file that is named itself may be called anything

    def problems(self) -> list[str]:
        """What is wrong with the description."""
        found = []
        for name in ("documents", "max_characters", "longest_document_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                found.append(f"{name} is {value!r}, needs a whole number above 0")
        if self.weight is not None and not (isinstance(self.weight, int | float) and 0 < self.weight < float("inf")):
            found.append(f"weight is {self.weight!r}, needs a number above 0 (leave the source out to use none of it)")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            found.append(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        if self.keep:
            try:
                _predicate(self.keep)
            except (ImportError, AttributeError, ValueError) as error:
                found.append(f"keep {self.keep!r} is no importable module:function ({error})")
        return found

    def file_problems(self) -> list[str]:
        """What is wrong with the files, as far as a glance shows."""
        if self.format is Format.HUGGING_FACE:
            try:
                self.identity()
            except Exception as error:  # the library raises what its network stack raises
                return [f"dataset {self.path!r} cannot be found ({type(error).__name__}: {error})"]
            return []
        if self.is_local and not self.path.removeprefix("file://").startswith("/"):
            return [f"path {self.path!r} is not an absolute path"]  # jobs and workers run in folders of their own
        try:
            if not self._all_files:
                fs, root = self._filesystem
                there = fs.exists(root)
                return [f"path {self.path} " + ("holds no *.txt or other file" if there else "does not exist")]
        except (OSError, ImportError) as error:
            return [f"path {self.path} cannot be listed ({type(error).__name__}: {error})"]
        if self.kind is Format.AUTO:
            return [
                f"path {self.path}: its files' suffixes do not tell one format: give format=, one of {list(Format)}"
            ]
        if not self.files:
            return [f"path {self.path} holds no {' or '.join('*' + end for end in SUFFIXES[self.kind])} file"]
        if self.kind in TOKEN_FORMATS:
            return [f"{file.url} {problem}" for file in self.files if (problem := self._token_problem(file))]
        try:
            self._first_document()
        except SourceError as error:
            return [str(error)]
        return []

    def _token_problem(self, file: File) -> str:
        if file.compression:
            return "is compressed: token arrays are read in parts, unpack it first"
        if file.size % TOKEN_FORMATS[self.kind].itemsize:
            return f"is no whole number of {self.kind}"
        with self.open(file) as stream:
            has_header = stream.read(6) == b"\x93NUMPY"
        return "has a NumPy header: write the bare array with ndarray.tofile" if has_header else ""

    def _first_document(self) -> None:
        """Read one document of the first file that holds one, so that a wrong text field is told at once."""
        if self.kind in (Format.TEXT, Format.LINES):
            return
        for file in self.files[:8]:
            if next(READERS[self.kind](self, Shard(files=(file,)), Counter()), None):
                return

    # ---- identity ---------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What makes up the documents, JSON-able: everything but where they lie, and their weight."""
        left_out = ("path", "weight", "format", "revision")
        described = {name: value for name, value in encodable(self).items() if name not in left_out}
        return {**described, "format": str(self.kind), "contents": self._contents}

    @cached_property
    def _contents(self) -> str:
        """Digest of the contents. Local files are hashed (once, until they change); remote ones are known by the
        checksum, ETag or version that their filesystem tells, so that nothing is downloaded for it."""
        if self.kind is Format.HUGGING_FACE and not self._filesystem[0].isdir(self.path):
            from huggingface_hub import HfApi  # only here is a network needed

            return f"{self.path}@{HfApi().dataset_info(self.path, revision=self.revision).sha}"
        if not self.is_local:
            return digest({file.name: _remote_version(self._filesystem[0], file) for file in self.files}, length=64)
        return digest(_local_hashes(self.path, self.files), length=64)

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
        if file.compression or self.kind is Format.CSV or file.size < 2 * least:
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
        self, shard: Shard, skipped: Counter[str], *, end_of_text: int = 0, vocab_size: int = 1 << 32
    ) -> Iterator[tuple[str, str | npt.NDArray[np.uint32]]]:
        """A shard's documents that pass the filters, in order.

        Args:
            shard: one of :meth:`shards`.
            skipped: counts what is left out, by reason; filled on the way.
            end_of_text: the id that divides a token array's documents.
            vocab_size: of the tokenizer of a token array.

        Raises:
            SourceError: something cannot be read.
        """
        if self.kind in TOKEN_FORMATS:
            yield from read_tokens(self, shard, skipped, end_of_text, vocab_size)
            return
        keep = _predicate(self.keep) if self.keep else None
        most = self.max_characters or sys.maxsize
        for name, text in READERS[self.kind](self, shard, skipped):
            if text is None:
                skipped["null"] += 1
            elif not text:
                skipped["empty"] += 1
            elif not self.min_characters <= len(text) <= most or (keep is not None and not keep(text)):
                skipped["filtered"] += 1
            else:
                yield name, self._valid(text, name, skipped)

    def _valid(self, text: Any, name: str, skipped: Counter[str]) -> str:
        """The text, without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.invalid_utf8 is InvalidUtf8.ERROR:
                raise SourceError(f"{name} is not UTF-8 (character {error.start}: {error.reason})") from None
            skipped["replaced_utf8"] += 1
            return str(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return str(text)

    def open(self, file: File) -> Any:
        """A file's bytes, unpacked."""
        raw = self._filesystem[0].open(file.url, "rb")
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), file.compression) if file.compression else raw

    def decode(self, content: bytes, where: str, offset: int, skipped: Counter[str]) -> str:
        """A text from its bytes, which begin at ``offset`` of ``where``."""
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.invalid_utf8 is InvalidUtf8.ERROR:
                raise SourceError(f"{where} is not UTF-8 (byte {offset + error.start}: {error.reason})") from None
            skipped["replaced_utf8"] += 1
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


def _remote_version(fs: Any, file: File) -> str:
    info = fs.info(file.url)
    told = next((info[key] for key in ("ETag", "etag", "md5Hash", "checksum", "blob_id") if info.get(key)), None)
    return str(told or fs.ukey(file.url))


def _local_hashes(path: str, files: list[File]) -> dict[str, str]:
    """SHA-256 of each file; kept in the home folder by size and modification time, as git does."""
    kept_in = haltscale_home() / "hashes" / f"{digest(path, length=32)}.json"
    try:
        kept = json.loads(kept_in.read_text())
    except (OSError, ValueError):
        kept = {}
    fs, hashes, fresh = fsspec.filesystem("file"), {}, {}
    for file in files:
        modified = fs.info(file.url)["mtime"]
        key = [file.size, modified]
        if kept.get(file.name, [None])[:2] == key:
            hashes[file.name] = kept[file.name][2]
        else:
            with open(file.url, "rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - modified > 2:  # a younger file may change again within the clock's resolution
            fresh[file.name] = [*key, hashes[file.name]]
    if fresh != kept:
        try:
            kept_in.parent.mkdir(parents=True, exist_ok=True)
            partial = kept_in.with_name(f"{kept_in.name}.{time.time_ns()}.partial")
            partial.write_text(json.dumps(fresh))
            partial.replace(kept_in)
        except OSError:
            pass  # a home that cannot be written is told where it matters
    return hashes
