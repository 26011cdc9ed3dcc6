"""AdaPonderLM: what its gates, its reuse of keys and its sparsity loss promise beyond what every method owes."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from haltscale.model import AdaponderOptions, Method, PonderOptions, VanillaOptions
from haltscale.model.language_model import canonical_name

OPTIONS = AdaponderOptions(lam=0.3, fraction=0.4, tau=0.5, router_bias=0.3)


def take_weights(model: Any, other: Any) -> None:
    """Copy the weights that both have."""
    theirs = {canonical_name(name): value for name, value in other.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if canonical_name(name) in theirs:
                parameter.copy_(theirs[canonical_name(name)])


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_forward_and_gradients_equal_the_definition(
    tiny: Callable, batch: Callable, oracle: ModuleType, seed: int
) -> None:
    model = tiny(Method.ADAPONDER, OPTIONS, seed=seed, spread=6.0, tie_embeddings=seed == 2)
    tokens, targets = batch(3, 9, seed)
    lengths = [9, 4, 7]
    rows, wanted = ([values[b, :n].tolist() for b, n in enumerate(lengths)] for values in (tokens, targets))
    loss, _, executed = oracle.batch_loss(model, oracle.adaponder_sequence, rows, wanted, 1.0, None)
    out = model(tokens, targets, lengths_B=torch.tensor(lengths))
    steps = [out.trace.steps_BT[b, :n].tolist() for b, n in enumerate(lengths)]
    assert steps == [[n - 1 for n in row] for row in executed]
    assert len({n for row in steps for n in row}) >= 3, "the example is meant to halt raggedly"
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-9)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_open_gates_make_it_ponderlm(tiny: Callable, batch: Callable) -> None:
    """All gates 1: every token runs every pass, sees each other's newest keys, and feeds its whole guess back."""
    gated = tiny(Method.ADAPONDER, replace(OPTIONS, lam=0.0, router_bias=60.0), spread=0.0)
    plain = tiny(Method.PONDER, PonderOptions(steps=3))
    take_weights(plain, gated)
    tokens, targets = batch(2, 9)
    mine, theirs = gated(tokens, targets, return_logits=True), plain(tokens, targets, return_logits=True)
    torch.testing.assert_close(mine.logits_BTV, theirs.logits_BTV, atol=1e-11, rtol=0)
    assert mine.trace.counts.rows == theirs.trace.counts.rows == [18] * 4
    assert mine.trace.counts.keys == theirs.trace.counts.keys


@pytest.mark.parametrize("options", [AdaponderOptions(l_max=0), AdaponderOptions(tau=1.0, lam=0.0)])
def test_shut_gates_make_it_the_plain_model(tiny: Callable, batch: Callable, options: AdaponderOptions) -> None:
    gated, plain = tiny(Method.ADAPONDER, options), tiny(Method.VANILLA, VanillaOptions())
    take_weights(plain, gated)
    tokens, targets = batch(2, 9)
    mine, theirs = gated(tokens, targets, return_logits=True), plain(tokens, targets, return_logits=True)
    torch.testing.assert_close(mine.logits_BTV, theirs.logits_BTV, atol=1e-12, rtol=0)
    assert mine.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-12)
    assert mine.trace.mean_steps == 0


def test_halting_is_monotone_and_saves_rows(tiny: Callable, batch: Callable) -> None:
    model = tiny(Method.ADAPONDER, OPTIONS, spread=6.0)
    trace = model(*batch(4, 12)).trace
    active = [int((trace.steps_BT >= k).sum()) for k in range(4)]
    assert active[0] > active[1] > active[3], "the example is meant to halt raggedly"
    assert trace.counts.rows == trace.counts.executed_rows == [n for n in active if n]


def test_only_the_lowest_gates_are_pressed(tiny: Callable, batch: Callable) -> None:
    tokens, targets = batch(1, 10)
    targets = targets.clamp(min=0)  # all scored
    pressed = {}
    for fraction in (0.0, 0.25, 1.0):
        model = tiny(Method.ADAPONDER, replace(OPTIONS, l_max=1, fraction=fraction), spread=6.0)
        pressed[fraction] = float(model(tokens, targets).penalty)
    plain = tiny(Method.ADAPONDER, replace(OPTIONS, l_max=0))
    take_weights(plain, model)
    hidden_Td = plain.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool)).hidden_BTd[0]
    gates = sorted(model.latent_loop.gate(hidden_Td, 0).tolist())
    assert pressed[0.0] == 0
    assert pressed[0.25] == pytest.approx(0.3 * sum(gates[:3]) / 10)
    assert pressed[1.0] == pytest.approx(0.3 * sum(gates) / 10)


def test_a_sequences_penalty_does_not_depend_on_its_batch(tiny: Callable, batch: Callable) -> None:
    model = tiny(Method.ADAPONDER, OPTIONS, spread=6.0)
    tokens, targets = batch(3, 9)
    targets = targets.clamp(min=0)
    alone = [float(model(tokens[b : b + 1], targets[b : b + 1]).penalty) for b in range(3)]
    assert float(model(tokens, targets).penalty) == pytest.approx(sum(alone) / 3)


def test_one_position_may_go_on_alone(tiny: Callable, batch: Callable) -> None:
    tokens, targets = batch(2, 8)
    plain = tiny(Method.ADAPONDER, replace(OPTIONS, l_max=0))
    model = tiny(Method.ADAPONDER, OPTIONS, spread=6.0)
    take_weights(plain, model)
    hidden_Nd = plain.hidden_states(tokens, torch.ones_like(tokens, dtype=torch.bool)).hidden_BTd.flatten(0, 1)
    highest, second = torch.logit(model.latent_loop.gate(hidden_Nd, 0)).sort(descending=True).values[:2].tolist()
    with torch.no_grad():
        model.latent_loop.routers[0].score.bias.sub_((highest + second) / 2)
    out = model(tokens, targets)
    assert out.trace.counts.rows[1] == 1
    out.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_gates_learn_from_the_text_and_from_the_pressure(tiny: Callable, batch: Callable) -> None:
    """An open gate has a gradient of the cross-entropy; the sparsity loss alone pulls it down."""
    tokens, targets = batch(2, 8)
    free = tiny(Method.ADAPONDER, replace(OPTIONS, lam=0.0))
    bias = free.latent_loop.routers[0].score.bias
    (learned,) = torch.autograd.grad(free(tokens, targets).loss, bias)
    assert learned.abs().item() > 0
    pressed = tiny(Method.ADAPONDER, OPTIONS)
    (both,) = torch.autograd.grad(pressed(tokens, targets).loss, pressed.latent_loop.routers[0].score.bias)
    assert both.item() > learned.item()
