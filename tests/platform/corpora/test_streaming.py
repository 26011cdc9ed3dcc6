"""What Ray Data's tasks read for a rank, against the rows themselves; no cluster is started."""

import numpy as np
import pytest

from haltscale.platform.corpora import ray_data
from haltscale.platform.corpora.corpus import Corpus, PreparedCorpus, RowReader
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained

BATCH = 4


@pytest.fixture(params=[None, 2.5], ids=["one pool", "mixture"])
def prepared(tmp_path, request) -> PreparedCorpus:
    sources = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.txt").write_text(f"document {number} of {name} " * (number + 2))
        sources[name] = Source(path=str(tmp_path / name), weight=request.param and request.param * (1 + (name == "b")))
    return prepare(Corpus(name="mixed", sources=sources, tokenizer=Pretrained(name="bytes"), validation_documents=1), 8)


def read(prepared: PreparedCorpus, *, first: int, steps: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence ids ``(steps, batch)`` and tokens ``(steps, batch, context + 1)`` of all ranks together."""
    shared = {"place": str(prepared.folder), "seed": 5, "mixture": prepared.mixture, "batch": BATCH, "world": world}
    window = {"first": np.array([first]), "steps": np.array([steps])}
    tables = [ray_data._read_window(window, rank=rank, **shared) for rank in range(world)]
    for table in tables:
        assert table["step"].to_pylist() == list(range(first, first + steps))
        assert table["seq_ids"] == tables[0]["seq_ids"]
    shares = [np.array(table["tokens"].to_pylist()).reshape(steps, BATCH // world, -1) for table in tables]
    return np.array(tables[0]["seq_ids"].to_pylist()), np.concatenate(shares, axis=1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_read_the_rows_of_the_order(prepared, world):
    ids, tokens = read(prepared, first=2, steps=30, world=world)
    expected = global_batches(seed=5, mixture=prepared.mixture, batch=BATCH, first_step=2, steps=30)
    assert ids.tolist() == expected.tolist()
    for step in range(30):
        assert tokens[step].tolist() == RowReader(prepared.folder).read(expected[step]).tolist()


def test_one_two_one_workers_read_what_one_reads(prepared):
    """Resumed at steps 7 and 19 with other worker counts: the same sequences, the same tokens, in the same order."""
    whole_ids, whole_tokens = read(prepared, first=0, steps=40, world=1)
    legs = [(0, 7, 1), (7, 12, 2), (19, 21, 1)]
    ids, tokens = zip(
        *(read(prepared, first=first, steps=steps, world=world) for first, steps, world in legs), strict=True
    )
    assert np.concatenate(ids).tolist() == whole_ids.tolist()
    assert np.concatenate(tokens).tolist() == whole_tokens.tolist()


def test_a_mixture_draws_from_both_sources(prepared):
    counts = prepared.counts["sources"]
    ids, _ = read(prepared, first=0, steps=256, world=1)
    share = (ids < counts["a"]["rows"]).mean()
    expected = 1 / 3 if prepared.mixture.weights else counts["a"]["rows"] / prepared.rows
    assert share == pytest.approx(expected, abs=0.05)
