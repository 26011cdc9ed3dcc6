"""Controls and dial on one set of weights, against reading with the halting really set so."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model import Method, probing
from haltscale.model.posthoc import Score, Threshold
from haltscale.platform.corpora.corpus import HeldOutDocument, PreparedCorpus
from haltscale.platform.evaluation.controls import best_steps, control, dial, first_tokens
from haltscale.platform.evaluation.evaluation_jobs import training_text
from haltscale.platform.evaluation.held_out import batches, read_batch, read_documents
from haltscale.platform.inference.models import load_model

CONTEXT = 64
POSTHOC = ["posthoc-change", "posthoc-divergence", "posthoc-confidence"]


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
    assert list(arms) == ["learned", "shuffled", "fixed", *POSTHOC, "oracle", "none", "full"]
    for name in ("learned", "shuffled", "fixed", "oracle"):
        assert arms[name]["mean_steps"] == pytest.approx(events.steps.mean())
    for name in POSTHOC:
        assert arms[name]["mean_steps"] == pytest.approx(events.steps.mean(), rel=0.01)
    assert arms["none"]["mean_steps"] == 0
    depths = {row["value"]: row for row in dial(model, texts, context=CONTEXT, taus=[]) if row["dial"] == "l_max"}
    assert arms["none"]["loss"] == pytest.approx(depths[0]["loss"], rel=1e-6)
    assert arms["full"]["mean_steps"] == 2
    assert {row["tokens_evaluated"] for row in arms.values()} == {625}
    lengths = np.array([len(text.tokens) - 1 for text in texts])
    assert found["tokens_by_document"] == lengths.tolist()
    for row in arms.values():
        assert sum(row["nats_by_document"]) == pytest.approx(row["loss"] * 625, rel=1e-5)
    for name in set(arms) - {"learned"}:
        gap = arms[name]["minus_learned"]
        assert gap["mean"] == pytest.approx(arms[name]["loss"] - arms["learned"]["loss"], abs=1e-6)
        assert gap["low"] < gap["mean"] < gap["high"]
        assert gap["documents"] == 6
    assert len({row["loss"] for row in arms.values()}) == 9
    assert arms["oracle"]["loss"] < min(arms[name]["loss"] for name in ("learned", "shuffled", "fixed", *POSTHOC))
    extra = {name: arms[name]["flops_realised"] - arms["posthoc-change"]["flops_realised"] for name in POSTHOC[1:]}
    assert all(value > 0 for value in extra.values()), "reading every state costs head rows"


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


def test_thresholds_are_tuned_on_other_text_and_moved_to_equal_steps(model, texts):
    stream = np.random.default_rng(9)
    other = [HeldOutDocument(name="", bytes=0, tokens=stream.integers(0, 260, 65)) for _ in range(20)]
    for document in texts:
        document.tokens[:] = document.tokens % 30  # text of another kind: the router takes other steps there
    found = control(model, texts, context=CONTEXT, tuning=other)
    arms = {row["name"]: row for row in found["arms"]}
    for name in POSTHOC:
        assert arms[name]["mean_steps"] == pytest.approx(arms["learned"]["mean_steps"], rel=0.01)
    apart = [abs(arms[name]["tuned_mean_steps"] / arms[name]["mean_steps"] - 1) for name in POSTHOC]
    assert max(apart) > 0.02, "the texts are alike: the test has lost its subject"


@pytest.mark.parametrize("score", list(Score))
def test_a_threshold_halts_where_its_score_falls_below(model, texts, score):
    """Against the definition, from the states that the reading itself produced."""
    (batch,) = batches(texts[:2], CONTEXT, 8)
    rule = Threshold(model, score, -np.inf, seen=[])
    read_batch(model, batch, goes_on=rule)
    rule.value = float(torch.cat([scores for _, scores in rule.seen]).median())
    kept = []

    def hidden(tokens, valid):
        out = model.latent_loop(model.embed(tokens).flatten(0, 1), valid, goes_on=rule)
        kept.append(out)
        return out

    lengths = torch.as_tensor(batch.lengths)
    with probing.rules_changed(model, keep_states=True), torch.no_grad():
        model(torch.as_tensor(batch.tokens), lengths_B=lengths, hidden_states=hidden)
        (out,) = kept
        steps = out.trace.steps_BT.flatten().long()
        before = model.embed(torch.as_tensor(batch.tokens)).flatten(0, 1)
        for k, state in enumerate(out.states[:2]):
            for row, z in zip(state.row_N.tolist(), state.z_Nd, strict=True):
                if not out.trace.valid_BT.flatten()[row]:
                    continue
                p, q = (torch.log_softmax(model.lm_head(x).double(), 0) for x in (z, before[row]))
                value = {
                    "change": float((z - before[row]).norm() / z.norm()),
                    "divergence": float((p.exp() * (p - q)).sum()),
                    "confidence": 1 - float(p.max().exp()),
                }[score]
                if abs(value - rule.value) > 1e-5 * abs(rule.value):
                    assert (int(steps[row]) > k) == (value > rule.value)
            before = before.index_copy(0, state.row_N, state.z_Nd)
    assert len(steps.unique()) > 1, "halting is not ragged: the test has lost its subject"
    state = read_batch(model, batch, goes_on=rule)[0]
    assert torch.equal(state.trace.steps_BT, out.trace.steps_BT)


@given(
    nll=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=5),
    share=st.floats(0, 1),
)
def test_the_best_steps_of_a_given_sum(nll, share):
    """Never worse than any deal that a price can reach, and never a step too many."""
    values = np.array(nll, dtype=np.float64)
    total = round(share * 2 * len(values))
    steps = best_steps(values, total)
    assert steps.sum() == total
    assert ((steps >= 0) & (steps <= 2)).all()
    mine = values[np.arange(len(values)), steps].sum()
    deals = [deal for deal in itertools.product(range(3), repeat=len(values)) if sum(deal) == total]
    best = min(sum(values[n, k] for n, k in enumerate(deal)) for deal in deals)
    hull = np.minimum(values[:, 1], (values[:, 0] + values[:, 2]) / 2)  # where one token takes a step in the middle
    assert mine <= best + (values[:, 1] - hull).max() + np.ptp(values) + 1e-9


def test_best_steps_are_the_best_where_every_step_gains_less_than_the_one_before():
    stream = np.random.default_rng(0)
    gains = np.sort(stream.random((6, 2)), axis=1)[:, ::-1]
    nll = 5 - np.concatenate([np.zeros((6, 1)), gains.cumsum(1)], axis=1)
    for total in range(13):
        mine = nll[np.arange(6), best_steps(nll, total)].sum()
        deals = (deal for deal in itertools.product(range(3), repeat=6) if sum(deal) == total)
        assert mine == pytest.approx(min(sum(nll[n, k] for n, k in enumerate(deal)) for deal in deals))


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


def test_thresholds_are_tuned_on_training_rows(tmp_path):
    """Spread over the corpus, no more than were asked for; none where only held-out text is kept."""
    rows = np.arange(40 * 65).reshape(40, 65)
    assert training_text(PreparedCorpus(folder=tmp_path, counts={"context": 64, "rows": 40}), 640) == []
    for part in (0, 1):
        values = pa.array(rows[20 * part : 20 * part + 20].astype(np.uint32).tolist(), pa.list_(pa.uint32()))
        pq.write_table(pa.table({"tokens": values}), tmp_path / f"part-{part}.parquet", row_group_size=8)
    parts = [{"file": f"part-{part}.parquet", "rows": 20} for part in (0, 1)]
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    corpus = PreparedCorpus(folder=tmp_path, counts={"context": 64, "rows": 40})
    found = training_text(corpus, 640)
    assert [document.tokens.tolist() for document in found] == [
        rows[n].tolist() for n in np.linspace(0, 39, 10).astype(int)
    ]
    assert len(training_text(corpus, 10**9)) == 40
    assert len(training_text(corpus, 1)) == 1
