"""Preparing a corpus in this process: against plain lists; through kills, full disks and two at once."""

import collections
import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from haltscale.platform.corpora import document_plan, shard_jobs, sources
from haltscale.platform.corpora.corpus import Corpus, CorpusError, PreparedCorpus, RowReader
from haltscale.platform.corpora.prepare import in_process, prepare
from haltscale.platform.corpora.shard_jobs import name_hash
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained


def packed(documents: list[list[int]], context: int) -> list[list[int]]:
    """Rows of a stream, one after another, each beginning with the last token of the one before."""
    stream = list(itertools.chain(*documents))
    rows = []
    while len(stream) >= context + 1:
        rows.append(stream[: context + 1])
        stream = stream[context:]
    return rows


def rows_of(prepared: PreparedCorpus) -> list[list[int]]:
    return RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist()


def byte_tokens(text: str) -> list[int]:
    return Tokenizer.from_str(Pretrained(name="bytes").json).encode(text, add_special_tokens=False).ids


def texts(folder: Path, contents: dict[str, str]) -> Source:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Source(path=str(folder))


def plain(*found: Source, **changes) -> Corpus:
    """A corpus of bytes, so that its tokens are known without training."""
    values = {"name": "plain", "tokenizer": Pretrained(name="bytes"), "validation_documents": 1}
    return Corpus(sources={f"s{n}": source for n, source in enumerate(found)}, **(values | changes))


def by_hash(names) -> list[str]:
    return sorted(names, key=name_hash)


# ---- rows -----------------------------------------------------------------------------------------------------------

documents_ = st.lists(st.text("ab é", min_size=2, max_size=30), min_size=4, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=documents_, context=st.integers(1, 9), shard_bytes=st.integers(1, 80), group=st.integers(1, 40))
def test_rows_are_the_documents_end_to_end(tmp_path_factory, monkeypatch, contents, context, shard_bytes, group):
    """However the files are cut into shards, and the rows into groups."""
    folder = tmp_path_factory.mktemp("texts")
    monkeypatch.setenv("HALTSCALE_HOME", str(folder / "home"))
    monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(shard_jobs, "GROUP_TOKENS", group)
    contents = {f"{index:02d}.txt": text for index, text in enumerate(contents)}
    corpus = plain(texts(folder / "texts", contents), remove_duplicates=False)
    left = by_hash(contents)[2:]
    stream = [[0, *byte_tokens(contents[name])] for name in sorted(left)]
    expected = packed(stream, context)
    if not expected:
        with pytest.raises(CorpusError, match="do not fill one row"):
            prepare(corpus, context)
        return
    prepared = prepare(corpus, context)
    assert rows_of(prepared) == expected
    assert prepared.rows == len(expected)
    counts = collections.Counter(itertools.chain(*stream))
    assert prepared.token_counts().tolist() == [counts[token] for token in range(257)]
    parts = json.loads((prepared.folder / "parts.json").read_text())
    table = [row for part in parts for row in pq.read_table(prepared.folder / part["file"]).to_pylist()]
    assert [row["seq_id"] for row in table] == list(range(len(expected)))
    for row in table:
        assert row["starts"] == [place for place, token in enumerate(row["tokens"]) if token == 0]


def test_a_prepared_corpus_holds_what_its_documents_hold(corpus, documents):
    tiny = corpus()
    prepared = prepare(tiny, 8)
    tokenizer = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    contents = {path.relative_to(documents).as_posix(): path.read_text() for path in documents.rglob("*.txt")}
    probe, *rest = by_hash(contents)
    held_out, train = sorted(rest[:2]), sorted(rest[2:])
    found = prepared.validation()
    assert [document.name for document in found] == held_out
    for document in found:
        assert document.bytes == len(contents[document.name].encode())
        assert document.tokens[0] == 0
        assert tokenizer.decode(document.tokens[1:].tolist()) == contents[document.name]
    stream = [[0, *tokenizer.encode(contents[name]).ids] for name in train]
    assert rows_of(prepared) == packed(stream, 8)
    counts = prepared.counts
    assert counts["train_documents"] == 3
    assert counts["train_tokens"] == sum(map(len, stream))
    assert counts["train_bytes"] == sum(len(contents[name].encode()) for name in train)
    assert counts["bytes_per_token"] == pytest.approx(counts["train_bytes"] / (counts["train_tokens"] - 3))
    assert counts["validation_bytes"] == sum(document.bytes for document in found)
    assert counts["validation_tokens"] == sum(len(document.tokens) - 1 for document in found)
    assert (counts["name"], counts["context"], counts["fingerprint"]) == ("tiny", 8, tiny.fingerprint)
    assert prepared.probe().name == probe
    assert "".join(prepared.probe().pieces) == contents[probe][: len("".join(prepared.probe().pieces))]
    assert prepared.token_counts().sum() == counts["train_tokens"]


def test_the_tokenizer_never_sees_a_held_out_document(corpus, documents):
    contents = {path.relative_to(documents).as_posix(): path for path in documents.rglob("*.txt")}
    for name in by_hash(contents)[:3]:
        contents[name].write_text("qqqqqq qqqqqq qqqqqq zzzz zzzz zzzz " * 50)
    tokenizer = Tokenizer.from_file(str(prepare(corpus(), 8).folder / "tokenizer.json"))
    assert not [token for token in tokenizer.get_vocab() if "qq" in token or "zz" in token]


def test_the_reader_keeps_few_parts_open(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)
    prepared = prepare(plain(texts(tmp_path / "texts", {f"{n}.txt": f"{n:09d}" for n in range(9)})), 4)
    sizes = [pq.read_metadata(part).serialized_size for part in prepared.folder.glob("part-*.parquet")]
    monkeypatch.setattr(RowReader, "MOST_METADATA", 2 * max(sizes))
    reader = RowReader(prepared.folder)
    everything = rows_of(prepared)
    for index in [0, 5, 3, 0, 7, 5, 0]:
        assert reader.read(np.array([index])).tolist() == [everything[index]]
        assert len(reader._opened) <= 2
    for ids in ([-1], [0, prepared.rows], [prepared.rows]):
        with pytest.raises(IndexError, match="not all in"):
            reader.read(np.array(ids))


# ---- splits, duplicates, limits, sources ----------------------------------------------------------------------------


def names_in(prepared: PreparedCorpus) -> set[str]:
    return {document.name for document in prepared.validation()}


def test_holding_out_more_keeps_what_was_held_out(corpus):
    """So that losses of studies with other held-out sets stay roughly comparable."""
    few, many = (names_in(prepare(corpus(validation_documents=n), 8)) for n in (1, 3))
    assert few < many
    assert (len(few), len(many)) == (1, 3)


def test_the_probe_can_be_named(corpus):
    for name in ("document-4.txt", "below/document-3.txt"):
        prepared = prepare(corpus(probe_document=name), 8)
        assert prepared.probe().name == name
        assert name not in names_in(prepared)
        assert prepared.counts["train_documents"] == 3


def test_a_probe_that_is_in_no_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(9)))
    with pytest.raises(CorpusError, match="probe_document 'a' is not in its sources"):
        prepare(plain(Source(path=str(path)), probe_document="a"), 8)
    assert prepare(plain(Source(path=str(path)), probe_document="a.jsonl@0"), 8).probe().name == "a.jsonl@0"


def test_of_equal_documents_one_is_kept(tmp_path):
    contents = {f"{n}.txt": f"document {n % 4} " * 5 for n in range(12)}
    first, second = texts(tmp_path / "a", contents), texts(tmp_path / "b", contents)
    survivors = {
        min((name for name in contents if contents[name] == text), key=name_hash) for text in contents.values()
    }
    prepared = prepare(plain(first), 4)
    assert prepared.counts["sources"]["s0"]["duplicates"] == 8
    assert prepared.counts["train_documents"] == 2
    assert names_in(prepared) | {prepared.probe().name} == set(by_hash(survivors)[:2])
    both = prepare(plain(first, second, remove_duplicates=False), 4)
    assert both.counts["train_documents"] == 24 - 3
    with pytest.raises(CorpusError, match="12 usable documents, but"):  # the second source has nothing of its own
        prepare(plain(first, second), 4)


def test_sources_lie_one_after_another_and_each_is_held_out_from(tmp_path):
    first = texts(tmp_path / "a", {f"{n}.txt": f"first {n} " * (n + 1) for n in range(6)})
    second = texts(tmp_path / "b", {f"{n}.txt": f"second {n} " * (n + 1) for n in range(7)})
    prepared = prepare(plain(first, second), 5)
    counts = prepared.counts["sources"]
    assert sum(each["rows"] for each in counts.values()) == prepared.rows
    assert (counts["s0"]["train_documents"], counts["s1"]["train_documents"]) == (4, 6)
    assert {name.split("/")[0] for name in names_in(prepared)} == {"s0", "s1"}
    alone = rows_of(prepare(plain(first), 5))
    assert rows_of(prepared)[: counts["s0"]["rows"]] == alone[: counts["s0"]["rows"]] == alone


def test_a_limit_takes_the_first_documents_and_reads_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 30)
    contents = {f"{n:02d}.txt": f"document {n:02d}" for n in range(20)}
    source = texts(tmp_path / "texts", contents)
    started = []

    def watched(function, jobs):
        for job in jobs:
            started.append(job)
            yield function(job)

    prepared = prepare(plain(Source(path=source.path, documents=7)), 4, run=watched)
    assert len([job for job in started if isinstance(job, shard_jobs.TokeniseJob)]) == 3
    kept = [name for name in sorted(contents)[:7] if name not in by_hash(sorted(contents)[:7])[:2]]
    assert rows_of(prepared) == packed([[0, *byte_tokens(contents[name])] for name in kept], 4)


def test_the_tokenizer_of_a_limited_source_reads_no_further(tmp_path):
    contents = {f"{n:02d}.txt": f"document {n} abc" if n < 7 else "qqqq zzzz " * 9 for n in range(20)}
    source = texts(tmp_path / "texts", contents)
    limited_source = Source(path=source.path, documents=7)
    prepared = prepare(plain(limited_source, tokenizer=BytePairs(vocab_size=300)), 2)
    vocabulary = Tokenizer.from_file(str(prepared.folder / "tokenizer.json")).get_vocab()
    assert not [token for token in vocabulary if "qq" in token or "zz" in token]


def test_a_home_with_an_odd_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "it's [mine] *"))
    assert prepare(plain(texts(tmp_path / "texts", {f"{n}.txt": f"document {n}" for n in range(5)})), 4).rows


# ---- leakage --------------------------------------------------------------------------------------------------------


def test_a_passage_in_training_and_validation_is_reported(tmp_path):
    contents = {f"{n}.txt": f"text number {n} goes on and on " * 4 for n in range(8)}
    _, held_out, trained, *_ = by_hash(contents)
    passage = "0123456789" * 7  # 70 bytes: 21 windows of 50
    contents[held_out] = f"<{passage}>"
    prepared = prepare(plain(texts(tmp_path / "clean", contents)), 8)
    assert prepared.counts["leakage"] == {
        "window_tokens": 50,
        "validation_windows": 72 - 49,
        "overlapping_windows": 0,
        "overlapping_documents": 0,
    }
    contents[trained] = f"[{passage}]"
    leaking = prepare(plain(texts(tmp_path / "leaking", contents)), 8)
    assert leaking.counts["leakage"]["overlapping_windows"] == 21
    assert leaking.counts["leakage"]["overlapping_documents"] == 1


# ---- refusals, crashes, restarts ------------------------------------------------------------------------------------


def test_a_corpus_smaller_than_one_row_or_one_batch_is_refused(corpus, home):
    with pytest.raises(CorpusError, match="do not fill one row of 100001"):
        prepare(corpus(), 100_000)
    assert list((home / "corpora").iterdir()) == []
    rows = prepare(corpus(), 8).rows
    with pytest.raises(CorpusError, match=f"{rows} training rows of 8 tokens, but one batch needs {rows + 1}"):
        prepare(corpus(), 8, batch=rows + 1)


def test_everything_that_cannot_be_read_is_told_at_once(corpus, documents, home):
    (documents / "document-1.txt").write_bytes(b"caf\xc3\xa9, caf\xe9 again")
    (documents / "document-5.txt").write_bytes(b"ok\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", 1)
        with pytest.raises(CorpusError) as refusal:
            prepare(corpus(), 8)
    assert len(refusal.value.problems) == 2
    assert "document-1.txt is not UTF-8 (byte 10: " in refusal.value.problems[0]
    assert "document-5.txt is not UTF-8 (byte 2: " in refusal.value.problems[1]
    assert list((home / "corpora").iterdir()) == []


def test_what_was_prepared_is_opened_and_not_prepared_again(corpus):
    first = prepare(corpus(), 16)
    assert prepare(corpus(), 16, run=lambda *_: pytest.fail("prepared again")) == first


def test_a_damaged_cache_is_not_written_over(corpus):
    prepared = prepare(corpus(), 16)
    (prepared.folder / "corpus.json").write_text("{")
    with pytest.raises(CorpusError, match=r"no readable corpus\.json: remove it"):
        prepare(corpus(), 16)


def in_child(function, *arguments) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    return child


@pytest.mark.parametrize("stage", ["tokens", "packed"])
def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)
    corpus = plain(texts(tmp_path / "texts", {f"{n}.txt": f"document {n} " * 5 for n in range(9)}))

    def killed_on_the_way(function, jobs):
        for number, job in enumerate(jobs):
            if (
                number == 4
                and function is {"tokens": shard_jobs.tokenise_shard, "packed": shard_jobs.pack_shard}[stage]
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            yield function(job)

    assert in_child(lambda: prepare(corpus, 4, run=killed_on_the_way)).exitcode == -signal.SIGKILL
    folder = corpus.cache(4)
    assert PreparedCorpus.open(folder) is None
    began = len(list(Path(f"{folder}.partial/work").glob(f"{stage}-*.json")))
    done = []

    def counted(function, jobs):
        done.extend((function, job) for job in jobs)
        return in_process(function, jobs)

    prepared = prepare(corpus, 4, run=counted)
    again = shard_jobs.tokenise_shard if stage == "tokens" else shard_jobs.pack_shard
    assert began == 4
    assert len([job for function, job in done if function is again]) == 9 - 4
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "other-home"))
    fresh = prepare(corpus, 4)
    assert rows_of(prepared) == rows_of(fresh)
    assert prepared.counts == fresh.counts


def test_of_two_preparations_at_once_one_works_and_both_have_it(tmp_path):
    corpus = plain(texts(tmp_path / "texts", {f"{n}.txt": f"document {n} " * 5 for n in range(9)}))
    inside, other = multiprocessing.get_context("fork").Event(), []

    def second() -> None:
        inside.wait()
        prepare(corpus, 4, run=lambda *_: os._exit(3))

    def first(function, jobs):
        inside.set()
        yield from map(function, jobs)

    child = multiprocessing.get_context("fork").Process(target=second)
    child.start()
    other.append(prepare(corpus, 4, run=first))
    child.join()
    assert child.exitcode == 0


def limited(corpus: Corpus, most: int, answer: Path) -> None:
    """Prepare in a process whose files cannot grow beyond ``most`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        prepare(corpus, 4)
    except CorpusError as error:
        os.write(os.open(answer, os.O_CREAT | os.O_WRONLY), str(error).encode())


@pytest.mark.parametrize("most", [3_000, 9_000, 40_000])
def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, most):
    """A limit on the size of files stands for the disk: writing fails in the middle of a file."""
    corpus = plain(texts(tmp_path / "texts", {f"{n}.txt": f"document {n} " * 500 for n in range(9)}))
    assert in_child(limited, corpus, most, tmp_path / "answer").exitcode == 0
    answer = (tmp_path / "answer").read_text()
    assert "cannot be written (File too large): free space, or point HALTSCALE_HOME elsewhere" in answer
    folder = corpus.cache(4)
    assert PreparedCorpus.open(folder) is None
    assert not folder.exists()
    assert not list(Path(f"{folder}.partial").rglob("*.partial"))
    assert prepare(corpus, 4).counts["train_documents"] == 7


def test_no_space_left_on_device(corpus, home, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs.pq.ParquetWriter, "write_table", full)
        with pytest.raises(CorpusError, match="No space left on device"):
            prepare(corpus(), 8)
    assert prepare(corpus(), 8).rows


def test_a_disk_that_fills_while_documents_are_chosen(corpus, monkeypatch):
    def full(*_):
        raise duckdb.IOException("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(document_plan, "_hold_out", full)
        with pytest.raises(CorpusError, match="No space left on device"):
            prepare(corpus(), 8)
    assert prepare(corpus(), 8).rows


def test_a_cache_that_cannot_be_written_is_told(corpus, home):
    home.mkdir()
    (home / "corpora").write_text("a file where the folder should be")
    with pytest.raises((CorpusError, FileExistsError)) as refusal:
        prepare(corpus(), 8)
    assert "cannot be written" in str(refusal.value)


def test_a_read_only_cache_is_told(corpus, home, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CorpusError, match=r"cannot be written \(Read-only file system\)"):
        prepare(corpus(), 8)
