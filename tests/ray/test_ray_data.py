"""Preparing and streaming a corpus with Ray Data, against the obvious ways to do it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from haltscale.platform.corpus import Corpus, PreparedCorpus, RowReader
from haltscale.platform.order import global_batches

pytestmark = pytest.mark.ray

CONTEXT = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    for index in range(40):
        words = [f"word{(index * 7 + n * n) % 97} naïve" for n in range(30 + 11 * (index % 5))]
        (folder / f"{index:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return Corpus(name="toy", folder=str(folder), vocab_size=320, validation_documents=3, probe_characters=200)


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, connected: None) -> PreparedCorpus:
    from haltscale.platform import ray_data

    return ray_data.prepare(corpus, CONTEXT)


def test_rows_are_the_documents_end_to_end(corpus: Corpus, prepared: PreparedCorpus) -> None:
    tokenizer = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    stream: list[int] = []
    for path in corpus.split[0]:
        stream += [
            tokenizer.token_to_id("<|endoftext|>"),
            *tokenizer.encode(path.read_text(), add_special_tokens=False).ids,
        ]
    expected = [stream[n * CONTEXT : n * CONTEXT + CONTEXT + 1] for n in range((len(stream) - 1) // CONTEXT)]
    assert prepared.rows == len(expected)
    assert prepared.counts["train_tokens"] == len(stream)
    np.testing.assert_array_equal(RowReader(prepared.folder).read(np.arange(prepared.rows)), expected)


def test_held_out_documents_are_whole(corpus: Corpus, prepared: PreparedCorpus) -> None:
    tokenizer = Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    for path, document in zip(corpus.split[1], prepared.validation(), strict=True):
        text = path.read_text(encoding="utf-8")
        assert (document.name, document.bytes) == (corpus.document_name(path), len(text.encode()))
        assert tokenizer.decode(document.tokens[1:].tolist()) == text


def test_the_probe_reads_as_its_text(prepared: PreparedCorpus) -> None:
    probe = prepared.probe()
    text = json.loads((prepared.folder / "probe.json").read_text())["text"]
    assert len(probe.pieces) == len(probe.tokens) - 1
    assert len(text) <= 200
    assert "".join(probe.pieces).replace(" ", "") == text.replace(" ", "")


def test_preparing_again_reads_nothing(
    corpus: Corpus, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haltscale.platform import ray_data

    monkeypatch.setattr(ray_data, "_write_corpus", lambda *_: pytest.fail("the corpus was prepared a second time"))
    assert ray_data.prepare(corpus, CONTEXT) == prepared


def test_a_failure_leaves_no_folder(corpus: Corpus, connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from haltscale.platform import ray_data

    monkeypatch.setattr(ray_data, "_probe", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ray_data.prepare(corpus, 16)
    folder = corpus.cache(16)
    assert not list(folder.parent.glob(f"{folder.name}*"))


def test_a_corpus_smaller_than_one_row_is_refused(corpus: Corpus, connected: None) -> None:
    from haltscale.platform import ray_data

    with pytest.raises(ValueError, match="do not fill one row"):
        ray_data.prepare(corpus, 1_000_000)


@pytest.mark.parametrize(("first_step", "world"), [(0, 1), (0, 2), (37, 2)])
def test_the_stream_is_the_order(prepared: PreparedCorpus, first_step: int, world: int) -> None:
    from haltscale.platform import ray_data

    order = {"seed": 5, "rows": prepared.rows, "batch": 4, "first_step": first_step}
    streams = [
        list(ray_data.stream(prepared.folder, **order, steps=45, rank=rank, world=world)) for rank in range(world)
    ]
    expected = global_batches(**order, steps=45 - first_step)
    reader = RowReader(Path(prepared.folder))
    for batches in streams:
        assert [batch.step for batch in batches] == list(range(first_step, 45))
    for index, ids in enumerate(expected):
        together = [batches[index] for batches in streams]
        assert all(batch.seq_ids.tolist() == ids.tolist() for batch in together)
        np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in together]), reader.read(ids))
