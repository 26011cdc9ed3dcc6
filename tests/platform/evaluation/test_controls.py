"""Controls and dial on one set of weights, against reading with the halting really set so."""

import json

import numpy as np
import pytest
import torch

from haltscale.model import Method, probing
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.evaluation.controls import control, dial, first_tokens
from haltscale.platform.evaluation.held_out import read_documents
from haltscale.platform.inference.models import load_model

CONTEXT = 64


@pytest.fixture
def texts():
    stream = np.random.default_rng(0)
    return [
        HeldOutDocument(name=str(n), bytes=n, tokens=stream.integers(0, 260, n + 1)) for n in (150, 20, 64, 90, 1, 300)
    ]


@pytest.fixture
def model(finished):
    return load_model(finished()).model


def test_controls_spend_what_the_router_spends(model, texts):
    found = control(model, texts, context=CONTEXT, batch_rows=3)
    json.dumps(found, allow_nan=False)
    arms = {row["name"]: row for row in found["arms"]}
    events = read_documents(model, texts, context=CONTEXT)
    assert 0.2 < events.steps.mean() < 1.9, "halting is not ragged: the test has lost its subject"
    assert arms["learned"]["loss"] == pytest.approx(events.nll.mean(), rel=1e-5)
    for name in ("learned", "shuffled", "fixed"):
        assert arms[name]["mean_steps"] == pytest.approx(events.steps.mean())
        assert arms[name]["tokens_evaluated"] == 625
    assert arms["full"]["mean_steps"] == 2
    for name in ("shuffled", "fixed", "full"):
        gap = arms[name]["minus_learned"]
        assert gap["mean"] == pytest.approx(arms[name]["loss"] - arms["learned"]["loss"], abs=1e-6)
        assert gap["low"] < gap["mean"] < gap["high"]
    assert len({row["loss"] for row in arms.values()}) == 4


def test_the_oracle_at_full_depth(model, texts):
    found = control(model, texts, context=CONTEXT)["oracle"]
    with probing.rules_changed(model, tau=0.0):
        full = read_documents(model, texts, context=CONTEXT, by_step=1.0)
    assert found["tokens"] == 625
    assert found["oracle_loss"] == pytest.approx(full.nll_by_step.min(1).mean(), rel=1e-5)
    assert found["mean_depth"] == pytest.approx(full.nll_by_step.argmin(1).mean())
    learned = read_documents(model, texts, context=CONTEXT)
    assert found["router_loss"] == pytest.approx(learned.nll.mean(), rel=1e-5)
    assert found["router_gap"]["mean"] == pytest.approx(found["router_loss"] - found["oracle_loss"], rel=1e-5)
    assert -1 <= found["rank_correlation"] <= 1


def test_shuffling_is_seeded(model, texts):
    first, again, other = (control(model, texts, context=CONTEXT, seed=seed)["arms"][1]["loss"] for seed in (0, 0, 1))
    assert first == again != other


def test_the_dial(model, texts):
    points = dial(model, texts, context=CONTEXT, taus=(0.0, 0.5, 1.0))
    by = {(row["dial"], row["value"]): row for row in points}
    assert list(by) == [
        ("tau", 0.0),
        ("tau", 0.25),
        ("tau", 0.5),
        ("tau", 1.0),
        ("l_max", 0),
        ("l_max", 1),
        ("l_max", 2),
    ]
    assert [key for key, row in by.items() if row["own"]] == [("tau", 0.25), ("l_max", 2)]
    learned = read_documents(model, texts, context=CONTEXT)
    for own in (by["tau", 0.25], by["l_max", 2]):
        assert own["loss"] == pytest.approx(learned.nll.mean(), rel=1e-5)
        assert own["mean_steps"] == pytest.approx(learned.steps.mean())
        assert own["flops_realised"] == pytest.approx(learned.flops.realised / 625)
    assert by["tau", 1.0]["loss"] == pytest.approx(by["l_max", 0]["loss"])
    flops = [by["tau", tau]["flops_realised"] for tau in (1.0, 0.5, 0.25, 0.0)]
    assert flops == sorted(flops)
    assert flops[0] < flops[-1]
    assert all(row["seconds"] > 0 and row["flops_executed"] >= row["flops_realised"] for row in points)
    assert model.latent_loop.rules.tau == 0.25


@pytest.mark.parametrize("method", [Method.VANILLA, Method.FIXED, Method.SHUFFLED, Method.MOR])
def test_methods_without_a_router_have_neither(finished, texts, method):
    model = load_model(finished(method)).model
    assert control(model, texts, context=CONTEXT) is None
    assert dial(model, texts, context=CONTEXT) == []


def test_whole_documents_until_there_are_enough_tokens(texts):
    assert [len(first_tokens(texts, tokens)) for tokens in (1, 150, 151, 170, 171, 625, 10**6, None)] == [
        1, 1, 2, 2, 3, 6, 6, 6,
    ]  # fmt: skip


def test_a_model_that_always_goes_on_has_no_rank_correlation(model, texts):
    with torch.no_grad():
        model.latent_loop.routers[0].score.weight.zero_()
        model.latent_loop.routers[0].score.bias.fill_(50.0)
    assert control(model, texts, context=CONTEXT)["oracle"]["rank_correlation"] is None
