"""One corpus on its way: read and tokenise its shards, choose what is held out, pack rows, and publish, in that order.

Tokenising and packing are maps over shards (:mod:`.shard_jobs`), which any runner can spread over processes. The rows
do not depend on how a source was cut into shards: packing gives each row to the shard that it begins in. No process
holds more than a few megabytes of tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from haltscale.platform.corpora import leakage
from haltscale.platform.corpora.corpus import REVISION, Corpus, CorpusError, PreparedCorpus
from haltscale.platform.corpora.document_plan import DocumentPlan, plan_documents
from haltscale.platform.corpora.formats import SourceError
from haltscale.platform.corpora.shard_jobs import (
    PackJob,
    Result,
    TokeniseJob,
    end_of_text_id,
    kept_rows,
    kept_tokens,
    name_hash,
    pack_shard,
    read_document,
    tokenise_shard,
)
from haltscale.platform.corpora.tokenization import BytePairs, TokenizerError, encode_with_places, exact
from haltscale.platform.durable import replacing, sync_file, sync_folder, write_json
from haltscale.platform.durations import clock

log = logging.getLogger(__name__)

Runner = Callable[[Callable[[Any], Result], list[Any]], Iterable[Result]]
"""Maps a function over jobs, in any processes, and gives the results in the order of the jobs."""

SAMPLED_SHARDS = 16
PROGRESS_SECONDS = 5.0


class Preparation:
    """One corpus on its way; everything lies below ``<folder>.partial`` until it is published."""

    def __init__(self, corpus: Corpus, context: int, folder: Path, run: Runner) -> None:
        self.corpus, self.context, self.folder, self.run = corpus, context, folder, run
        self.partial = folder.with_name(f"{folder.name}.partial")
        self.work, self.ready = self.partial / "work", self.partial / "ready"
        self.tokenizer_file = self.ready / "tokenizer.json"

    def publish(self) -> PreparedCorpus:
        if self.folder.exists():
            raise CorpusError(self.corpus.name, [f"{self.folder} has no readable corpus.json: remove it"])
        self.work.mkdir(parents=True, exist_ok=True)
        self.ready.mkdir(exist_ok=True)
        try:
            self._write()
        except CorpusError:
            shutil.rmtree(self.partial)  # other documents have another fingerprint: nothing here is of use to them
            raise
        self.check_unchanged()
        self.reveal()
        shutil.rmtree(self.partial)
        prepared = PreparedCorpus.open(self.folder, self.corpus.weights)
        assert prepared is not None, "just published"
        return prepared

    def check_unchanged(self) -> None:
        """What was read is what the fingerprint was made of: local files are looked at again.

        Raises:
            CorpusError: some have changed since.
        """
        for name, source in self.corpus.sources.items():
            if source.has_local_files and replace(source).identity() != source.identity():
                changed = f"source {name} has changed while it was prepared: prepare the corpus again"
                raise CorpusError(self.corpus.name, [changed])

    def reveal(self) -> None:
        """Publish what is ready: a reader sees all of it or nothing, also after a power cut."""
        for path in self.ready.iterdir():
            sync_file(path)
        sync_folder(self.ready)
        self.ready.rename(self.folder)
        sync_folder(self.folder.parent)

    def _write(self) -> None:
        tokenizer = self._tokenizer()
        shards = self._tokenise()
        plan = plan_documents(self.corpus, shards, self.work)
        end = end_of_text_id(tokenizer, self.corpus.tokenizer.end_of_text)
        held_out = self._hold_out(plan, tokenizer, end)
        rows, packed = self._pack(plan, end)
        counts = np.zeros(self.corpus.vocab_size, dtype=np.int64)
        for index in (result["index"] for result in packed):
            counts += np.load(self.work / f"packed-{index:06d}.npy")
        np.save(self.ready / "token_counts.npy", counts)
        parts = [{"file": result["file"], "rows": result["rows"]} for result in packed if result["rows"]]
        write_json(self.ready / "parts.json", parts)
        found = {window for result in packed for window in result["leaked"]}
        write_json(self.ready / "corpus.json", self._statistics(plan, held_out, rows, found))

    def _hold_out(self, plan: DocumentPlan, tokenizer: Tokenizer, end: int) -> list[Result]:
        """Write the held-out documents and the probe, and the windows that packing looks for; gives the documents."""
        held_out = [read_document(self.work, each["shard"], each["position"]) for each in plan.held_out]
        tokens = [document["tokens"] for document in held_out]
        np.save(self.work / "windows.npy", leakage.window_hashes(tokens))
        columns = {
            "document": [self.corpus.document_name(each["source"], each["name"]) for each in plan.held_out],
            "source": [each["source"] for each in plan.held_out],
            "bytes": [document["bytes"] for document in held_out],
            "tokens": [np.concatenate([[end], each]).astype(np.uint32) for each in tokens],
        }
        pq.write_table(pa.table(columns), self.ready / "validation.parquet", compression="zstd")
        write_json(self.ready / "probe.json", self._probe(plan, tokenizer, end))
        return held_out

    def _statistics(
        self, plan: DocumentPlan, held_out: list[Result], rows: Mapping[str, int], found: Iterable[int]
    ) -> Result:
        """``corpus.json``; ``found``: places of the held-out documents' windows that training documents hold too."""
        tokens = [document["tokens"] for document in held_out]
        return {
            "name": self.corpus.name,
            "fingerprint": self.corpus.prepared_fingerprint,
            "context": self.context,
            "vocab_size": self.corpus.vocab_size,
            "end_of_text": self.corpus.tokenizer.end_of_text,
            "revision": REVISION,
            **({"need": self.corpus.need} if self.corpus.need else {}),
            "rows": sum(rows.values()),
            **plan.totals(),
            "validation_documents": len(held_out),
            "validation_bytes": sum(document["bytes"] for document in held_out),
            "validation_tokens": sum(map(len, tokens)),
            "probe": self.corpus.document_name(plan.probe["source"], plan.probe["name"]),
            "sources": {
                name: {**plan.sources[name], "rows": rows[name], "other_files": self.corpus.sources[name].other_files}
                for name in plan.sources
            },
            "leakage": leakage.report(np.load(self.work / "windows.npy")[sorted(found)], tokens),
            "prepared": self.corpus.identity(),
        }

    # ---- tokenizer --------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        path, end_of_text = self.tokenizer_file, self.corpus.tokenizer.end_of_text
        if path.exists():
            try:
                return exact(path.read_text(encoding="utf-8"), end_of_text)
            except (TokenizerError, UnicodeDecodeError) as error:
                log.warning("%s is damaged (%s): it is made again, and what was made with it", path, error)
                for old in [*self.work.glob("tokens-*.json"), *self.work.glob("packed-*.json")]:
                    old.unlink()
        spec = self.corpus.tokenizer
        if isinstance(spec, BytePairs):
            log.info("corpus %s: training a tokenizer of %d", self.corpus.name, spec.vocab_size)
            text = spec.train(self._sample(spec.sample_bytes)).to_str()
        else:
            text = spec.json
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return exact(text, end_of_text)

    def _sample(self, sample_bytes: int) -> list[str]:
        """Beginnings of evenly spread shards, in order; of a source with a limit, no document beyond it.

        In each source the documents whose names hash lowest are left out, one more than are held out of it: whatever
        part of the source the sample is, the held-out documents that are in it are among these.
        """
        sample: list[str] = []
        for _, source in sorted(self.corpus.sources.items()):
            shards = source.shards()
            budget = sample_bytes // len(self.corpus.sources)
            if source.documents is None:
                shards = shards[:: max(1, -(-len(shards) // SAMPLED_SHARDS))]
                budget //= len(shards)
            documents: list[tuple[str, str]] = []
            for shard in shards:
                left = budget
                with contextlib.suppress(SourceError):  # reported by the pass that reads everything, with all others
                    for name, text in source.documents_of(shard, Counter()):
                        documents.append((name, str(text)))
                        left -= len(str(text))
                        if left <= 0 or len(documents) == source.documents:
                            break
                if len(documents) == source.documents:
                    break
            lowest = sorted(map(name_hash, dict(documents)))[: self.corpus.validation_documents + 1]
            sample += [
                text for name, text in documents if name_hash(name) not in lowest and name != self.corpus.probe_document
            ]
        return sample

    # ---- the two passes ---------------------------------------------------------------------------------------------

    def _jobs(self) -> dict[str, list[TokeniseJob]]:
        """What there is to tokenise, by source."""
        common = {
            "work": str(self.work),
            "tokenizer": str(self.tokenizer_file),
            "end_of_text": self.corpus.tokenizer.end_of_text,
        }
        jobs: dict[str, list[TokeniseJob]] = {}
        first = 0
        for name, source in sorted(self.corpus.sources.items()):
            shards = source.shards()
            jobs[name] = [
                TokeniseJob(index=first + n, name=name, source=source.bare(), shard=shard, **common)
                for n, shard in enumerate(shards)
            ]
            first += len(shards)
        return jobs

    def _tokenise(self) -> list[Result]:
        """Tokenise every shard; results in the order of sources and shards.

        Raises:
            CorpusError: with what could not be read, of all shards.
        """
        jobs = self._jobs()
        names = list(jobs)
        unlimited = [job for name in names if self.corpus.sources[name].documents is None for job in jobs[name]]
        results = list(self._results("tokenising", tokenise_shard, unlimited))
        for name in names:
            if (limit := self.corpus.sources[name].documents) is not None:
                taken = 0
                for result in self._results(f"tokenising {name}", tokenise_shard, jobs[name]):
                    results.append(result)
                    taken += result.get("documents", 0)
                    if taken >= limit or "problem" in result:
                        break  # what follows is not read
        if problems := [result["problem"] for result in results if "problem" in result]:
            raise CorpusError(self.corpus.name, problems)
        return sorted(results, key=lambda result: result["index"])

    def _pack(self, plan: DocumentPlan, end: int) -> tuple[dict[str, int], list[Result]]:
        """Pack every shard's rows; gives the rows of each source and the results."""
        rows, jobs, problems = {}, [], []
        first_row = 0
        for name, source in plan.sources.items():
            rows[name] = max(0, (source["train_tokens"] - 1) // self.context)
            if rows[name] < 1:
                many = f"source {name}: {source['train_tokens']} training tokens do not fill one row of"
                problems.append(f"{many} {self.context + 1}; use a larger corpus or a shorter context")
            shards = [shard for shard in plan.shards if shard["source"] == name]
            offset = 0
            for n, shard in enumerate(shards):
                begin, stop = (-(-at // self.context) for at in (offset, offset + shard["train_tokens"]))
                count = max(0, min(stop, rows[name]) - begin)
                jobs.append(
                    PackJob(
                        index=shard["index"],
                        work=str(self.work),
                        ready=str(self.ready),
                        context=self.context,
                        end_of_text=end,
                        vocab_size=self.corpus.vocab_size,
                        first_row=first_row + begin,
                        rows=count,
                        skip=begin * self.context - offset,
                        takes=tuple((each["index"], each["take"]) for each in shards[n:]),
                    )
                )
                offset += shard["train_tokens"]
            first_row += rows[name]
        if problems:
            raise CorpusError(self.corpus.name, problems)
        return rows, list(self._results("packing", pack_shard, jobs))

    def _results(self, what: str, function: Callable[[Any], Result], jobs: list[Any]) -> Generator[Result]:
        """Run the jobs that have no result yet, logging the progress; all results, in the order of the jobs."""
        kept = {job.index: self._kept(job) for job in jobs}
        fresh = iter(self.run(function, [job for job in jobs if kept[job.index] is None]))
        began = logged = time.monotonic()
        done = before = sum(result is not None for result in kept.values())
        if before and before < len(jobs):
            log.info("corpus %s: %s resumes, %d of %d shards are done", self.corpus.name, what, before, len(jobs))
        for job in jobs:
            result = kept[job.index]
            if result is None:
                result = next(fresh)
                done += 1
            if "errno" in result:
                raise OSError(result["errno"], result["strerror"])
            yield result
            if (now := time.monotonic()) - logged > PROGRESS_SECONDS:
                logged, left = now, (now - began) / max(1, done - before) * (len(jobs) - done)
                log.info(
                    "corpus %s: %s, %d of %d shards, about %s left",
                    self.corpus.name,
                    what,
                    done,
                    len(jobs),
                    clock(left),
                )

    def _kept(self, job: TokeniseJob | PackJob) -> Result | None:
        return kept_tokens(self.work, job) if isinstance(job, TokeniseJob) else kept_rows(self.work, job)

    def _probe(self, plan: DocumentPlan, tokenizer: Tokenizer, end: int) -> Result:
        document = read_document(self.work, plan.probe["shard"], plan.probe["position"])
        text = tokenizer.decode(document["tokens"].tolist(), skip_special_tokens=False)
        return {
            "document": self.corpus.document_name(plan.probe["source"], plan.probe["name"]),
            **probe_text(text, tokenizer, end, self.corpus.probe_characters),
        }


def probe_text(text: str, tokenizer: Tokenizer, end: int, characters: int) -> Result:
    """The text cut at the last white space before ``characters``, its tokens, and what each adds to the text.

    The pieces, one after another, are the text. Where a character is several tokens, the one that completes it adds it;
    white space that no token holds goes with the token before it.
    """
    if len(text) > characters:
        cut = text[:characters]
        text = cut[: max(cut.rfind(" "), cut.rfind("\n"))] if " " in cut or "\n" in cut else cut
    pairs = encode_with_places(tokenizer, text, end)
    starts = [0, *itertools.accumulate((place for _, place in pairs[1:]), max)]
    return {
        "text": text,
        "tokens": [end, *(token for token, _ in pairs)],
        "pieces": [text[start:stop] for start, stop in itertools.pairwise([*starts, len(text)])][: len(pairs)],
    }
