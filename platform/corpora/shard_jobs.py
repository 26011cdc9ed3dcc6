"""What is done to one shard: tokenise its documents, and later pack the rows that begin in it.

Both are functions from a job to a small result, for any process. What they make is a file, written whole or not at all,
and found again by a later attempt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from haltscale.platform.corpora import leakage
from haltscale.platform.corpora.corpus import ends_as_parquet
from haltscale.platform.corpora.formats import Shard, SourceError, printable
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Losses, TokenizerError, encode, exact
from haltscale.platform.durable import replacing, write_json

log = logging.getLogger(__name__)

Uint32 = npt.NDArray[np.uint32]
Result = dict[str, Any]

ALTERED = ("replaced_utf8", "byte_order_mark", "unknown_tokens", "dropped_characters", "empty_file")
"""What is counted beside documents that are left out: these are kept, or are none."""
LEAST_TOKENS = 2
"""A shorter document is skipped and counted as ``too_short``."""
BATCH_CHARACTERS = 1 << 20
GROUP_TOKENS = 8192
"""Size of a row group: what reading one row decodes."""
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
}

DOCUMENTS = pa.schema(
    {
        "shard": pa.int32(),
        "position": pa.int32(),
        "name": pa.string(),
        "name_hash": pa.uint64(),
        "content": pa.binary(16),
        "bytes": pa.int64(),
        "n_tokens": pa.int64(),
        "tokens": pa.list_(pa.uint32()),
    }
)


@dataclass(frozen=True, kw_only=True)
class TokeniseJob:
    """Read one shard and tokenise it."""

    index: int
    name: str
    source: Source
    shard: Shard
    work: str
    tokenizer: str
    end_of_text: str


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """Pack the rows that begin in one shard."""

    index: int
    work: str
    ready: str
    context: int
    end_of_text: int
    vocab_size: int
    first_row: int
    rows: int
    skip: int
    """Tokens of the shard before its first row: they belong to a row of a shard before it."""
    takes: tuple[tuple[int, int], ...]
    """This shard and those that follow it in its source, with how many documents each gives."""


def _attempted(work: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Failures that the user can mend come back as results, so that all of them are reported together."""

    def attempt(job: Any) -> Result:
        try:
            return {"index": job.index, **work(job)}
        except SourceError as error:
            return {"index": job.index, "problem": str(error)}
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            return {"index": job.index, "errno": error.errno, "strerror": os.strerror(error.errno or 0)}

    return attempt


def kept_tokens(work: Path, job: TokeniseJob) -> Result | None:
    """What an earlier attempt made of a shard, or None: there is nothing, it is damaged, or of files that have changed.

    What was packed of a shard that is tokenised again is forgotten.
    """
    path = work / f"tokens-{job.index:06d}.json"

    def is_whole(result: Result) -> bool:
        return result["stamp"] == job.source.stamp(job.shard) and ends_as_parquet(path.with_suffix(".parquet"))

    result = _kept(path, is_whole)
    if result is None and path.exists():
        for packed in work.glob("packed-*.json"):
            packed.unlink()
    return result


def kept_rows(work: Path, job: PackJob) -> Result | None:
    """What an earlier attempt packed of a shard, or None: there is nothing, or it is damaged."""
    path = work / f"packed-{job.index:06d}.json"

    def is_whole(result: Result) -> bool:
        part = Path(job.ready) / result["file"]
        has_part = not result["rows"] or ends_as_parquet(part)
        return has_part and len(np.load(path.with_suffix(".npy"))) == job.vocab_size and "leaked" in result

    return _kept(path, is_whole)


def _kept(path: Path, is_whole: Callable[[Result], bool]) -> Result | None:
    if not path.exists():
        return None
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        if is_whole(result):
            return result
        reason = "it does not match its source files or its neighbours"
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"it is damaged: {error}"
    log.warning("%s is made again (%s)", path, reason)
    return None


def name_hash(name: str) -> int:
    """Orders documents for what is held out: the first 8 bytes of the SHA-256 of the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@lru_cache(maxsize=2)
def _tokenizer_of(path: str, modified: int, end_of_text: str) -> tuple[Tokenizer, Losses]:
    text = Path(path).read_text(encoding="utf-8")
    return exact(text, end_of_text), Losses(text)


def _tokenise(job: TokeniseJob) -> Result:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the runner has a process for every core
    tokenizer, losses = _tokenizer_of(job.tokenizer, os.stat(job.tokenizer).st_mtime_ns, job.end_of_text)
    work, counted = Path(job.work), Counter[str]()
    try:
        stamp = job.source.stamp(job.shard)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read ({error.strerror})") from error
    end = end_of_text_id(tokenizer, job.end_of_text)
    documents = job.source.documents_of(
        job.shard,
        counted,
        end_of_text=end,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
    )
    position = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(stack.enter_context(replacing(work / f"tokens-{job.index:06d}.parquet")), "wb"))
        writer = stack.enter_context(pq.ParquetWriter(file, DOCUMENTS, compression="lz4"))
        for batch in _batches(documents):
            kept = []
            for (name, content), tokens in zip(batch, _tokens_of(job, tokenizer, batch, end), strict=True):
                if len(tokens) < LEAST_TOKENS:
                    counted["too_short"] += 1
                elif job.source.documents is None or position < job.source.documents:
                    kept.append(_row(job.index, position, name, content, tokens, tokenizer))
                    position += 1
                    if isinstance(content, str):
                        counted.update(losses.of(tokenizer, content, tokens))
            if kept:
                writer.write_table(pa.Table.from_pylist(kept, schema=DOCUMENTS))
            if position == job.source.documents:
                break
        if job.source.stamp(job.shard) != stamp:
            raise SourceError(f"{job.shard.files[0].url} changed while it was being read: prepare the corpus again")
    result = {
        "index": job.index,
        "source": job.name,
        "documents": position,
        "skipped": {reason: count for reason, count in counted.items() if reason not in ALTERED},
        "altered": {reason: count for reason, count in counted.items() if reason in ALTERED},
        "stamp": stamp,
    }
    write_json(work / f"tokens-{job.index:06d}.json", result)
    return result


def end_of_text_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of the token between documents."""
    found = tokenizer.token_to_id(token)
    assert found is not None, "checked before"
    return int(found)


def _tokens_of(job: TokeniseJob, tokenizer: Tokenizer, batch: list[tuple[str, Any]], end: int) -> list[Uint32]:
    if not isinstance(batch[0][1], str):
        return [tokens for _, tokens in batch]
    try:
        return encode(tokenizer, [text for _, text in batch], end)
    except TokenizerError:
        text = Path(job.tokenizer).read_text(encoding="utf-8")
    again = exact(text, job.end_of_text)  # a panic may leave the other one unusable
    return [_encode_named(job, again, name, text, end) for name, text in batch]


def _encode_named(job: TokeniseJob, tokenizer: Tokenizer, name: str, text: str, end: int) -> Uint32:
    try:
        return encode(tokenizer, [text], end)[0]
    except TokenizerError as error:
        raise SourceError(f"document {name} of {job.source.path} cannot be tokenised ({error})") from error


def _row(shard: int, position: int, name: str, content: Any, tokens: Uint32, tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(content, str):
        raw = content.encode()
        size = len(raw)
    else:
        raw, size = tokens.tobytes(), len(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode())
    return {
        "shard": shard,
        "position": position,
        "name": printable(name),
        "name_hash": name_hash(name),
        "content": hashlib.sha256(raw).digest()[:16],
        "bytes": size,
        "n_tokens": len(tokens),
        "tokens": tokens,
    }


def _batches(documents: Iterator[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    batch: list[tuple[str, Any]] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document[1])
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def write_dropped(work: Path, shard: int, positions: list[int]) -> None:
    """Write down which of a shard's documents are not trained on."""
    with replacing(work / f"dropped-{shard:06d}.npy") as partial, open(partial, "wb") as file:
        np.save(file, np.array(sorted(positions), dtype=np.int32))


def training_documents(work: Path, shard: int, take: int) -> Iterator[Uint32]:
    """The tokens of a shard's training documents, in order."""
    left_out = set(np.load(work / f"dropped-{shard:06d}.npy").tolist())
    position = 0
    with pq.ParquetFile(work / f"tokens-{shard:06d}.parquet") as file:
        for group in range(file.num_row_groups):
            if position >= take:
                return
            for tokens in file.read_row_group(group, columns=["tokens"], use_threads=False)["tokens"]:
                if position < take and position not in left_out:
                    yield tokens.values.to_numpy()
                position += 1


def read_document(work: Path, shard: int, position: int) -> dict[str, Any]:
    """One document: its bytes and tokens."""
    with pq.ParquetFile(work / f"tokens-{shard:06d}.parquet") as file:
        for group in range(file.num_row_groups):
            if position < (rows := file.metadata.row_group(group).num_rows):
                table = file.read_row_group(group, columns=["bytes", "tokens"])
                return {
                    "bytes": table["bytes"][position].as_py(),
                    "tokens": table["tokens"][position].values.to_numpy(),
                }
            position -= rows
    raise IndexError(f"shard {shard} has no document {position}")


def _pack(job: PackJob) -> Result:
    work = Path(job.work)
    hashes = np.load(work / "windows.npy")
    counts = np.zeros(job.vocab_size, dtype=np.int64)
    leaked: set[int] = set()
    end = np.array([job.end_of_text], dtype=np.uint32)
    name = f"part-{job.index:06d}.parquet"
    with RowWriter(Path(job.ready) / name, job) as writer:
        for tokens in training_documents(work, *job.takes[0]):
            counts += np.bincount(tokens, minlength=job.vocab_size)
            counts[job.end_of_text] += 1
            leaked.update(leakage.found_in(tokens, hashes).tolist())
            writer.add(end, tokens)
        for following in job.takes[1:]:
            if writer.is_full:
                break
            for tokens in training_documents(work, *following):
                writer.add(end, tokens)
                if writer.is_full:
                    break
    with replacing(work / f"packed-{job.index:06d}.npy") as partial, open(partial, "wb") as file:
        np.save(file, counts)
    result = {"index": job.index, "file": name, "rows": job.rows, "leaked": sorted(leaked)}
    write_json(work / f"packed-{job.index:06d}.json", result)
    return result


tokenise_shard = _attempted(_tokenise)
pack_shard = _attempted(_pack)


class RowWriter:
    """Cuts a stream of tokens into rows of context+1 and writes one part; consecutive rows overlap by one token."""

    SCHEMA = staticmethod(
        lambda context: pa.schema(
            {
                "seq_id": pa.int64(),
                "tokens": pa.list_(pa.uint32(), context + 1),
                "starts": pa.list_(pa.uint32()),
            }
        )
    )

    def __init__(self, path: Path, job: PackJob) -> None:
        self._path, self._job = path, job
        self._group = max(1, GROUP_TOKENS // (job.context + 1))
        self._skip = job.skip
        self._pending: list[Uint32] = []
        self._held = self._written = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RowWriter:
        if self._job.rows:
            file = self._stack.enter_context(open(self._stack.enter_context(replacing(self._path)), "wb"))
            schema = self.SCHEMA(self._job.context)
            options = {"compression": "none", "use_dictionary": False, "write_statistics": ["seq_id"]}
            self._writer = self._stack.enter_context(pq.ParquetWriter(file, schema, **options))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._write(self._job.rows - self._written)
        self._stack.__exit__(*error)

    @property
    def is_full(self) -> bool:
        """All rows of this part are complete."""
        return self._held > (self._job.rows - self._written) * self._job.context

    def add(self, *pieces: Uint32) -> None:
        """Append tokens."""
        for piece in pieces:
            left_out = min(self._skip, len(piece))
            self._skip -= left_out
            self._pending.append(piece[left_out:])
            self._held += len(piece) - left_out
        block = self._group * max(1, (1 << 18) // GROUP_TOKENS)
        if self._held > block * self._job.context:
            self._write(min(self._held - 1, block * self._job.context) // self._job.context)

    def _write(self, rows: int) -> None:
        rows = min(rows, self._job.rows - self._written)
        if rows < 1:
            return
        context = self._job.context
        stream = np.concatenate(self._pending)
        windows = np.lib.stride_tricks.sliding_window_view(stream, context + 1)[::context][:rows]
        row, start = np.nonzero(windows == self._job.end_of_text)
        offsets = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
        first = self._job.first_row + self._written
        columns = [
            pa.array(np.arange(first, first + rows)),
            pa.FixedSizeListArray.from_arrays(pa.array(windows.ravel()), context + 1),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(start.astype(np.uint32))),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self.SCHEMA(context)), self._group)
        self._pending = [stream[rows * context :]]
        self._held = len(self._pending[0])
        self._written += rows
