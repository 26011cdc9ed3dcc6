"""Replayed steps: blind, exact in distribution, the same however they are read; and gates that are trained later."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltscale.model import (
    AdaptiveOptions,
    GateTarget,
    HaltingRule,
    Method,
    Mixture,
    RouterInput,
    RouterKind,
    StepsFrom,
    WarmupLoss,
    probing,
)
from haltscale.model.step_source import SETTLED, Replay, draws, level_distribution

SCHEDULE = ((0.0, 0.0, 0.1, 0.2, 0.7), (0.25, 0.2, 0.3, 0.3, 0.2), (1.0, 0.55, 0.15, 0.1, 0.2))
OPTIONS = AdaptiveOptions(tau=0.25, router_bias=0.5, lam=0.3, beta=0.7)
SHUFFLED: dict[str, Any] = {"steps_from": StepsFrom.SHUFFLED, "steps_schedule": SCHEDULE, "steps_seed": 5}
REPLAYED = replace(OPTIONS, **SHUFFLED)


def text(B: int, T: int, seed: int = 0, vocabulary: int = 31) -> torch.Tensor:
    return torch.randint(vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


def test_draws_are_the_definitions(oracle: ModuleType) -> None:
    tokens = text(3, 40)
    mine, _ = draws(tokens, 7, salt=2)
    for b in range(3):
        assert mine[b].tolist() == oracle.drawn(tokens[b].tolist(), 7, 2)


def test_draws_are_uniform_and_know_nothing_of_each_other_or_of_the_token() -> None:
    tokens = text(500, 200)
    mine = draws(tokens, 0)[0].numpy()
    counts = np.histogram(mine, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square with 19 degrees of freedom, 0.999

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))

    assert correlation(mine[:, 1:], mine[:, :-1]) < 0.015
    assert correlation(mine[1:], mine[:-1]) < 0.015
    assert correlation(mine, tokens.numpy()) < 0.015
    assert correlation(mine, draws(tokens, 1)[0].numpy()) < 0.015
    assert correlation(mine, draws(tokens, 0, salt=1)[0].numpy()) < 0.015


@pytest.mark.parametrize("steps_from", [StepsFrom.SHUFFLED, StepsFrom.FIXED])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.9, 1.0])
def test_steps_have_the_recorded_distribution(steps_from: StepsFrom, share: float) -> None:
    """Within 1 % of its mean, though all sequences begin with the same token."""
    replay = Replay(replace(REPLAYED, steps_from=steps_from))
    tokens = text(4000, 32)
    tokens[:, 0] = 0
    steps = replay.steps(tokens, share)
    recorded = next(np.array(row[1:]) for row in reversed(SCHEDULE) if row[0] <= share)
    mean = float(recorded @ np.arange(4))
    assert float(steps.double().mean()) == pytest.approx(mean, rel=0.01)
    shares = np.bincount(steps.flatten(), minlength=4) / steps.numel()
    if steps_from is StepsFrom.SHUFFLED:
        np.testing.assert_allclose(shares, recorded, atol=0.006)
    else:
        assert set(steps.unique().tolist()) == {int(mean), int(mean) + 1}
    after = np.bincount(steps[:, SETTLED:].flatten(), minlength=4) / steps[:, SETTLED:].numel()
    np.testing.assert_allclose(after, replay.distribution(share), atol=0.006)


@given(weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.01))
def test_a_level_distribution_keeps_the_mean(weights: list[float]) -> None:
    total = sum(weights)
    level = level_distribution([w / total for w in weights])
    k = np.arange(len(weights))
    assert sum(level) == pytest.approx(1)
    assert np.dot(level, k) == pytest.approx(np.dot(weights, k) / total)
    assert np.count_nonzero(level) <= 2
    assert min(level) >= 0


def test_steps_depend_on_the_text_alone_and_follow_the_budget(tiny: Callable) -> None:
    """Not on the row's place in the batch, on training or evaluating, or on padding; and at half the budget on its
    distribution there."""
    model = tiny(options=REPLAYED)
    tokens = text(6, 20)
    model.set_budget_share(0.3)
    together = model.train()(tokens).trace.steps_BT
    assert torch.equal(model.eval()(tokens.flip(0)).trace.steps_BT.flip(0), together)
    assert torch.equal(model(tokens[2:3]).trace.steps_BT, together[2:3])
    model.set_budget_share(1.0)
    assert not torch.equal(model(tokens).trace.steps_BT, together)
    state = model.start_decoding(6)
    model.set_budget_share(0.3)
    for t in range(20):
        assert model.decode_step(tokens[:, t], state)[1].tolist() == together[:, t].tolist()


@pytest.mark.parametrize("mixture", list(Mixture))
def test_gates_weigh_what_is_replayed_as_they_weigh_their_own(
    tiny: Callable, batch: Callable, mixture: Mixture
) -> None:
    """Told to take the very steps that the router takes, the replaying model is the subject: the same loss, and the
    same gradient for every weight, the router's included."""
    subject = tiny(options=replace(OPTIONS, mixture=mixture), spread=2.0)
    control = tiny(options=replace(REPLAYED, mixture=mixture), spread=2.0)
    tokens, targets = batch(2, 12)
    one = subject(tokens, targets)
    control.replay.steps = lambda tokens_BT, share: one.trace.steps_BT.long()
    two = control(tokens, targets)
    assert len(one.trace.steps_BT.unique()) > 2
    assert one.loss.item() == two.loss.item()
    torch.testing.assert_close(one.trace.exit_BTK, two.trace.exit_BTK)
    for a, b in zip(
        torch.autograd.grad(one.loss, list(subject.parameters())),
        torch.autograd.grad(two.loss, list(control.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_who_has_a_router(tiny: Callable) -> None:
    assert probing.has_router(tiny(options=OPTIONS))
    assert not probing.has_router(tiny(options=REPLAYED))


@pytest.mark.parametrize(
    "schedule",
    [
        ((0.0, 0.5, 0.5),),
        ((0.1, 0.25, 0.25, 0.25, 0.25),),
        ((0.0, 0.3, 0.3, 0.3, 0.3),),
        ((0.0, 1.2, -0.2, 0.0, 0.0),),
        ((0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0)),
        "0",
        (1.0,),
        (),
    ],
)
def test_unsound_schedules_are_refused(schedule: Any) -> None:
    (problem,) = replace(REPLAYED, steps_schedule=schedule).problems()
    assert problem.startswith("steps_schedule = ")
    assert "rows of (share, 4 probabilities that sum to 1)" in problem


def test_options_without_a_say_do_not_make_another_run() -> None:
    idle = replace(OPTIONS, steps_schedule=SCHEDULE, steps_seed=2, gain_margin=0.1)
    assert idle.canonical() == OPTIONS
    assert replace(idle, explore=0.1).canonical() == replace(OPTIONS, explore=0.1, steps_seed=2)
    assert REPLAYED.canonical() == REPLAYED


# Gates that are trained later, or by other things ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"gate_warmup": 0.5}, 0.4),
        ({"gate_warmup": 0.5, "gate_target": GateTarget.GAIN}, 0.4),
        ({"gate_warmup": 0.5, "warmup_loss": WarmupLoss.EVERY, "gate_target": GateTarget.STOPPING}, 0.4),
        ({"gate_target": GateTarget.STOPPING, "gain_margin": 0.02, "router_detached": True, "explore": 0.5}, 1.0),
        ({"halting_rule": HaltingRule.GATE, "tau": 0.5}, 1.0),
        (
            {
                "halting_rule": HaltingRule.GATE,
                "router": RouterKind.MLP,
                "gate_target": GateTarget.STOPPING,
                "mixture": Mixture.LAST,
                "tau": 0.5,
                "explore": 0.2,
            },
            1.0,
        ),
        ({"depth_growth": 0.8}, 0.4),
        ({"depth_growth": 0.8, "gate_warmup": 0.8, "warmup_loss": WarmupLoss.EVERY}, 0.3),
        ({"depth_growth": 0.8, **SHUFFLED}, 0.3),
        ({"gate_warmup": 0.25, "lam_ramp": 0.5}, 0.5),
        ({"lam_ramp": 0.5}, 0.1),
        ({"explore": 0.4}, 1.0),
        ({"explore": 0.4, "gate_target": GateTarget.GAIN, "mixture": Mixture.LAST}, 1.0),
        ({"router_input": RouterInput.CHANGE, "router_rate": 2.5}, 1.0),
        ({"router_detached": True}, 1.0),
        ({"prior_steps": 0.7}, 1.0),
        ({"mixture": Mixture.LAST}, 1.0),
    ],
    ids=str,
)
def test_every_option_equals_its_definition_in_training(
    tiny: Callable, batch: Callable, oracle: ModuleType, changes: dict[str, Any], share: float
) -> None:
    model = tiny(options=replace(OPTIONS, **changes), spread=2.0).train()
    model.set_budget_share(share)
    tokens, targets = batch(2, 7, seed=4)
    loss, logits, executed = oracle.batch_loss(
        model, oracle.optioned_sequence, tokens.tolist(), targets.tolist(), 1.0, None
    )
    out = model(tokens, targets, return_logits=True)
    assert (out.trace.steps_BT + 1).tolist() == executed
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(out.logits_BTV, torch.stack(logits), atol=1e-9, rtol=0)
    parameters = list(model.parameters())
    for (name, _), a, b in zip(
        model.named_parameters(),
        torch.autograd.grad(out.loss, parameters),
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_in_the_warm_up_every_position_takes_all_steps_and_the_last_state_is_read(tiny: Callable, batch: Callable):
    tokens, targets = batch(2, 9)
    model = tiny(options=replace(OPTIONS, gate_warmup=0.5), spread=2.0)
    model.set_budget_share(0.49)
    warm = model(tokens, targets)
    assert warm.trace.histogram() == [0, 0, 0, 18]
    torch.testing.assert_close(warm.trace.exit_BTK[..., 3], torch.ones(2, 9))
    assert float(warm.penalty) == 0
    warm.loss.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.latent_loop.routers.parameters())
    model.set_budget_share(0.5)
    plain = tiny(options=OPTIONS, spread=2.0)(tokens, targets)
    assert model(tokens, targets).loss.item() == plain.loss.item()


def test_a_beta_of_zero_presses_on_plain_expected_steps(tiny: Callable, batch: Callable) -> None:
    tokens, targets = batch(2, 9)
    out = tiny(options=replace(OPTIONS, beta=0.0), spread=2.0)(tokens, targets)
    scored = targets != -100
    expected = out.trace.reach_BTK[..., 1:].sum(2)[scored].mean()
    assert float(out.penalty) == pytest.approx(0.3 * float(expected), rel=1e-6)


def test_exploration_is_for_training(tiny: Callable, batch: Callable) -> None:
    tokens, targets = batch(8, 20)
    model = tiny(options=replace(OPTIONS, explore=0.5), spread=2.0)
    plain = tiny(options=OPTIONS, spread=2.0)(tokens, targets).trace.steps_BT
    assert torch.equal(model.eval()(tokens, targets).trace.steps_BT, plain)
    explored = model.train()(tokens, targets).trace.steps_BT
    missed = 1 - (plain == 3).double().mean()
    assert float((explored == 3).double().mean()) == pytest.approx(1 - float(missed) / 2, abs=0.1)


def test_gains_teach_the_gates_alone(tiny: Callable, batch: Callable) -> None:
    """The masses take the gates as given: with the labels' weight gone, no gradient reaches the router."""
    tokens, targets = batch(2, 9)
    options = replace(OPTIONS, gate_target=GateTarget.GAIN, router_detached=True)
    model = tiny(options=options, spread=2.0)
    out = model(tokens, targets)
    router = list(model.latent_loop.routers.parameters())
    assert max(float(g.abs().max()) for g in torch.autograd.grad(out.loss, router, retain_graph=True)) > 0
    trunk = [p for n, p in model.named_parameters() if "router" not in n]
    with_labels = torch.autograd.grad(out.loss, trunk)
    model.options = replace(options, gate_target=GateTarget.READOUT, lam=0.0)  # the loop keeps its own rules
    without = model(tokens, targets)
    for a, b in zip(with_labels, torch.autograd.grad(without.loss, trunk), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rate", [0.5, 4.0])
def test_a_routers_rate_multiplies_what_an_adam_step_changes(tiny: Callable, batch: Callable, rate: float) -> None:
    tokens, targets = batch(4, 12)
    moved = []
    for multiple in (1.0, rate):
        model = tiny(options=replace(OPTIONS, router_rate=multiple), spread=0.0)
        router = model.latent_loop.routers[0]
        z = torch.ones(1, 16, dtype=torch.float64)
        before = torch.logit(router(z))
        assert before.item() == pytest.approx(0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-30)
        model(tokens, targets).loss.backward()
        optimizer.step()
        moved.append((torch.logit(router(z)) - before).item())
    assert moved[1] == pytest.approx(rate * moved[0], rel=1e-6)


def test_a_frozen_gate_is_a_router_of_kind_none(tiny: Callable) -> None:
    model = tiny(Method.ADAPTIVE, replace(OPTIONS, router=RouterKind.NONE))
    assert not list(model.latent_loop.routers.parameters())
