"""Held-out evaluation against reading one window at a time, and its numbers by hand."""

import inspect
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from haltscale.model import METHODS, AdaptiveOptions, Flops, Method, ModelConfig, PassCounts, Shape, build_model
from haltscale.platform.corpus import HeldOutDocument
from haltscale.platform.evaluation import (
    TokenEvents,
    halting_by_difficulty,
    probe_table,
    read_documents,
    summarise,
)
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.store import RunStore

VOCABULARY, CONTEXT = 40, 8


def model_of(method: Method = Method.ADAPTIVE):
    options = AdaptiveOptions(l_max=2, tau=0.25, router_bias=0.5) if method is Method.ADAPTIVE else None
    shape = Shape(layers=2, d=16, heads=2, kv_heads=2, ffn=24)
    config = ModelConfig(
        method=method,
        shape=shape,
        vocab_size=VOCABULARY,
        context=CONTEXT,
        options=options or METHODS[method].options(),
    )
    model = build_model(config, seed=0)
    with torch.no_grad():  # a router of random weights, so that halting is ragged
        for name, parameter in model.named_parameters():
            if "router" in name and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def document(tokens: int, seed: int) -> HeldOutDocument:
    stream = np.random.default_rng(seed)
    return HeldOutDocument(name=f"{seed}.txt", bytes=3 * tokens, tokens=stream.integers(0, VOCABULARY, tokens + 1))


DOCUMENTS = [document(tokens, seed) for seed, tokens in enumerate([19, 3, 8, 0, 16, 1, 9])]


def one_window_at_a_time(model, documents):
    """No batches, no padding: each window alone, and the counts added up."""
    nll, steps, reach, exits, counts = [], [], [], [], PassCounts()
    model.eval()
    for held_out in documents:
        left = torch.as_tensor(held_out.tokens)
        while len(left) > 1:
            window, left = left[: CONTEXT + 1], left[CONTEXT:]
            with torch.no_grad():
                output = model(window[None, :-1], window[None, 1:], return_logits=True)
            log_p = output.logits_BTV[0].log_softmax(-1)
            nll += [-float(log_p[t, target]) for t, target in enumerate(window[1:])]
            steps += output.trace.steps_BT[0].tolist()
            reach += output.trace.reach_BTK[0].tolist()
            exits += output.trace.exit_BTK[0].tolist()
            counts = counts + output.trace.counts
    return nll, steps, reach, exits, counts


@pytest.mark.parametrize("method", [Method.VANILLA, Method.ADAPTIVE])
@pytest.mark.parametrize("batch_rows", [1, 3, 16])
def test_reading_in_batches_against_one_window_at_a_time(method, batch_rows):
    model = model_of(method)
    events = read_documents(model, DOCUMENTS, context=CONTEXT, batch_rows=batch_rows)
    nll, steps, reach, exits, counts = one_window_at_a_time(model, DOCUMENTS)
    assert len(events.nll) == sum(len(held_out.tokens) - 1 for held_out in DOCUMENTS) == len(nll)
    np.testing.assert_allclose(events.nll, nll, rtol=1e-4, atol=1e-5)
    assert events.steps.tolist() == steps
    np.testing.assert_allclose(events.reach, reach, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(events.exit, exits, rtol=1e-4, atol=1e-6)
    flops = model.flops(counts)
    assert events.flops.realised == pytest.approx(flops.realised)
    assert events.flops.paper == pytest.approx(flops.paper)
    assert events.flops.executed >= flops.executed * (1 - 1e-9)  # padding is executed, and costs
    if method is Method.ADAPTIVE:
        assert len(set(steps)) > 1, "halting is not ragged: the test has lost its subject"


def test_reading_leaves_no_gradient_and_scores_in_evaluation_mode():
    model = model_of().train()
    read_documents(model, DOCUMENTS[:1], context=CONTEXT)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def events_of(nll, steps, exits) -> TokenEvents:
    exits = np.array(exits, dtype=np.float32)
    return TokenEvents(
        nll=np.array(nll, dtype=np.float32),
        steps=np.array(steps, dtype=np.uint8),
        reach=np.ones_like(exits),
        exit=exits,
        flops=Flops(),
    )


def test_the_summary_by_hand():
    events = events_of([1, 2, 3, 6], [0, 1, 1, 2], [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]])
    assert events.expected_steps.tolist() == [0.0, 0.5, 1.0, 1.5]
    row = summarise(events, text_bytes=10)
    assert row == {
        "loss": pytest.approx(3.0),
        "loss_standard_error": pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2),
        "perplexity": pytest.approx(math.exp(3)),
        "bits_per_byte": pytest.approx(12 / math.log(2) / 10),
        "mean_steps": pytest.approx(1.0),
        "expected_steps": pytest.approx(0.75),
        "steps_histogram": [0.25, 0.5, 0.25],
        "tokens_evaluated": 4,
    }


def test_states_that_nothing_reached_are_in_the_histogram():
    assert summarise(events_of([1, 2], [0, 0], [[1, 0, 0]] * 2), text_bytes=1)["steps_histogram"] == [1, 0, 0]


def test_a_hopeless_loss_has_a_finite_perplexity():
    assert math.isfinite(summarise(events_of([5000, 5001], [0, 0], [[1.0]] * 2), text_bytes=1)["perplexity"])


def test_uniform_guessing_has_the_bits_of_its_alphabet():
    """One byte a token, 256 equally likely: 8 bits per byte."""
    events = events_of([math.log(256)] * 50, [0] * 50, [[1.0]] * 50)
    assert summarise(events, text_bytes=50)["bits_per_byte"] == pytest.approx(8)


def test_halting_of_the_easiest_and_hardest_quarter_by_hand():
    events = events_of(
        [8, 1, 5, 4, 2, 6, 7, 3], [3, 0, 1, 1, 1, 1, 2, 1], [[1 - n / 10, n / 10] for n in (8, 1, 5, 4, 2, 6, 7, 3)]
    )
    row = halting_by_difficulty(events)
    assert row["well_predicted_mean_steps"] == pytest.approx(0.5)  # nll 1 and 2
    assert row["badly_predicted_mean_steps"] == pytest.approx(2.5)  # nll 7 and 8
    assert row["well_predicted_expected_steps"] == pytest.approx(0.15)
    assert row["badly_predicted_expected_steps"] == pytest.approx(0.75)
    assert (row["well_predicted_nll_below"], row["badly_predicted_nll_above"]) == (2.75, 6.25)


def test_the_probe_table_is_what_the_store_promises(tmp_path):
    """Its columns are those that ``RunStore.probe`` documents, and a reader gets them back."""
    promised = re.findall(r"``(\w+)``", inspect.getdoc(RunStore.probe) or "")
    probe = replace(DOCUMENTS[0], pieces=[f"piece {n}" for n in range(19)])
    events = read_documents(model_of(), [probe], context=CONTEXT)
    table = probe_table(events, probe)
    assert sorted(table.columns) == sorted(promised)
    assert table["token_id"].tolist() == probe.tokens[1:].tolist()
    store = RunStore(tmp_path)
    RunRecorder(store, "study", "key", steps=1).probe(1, table)
    read = store.probe("study", "key", 1)
    assert list(read.columns) == list(table.columns)
    assert read["position"].tolist() == list(range(19))
    assert read["text"].tolist() == probe.pieces
    assert read["steps"].tolist() == events.steps.tolist()
    np.testing.assert_array_equal(np.stack(read["reach"].to_numpy()), events.reach)
    np.testing.assert_array_equal(np.stack(read["exit"].to_numpy()), events.exit)
    np.testing.assert_allclose(read["nll"], events.nll)
    np.testing.assert_allclose(read["expected_steps"], events.exit @ np.arange(3), rtol=1e-5, atol=1e-6)
