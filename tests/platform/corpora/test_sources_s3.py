"""Corpora on object storage: against a real S3 server (moto's), over HTTP, in this process."""

import gzip
import json

import fsspec
import numpy as np
import pytest

from haltscale.platform.corpora import sources
from haltscale.platform.corpora.corpus import Corpus, RowReader
from haltscale.platform.corpora.prepare import begin, prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained

TEXTS = [f"document {n} naïve " * (5 + n % 4) for n in range(40)]


def corpus_at(path: str, **changes) -> Corpus:
    values = {"name": "there", "tokenizer": Pretrained(name="bytes"), "validation_documents": 1}
    return Corpus(sources={"text": Source(path=path)}, **(values | changes))


@pytest.fixture(params=["plain", "gzip"])
def shelf(request, s3, tmp_path) -> tuple[str, str]:
    """The same four files in a bucket and in a folder."""
    url, folder = f"{s3}/{request.param}", tmp_path / "here"
    folder.mkdir()
    fs = fsspec.filesystem("s3")
    for number in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[number::4]).encode()
        name, content = f"{number}.jsonl", lines
        if request.param == "gzip":
            name, content = f"{name}.gz", gzip.compress(lines, mtime=0)
        (folder / name).write_bytes(content)
        fs.pipe_file(f"{url.removeprefix('s3://')}/{name}", content)
    return url, str(folder)


@pytest.mark.parametrize("segment_tokens", [None, 1500])
def test_a_bucket_is_prepared_as_a_folder_is(shelf, monkeypatch, segment_tokens):
    monkeypatch.setattr(sources, "SHARD_BYTES", 100)
    there, here = (prepare(corpus_at(path, segment_tokens=segment_tokens), 16) for path in shelf)
    assert there.rows == here.rows > 0
    rows = [RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist() for prepared in (there, here)]
    assert rows[0] == rows[1]
    assert there.validation_names() == here.validation_names()


def test_a_bucket_is_known_by_what_the_server_tells_of_it(shelf):
    url, _ = shelf
    first = corpus_at(url).fingerprint
    assert corpus_at(url).fingerprint == first
    fs = fsspec.filesystem("s3")
    (name, *_) = fs.ls(url)
    fs.pipe_file(name, b"")
    fs.invalidate_cache()
    assert corpus_at(url).fingerprint != first


def test_a_bucket_is_streamed(shelf, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 100)
    corpus = corpus_at(shelf[0], segment_tokens=1500)
    with begin(corpus, 16) as early:
        late = early.wait_for(10**9)
    assert early.drawable > 0
    assert late.is_complete


def test_a_bucket_that_is_not_there_is_told(s3):
    (problem,) = corpus_at(f"{s3}-of-nobody/text").problems()
    assert "s3://bucket-of-nobody/text" in problem
