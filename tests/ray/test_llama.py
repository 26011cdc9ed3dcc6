"""A study whose runs start from a Llama, through Ray to its records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from haltscale.platform.api import Corpus, ExecutionConfig, Precision, Pretrained, RunConfig, Source, Study, grid, llama
from haltscale.platform.corpora.corpus import PreparedCorpus
from haltscale.platform.evaluation.evaluation_jobs import Evaluation
from haltscale.platform.inference.model_ref import own_corpus
from haltscale.platform.store import RunStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONTEXT = 32
TOKENIZER = Pretrained(name="bytes")


def test_a_study_that_starts_from_a_llama(connected: None, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, **settings)
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path / "pretrained"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER.json)
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(5):
        (texts / f"{index}.txt").write_text(" ".join(f"word{index * n % 7}" for n in range(200)))
    study = Study(
        name="from-a-llama",
        question="Does it start where the Llama ended?",
        corpus=Corpus(
            name="toy", sources={"texts": Source(path=str(texts))}, tokenizer=TOKENIZER, validation_documents=2
        ),
        base=RunConfig(
            init_from=llama(folder),
            size="imported",
            context=CONTEXT,
            batch_tokens=4 * CONTEXT,
            tokens=12 * CONTEXT,
            learning_rate=1e-7,  # so small that it stays what it was
            precision=Precision.FP32,
        ),
        sweep=grid(method="vanilla") + grid(method="adaptive", l_max=0),
        execution=ExecutionConfig(evaluations=1, checkpoints=1),
    )
    store = RunStore(tmp_path / "runs")
    results = study.run(store)
    assert results["state"].tolist() == ["finished"] * 2
    key = study.key(study.runs[0])
    prepared = PreparedCorpus.open(own_corpus(store, study.name, key))
    assert prepared is not None
    nats = tokens = 0.0
    for document in prepared.stream_validation():
        for start in range(0, len(document.tokens) - 1, CONTEXT):
            window = torch.as_tensor(document.tokens[start : start + CONTEXT + 1].astype("int64"))[None]
            with torch.no_grad():
                log_p = model(window[:, :-1]).logits.log_softmax(-1)
            nats -= float(log_p.gather(2, window[:, 1:, None]).sum())
            tokens += window.shape[1] - 1
    for loss in results["loss"]:
        assert loss == pytest.approx(nats / tokens, abs=1e-3)
    name = f"{study.name}/{key}@latest"
    evaluation = Evaluation(model=name, store=store.root, corpora=(str(prepared.folder),))
    [(_, held_out)] = evaluation.results()
    assert held_out["loss"] == pytest.approx(results["loss"][0], rel=1e-5)
    assert study.missing(store) == {}
