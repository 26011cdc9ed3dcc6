"""Prepare a streamed corpus: shard after shard, each published as soon as it is packed, while runs train on the others.

What would need the whole corpus is defined by what comes first. The *head* are the first documents, up to
``segment_tokens`` bytes of text: held-out documents, probe, tokenizer and token frequencies are of the head. Of equal
documents the first is kept. Statistics and leakage are of what has been prepared, and complete at the end. A
preparation that was killed goes through its finished shards again, which is quick, and decides the same.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from haltscale.platform.corpora.corpus import Corpus, CorpusError, PreparedCorpus
from haltscale.platform.corpora.document_plan import DocumentPlan
from haltscale.platform.corpora.formats import SourceError, printable
from haltscale.platform.corpora.pipeline import Preparation, Runner
from haltscale.platform.corpora.shard_jobs import (
    PackJob,
    Result,
    end_of_text_id,
    kept_rows,
    name_hash,
    pack_shard,
    tokenise_shard,
    training_documents,
    write_dropped,
)
from haltscale.platform.corpora.shared import SharedFolder, shared_root
from haltscale.platform.durable import write_json

log = logging.getLogger(__name__)


class StreamedPreparation(Preparation):
    """A streamed corpus on its way; its folder is published with its first segment, or with all there is if less.

    Args:
        rows: how many rows are to be drawn in order; what lies behind their segments is left to a later preparation.
            None: all there are.
        stop: ends the preparation after the shard at hand.
    """

    def __init__(
        self, corpus: Corpus, context: int, folder: Path, run: Runner, *, rows: int | None, stop: threading.Event
    ) -> None:
        super().__init__(corpus, context, folder, run)
        self.tokenizer_file = self.work / "tokenizer.json"
        ((self.name, self.source),) = corpus.sources.items()
        self.head_bytes = corpus.segment_tokens or 0
        self.segment = self.head_bytes // context
        self.wanted, self.stop = rows, stop
        self.shards: list[_Shard] = []
        self.parts: list[Result] = []
        self.leaked: set[int] = set()
        self.skipped: Counter[str] = Counter()
        self.altered: Counter[str] = Counter()
        self.packed_shards = self.packed_tokens = self.taken = 0

    @property
    def rows(self) -> int:
        """Rows that have been packed."""
        return sum(part["rows"] for part in self.parts)

    def publish(self) -> PreparedCorpus:
        """Continue until everything requested is published, or until stopped."""
        if self.segment < 1:
            few = f"segment_tokens {self.head_bytes} do not fill one row of {self.context + 1}: take larger segments"
            raise CorpusError(self.corpus.name, [few])
        self.known = PreparedCorpus.open(self.folder)
        if self.folder.exists() and not self.known:
            raise CorpusError(self.corpus.name, [f"{self.folder} has no readable corpus.json: remove it"])
        self.work.mkdir(parents=True, exist_ok=True)
        self.ready.mkdir(exist_ok=True)
        try:
            complete = self._go_on()
        except Exception as error:
            if known := PreparedCorpus.open(self.folder):
                problem = error.problems[0] if isinstance(error, CorpusError) else str(error)
                problem = problem.removeprefix(f"corpus {self.corpus.name}: ")
                with contextlib.suppress(OSError):  # of a full disk
                    write_json(self.folder / "corpus.json", {**known.counts, "problem": problem})
                    if shared_root():
                        SharedFolder(self.corpus.place(self.context)).publish()
            elif isinstance(error, CorpusError):
                shutil.rmtree(self.partial)
            raise
        if complete:
            shutil.rmtree(self.partial)
            for left in self.folder.glob("*.partial"):  # of a killed preparation
                left.unlink()
        if not (prepared := PreparedCorpus.open(self.folder, self.corpus.weights)):
            raise CorpusError(self.corpus.name, ["preparation was stopped before its first segment was ready"])
        return prepared

    def _go_on(self) -> bool:
        """Whether everything was prepared."""
        tokenizer = self._tokenizer()
        self.end = end_of_text_id(tokenizer, self.corpus.tokenizer.end_of_text)
        plan: DocumentPlan | None = None
        seen = _Seen(self.work / "seen.sqlite")
        tokenised = self._results("tokenising", tokenise_shard, self._jobs()[self.name])
        with contextlib.closing(tokenised), contextlib.closing(seen):
            for result in tokenised:
                if "problem" in result:
                    raise CorpusError(self.corpus.name, [result["problem"]])
                self._take(result, seen)
                if plan is None and sum(shard.head_bytes for shard in self.shards) >= self.head_bytes:
                    plan = self._choose(tokenizer)
                if plan is not None:
                    self._pack_shards(plan, is_last=False)
                if self._is_enough():
                    return False
                if self.taken == self.source.documents:
                    break  # what follows is not read
        self.check_unchanged()
        self._pack_shards(plan or self._choose(tokenizer), is_last=True)
        return True

    def _is_enough(self) -> bool:
        drawn = self.rows - self.rows % self.segment
        return self.stop.is_set() or (self.wanted is not None and drawn >= max(1, self.wanted))

    # ---- documents --------------------------------------------------------------------------------------------------

    def _take(self, result: Result, seen: _Seen) -> None:
        """Look at one shard's documents: which there are, and which are duplicates."""
        table = pq.read_table(
            self.work / f"tokens-{result['index']:06d}.parquet",
            columns=["name", "name_hash", "content", "bytes", "n_tokens"],
        )
        left = len(table) if self.source.documents is None else self.source.documents - self.taken
        shard = _Shard(result["index"], table.slice(0, left))
        if self.corpus.remove_duplicates:
            shard.duplicates = seen.before(table["content"].to_pylist()[:left])
        before = sum(each.head_bytes for each in self.shards)
        ends = before + np.cumsum(shard.bytes)
        shard.in_head = 0 if before >= self.head_bytes else int(np.searchsorted(ends, self.head_bytes)) + 1
        shard.in_head = min(shard.in_head, len(ends))
        shard.head_bytes = int(shard.bytes[: shard.in_head].sum())
        self.taken += len(ends)
        self.skipped.update(result["skipped"])
        self.altered.update(result["altered"])
        self.shards.append(shard)
        if not shard.in_head:
            self._settle(shard)

    def _settle(self, shard: _Shard) -> None:
        write_dropped(self.work, shard.index, [*shard.duplicates, *shard.left_out])
        shard.settle()

    def _choose(self, tokenizer: Any) -> DocumentPlan:
        """Probe and held-out documents, by the hashes of their names; writes what is of the head."""
        head = [shard for shard in self.shards if shard.in_head]
        free = [
            (shard.hashes[position], shard.index, position, shard.names[position])
            for shard in head
            for position in range(shard.in_head)
            if position not in shard.duplicates
        ]
        wanted, probe = self.corpus.validation_documents, printable(self.corpus.probe_document)
        probes = [each for each in free if each[3] == probe][:1] if probe else heapq.nsmallest(1, free)
        if probe and not probes:
            missing = f"probe_document {probe!r} is not in its first {self.head_bytes} bytes of text"
            raise CorpusError(self.corpus.name, [missing])
        chosen = heapq.nsmallest(wanted, [each for each in free if each not in probes])
        if len(chosen) < wanted or len(free) < wanted + 2:
            few = f"source {self.name} has {len(free)} usable documents in its first {self.head_bytes} bytes of text,"
            more = f"but {wanted} validation documents, the probe and one to train on need {wanted + 2}"
            raise CorpusError(self.corpus.name, [f"{few} {more}: use larger segments"])
        by_index = {shard.index: shard for shard in head}
        for _, index, position, _ in [*probes, *chosen]:
            by_index[index].left_out.add(position)
        for shard in head:
            self._settle(shard)
        first, *held_out = (
            {"shard": index, "position": position, "name": name, "source": self.name}
            for _, index, position, name in [*probes, *sorted(chosen, key=lambda each: each[1:3])]
        )
        plan = DocumentPlan(shards=[], sources={}, held_out=held_out, probe=first)
        self.held_out = self._hold_out(plan, tokenizer, self.end)
        counts = np.zeros(self.corpus.vocab_size, dtype=np.int64)
        for shard in head:
            for tokens in training_documents(self.work, shard.index, shard.in_head):
                counts += np.bincount(tokens, minlength=len(counts))
                counts[self.end] += 1
        np.save(self.ready / "token_counts.npy", counts)
        shutil.copyfile(self.tokenizer_file, self.ready / "tokenizer.json")
        return plan

    def _sample(self, sample_bytes: int) -> list[str]:
        """The first documents, none beyond the head; those that may be held out are left out."""
        documents: dict[str, str] = {}
        left = min(sample_bytes, self.head_bytes)
        with contextlib.suppress(SourceError):  # reported when it is tokenised
            for name, text in self._first_documents():
                documents.setdefault(text, name)  # of equal ones the first
                left -= len(text.encode())
                if left <= 0:
                    break
        names = [name for name in documents.values() if name != self.corpus.probe_document]
        held_out = {*heapq.nsmallest(self.corpus.validation_documents + 1, names, key=name_hash)}
        return [text for text, name in documents.items() if name in names and name not in held_out]

    def _first_documents(self) -> Iterator[tuple[str, str]]:
        taken = 0
        for shard in self.source.shards():
            for name, text in self.source.documents_of(shard, Counter()):
                if taken == self.source.documents:
                    return
                taken += 1
                yield name, str(text)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _pack_shards(self, plan: DocumentPlan, *, is_last: bool) -> None:
        """Pack the shards whose rows are whole, and publish them."""
        rows = max(0, (sum(shard.tokens for shard in self.shards) - 1) // self.context)
        if is_last and not rows:
            few = f"{sum(shard.tokens for shard in self.shards)} training tokens do not fill one row of"
            few = f"source {self.name}: {few} {self.context + 1}; use a larger corpus or a shorter context"
            raise CorpusError(self.corpus.name, [few])
        while self.packed_shards < len(self.shards):
            shard, offset = self.shards[self.packed_shards], self.packed_tokens
            begin, stop = (-(-at // self.context) for at in (offset, offset + shard.tokens))
            if stop > rows and not is_last:
                break  # its last row ends in a shard that is not there yet
            job = PackJob(
                index=shard.index,
                work=str(self.work),
                ready=str(self.folder if self.known else self.ready),
                context=self.context,
                end_of_text=self.end,
                vocab_size=self.corpus.vocab_size,
                first_row=begin,
                rows=max(0, min(stop, rows) - begin),
                skip=begin * self.context - offset,
                takes=tuple((each.index, each.take) for each in self.shards[self.packed_shards :]),
            )
            result = kept_rows(self.work, job) or pack_shard(job)
            if "errno" in result:
                raise OSError(result["errno"], result["strerror"])
            self.leaked.update(result["leaked"])
            if result["rows"]:
                self.parts.append({"file": result["file"], "rows": result["rows"]})
            self.packed_shards += 1
            self.packed_tokens += shard.tokens
        self._publish(plan, is_complete=is_last)

    def _publish(self, plan: DocumentPlan, *, is_complete: bool) -> None:
        """Publish what is packed; a reader finds parts.json as far as corpus.json says, or further."""
        if not is_complete and self.rows <= (self.known.rows if self.known else 0):
            return  # a resumed preparation has not reached new shards yet
        target = self.folder if self.known else self.ready
        write_json(target / "parts.json", self.parts)
        done = self.shards[: self.packed_shards]
        source = {
            "train_documents": sum(shard.documents for shard in done),
            "train_bytes": sum(shard.text_bytes for shard in done),
            "train_tokens": sum(shard.tokens for shard in done),
            "duplicates": sum(shard.copies for shard in done),
            "skipped": self.skipped,
            "altered": self.altered,
        }
        now = DocumentPlan(shards=[], sources={self.name: source}, held_out=plan.held_out, probe=plan.probe)
        statistics = self._statistics(now, self.held_out, {self.name: self.rows}, self.leaked)
        write_json(target / "corpus.json", {**statistics, "complete": is_complete, "segment_rows": self.segment})
        if not self.known and (is_complete or self.rows >= self.segment):
            self.reveal()
        self.known = PreparedCorpus.open(self.folder)
        if self.known and shared_root():
            SharedFolder(self.corpus.place(self.context)).publish()


class _Shard:
    """What is known of a tokenised shard's documents."""

    def __init__(self, index: int, table: Any) -> None:
        self.index, self.take = index, len(table)
        self.names, self.hashes = table["name"].to_pylist(), table["name_hash"].to_pylist()
        self.bytes, self.lengths = table["bytes"].to_numpy(), table["n_tokens"].to_numpy()
        self.duplicates: set[int] = set()
        self.left_out: set[int] = set()
        """Held out, or the probe."""
        self.in_head = self.head_bytes = 0
        self.documents = self.tokens = self.text_bytes = self.copies = 0
        """To train on; tokens with an end-of-text for each document. And how many were duplicates."""

    def settle(self) -> None:
        """Count what is trained on, and let go of the documents."""
        kept = np.ones(self.take, dtype=bool)
        kept[[*self.duplicates, *self.left_out]] = False
        self.documents = int(kept.sum())
        self.tokens = int(self.lengths[kept].sum()) + self.documents
        self.text_bytes = int(self.bytes[kept].sum())
        self.copies = len(self.duplicates)
        self.names, self.hashes, self.duplicates, self.bytes, self.lengths = [], [], set(), kept[:0], kept[:0]


class _Seen:
    """The contents of all documents so far, on disk."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # of a preparation that was killed
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE seen (content BLOB PRIMARY KEY) WITHOUT ROWID")

    def before(self, contents: list[bytes]) -> set[int]:
        """Which of these were there before, in an earlier call or earlier in the list: their places."""
        try:
            self._db.execute("BEGIN")
            found = {
                place
                for place, content in enumerate(contents)
                if not self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (content,)).rowcount
            }
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        return found

    def close(self) -> None:
        self._db.close()
