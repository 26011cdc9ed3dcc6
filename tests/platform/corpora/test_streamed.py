"""Streamed corpora: what is known before all is read, against plain lists; kills, failures; training meanwhile."""

import itertools
import json
import multiprocessing
import os
import signal
import sqlite3
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from haltscale.platform.corpora import shard_jobs, sources, streamed
from haltscale.platform.corpora.corpus import Corpus, CorpusError, PreparedCorpus, RowReader
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.prepare import begin, in_process, prepare
from haltscale.platform.corpora.shard_jobs import name_hash
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained

from looping import BATCH, CONTEXT, RUN, Batch, engine_of, go

CONTENTS = {f"{n:02d}.txt": f"document {n} " * (10 + n % 3) for n in range(20)}


@pytest.fixture(autouse=True)
def every_file_is_a_shard(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)


def written(folder: Path, contents: dict[str, str] = CONTENTS) -> Source:
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return Source(path=str(folder))


def streamed_corpus(source: Source, **changes) -> Corpus:
    """Of bytes, so that its tokens are known; five documents or so are its head."""
    values = {"name": "flow", "tokenizer": Pretrained(name="bytes"), "validation_documents": 1, "segment_tokens": 590}
    return Corpus(sources={"text": source}, **(values | changes))


def rows_of(prepared: PreparedCorpus) -> list[list[int]]:
    return RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist()


def expected_rows(contents: dict[str, str], segment_bytes: int, context: int, held_out: int) -> list[list[int]]:
    """The definition: first of equals, held out by hash from the first documents, the others end to end."""
    named = sorted(contents)
    ends = itertools.accumulate(len(contents[name].encode()) for name in named)
    head = named[: 1 + sum(end < segment_bytes for end in ends)]
    first = [name for n, name in enumerate(named) if contents[name] not in [contents[other] for other in named[:n]]]
    left_out = sorted((name for name in head if name in first), key=name_hash)[: held_out + 1]
    tokenizer = Tokenizer.from_str(Pretrained(name="bytes").json)
    documents = [[0, *tokenizer.encode(contents[name]).ids] for name in first if name not in left_out]
    stream = list(itertools.chain(*documents))
    return [stream[at : at + context + 1] for at in range(0, len(stream) - context, context)]


# ---- what is prepared -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab é", min_size=2, max_size=30), min_size=5, max_size=14),
    context=st.integers(1, 9),
    shard_bytes=st.integers(1, 80),
    segment=st.integers(9, 200),
)
def test_rows_are_as_defined_however_files_are_cut(tmp_path_factory, monkeypatch, texts, context, shard_bytes, segment):
    folder = tmp_path_factory.mktemp("flow")
    monkeypatch.setenv("HALTSCALE_HOME", str(folder / "home"))
    monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
    contents = {f"{n:02d}.txt": text for n, text in enumerate(texts)}
    corpus = streamed_corpus(written(folder / "texts", contents), segment_tokens=segment)
    try:
        prepared = prepare(corpus, context)
    except CorpusError as error:
        assert "usable documents in its first" in str(error) or "do not fill one row" in str(error)  # noqa: PT017
        assert not corpus.cache(context).exists()
        return
    expected = expected_rows(contents, segment, context, 1)
    assert rows_of(prepared) == expected
    assert prepared.is_complete
    assert prepared.mixture.segment == segment // context
    kept = set(texts)
    held_out = [prepared.probe().name, *prepared.validation_names()]
    assert prepared.counts["train_documents"] == len(kept) - len(held_out)
    assert prepared.counts["sources"]["text"]["duplicates"] == len(texts) - len(kept)
    assert prepared.counts["train_bytes"] == sum(len(t.encode()) for t in kept - {contents[n] for n in held_out})


def test_token_frequencies_are_of_the_first_documents(tmp_path):
    contents = CONTENTS | {f"{n}.txt": "zzzz " * 30 for n in range(90, 99)}
    prepared = prepare(streamed_corpus(written(tmp_path / "texts", contents)), 8)
    tokenizer = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    counts = prepared.token_counts()
    assert counts[tokenizer.token_to_id("z")] == 0
    assert counts[0] == 3  # five documents are the first 590 bytes; the probe and a held-out one are among them
    assert prepared.counts["train_documents"] > 3


def test_the_tokenizer_sees_no_held_out_document_and_none_beyond_the_first(tmp_path):
    contents = {name: text if name < "08.txt" else "qqqq qqqq " * 9 for name, text in CONTENTS.items()}
    head = sorted(contents)[:5]
    for name in sorted(head, key=name_hash)[:2]:
        contents[name] = contents[name].replace("document", "zzzzzzzz")
    corpus = streamed_corpus(written(tmp_path / "texts", contents), tokenizer=BytePairs(vocab_size=300))
    prepared = prepare(corpus, 8)
    assert {prepared.probe().name, *prepared.validation_names()} == set(sorted(head, key=name_hash)[:2])
    vocabulary = Tokenizer.from_file(str(prepared.folder / "tokenizer.json")).get_vocab()
    assert "Ġdocument" in vocabulary or "document" in vocabulary
    assert not [token for token in vocabulary if "qq" in token or "zz" in token]


def test_a_passage_of_a_held_out_document_is_reported_wherever_it_comes(tmp_path):
    contents = dict(CONTENTS)
    held_out = sorted(sorted(contents)[:5], key=name_hash)[1]
    contents[held_out] = "0123456789" * 12
    contents["19.txt"] = "and " + "0123456789" * 6 + " again"
    prepared = prepare(streamed_corpus(written(tmp_path / "texts", contents)), 8)
    assert prepared.validation_names() == [held_out]
    assert prepared.counts["leakage"]["overlapping_documents"] == 1
    assert prepared.counts["leakage"]["overlapping_windows"] == prepared.counts["leakage"]["validation_windows"] > 0


def test_a_limit_reads_no_further(tmp_path):
    source = written(tmp_path / "texts")
    (tmp_path / "texts" / "12.txt").write_bytes(b"\xff")
    prepared = prepare(streamed_corpus(Source(path=source.path, documents=12)), 8)
    first = dict(sorted(CONTENTS.items())[:12])
    assert rows_of(prepared) == expected_rows(first, 590, 8, 1)


def test_streaming_is_in_the_fingerprint_and_nothing_else_is_changed_by_it(tmp_path):
    source = written(tmp_path / "texts")
    whole, flow, larger = (streamed_corpus(source, segment_tokens=n) for n in (None, 590, 700))
    assert len({whole.fingerprint, flow.fingerprint, larger.fingerprint}) == 3
    assert "segment_tokens" not in whole.identity()


def test_what_cannot_be_streamed_is_refused(tmp_path):
    source = written(tmp_path / "texts")
    two = Corpus(name="two", sources={"a": source, "b": source}, segment_tokens=590)
    assert any("a streamed corpus has one source" in problem for problem in two.problems())
    assert any(
        "segment_tokens must be an integer above 0 (got 0)" in problem
        for problem in streamed_corpus(source, segment_tokens=0).problems()
    )
    for changes, context, message in (
        ({}, 591, "segment_tokens 590 do not fill one row of 592"),
        ({"segment_tokens": 100}, 8, "usable documents in its first 100 bytes of text, but 1 validation"),
        ({"probe_document": "19.txt"}, 8, "probe_document '19.txt' is not in its first 590 bytes"),
        ({"segment_tokens": 100_000}, 50_000, "do not fill one row of 50001"),
    ):
        corpus = streamed_corpus(source, **changes)
        with pytest.raises(CorpusError, match=message):
            prepare(corpus, context)
        assert not list(corpus.cache(context).parent.glob("flow*"))
    with pytest.raises(CorpusError, match="training rows of 8 tokens, but one batch needs 9999"):
        prepare(streamed_corpus(source), 8, batch=9999)
    with (
        pytest.raises(CorpusError, match="training rows of 8 tokens, but one batch needs 9998"),
        begin(streamed_corpus(source, segment_tokens=700), 8, batch=9998),
    ):
        pytest.fail("a corpus too small for one batch was begun")


# ---- while it is being prepared -------------------------------------------------------------------------------------


class Gate:
    """Keeps the last file of a remote store from being read until it is opened; then it may fail."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.failure: str | None = None

    def open(self) -> None:
        self.opened.set()

    def pass_through(self, path: str) -> None:
        if path.endswith("19.txt"):
            if not self.opened.wait(60):
                raise OSError("the gate was never opened")
            if self.failure:
                raise OSError(self.failure)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    gate, really_open = Gate(), MemoryFileSystem._open

    def gated_open(fs, path, mode="rb", **options):
        if mode == "rb":
            gate.pass_through(path)
        return really_open(fs, path, mode=mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", gated_open)
    return gate


@pytest.fixture
def remote(gate) -> Source:
    """A store in memory, remote to haltscale, whose last file is behind the gate."""
    fs = fsspec.filesystem("memory")
    for name, text in CONTENTS.items():
        fs.pipe_file(f"/texts/{name}", text.encode())
    yield Source(path="memory://texts")
    gate.open()
    fs.rm("/texts", recursive=True)


def order_of(prepared: PreparedCorpus, steps: int, *, seed: int = 0) -> np.ndarray:
    return global_batches(seed=seed, mixture=prepared.mixture, batch=BATCH, first_step=0, steps=steps)


def test_training_begins_before_the_last_shard_is_read(remote, gate, tmp_path, monkeypatch):
    """Real steps of a real engine; their sequences are those of a corpus that was prepared wholly beforehand."""
    corpus = streamed_corpus(remote)

    def batches(corpus, after_first_step):
        for step in range(RUN.steps):
            if step == 1:
                after_first_step()
            corpus = corpus.wait_for((step + 1) * BATCH)
            ids = order_of(corpus, step + 1)[-1]
            yield Batch(step, ids, RowReader(corpus.folder).read(ids).astype(np.int64))

    known = []

    def first_step_is_taken():
        known.append(PreparedCorpus.open(corpus.cache(CONTEXT)))
        assert not gate.opened.is_set()
        gate.open()

    with begin(corpus, CONTEXT, batch=BATCH) as prepared:
        assert not prepared.is_complete
        streamed_run, streamed_rows = go(engine_of(RUN), RUN, batches(prepared, first_step_is_taken))
    assert not known[0].is_complete

    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "beforehand"))
    whole = prepare(corpus, CONTEXT)
    assert rows_of(PreparedCorpus.open(corpus.cache(CONTEXT))) == rows_of(whole)
    again, rows = go(engine_of(RUN), RUN, batches(whole, lambda: None))
    assert streamed_run.sequence_digest == again.sequence_digest
    assert [row["loss"] for row in streamed_rows.rows] == [row["loss"] for row in rows.rows]


def test_what_is_known_early_is_the_order_that_is_known_in_the_end(remote, gate):
    corpus = streamed_corpus(remote)
    with begin(corpus, CONTEXT) as early:
        steps = early.drawable // BATCH
        ids = order_of(early, steps)
        rows = RowReader(early.folder).read(ids.ravel())
        held_out, probe, counts = early.validation_names(), early.probe().name, early.token_counts()
        gate.open()
        late = early.wait_for(10**9)
    assert late.is_complete
    assert late.rows > early.rows
    assert order_of(late, steps).tolist() == ids.tolist()
    assert RowReader(late.folder).read(ids.ravel()).tolist() == rows.tolist()
    assert (late.validation_names(), late.probe().name) == (held_out, probe)
    assert late.token_counts().tolist() == counts.tolist()
    assert sorted(set(order_of(late, late.rows).ravel()[: late.rows].tolist())) == list(range(late.rows))
    assert sorted(path.name for path in late.folder.parent.iterdir()) == [late.folder.name]


def test_a_reader_finds_what_has_come_since_it_was_opened(remote, gate):
    with begin(streamed_corpus(remote), CONTEXT) as early:
        reader = RowReader(early.folder)
        gate.open()
        late = early.wait_for(10**9)
        assert reader.read(np.arange(late.rows)).tolist() == rows_of(late)


def test_no_more_is_prepared_than_the_runs_draw(remote, gate):
    corpus = streamed_corpus(remote)
    read = []

    def watched(function, jobs):
        for job in jobs:
            read.append(job.index)
            yield function(job)

    with begin(corpus, CONTEXT, rows=20, run=watched) as early:
        assert early.wait_for(20).drawable >= 20
    before = len(read)
    assert before < len(CONTENTS) - 1
    gate.open()
    whole = prepare(corpus, CONTEXT, run=watched)
    assert whole.is_complete
    assert sorted(read) == list(range(len(CONTENTS)))  # none twice
    contents = {name: CONTENTS[name] for name in sorted(CONTENTS)}
    assert rows_of(whole) == expected_rows(contents, 590, CONTEXT, 1)


def test_a_shard_that_cannot_be_read_ends_the_wait_and_is_tried_again(remote, gate):
    corpus = streamed_corpus(remote)
    gate.failure = "connection reset"
    with begin(corpus, CONTEXT) as early:
        gate.open()
        with pytest.raises(CorpusError, match=r"failed after \d+ rows: .*19\.txt cannot be read.*connection reset"):
            early.wait_for(10**9)
        assert RowReader(early.folder).read(np.arange(early.rows)).shape == (early.rows, CONTEXT + 1)
    gate.failure = None
    with begin(corpus, CONTEXT) as early:
        assert early.wait_for(10**9).is_complete
    assert "problem" not in PreparedCorpus.open(corpus.cache(CONTEXT)).counts


def test_a_failure_before_the_first_segment_is_raised_at_once(tmp_path):
    source = written(tmp_path / "texts")
    (tmp_path / "texts" / "02.txt").write_bytes(b"ok \xff")
    corpus = streamed_corpus(source)
    with pytest.raises(CorpusError, match=r"not UTF-8 \(byte 3"), begin(corpus, 8):
        pytest.fail("it was begun")
    assert not list(corpus.cache(8).parent.glob("flow*"))


def test_a_second_process_trains_on_what_the_first_prepares(remote, gate):
    """Only one prepares; the other's block begins as well, and ends without waiting for it."""
    corpus = streamed_corpus(remote)
    with begin(corpus, CONTEXT), begin(corpus, CONTEXT, run=lambda *_: pytest.fail("prepared twice")) as second:
        assert second.drawable > 0
        assert not second.is_complete
        gate.open()
        assert second.wait_for(10**9).is_complete


@pytest.mark.parametrize("stage", ["tokens", "packed"])
@pytest.mark.parametrize("at", [2, 9, 18])
def test_a_killed_preparation_goes_on_and_makes_the_same(tmp_path, monkeypatch, stage, at):
    corpus = streamed_corpus(written(tmp_path / "texts"))
    attempted = {"tokens": "_tokenise", "packed": "_pack"}[stage]
    real = getattr(shard_jobs, attempted)

    def killed_on_the_way(job):
        if job.index == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job)

    def child():
        wrapped = shard_jobs._attempted(killed_on_the_way)
        monkeypatch.setattr(streamed, {"tokens": "tokenise_shard", "packed": "pack_shard"}[stage], wrapped)
        prepare(corpus, 8)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    early = PreparedCorpus.open(corpus.cache(8))
    assert (early is None) == (at == 2)
    before = early and (order_of(early, early.drawable // BATCH), rows_of(early))
    done = []

    def counted(function, jobs):
        done.extend(job.index for job in jobs)
        return in_process(function, jobs)

    prepared = prepare(corpus, 8, run=counted)
    assert not set(done) & set(range(at))
    assert rows_of(prepared) == expected_rows(CONTENTS, 590, 8, 1)
    if before:
        assert order_of(prepared, len(before[0])).tolist() == before[0].tolist()
        assert rows_of(prepared)[: len(before[1])] == before[1]
    assert sorted(path.name for path in prepared.folder.parent.iterdir()) == [prepared.folder.name]
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "other-home"))
    assert prepare(corpus, 8).counts == prepared.counts


def test_a_preparation_that_goes_on_never_takes_rows_back(remote, gate):
    corpus = streamed_corpus(remote)
    with begin(corpus, CONTEXT, rows=60):
        pass
    early = PreparedCorpus.open(corpus.cache(CONTEXT))
    counts = []

    def watched(function, jobs):
        for job in jobs:
            counts.append(json.loads((early.folder / "corpus.json").read_text())["rows"])
            yield function(job)

    gate.open()
    prepare(corpus, CONTEXT, run=watched)
    assert counts == sorted(counts)
    assert counts[0] == early.rows


def test_a_disk_that_fills_is_told_to_those_who_wait(remote, gate, monkeypatch):
    corpus = streamed_corpus(remote)
    with begin(corpus, CONTEXT) as early:
        monkeypatch.setattr(
            streamed, "pack_shard", lambda job: {"index": job.index, "errno": 28, "strerror": "No space left on device"}
        )
        gate.open()
        with pytest.raises(CorpusError, match="No space left on device"):
            early.wait_for(10**9)
    monkeypatch.setattr(streamed, "pack_shard", shard_jobs.pack_shard)
    assert prepare(corpus, CONTEXT).is_complete


def test_a_full_disk_under_the_list_of_contents(tmp_path, monkeypatch):
    class Full(sqlite3.Connection):
        def execute(self, statement, *parameters):
            if statement.startswith("INSERT"):
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *parameters)

    corpus = streamed_corpus(written(tmp_path / "texts"))
    with monkeypatch.context() as patch:
        patch.setattr(streamed.sqlite3, "connect", lambda path, **options: Full(path, **options))
        with pytest.raises(CorpusError, match="No space left on device"):
            prepare(corpus, 8)
    assert not corpus.cache(8).exists()
    assert prepare(corpus, 8).is_complete
