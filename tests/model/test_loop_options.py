"""The switches of methods that loop: growth of the depth by definition, what is refused, where gradients go."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from haltscale.model import AdaptiveOptions, DepthCurve, FixedOptions, Injection, LoopedOptions, Method
from haltscale.model.loop_options import LoopOptions

METHODS: dict[Method, Any] = {
    Method.LOOPED: LoopedOptions(steps=3),
    Method.FIXED: FixedOptions(steps=2.4),
    Method.ADAPTIVE: AdaptiveOptions(l_max=3, tau=0.25, router_bias=0.5, lam=0.3, beta=0.7),
}
ORACLES = {Method.LOOPED: "looped_sequence", Method.FIXED: "fixed_sequence", Method.ADAPTIVE: "optioned_sequence"}
every_method = pytest.mark.parametrize("method", list(METHODS))


@every_method
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"depth_growth": 0.8, "depth_curve": "sqrt"}, 0.0),
        ({"depth_growth": 0.8, "depth_curve": "sqrt"}, 0.6),
        ({"depth_growth": 0.7, "depth_curve": "late", "injection": "norm"}, 0.69),
        ({"depth_growth": 0.7, "depth_curve": "late", "injection": "norm"}, 0.7),
        ({"depth_growth": 0.8}, 0.5),
        ({"depth_growth": 0.8, "gradient_passes": 2, "injection": "add", "loop_norm": True}, 0.65),
    ],
    ids=str,
)
def test_a_growing_depth_equals_its_definition(
    tiny: Callable, batch: Callable, oracle: ModuleType, method: Method, changes: dict[str, Any], share: float
) -> None:
    """Logits, loss, gradients, decoding and FLOPs, in the middle of the budget."""
    model = tiny(method, replace(METHODS[method], **changes), spread=2.0)
    model.set_budget_share(share)
    tokens, targets = batch(2, 7, seed=4)
    sequence = getattr(oracle, ORACLES[method])
    loss, logits, executed = oracle.batch_loss(model, sequence, tokens.tolist(), targets.tolist(), 1.0, None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, targets, return_logits=True)
        out.loss.backward()
    executed_flops = model.flops(out.trace.counts).training.executed
    assert executed_flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (out.trace.steps_BT + 1).tolist() == executed
    assert out.trace.exit_BTK.shape[2] == 4, "as wide as the depth will be"
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(out.logits_BTV, torch.stack(logits), atol=1e-9, rtol=0)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for (name, parameter), wanted in zip(model.named_parameters(), theirs, strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-9, rtol=0, msg=lambda text, name=name: name + text)
    if method is not Method.ADAPTIVE:  # which decodes at its full depth: a model that speaks stands at the end
        state = model.start_decoding(2)
        for t in range(7):
            logits_BV, steps_B = model.decode_step(tokens[:, t], state)
            torch.testing.assert_close(logits_BV, out.logits_BTV[:, t], atol=1e-10, rtol=0)
            assert steps_B.tolist() == out.trace.steps_BT[:, t].tolist()


@given(
    l_max=st.integers(0, 8),
    growth=st.floats(0, 1),
    curve=st.sampled_from(DepthCurve),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_depth_only_grows(l_max: int, growth: float, curve: DepthCurve, shares: tuple[float, float]) -> None:
    options = LoopOptions(depth_growth=growth, depth_curve=curve)
    early, late = (options.most_steps(share, l_max) for share in sorted(shares))
    assert 0 <= early <= late <= l_max
    assert options.most_steps(1.0, l_max) == l_max


def test_the_depths_of_the_curves() -> None:
    """By hand: R = 4 passes, W = 0.8; ceil(4 (1 - sqrt(1 - t / 0.8))) passes 1 at 0.35, 2 at 0.6, 3 at 0.75."""
    shares = (0.0, 0.1, 0.3, 0.34, 0.36, 0.5, 0.59, 0.61, 0.74, 0.76, 0.9)
    sqrt = LoopOptions(depth_growth=0.8, depth_curve=DepthCurve.SQRT)
    assert [sqrt.most_steps(share, 3) for share in shares] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    late = LoopOptions(depth_growth=0.7, depth_curve=DepthCurve.LATE)
    assert [late.most_steps(share, 3) for share in (0.0, 0.69, 0.7, 1.0)] == [0, 0, 3, 3]
    linear = LoopOptions(depth_growth=0.8)
    assert [linear.most_steps(share, 3) for share in (0.0, 0.19, 0.21, 0.41, 0.61, 0.8)] == [0, 0, 1, 2, 3, 3]


@every_method
def test_blocks_with_zero_outputs_begin_as_the_identity(tiny: Callable, batch: Callable, method: Method) -> None:
    model = tiny(method, replace(METHODS[method], zero_outputs=True), spread=2.0)
    plain = tiny(method, METHODS[method], spread=2.0)
    zero = {name for name, weight in model.named_parameters() if not weight.any()}
    projections = {name for name in model.state_dict() if name.endswith((".out.weight", ".down.weight"))}
    assert zero == projections
    for name, weight in model.state_dict().items():
        if name not in projections:
            assert torch.equal(weight, plain.state_dict()[name]), "nothing else begins otherwise"
    tokens, targets = batch(1, 5)
    if method is Method.LOOPED:
        final = model.latent_loop.stack.final_norm
        wanted = model.lm_head(final(model.embed(tokens)))
        torch.testing.assert_close(model(tokens).logits_BTV, wanted, atol=1e-12, rtol=0)
    model(tokens, targets).loss.backward()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in projections), "and learns at once"


@every_method
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"injection": "concat"}, "injection = 'concat': must be one of none, add, norm"),
        ({"depth_curve": "cubic"}, "depth_curve = 'cubic': must be one of linear, sqrt, late"),
        ({"loop_norm": 1}, "loop_norm = 1: must be true or false"),
        ({"depth_growth": 1.5}, "depth_growth = 1.5: must be a finite number of at least 0 and at most 1"),
        ({"gradient_passes": -1}, "gradient_passes = -1: must be an integer of at least 0 and at most 33"),
        ({"gradient_passes": 2}, "gradient_passes = 2: must be 0 without an injection"),
        ({"injection": "norm", "loop_norm": True}, "loop_norm = True: must be false with injection norm"),
        ({"steps": 0, "injection": "add"}, "injection = 'add': must be none where there are no steps to loop"),
        ({"steps": 0, "scaled_residuals": True}, "scaled_residuals = True: must be False where there are no steps"),
    ],
)
def test_what_makes_no_sense_is_refused(method: Method, changes: dict[str, Any], said: str) -> None:
    own = METHODS[method]
    if "steps" in changes and method is Method.ADAPTIVE:
        changes = {"l_max" if name == "steps" else name: value for name, value in changes.items()}
    (problem,) = replace(own, **changes).problems()
    assert problem.startswith(said)


@pytest.mark.parametrize("every", [{"mixture": "probability"}, {"mixture": "expected_loss"}, {"warmup_loss": "every"}])
def test_states_that_are_all_read_need_a_gradient(every: dict[str, Any]) -> None:
    options = AdaptiveOptions(injection="add", gradient_passes=1, **every)  # type: ignore[arg-type]
    (problem,) = options.problems()
    assert "must be 0 where every state is read" in problem


@every_method
def test_switches_without_a_say_make_no_other_run(method: Method) -> None:
    own = METHODS[method]
    assert replace(own, depth_curve="late").canonical() == own
    every = replace(own, injection=Injection.ADD, gradient_passes=4)
    assert every.canonical() == replace(every, gradient_passes=0)
    assert replace(every, gradient_passes=3).canonical().gradient_passes == 3


@every_method
def test_off_they_leave_no_trace_in_the_weights(tiny: Callable, method: Method) -> None:
    """Published checkpoints go on loading."""
    model = tiny(method, METHODS[method])
    assert not [name for name in model.state_dict() if "border" in name]


@every_method
def test_passes_without_a_gradient_keep_no_cast_weights(tiny: Callable, batch: Callable, method: Method) -> None:
    """Autocast caches the weights that it casts: cast where there is no gradient, they would have none later on."""
    options = replace(METHODS[method], injection=Injection.ADD, gradient_passes=2)
    model = tiny(method, options, dtype=torch.float32, spread=2.0)
    tokens, targets = batch(2, 8)
    model(tokens, targets).loss.backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, targets).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if exact[name].norm() > 1e-3:
            missed = (parameter.grad - exact[name]).norm() / exact[name].norm()
            assert missed < 0.5, name


@every_method
def test_a_position_that_halts_early_still_gives_every_parameter_a_gradient(
    tiny: Callable, batch: Callable, method: Method
) -> None:
    options = replace(METHODS[method], injection=Injection.NORM, gradient_passes=1)
    model = tiny(method, options)
    if method is Method.ADAPTIVE:
        with torch.no_grad():
            model.latent_loop.routers[0].score.bias.fill_(-1e4)
    model(*batch(1, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
