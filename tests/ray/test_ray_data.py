"""Preparing and streaming a corpus with Ray Data, against the obvious ways to do it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from web import Gate, served

from haltscale.platform.corpora import prepare
from haltscale.platform.corpora.corpus import Corpus, PreparedCorpus, RowReader
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained

pytestmark = pytest.mark.ray

CONTEXT = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("texts")
    for index in range(40):
        words = [f"word{(index * 7 + n * n) % 97} naïve" for n in range(30 + 11 * (index % 5))]
        (folder / f"{index:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return Corpus(
        name="toy",
        sources={"texts": Source(path=str(folder))},
        tokenizer=BytePairs(vocab_size=320),
        validation_documents=3,
        probe_characters=200,
    )


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, connected: None) -> PreparedCorpus:
    from haltscale.platform.corpora import ray_data

    return ray_data.prepare(corpus, CONTEXT)


def test_ray_data_prepares_what_one_process_prepares(
    corpus: Corpus, prepared: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    alone = prepare.prepare(corpus, CONTEXT)
    files = sorted(path.name for path in alone.folder.iterdir())
    assert sorted(path.name for path in prepared.folder.iterdir()) == files
    assert alone.counts == prepared.counts
    for name in ("tokenizer.json", "probe.json", "parts.json", "token_counts.npy"):
        assert (alone.folder / name).read_bytes() == (prepared.folder / name).read_bytes()
    everything = np.arange(alone.rows)
    np.testing.assert_array_equal(RowReader(alone.folder).read(everything), RowReader(prepared.folder).read(everything))


def test_preparing_again_reads_nothing(
    corpus: Corpus, prepared: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haltscale.platform.corpora import ray_data

    monkeypatch.setattr(ray_data, "spread", lambda *_: pytest.fail("the corpus was prepared a second time"))
    assert ray_data.prepare(corpus, CONTEXT) == prepared


def test_a_killed_worker_s_shard_is_done_again(connected: None, tmp_path: Path) -> None:
    from haltscale.platform.corpora import ray_data

    def killed_once(job: SimpleNamespace) -> dict[str, Any]:
        marker = Path(job.marker)
        if job.index == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"index": job.index}

    jobs = [SimpleNamespace(index=index, marker=str(tmp_path / "killed")) for index in range(4)]
    assert list(ray_data.spread(killed_once, jobs)) == [{"index": index} for index in range(4)]
    assert (tmp_path / "killed").exists()


def test_errors_of_all_shards_come_from_the_workers(
    connected: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haltscale.platform.corpora import ray_data, sources

    monkeypatch.setattr(sources, "SHARD_BYTES", 1)
    for index in range(6):
        (tmp_path / f"{index}.txt").write_bytes(b"ok \xff" if index % 3 == 0 else b"some text")
    broken = Corpus(name="broken", sources={"texts": Source(path=str(tmp_path))}, validation_documents=1)
    with pytest.raises(prepare.CorpusError) as refusal:
        ray_data.prepare(broken, 16)
    assert len(refusal.value.problems) == 2
    assert not list(broken.cache(16).parent.glob("broken*"))


@pytest.mark.parametrize(("first_step", "world"), [(0, 1), (0, 2), (37, 2)])
def test_the_stream_is_the_order(
    prepared: PreparedCorpus, first_step: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haltscale.platform.corpora import ray_data

    monkeypatch.setattr(ray_data, "WINDOW_TOKENS", 300)  # several windows: Ray reads all but the first
    monkeypatch.setattr(ray_data, "PIECE_STEPS", 2)
    order = {"seed": 5, "mixture": prepared.mixture, "batch": 4, "first_step": first_step}
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


@pytest.fixture
def gate() -> Gate:
    return Gate("39.txt")


@pytest.fixture
def remote(corpus: Corpus, gate: Gate) -> Iterator[str]:
    """The texts on a web server, whose last file is behind the gate."""
    with served(corpus.sources["texts"].path, gate) as url:
        yield url


def test_a_streamed_corpus_is_drawn_from_before_its_last_file_is_read(
    connected: None, remote: str, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, while two tasks hold every CPU of the cluster but what runs leave to the stream."""
    import ray

    from haltscale.platform.corpora import ray_data, sources

    class Holder:  # in here, so that it travels by value: workers do not have this module
        def there(self) -> None:
            """Return when it is."""

    monkeypatch.setattr(sources, "SHARD_BYTES", 1)
    source = Source(path=f"{remote}*.txt")
    flow = Corpus(
        name="flow",
        sources={"texts": source},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=3,
        segment_tokens=6000,
    )
    holders = [ray.remote(num_cpus=(2 - ray_data.RESERVED_CPUS) / 2)(Holder).remote() for _ in range(2)]
    ray.get([holder.there.remote() for holder in holders])
    batch, steps = 4, 60
    with ray_data.begin(flow, CONTEXT, batch=batch) as early:
        assert not early.is_complete
        order = {"seed": 5, "mixture": early.mixture, "batch": batch, "first_step": 0}
        streams = [ray_data.stream(early.folder, **order, steps=steps, rank=rank, world=2) for rank in range(2)]
        seen = [[next(stream)] for stream in streams]
        assert not PreparedCorpus.open(early.folder).is_complete
        gate.open()
        for batches, stream in zip(seen, streams, strict=True):
            batches.extend(stream)
    for holder in holders:
        ray.kill(holder)
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path))
    whole = prepare.prepare(flow, CONTEXT)
    assert steps * batch > early.drawable
    expected = global_batches(seed=5, mixture=whole.mixture, batch=batch, first_step=0, steps=steps)
    for step, ids in enumerate(expected):
        assert all(batches[step].step == step for batches in seen)
        assert all(batches[step].seq_ids.tolist() == ids.tolist() for batches in seen)
        together = np.concatenate([batches[step].tokens for batches in seen])
        np.testing.assert_array_equal(together, RowReader(whole.folder).read(ids))
