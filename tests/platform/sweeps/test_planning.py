"""What a run will cost: against the methods themselves, and against the ledger by hand."""

from dataclasses import fields, replace

import pytest
import torch

from haltscale.model import METHODS, SIZES, Method, build_model
from haltscale.platform.config import ConfigError, RunConfig
from haltscale.platform.sweeps import planning

V = 300


def run(method: str, **options) -> RunConfig:
    made = METHODS[method].options(**options)
    return RunConfig(method=Method(method), options=made, size="1.8m", context=24, batch_tokens=48)


def spent(run: RunConfig, *, train: bool = False) -> float:
    """Realised training FLOPs per token of a real forward pass."""
    torch.manual_seed(0)
    model = build_model(run.model_config(V), seed=0).train(train)
    tokens = torch.zeros(4, run.context, dtype=torch.long)
    with torch.no_grad():
        counts = model(tokens, tokens).trace.counts
    return model.flops(counts).training.realised / counts.tokens


def test_vanilla_by_hand():
    shape = SIZES["1.8m"]
    linear = 2 * (4 * shape.d**2 + 3 * shape.d * shape.ffn)
    attention = 4 * shape.d * (24 + 1) / 2
    by_hand = 3 * (shape.layers * (linear + attention) + 2 * shape.d * V)
    assert planning.cost(run("vanilla"), V).expected == pytest.approx(by_hand)


@pytest.mark.parametrize("method", ["vanilla", "fixed", "looped", "pause", "ponder"])
def test_methods_of_given_depth_cost_what_they_cost(method):
    assert planning.cost(run(method), V).expected == pytest.approx(spent(run(method)))


def test_a_method_that_draws_its_depth_costs_the_mean():
    drawn = [spent(run("ponder2", jacobi_low=n, jacobi_high=n)) for n in (1, 2, 3)]
    cost = planning.cost(run("ponder2", jacobi_low=1, jacobi_high=3), V)
    assert cost.expected == pytest.approx(sum(drawn) / 3)
    assert cost.bound == pytest.approx(drawn[-1])


@pytest.mark.parametrize("method", METHODS)
def test_the_bound_holds(method):
    options = {"router_bias": 50.0} if "router_bias" in {f.name for f in fields(METHODS[method].options)} else {}
    asked = run(method, **options)
    assert planning.cost(asked, V).bound >= 0.999999 * max(spent(asked), spent(asked, train=True))


@pytest.mark.parametrize("method", ["adaptive", "shuffled", "ponder3", "adaponder", "mor"])
def test_what_a_router_will_save_is_not_guessed(method):
    assert planning.cost(run(method), V).expected is None


@pytest.mark.parametrize("method", ["vanilla", "fixed", "pause", "ponder2"])
def test_long_contexts_are_carried_on_exactly(method, monkeypatch):
    long = replace(run(method), context=96)
    whole = planning.cost(long, V).bound
    monkeypatch.setattr(planning, "PROBE_CONTEXT", 48)
    planning._counts.cache_clear()
    planning._training_flops.cache_clear()
    assert planning.cost(long, V).bound == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("method", ["looped", "fixed"])
@pytest.mark.parametrize("context", [24, 96])
def test_passes_without_a_gradient_cost_a_third(method, context, monkeypatch):
    """By hand from the costs at other depths: of four passes, the first two go forward only."""
    monkeypatch.setattr(planning, "PROBE_CONTEXT", 48)
    whole, half = (planning.cost(replace(run(method, steps=s), context=context), V).bound for s in (3, 1))
    some = replace(run(method, steps=3, injection="add", gradient_passes=2), context=context)
    priced = planning.cost(some, V)
    assert priced.expected == priced.bound
    assert half < priced.bound < whole
    if method == "looped":  # every pass has the same keys
        assert whole - priced.bound == pytest.approx((whole - half) * 2 / 3)
    if context == 24:
        assert priced.bound == pytest.approx(spent(some))


@pytest.mark.parametrize("method", ["looped", "fixed"])
@pytest.mark.parametrize("curve", ["linear", "sqrt", "late"])
def test_a_growing_depth_costs_the_mean_over_the_budget(method, curve):
    shares = [n / 200 for n in range(200)]
    grown = run(method, steps=3, depth_growth=0.8, depth_curve=curve)
    model = build_model(grown.model_config(V), seed=0)
    tokens, found = torch.zeros(1, grown.context, dtype=torch.long), []
    for share in shares:
        model.set_budget_share(share)
        counts = model(tokens, tokens).trace.counts
        found.append(model.flops(counts).training.realised / counts.tokens)
    priced = planning.cost(grown, V)
    assert priced.bound == planning.cost(run(method, steps=3), V).bound == max(found)
    assert priced.expected == pytest.approx(sum(found) / len(found), rel=1e-2)


def test_fractions_of_steps_lie_between(monkeypatch):
    two, more, three = (planning.cost(run("fixed", steps=s), V).bound for s in (2, 2.4, 3))
    assert two < more < three


def test_budgets_are_solved_for_whole_steps():
    vanilla = run("vanilla")
    per_token = planning.cost(vanilla, V).bound
    solved = planning.with_budget(vanilla, {"training_flops": per_token * 48 * 100.4}, V)
    assert solved.tokens == 4800
    parameters = SIZES["1.8m"].parameters(V)
    assert planning.with_budget(vanilla, {"tokens_per_parameter": 20}, V).tokens == round(parameters * 20 / 48) * 48
    assert planning.with_budget(vanilla, {}, V) is vanilla
    adaptive = run("adaptive")
    assert planning.with_budget(adaptive, {"training_flops": 1e12}, V) == replace(adaptive, flops=1e12)


@pytest.mark.parametrize("value", [0, -1, float("inf"), "many", True, None])
def test_a_budget_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="needs a number above 0"):
        planning.with_budget(run("vanilla"), {"tokens_per_parameter": value}, V)


def test_a_budget_below_one_batch_and_two_budgets_are_refused():
    with pytest.raises(ConfigError, match="less than one batch of 48"):
        planning.with_budget(run("vanilla"), {"training_flops": 1.0}, V)
    with pytest.raises(ConfigError, match="two budgets"):
        planning.with_budget(run("vanilla"), {"training_flops": 1e9, "tokens_per_parameter": 1}, V)


def test_asking_the_methods_leaves_random_numbers_alone():
    planning._counts.cache_clear()
    planning._weightless.cache_clear()
    planning._training_flops.cache_clear()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    planning.cost(run("ponder2"), V)
    assert torch.equal(torch.rand(3), expected)


def test_penalties_do_not_ask_again():
    planning.cost(run("adaptive"), V)
    before = planning._training_flops.cache_info().misses
    for lam in (0.2, 0.3, 0.4):
        asked = run("adaptive", lam=lam)
        planning.cost(asked, V)
    assert planning._training_flops.cache_info().misses == before
