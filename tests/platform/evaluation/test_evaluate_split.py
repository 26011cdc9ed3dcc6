"""A run's telemetry from a prepared corpus to the store, and the finished model back from it."""

import gc
import json
import tracemalloc

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from haltscale.model import AdaptiveOptions, Method, build_model
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.corpora.corpus import Corpus, HeldOutDocument
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained
from haltscale.platform.evaluation import telemetry
from haltscale.platform.evaluation.evaluation_jobs import held_out, open_corpus
from haltscale.platform.evaluation.held_out import Tally, read_documents, read_events
from haltscale.platform.evaluation.telemetry import EVENT_COLUMNS, EventsFile, EventsWriter, Quantiles
from haltscale.platform.evaluation.token_kinds import TokenClass, TokenKinds
from haltscale.platform.inference.model_ref import find_model, model_folder, own_corpus
from haltscale.platform.inference.models import load_model
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.runs.finalize import evaluate_run, finish
from haltscale.platform.training.progress import Progress

import looping
from looping import answer_together

RUN = RunConfig(
    size="0.6m",
    method=Method.ADAPTIVE,
    options=AdaptiveOptions(l_max=2, tau=0.5, router_bias=1.0),
    tokens=64,
    context=16,
    batch_tokens=64,
    precision=Precision.FP32,
)


@pytest.fixture
def prepared(corpus):
    return prepare(corpus(), RUN.context)


@pytest.fixture
def model(prepared):
    return build_model(RUN.model_config(prepared.counts["vocab_size"]), seed=0).eval()


def test_what_a_milestone_leaves_in_the_store(prepared, model, store):
    recorder = RunRecorder(store, "study", "key", steps=1)
    result = evaluate_run(model, prepared, RUN, Progress(step=7, tokens=448), recorder)
    events = read_documents(model, prepared.validation(), context=16)
    assert result.row["loss"] == pytest.approx(events.nll.mean(dtype=np.float64))
    assert store.evaluations("study", "key").loc[0, "loss"] == result.row["loss"]
    assert store.halting_steps("study", "key") == store.probe_steps("study", "key") == [7]
    table = store.halting_events("study", "key", 7)
    assert list(table.columns) == list(EVENT_COLUMNS)
    assert table["token_id"].tolist() == events.token_id.tolist()
    assert store.halting_events("study", "key", 7, ["nll"]).columns.tolist() == ["nll"]
    cube = store.halting_cube("study", "key", 7)
    assert cube["tokens"].sum() == len(events.nll) == prepared.counts["validation_tokens"]
    assert cube["nll_sum"].sum() == pytest.approx(events.nll.sum(dtype=np.float64))
    assert store.halting_summary("study", "key", 7)["tokens"] == len(events.nll)
    path = store.halting_path("study", "key", "events", 7)
    asked = duckdb.sql(f"select token_class, avg(steps), avg(exit[1]) from '{path}' group by 1").df()
    assert set(asked["token_class"]) <= set(map(str, TokenClass))


def test_other_ranks_read_and_do_not_write(prepared, model, store):
    recorder = RunRecorder(store, "study", "key", steps=1, enabled=False)
    assert evaluate_run(model, prepared, RUN, Progress(), recorder).row["loss"] > 0
    assert not store.fs.exists(store.path("study", "key"))


@pytest.fixture
def read_by_two(prepared, store, tmp_path):
    """What two ranks find together, with whole and with sharded weights."""
    tasks = {
        str(stage): {
            "do": "evaluated",
            "corpus": str(prepared.folder),
            "store": store.root,
            "key": f"stage-{stage}",
            "zero_stage": stage,
        }
        for stage in (1, 3)
    }
    return answer_together(tmp_path, tasks)


def test_two_ranks_read_what_one_reads_to_the_last_bit(prepared, store, read_by_two):
    run = looping.EVALUATED
    model = looping.ragged_model(run, prepared.counts["vocab_size"])
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    alone = evaluate_run(model, prepared, run, Progress(step=7), RunRecorder(store, "study", "alone", steps=1))
    assert 0 < alone.row["mean_steps"] < 2
    assert len(passes) > 4
    for stage in ("1", "3"):
        for rank in read_by_two:
            assert rank[stage]["row"] == alone.row
            assert rank[stage]["summary"] == json.loads(json.dumps(alone.summary))
        assert sum(rank[stage]["passes"] for rank in read_by_two) == len(passes), "each batch is read once"
        assert abs(read_by_two[0][stage]["passes"] - 1 - read_by_two[1][stage]["passes"]) <= 1
        key = f"stage-{stage}"
        pd.testing.assert_frame_equal(store.halting_events("study", key, 7), store.halting_events("study", "alone", 7))
        pd.testing.assert_frame_equal(store.halting_cube("study", key, 7), store.halting_cube("study", "alone", 7))
        assert (
            store.evaluations("study", key)
            .drop(columns="time")
            .equals(store.evaluations("study", "alone").drop(columns="time"))
        )


def test_a_finished_run_is_evaluated_by_its_name(prepared, model, store):
    identity = RUN.identity(prepared.counts["name"], "with-weights")
    store.write_json(store.path("study", None, "study.json"), {"corpus": prepared.counts, "runs": ["key"]})
    store.write_json(store.path("study", "key", "spec.json"), {"label": "a run", "identity": identity})
    recorder = RunRecorder(store, "study", "key", steps=1)
    recorder.begin(0, 0.0)
    finish(model, model.state_dict(), prepared, RUN, Progress(step=1, tokens=64, seconds=1.0), recorder, {"key": "key"})
    record = store.run("study", "key").record
    with model_folder(find_model("study/key", store), store) as folder:
        assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
        loaded = load_model(folder)
        corpus = open_corpus(own_corpus(store, "study", "key"), loaded)
        again = read_documents(loaded.model, corpus.validation(), context=16)
    assert record["loss"] == pytest.approx(again.nll.mean(dtype=np.float64), rel=1e-6)
    difficulty = store.halting_summary("study", "key", 1)["difficulty"]
    assert record["halting"] == difficulty
    json.dumps(record, allow_nan=False)


def long_text(tokens: int):
    stream = np.random.default_rng(0)
    for index in range(tokens // 512):
        yield HeldOutDocument(name=str(index), bytes=1, tokens=stream.integers(0, 260, 513))


def written(model, tmp_path, tokens: int) -> tuple[EventsFile, int, int]:
    """Events of a text of so many tokens, the most memory that Python and numpy held while they were written, and what
    PyTorch's tensors held at the end of the text."""
    kinds = TokenKinds(frequency=np.zeros(260, dtype=np.uint8), look=np.zeros(260, dtype=np.int8))
    path = tmp_path / f"{tokens}.parquet"
    tracemalloc.start()
    tally, quantiles = Tally(), Quantiles()
    writer = EventsWriter(path, kinds, step=0, context=64, documents=[])
    for events in read_events(model, long_text(tokens), context=64, by_step=1 / 64):
        tally.add(events)
        quantiles.add(events.nll)
        writer.add(events)
    real = (torch.Tensor, torch.nn.Parameter)  # not what torch.compile knows of tensors, after another test
    held = sum(one.nbytes for one in gc.get_objects() if type(one) in real)
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tally.tokens == tokens
    return EventsFile(path=path), peak, held


def test_memory_stays_flat_and_tokens_are_small(finished, tmp_path, monkeypatch):
    model = load_model(finished()).model
    monkeypatch.setattr(telemetry, "ROW_GROUP", 2048)
    written(model, tmp_path, 2048)  # whatever is imported and cached at first use
    _, short, tensors = written(model, tmp_path, 8192)
    file, long, tensors_later = written(model, tmp_path, 32768)
    assert long < short * 1.2
    assert tensors_later <= tensors
    assert file.path.stat().st_size / 32768 <= 40


def test_a_mixtures_sources_are_told_apart(documents, finished, tmp_path):
    loaded = load_model(finished())
    other = tmp_path / "other"
    other.mkdir()
    for index in range(4):
        (other / f"{index}.txt").write_text("0123456789 " * (index + 3))
    sources = {"words": Source(path=str(documents)), "numbers": Source(path=str(other))}
    bytes_ = Pretrained(name="bytes")
    corpus = prepare(Corpus(name="mixed", sources=sources, tokenizer=bytes_, validation_documents=1), 16)
    found = held_out(loaded, corpus)
    assert sorted(found["sources"]) == ["numbers", "words"]
    for name, row in found["sources"].items():
        own = [document for document in corpus.validation() if document.source == name]
        nll = read_documents(loaded.model, own, context=64).nll
        assert row["loss"] == pytest.approx(nll.mean(dtype=np.float64), rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(nll.sum() / np.log(2) / sum(one.bytes for one in own), rel=1e-5)
    assert found["tokens_evaluated"] == sum(row["tokens_evaluated"] for row in found["sources"].values())
