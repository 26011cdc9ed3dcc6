"""A study of a streamed corpus, submitted as a user submits it, trains while the last file is still unread."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from web import Gate, served

from haltscale.platform import cluster
from haltscale.platform.corpora.corpus import Corpus, PreparedCorpus
from haltscale.platform.corpora.order import global_batches
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained
from haltscale.platform.store import RunStore
from haltscale.platform.training.progress import Progress

from jobs import submit

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STUDY = """
from haltscale.platform.api import Corpus, ExecutionConfig, Pretrained, RunConfig, Source, Study, grid
from haltscale.platform.corpora import sources

sources.SHARD_BYTES = 1
Study(
    name="river",
    question="Does it train before all is read?",
    corpus=Corpus(
        name="river",
        sources={{"texts": Source(path={url!r})}},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=2,
        segment_tokens=8000,
    ),
    base=RunConfig(tokens=24576, context=64, batch_tokens=512),
    sweep=grid(method=["vanilla", "adaptive"]),
    execution=ExecutionConfig(evaluations=2, checkpoints=2, log_every_seconds=0.0),
).main()
"""


def test_both_runs_train_before_the_last_file_is_read(
    head: cluster.Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs take all that the cluster has; the last file comes only when both have taken steps."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02d}.txt").write_text(" ".join(f"w{(index + n * n) % 89}" for n in range(500)))
    script, gate, store = tmp_path / "flow.py", Gate("19.txt"), RunStore()
    with served(folder, gate) as url:
        script.write_text(STUDY.format(url=f"{url}*.txt"))
        job = submit(head, "python", str(script))
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.extend(job.stdout or []))
        reader.start()

        def steps() -> list[int]:
            return [view.status.get("step", 0) for view in store.runs("river")]

        while len(taken := steps()) < 2 or not all(taken):
            assert job.poll() is None, "".join(output)
            time.sleep(0.1)
        (early,) = [PreparedCorpus.open(path) for path in store_corpora("river")]
        assert early is not None
        assert not early.is_complete
        gate.open()
        reader.join()
        assert job.wait() == 0, "".join(output)
        corpus = Corpus(
            name="river",
            sources={"texts": Source(path=f"{url}*.txt")},
            tokenizer=Pretrained(name="bytes"),
            validation_documents=2,
            segment_tokens=8000,
        )
        monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "beforehand"))
        whole = prepare(corpus, 64)
    assert early.counts["fingerprint"] == whole.counts["fingerprint"]
    expected = Progress()
    for ids in global_batches(seed=0, mixture=whole.mixture, batch=8, first_step=0, steps=48):
        expected.saw(np.asarray(ids))
    records = [view.record for view in store.runs("river")]
    assert [record["sequence_digest"] for record in records] == [expected.sequence_digest] * 2
    assert store.study("river")["corpus"]["fingerprint"] == whole.counts["fingerprint"]


def store_corpora(name: str) -> list[Path]:
    """The folders of prepared corpora of a name."""
    from haltscale.platform.store import haltscale_home

    return [path for path in (haltscale_home() / "corpora").glob(f"{name}-*") if (path / "corpus.json").exists()]
