"""Corpora that nodes share through object storage: a real S3 server, and a home for each node."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import write_texts

from haltscale.platform.corpora import corpus as corpus_module
from haltscale.platform.corpora import shared, sources
from haltscale.platform.corpora.corpus import Corpus, CorpusError, PreparedCorpus, RowReader
from haltscale.platform.corpora.prepare import _owned, begin, prepare
from haltscale.platform.corpora.shared import BlockCache, RangedFile, SharedFolder
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs
from haltscale.platform.lease import Lease

CONTEXT = 32


@pytest.fixture
def node(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this process one of several nodes, which share a bucket only."""
    monkeypatch.setenv("HALTSCALE_CORPORA", f"{s3}/{uuid.uuid4().hex}")

    def become(name: str) -> Path:
        monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / name))
        return tmp_path / name

    return become


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("shared") / "texts")


def corpus_of(texts: Path, **more: Any) -> Corpus:
    fields = {"tokenizer": BytePairs(vocab_size=300), "validation_documents": 2, "probe_characters": 100}
    return Corpus(**{"name": "shared", "sources": {"texts": Source(path=str(texts))}, **fields, **more})


def everything(prepared: PreparedCorpus) -> Any:
    return RowReader(prepared.place).read(np.arange(prepared.rows)).tolist()


def refuse(function: Any, jobs: list[Any]) -> Any:
    raise AssertionError("it is prepared once")


def test_a_corpus_is_prepared_by_one_node_and_read_by_ranges_on_another(node, texts, monkeypatch):
    corpus = corpus_of(texts)
    node("first")
    prepared = prepare(corpus, CONTEXT)
    assert prepared.url == prepared.place == corpus.place(CONTEXT)
    rows = everything(prepared)

    home = node("second")
    other = prepare(corpus_of(texts), CONTEXT, run=refuse)
    assert other.counts == prepared.counts
    assert other.folder.is_relative_to(home)
    assert not list(home.rglob("part-*.parquet"))
    assert everything(other) == rows
    assert [each.tokens.tolist() for each in other.validation()] == [
        each.tokens.tolist() for each in prepared.validation()
    ]
    assert other.probe().pieces == prepared.probe().pieces
    assert other.token_counts().tolist() == prepared.token_counts().tolist()

    def gone(*arguments: Any, **more: Any) -> bytes:
        raise AssertionError("what was read once is read from the node's disk")

    monkeypatch.setattr(type(SharedFolder(other.url).fs), "cat_file", gone)
    assert everything(other) == rows


def test_what_was_prepared_but_not_uploaded_is_uploaded_and_not_made_again(node, texts):
    node("first")
    corpus = corpus_of(texts)

    def fail(self: SharedFolder) -> None:
        raise ConnectionError("no bucket")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedFolder, "publish", fail)
        with pytest.raises(ConnectionError):
            prepare(corpus, CONTEXT)
    node("second")
    assert PreparedCorpus.open(corpus.place(CONTEXT)) is None
    node("first")
    rows = everything(prepare(corpus, CONTEXT, run=refuse))
    node("second")
    assert everything(prepare(corpus, CONTEXT, run=refuse)) == rows


def test_another_node_waits_for_the_one_that_prepares(node, texts):
    corpus = corpus_of(texts)
    node("second")
    place = SharedFolder(corpus.place(CONTEXT))
    lease = Lease(place, place.path)
    lease.acquire()
    stop = threading.Event()
    stop.set()
    with pytest.raises(CorpusError, match="another node prepares it"), _owned(place.url, stop):
        pass
    lease.release()
    assert prepare(corpus, CONTEXT).rows


def test_a_streamed_corpus_grows_for_all_nodes_and_goes_on_when_its_node_is_gone(node, texts, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)  # every file is a shard
    corpus = corpus_of(texts, segment_tokens=20_000)
    node("alone")
    node_of_its_own = prepare(corpus_of(texts, segment_tokens=20_000, name="whole"), CONTEXT)
    rows = everything(node_of_its_own)
    node("first")
    with begin(corpus, CONTEXT, rows=1) as early:
        pass
    assert not early.is_complete
    known = len(everything(early))
    node("second")
    other = PreparedCorpus.open(corpus.place(CONTEXT))
    assert other is not None
    reader = RowReader(other.place)
    assert reader.read(np.arange(known)).tolist() == rows[:known]
    node("third")
    assert everything(prepare(corpus, CONTEXT)) == rows
    node("second")
    assert reader.read(np.arange(len(rows))).tolist() == rows, "it looks again for what has come"
    node("first")
    again = PreparedCorpus.open(corpus.place(CONTEXT))
    assert again is not None
    assert again.is_complete
    assert everything(again) == rows


def test_less_never_replaces_more(node, texts):
    corpus = corpus_of(texts)
    node("first")
    prepared = prepare(corpus, CONTEXT)
    place = SharedFolder(prepared.url)
    path = prepared.folder / "corpus.json"
    path.write_text(json.dumps({**prepared.counts, "rows": 1, "complete": False}))
    place.publish()
    assert place.counts() == prepared.counts


def test_another_version_of_a_file_is_read_anew(tmp_path):
    cache = BlockCache(tmp_path, 10**6)
    for version in (b"old", b"new"):
        files = Counted(version)
        assert cache.get(files, "file", {"size": 3, "ETag": version.decode()}, 0) == version


def test_what_an_older_version_prepared_is_replaced_for_all_nodes(node, texts, monkeypatch):
    monkeypatch.setattr(corpus_module, "REVISED", (Source(path=str(texts)).kind,))
    corpus = corpus_of(texts)
    node("first")
    prepared = prepare(corpus, CONTEXT)
    place, rows = SharedFolder(prepared.url), everything(prepared)
    node("second")
    other = prepare(corpus, CONTEXT)
    (part,) = json.loads((other.folder / "parts.json").read_text())
    size = place.fs.info(f"{place.path}/{part['file']}")["size"]
    place.fs.pipe_file(f"{place.path}/{part['file']}", b"x" * size)  # what the older version made of it
    for home in ("first", "second"):
        outdated = {**prepared.counts, "revision": 1}
        (node(home) / "corpora" / prepared.folder.name / "corpus.json").write_text(json.dumps(outdated))
    place.replace_counts({**prepared.counts, "revision": 1})
    node("first")
    assert everything(prepare(corpus, CONTEXT)) == rows
    node("second")
    assert everything(prepare(corpus, CONTEXT, run=refuse)) == rows


class Counted:
    """A filesystem of one file, which counts what is asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.asked = content, 0

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.asked += 1
        return self.content[start:end]

    def info(self, path: str) -> dict[str, int]:
        return {"size": len(self.content)}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(min_size=1, max_size=200),
    reads=st.lists(st.tuples(st.integers(0, 220), st.integers(0, 90)), max_size=12),
    limit=st.sampled_from([0, 20, 64, 10_000]),
)
def test_any_reads_of_any_file_under_any_bound_are_those_of_the_file(content, reads, limit, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "BLOCK_BYTES", 16)
        folder = tmp_path / uuid.uuid4().hex
        files = Counted(content)
        patch.setattr(shared.fsspec.core, "url_to_fs", lambda url, **more: (files, "file"))
        file = RangedFile("any://file", BlockCache(folder, limit))
        for at, length in reads:
            file.seek(at)
            assert file.read(length) == content[at : at + length]
            held = sum(path.stat().st_size for path in folder.glob("??/*"))
            assert held <= max(limit + limit // 16, 0) + (16 if limit else 0)


def test_the_cache_keeps_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "BLOCK_BYTES", 16)
    files, cache = Counted(bytes(range(256))), BlockCache(tmp_path, 64)
    for index in (0, 1, 2, 3):
        cache.get(files, "file", {"size": 256}, index)
    asked = files.asked
    cache.get(files, "file", {"size": 256}, 0)
    assert files.asked == asked
    cache.get(files, "file", {"size": 256}, 9)  # over the bound: 1 and 2 are the oldest
    cache.get(files, "file", {"size": 256}, 0)
    assert files.asked == asked + 1
    cache.get(files, "file", {"size": 256}, 1)
    assert files.asked == asked + 2
