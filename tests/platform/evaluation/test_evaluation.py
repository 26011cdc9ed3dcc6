"""Held-out evaluation against reading one window at a time, and its numbers by hand."""

import inspect
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from haltscale.model import METHODS, AdaptiveOptions, Flops, Method, ModelConfig, PassCounts, Shape, build_model
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.evaluation.evaluate_split import probe_table
from haltscale.platform.evaluation.held_out import Tally, TokenEvents, read_documents, read_events
from haltscale.platform.evaluation.token_kinds import TokenClass, TokenKinds
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


def test_places_of_tokens():
    events = read_documents(model_of(), DOCUMENTS, context=CONTEXT, batch_rows=2)
    expected = [(d, t, token) for d, held in enumerate(DOCUMENTS) for t, token in enumerate(held.tokens[1:].tolist())]
    found = zip(events.document.tolist(), events.position.tolist(), events.token_id.tolist(), strict=True)
    assert list(found) == expected


def test_reading_after_every_step_does_not_depend_on_the_batches():
    model = model_of()
    one, many = (read_documents(model, DOCUMENTS, context=CONTEXT, batch_rows=n, by_step=0.4) for n in (1, 16))
    assert one.sampled.tolist() == many.sampled.tolist()
    assert 0.3 < len(one.sampled) / len(one.nll) < 0.5
    np.testing.assert_allclose(one.nll_by_step, many.nll_by_step, rtol=1e-4, atol=1e-5)
    own = one.nll_by_step[np.arange(len(one.sampled)), one.steps[one.sampled]]
    np.testing.assert_allclose(own, one.nll[one.sampled])


def test_documents_may_be_a_stream():
    """A generator is read as it comes: at most one batch of documents is taken ahead."""
    taken = []

    def stream():
        for held_out in DOCUMENTS:
            taken.append(held_out.name)
            yield held_out

    first = next(read_events(model_of(), stream(), context=CONTEXT, batch_rows=2))
    assert len(first.nll) == 16
    assert taken == [DOCUMENTS[0].name]


def events_of(nll, steps, exits) -> TokenEvents:
    exits = np.array(exits, dtype=np.float32)
    n = len(nll)
    nothing = np.zeros((0, exits.shape[1]), dtype=np.float32)
    return TokenEvents(
        document=np.zeros(n, dtype=np.int64),
        position=np.arange(n),
        token_id=np.zeros(n, dtype=np.int64),
        nll=np.array(nll, dtype=np.float32),
        entropy=np.zeros(n, dtype=np.float32),
        confidence=np.ones(n, dtype=np.float32),
        correct=np.ones(n, dtype=bool),
        steps=np.array(steps, dtype=np.uint8),
        exit=exits,
        sampled=np.zeros(0, dtype=np.int64),
        nll_by_step=nothing,
        entropy_by_step=nothing,
        flops=Flops(),
    )


def summarise(*parts: TokenEvents, text_bytes: int):
    tally = Tally()
    for part in parts:
        tally.add(part)
    return tally.row(text_bytes=text_bytes)


@pytest.mark.parametrize("cut", [4, 1, 3])
def test_the_summary_by_hand(cut):
    nll, steps = [1, 2, 3, 6], [0, 1, 1, 2]
    exits = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]]
    events = events_of(nll, steps, exits)
    assert events.expected_steps.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert events.reach.tolist() == [[1, 0, 0], [1, 0.5, 0], [1, 1, 0], [1, 1, 0.5]]
    parts = [events_of(nll[a:b], steps[a:b], exits[a:b]) for a, b in ((0, cut), (cut, 4)) if a < b]
    row = summarise(*parts, text_bytes=10)
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


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Tally().row(text_bytes=1)


def test_the_probe_table_is_what_the_store_promises(tmp_path):
    """Its columns are those that ``RunStore.probe`` documents, and a reader gets them back."""
    promised = re.findall(r"``(\w+)``", inspect.getdoc(RunStore.probe) or "")
    probe = replace(DOCUMENTS[0], pieces=[f"piece {n}" for n in range(19)])
    events = read_documents(model_of(), [probe], context=CONTEXT, by_step=1.0)
    kinds = TokenKinds(
        frequency=np.arange(VOCABULARY, dtype=np.uint8) % 10, look=np.arange(VOCABULARY, dtype=np.int8) % 6
    )
    table = probe_table(events, probe, kinds)
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
    assert read["frequency"].tolist() == [token % 10 for token in probe.tokens[1:]]
    assert read["token_class"].tolist() == [list(TokenClass)[token % 6] for token in probe.tokens[1:]]
    assert [len(cell) - 1 for cell in read["nll_by_step"]] == events.steps.tolist()
    np.testing.assert_allclose([cell[-1] for cell in read["nll_by_step"]], events.nll)
