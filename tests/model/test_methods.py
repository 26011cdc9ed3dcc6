"""What every method owes: its definition, causality, decoding as in training, an honest ledger, no use of padding."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from haltscale.model import METHODS, Method, Shape
from haltscale.model.adaponder import AdaponderOptions
from haltscale.model.adaptive import AdaptiveOptions
from haltscale.model.fixed import FixedOptions
from haltscale.model.language_model import HeadLoss, canonical_name
from haltscale.model.ledger import PassCounts
from haltscale.model.looped import LoopedOptions
from haltscale.model.mor import MorOptions, Routing
from haltscale.model.pause import PauseOptions
from haltscale.model.ponder import PonderOptions
from haltscale.model.ponder2 import Ponder2Options
from haltscale.model.ponder3 import Ponder3Options
from haltscale.model.shuffled import ShuffledOptions
from haltscale.model.vanilla import VanillaOptions

from cases import CASES, LAYOUTS, ORACLES, RAGGED, TINY, build

every_case = pytest.mark.parametrize("case", list(CASES))
PLAIN_LAYOUTS = [layout for layout in LAYOUTS if "factorised" not in layout]
FACTORISED = ("vanilla", "adaptive, probabilities", "fixed", "looped, norm injection, last passes", "pause", "ponder")
"""Cases that are enough for the factorised layouts: each way in which a method uses embedding and head."""
every_case_and_layout = pytest.mark.parametrize(
    ("case", "layout"),
    [
        (case, layout)
        for layout in LAYOUTS
        for case in CASES
        if layout in PLAIN_LAYOUTS or case in (*FACTORISED, "ponder2", "ponder3", "adaponder", "mor")
    ],
)
routed_case = pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c != "adaptive, no router"
        and "steps" not in c
        and CASES[c][0] in (Method.ADAPTIVE, Method.SHUFFLED, Method.PONDER3, Method.ADAPONDER, Method.MOR)
    ],
)


def test_every_method_is_held_to_these_tests() -> None:
    assert {method for method, _ in CASES.values()} == set(Method) == set(METHODS)
    assert set(ORACLES) == set(CASES)


@every_case_and_layout
def test_forward_and_gradients_equal_the_definition(
    tiny: Callable, batch: Callable, oracle: ModuleType, device: torch.device, case: str, layout: str
) -> None:
    """In float64 to 1e-9, in float32 to 1e-5; the definition is computed on the CPU."""
    model = build(tiny, case, **LAYOUTS[layout])
    tokens, targets = batch(2, 7, seed=4)
    lengths = [7, 5]
    rows, wanted = ([values[b, :n].tolist() for b, n in enumerate(lengths)] for values in (tokens, targets))
    lam, beta = getattr(CASES[case][1], "lam", 0.0), getattr(CASES[case][1], "beta", 1.0)
    beta = None if "step penalty" in case else beta
    if case.startswith("ponder3"):
        beta = 0.0
    if case.startswith(("mor", "adaponder")) or ORACLES[case] == "optioned_sequence":
        lam, beta = 1.0, None
    loss, logits, executed = oracle.batch_loss(model, getattr(oracle, ORACLES[case]), rows, wanted, lam, beta)
    right = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    def found(model: Any) -> tuple[Any, list[torch.Tensor]]:
        places = (x.to(device) for x in (tokens, targets, torch.tensor(lengths)))
        out = model.to(device)(next(places), next(places), lengths_B=next(places), return_logits=True)
        return out, [g.cpu().double() for g in torch.autograd.grad(out.loss, list(model.parameters()))]

    out, mine = found(model)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(out.logits_BTV[b, :n].cpu(), logits[b], atol=1e-9, rtol=0)
    assert [out.trace.steps_BT[b, :n].tolist() for b, n in enumerate(lengths)] == [[n - 1 for n in r] for r in executed]
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-9)
    for (name, parameter), a, b in zip(model.named_parameters(), mine, right, strict=True):
        b = torch.zeros(parameter.shape, dtype=torch.float64) if b is None else b
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

    single, gradients = found(model.float())
    assert torch.equal(single.trace.steps_BT, out.trace.steps_BT)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(single.logits_BTV[b, :n].double().cpu(), logits[b], atol=1e-5, rtol=0)
    for a, b in zip(gradients, mine, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@every_case
@pytest.mark.parametrize("training", [False, True])
def test_the_future_changes_nothing(tiny: Callable, batch: Callable, case: str, training: bool) -> None:
    model = build(tiny, case).train(training)
    tokens, _ = batch(2, 10)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 5) % 31
    results = []
    for each in (tokens, other):
        results.append(model(each))
    before, after = results
    if training and case in ("mor", "mor, published recipe"):  # expert choice ranks the whole sequence: mor.py says so
        assert not torch.equal(before.logits_BTV[:, :6], after.logits_BTV[:, :6])
        return
    torch.testing.assert_close(before.logits_BTV[:, :6], after.logits_BTV[:, :6], atol=1e-11, rtol=0)
    assert not torch.allclose(before.logits_BTV[:, 6:], after.logits_BTV[:, 6:])
    assert torch.equal(before.trace.steps_BT[:, :6], after.trace.steps_BT[:, :6])


@every_case
def test_a_batch_of_one_equals_a_batch_of_many(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, targets = batch(4, 9)
    together = model(tokens, targets, return_logits=True)
    for b in range(4):
        alone = model(tokens[b : b + 1], targets[b : b + 1], return_logits=True)
        torch.testing.assert_close(alone.logits_BTV[0], together.logits_BTV[b], atol=1e-11, rtol=0)
        assert torch.equal(alone.trace.steps_BT[0], together.trace.steps_BT[b])


@every_case
def test_decoding_equals_reading(
    tiny: Callable, batch: Callable, device: torch.device, case: str, monkeypatch: Any
) -> None:
    """Token by token, the same logits, the same steps, the same count of what was needed."""
    monkeypatch.setattr("haltscale.model.decoding.FIRST_CAPACITY", 4)  # so that the cache grows on the way
    method, options = CASES[case]
    if method is Method.PONDER2:
        passes = 11 * options.thoughts
        options = replace(
            options, jacobi_low=passes, jacobi_high=passes
        )  # decoding is the fixed point of the iteration
    monkeypatch.setitem(CASES, case, (method, options))
    model = build(tiny, case).to(device)
    tokens = batch(3, 11)[0].to(device)
    whole = model(tokens)
    state = model.start_decoding(3)
    for t in range(11):
        logits_BV, steps_B = model.decode_step(tokens[:, t], state)
        torch.testing.assert_close(logits_BV, whole.logits_BTV[:, t], atol=1e-10, rtol=0)
        assert steps_B.tolist() == whole.trace.steps_BT[:, t].tolist()
    assert state.counts.tokens == whole.trace.counts.tokens
    if method is Method.PONDER2:
        assert state.counts.rows == [33] * (options.thoughts + 1), "one pass per slot where training iterates"
    else:
        assert [n for n in state.counts.rows if n] == [n for n in whole.trace.counts.rows if n]
        assert [n for n in state.counts.keys if n] == [n for n in whole.trace.counts.keys if n]
        assert model.flops(state.counts).realised == pytest.approx(model.flops(whole.trace.counts).realised)


@every_case
def test_prompts_read_in_parallel_equal_those_read_token_by_token(
    tiny: Callable, batch: Callable, device: torch.device, case: str, monkeypatch: Any
) -> None:
    """Prompts of unequal length, in passes of their own or together: the same logits and steps after each and of what
    is written then, the same count of what was needed; and what was executed equals torch's counter."""
    model = build(tiny, case).to(device)
    tokens = batch(4, 17, seed=5)[0].to(device)
    lengths = [9, 1, 12, 8]  # the second is read alone
    alone: list[Any] = []
    for row_T, length in zip(tokens, lengths, strict=True):
        state = model.start_decoding(1)
        steps = [model.decode_step(row_T[t : t + 1], state) for t in range(length + 4)]
        alone.append((steps[length - 1 :], state.counts))
    counts = sum((one for _, one in alone), start=PassCounts())

    monkeypatch.setattr("haltscale.model.decoding.FIRST_CAPACITY", 4)
    model.train()  # as little as it is in decoding: mor would look ahead
    state = model.start_decoding(4, capacity=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = [model.read_prompts([row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)], state)]
        assert state.positions == lengths
        for t in range(4):
            found.append(model.decode_step(tokens[range(4), [n + t for n in lengths]], state))
    assert model.training
    for t, (logits_BV, steps_B) in enumerate(found):
        for b, (steps, _) in enumerate(alone):
            torch.testing.assert_close(logits_BV[b : b + 1], steps[t][0], atol=1e-10, rtol=0)
            assert steps_B[b] == steps[t][1]
    assert state.counts.tokens == counts.tokens
    assert [n for n in state.counts.rows if n] == [n for n in counts.rows if n]
    assert [n for n in state.counts.keys if n] == [n for n in counts.keys if n]
    flops = model.flops(state.counts)
    assert flops.realised == pytest.approx(model.flops(counts).realised)
    assert flops.executed == pytest.approx(counter.get_total_flops(), rel=0.01)


@every_case
def test_logits_of_every_position_of_prompts(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, _ = batch(2, 9, seed=6)
    prompts = [tokens[0].tolist(), tokens[1, :5].tolist()]
    logits_BTV, _ = model.read_prompts(prompts, model.start_decoding(2), every_position=True)
    assert logits_BTV.shape == (2, 9, 31)
    for own_TV, prompt in zip(logits_BTV, prompts, strict=True):
        state = model.start_decoding(1)
        for own_V, token in zip(own_TV, prompt, strict=False):
            torch.testing.assert_close(own_V, model.decode_step(torch.tensor([token]), state)[0][0], atol=1e-10, rtol=0)


@every_case
def test_some_of_several_prompts_go_on(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, _ = batch(3, 12, seed=7)
    prompts = [tokens[0, :6].tolist(), tokens[1, :8].tolist(), tokens[2, :7].tolist()]
    whole, part = model.start_decoding(3), model.start_decoding(3)
    for state in (whole, part):
        model.read_prompts(prompts, state)
    model.keep_sequences(part, [2, 0])
    for t in range(8, 12):
        every_BV, every_B = model.decode_step(tokens[:, t], whole)
        some_BV, some_B = model.decode_step(tokens[[2, 0], t], part)
        torch.testing.assert_close(some_BV, every_BV[[2, 0]], atol=1e-10, rtol=0)
        assert some_B.tolist() == every_B[[2, 0]].tolist()


@every_case_and_layout
@pytest.mark.parametrize("backward", [False, True])
def test_executed_flops_equal_torchs_counter(
    tiny: Callable, batch: Callable, device: torch.device, case: str, backward: bool, layout: str
) -> None:
    model = build(tiny, case, **LAYOUTS[layout]).to(device)
    tokens, targets = (x.to(device) for x in batch(2, 24))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, targets, lengths_B=torch.tensor([24, 15], device=device))
        if backward:
            out.loss.backward()
    flops = model.flops(out.trace.counts)
    executed = flops.training.executed if backward else flops.executed
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 0 < flops.realised <= flops.executed


@every_case_and_layout
def test_decodings_flops_equal_torchs_counter(tiny: Callable, batch: Callable, case: str, layout: str) -> None:
    model = build(tiny, case, **LAYOUTS[layout])
    tokens, _ = batch(2, 8)
    state = model.start_decoding(2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for t in range(8):
            model.decode_step(tokens[:, t], state)
    assert model.flops(state.counts).executed == pytest.approx(counter.get_total_flops(), rel=0.01)


@every_case
def test_the_trace_adds_up(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, targets = batch(3, 9)
    lengths = torch.tensor([9, 4, 6])
    trace = model(tokens, targets, lengths_B=lengths).trace
    torch.testing.assert_close(trace.exit_BTK.sum(2), trace.valid_BT.float())
    assert (trace.steps_BT[~trace.valid_BT] == 0).all()
    assert trace.counts.tokens == sum(trace.histogram()) == 19
    assert trace.expected_steps <= trace.mean_steps + 1e-6
    assert all(n <= m for n, m in zip(trace.counts.rows, trace.counts.executed_rows, strict=True))
    assert all(n <= m for n, m in zip(trace.counts.keys, trace.counts.executed_keys, strict=True))


@every_case_and_layout
def test_padding_changes_nothing(tiny: Callable, batch: Callable, device: torch.device, case: str, layout: str) -> None:
    model = build(tiny, case, **LAYOUTS[layout]).to(device)
    tokens, targets = (x.to(device) for x in batch(2, 12))
    lengths = torch.tensor([7, 4], device=device)
    noise = torch.where(torch.arange(12, device=device) < lengths[:, None], tokens, (tokens + 3) % 31)
    a, b = (model(t[:, :cut], targets[:, :cut], lengths_B=lengths) for t, cut in ((tokens, 7), (noise, 12)))
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-11)
    torch.testing.assert_close(a.nll_BT, b.nll_BT[:, :7], atol=1e-6, rtol=0)
    assert a.trace.counts.rows == b.trace.counts.rows
    assert a.trace.counts.keys == b.trace.counts.keys


@every_case_and_layout
def test_bfloat16_trains_and_decodes(
    tiny: Callable, batch: Callable, device: torch.device, case: str, layout: str
) -> None:
    model = build(tiny, case, dtype=torch.float32, **LAYOUTS[layout]).bfloat16().train().to(device)
    tokens, targets = (x.to(device) for x in batch(2, 12))
    out = model(tokens, targets)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    state = model.start_decoding(2)
    for t in range(3):
        logits_BV, _ = model.decode_step(tokens[:, t], state)
    assert torch.isfinite(logits_BV).all()


@every_case
def test_bfloat16_computes_the_same_to_its_precision(tiny: Callable, device: torch.device, case: str) -> None:
    """Against float64 with the same rounded weights. Where a gate is as good as tau, or two guesses are equally likely,
    rounding may decide otherwise, at a few positions."""
    shape = Shape(layers=4 if CASES[case][0] is Method.MOR else 2, d=64, heads=4, kv_heads=2, ffn=96)
    rough = tiny(*CASES[case], dtype=torch.float32, spread=2.0, shape=shape).eval().bfloat16()
    exact = copy.deepcopy(rough).double()
    stream = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(31, (2, 24), generator=stream) for _ in range(2))
    right = exact(tokens, targets)
    found = rough.to(device)(tokens.to(device), targets.to(device))
    elsewhere = (found.trace.steps_BT.cpu() != right.trace.steps_BT).float().mean()
    assert elsewhere < 0.1
    assert (found.nll_BT.cpu() - right.nll_BT).abs().mean() < 0.02
    mine, theirs = (
        torch.cat([g.cpu().double().flatten() for g in torch.autograd.grad(out.loss, list(model.parameters()))])
        for out, model in ((found, rough), (right, exact))
    )
    jumps = elsewhere > 0 or "gains" in case or "likeliest" in case
    assert (mine - theirs).norm() < (0.3 if jumps else 0.04) * theirs.norm()


@pytest.mark.parametrize(
    ("case", "layout"),
    [*[(c, "grouped queries, untied") for c in CASES], *[("adaptive", layout) for layout in LAYOUTS]],
)
def test_losses_by_parts_are_those_of_whole_logits(
    tiny: Callable, batch: Callable, device: torch.device, case: str, layout: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("haltscale.model.kernels.rows_in_a_part", lambda _: 5)
    model = build(tiny, case, **LAYOUTS[layout]).to(device)
    tokens, targets = (x.to(device) for x in batch(2, 9))
    found = []
    for model.head_loss in (HeadLoss.WHOLE, HeadLoss.PARTS):
        out = model(tokens, targets)
        found.append((out.nll_BT, out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))))
        assert out.logits_BTV is None
        counts = out.trace.counts
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    assert model(tokens, targets, return_logits=True).logits_BTV is not None
    model.head_loss = HeadLoss.WHOLE
    assert model(tokens, targets).trace.counts == counts


@every_case
def test_activation_checkpointing_changes_no_result(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, targets = batch(2, 8)
    plain = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    again = torch.autograd.grad(model.activation_checkpointing_()(tokens, targets).loss, list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def saturate(model: Any, *, onward: bool) -> None:
    """Routers that are certain, far beyond where a sigmoid still has a slope."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and name.endswith("bias"):
                parameter.fill_(1e4 if onward else -1e4)
            elif "router" in name:
                parameter.fill_(0.0 if model.config.method is not Method.MOR else 1e4 if onward else -1e4)


@routed_case
@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("tokens_each", [1, 8])
def test_a_saturated_router_trains_in_bfloat16(
    tiny: Callable, batch: Callable, case: str, onward: bool, tokens_each: int
) -> None:
    """No position, one position and all positions active after the first pass; gradients finite and all there."""
    model = build(tiny, case, dtype=torch.float32).bfloat16().train()
    saturate(model, onward=onward)
    tokens, targets = batch(1, tokens_each)
    out = model(tokens, targets.clamp(min=0))
    if CASES[case][0] is not Method.MOR:  # its routers have no biases: certain, but of different things
        assert out.trace.histogram() == ([0, 0, 0, tokens_each] if onward else [tokens_each, 0, 0, 0])
    out.loss.backward()
    assert torch.isfinite(out.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_case
def test_bytes_of_keys_and_values(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, _ = batch(3, 5)
    state = model.start_decoding(3)
    for t in range(5):
        model.decode_step(tokens[:, t], state)
    held = [state, state.extra[0]] if case == "shuffled" else [state]
    stores = [x for one in held for memory in one.cache.memories for pair in memory for x in pair]
    assert sum(x.numel() * 8 for x in stores) == model.cache_bytes_per_token() * 3 * state.cache.capacity
    needed = model.state_bytes_per_token(state.counts)
    assert 0 < needed <= model.cache_bytes_per_token()
    if case == "vanilla":
        assert needed == model.cache_bytes_per_token() == 2 * 2 * 8 * 8  # keys, values; layers; 2 heads of 4; float64


@every_case_and_layout
def test_parameters_by_part_add_up(tiny: Callable, case: str, layout: str) -> None:
    model = build(tiny, case, **LAYOUTS[layout])
    shape, groups = model.config.shape, model.parameter_groups_count()
    assert sum(groups.values()) == sum(p.numel() for p in model.parameters())
    tied, rank = model.config.tie_embeddings, model.config.embedding_rank
    assert groups["head"] == (0 if tied else rank * (31 + 16) if rank else 31 * 16)
    whole = shape.parameters(31, tie_embeddings=tied, embedding_rank=rank)
    assert sum(groups.values()) - groups["method"] == whole


@pytest.mark.parametrize(
    "nothing",
    [
        (Method.ADAPTIVE, AdaptiveOptions(l_max=0)),
        (Method.ADAPTIVE, AdaptiveOptions(tau=1.0)),
        (Method.SHUFFLED, ShuffledOptions(l_max=0)),
        (Method.SHUFFLED, ShuffledOptions(tau=1.0)),
        (Method.PONDER3, Ponder3Options(tau=1.0)),
        (Method.ADAPONDER, AdaponderOptions(l_max=0)),
        (Method.ADAPONDER, AdaponderOptions(tau=1.0)),
        (Method.FIXED, FixedOptions(steps=0)),
        (Method.LOOPED, LoopedOptions(steps=0)),
        (Method.PAUSE, PauseOptions(steps=0)),
        (Method.PONDER, PonderOptions(steps=0)),
    ],
    ids=lambda nothing: f"{nothing[0]}, {'tau 1' if getattr(nothing[1], 'tau', 0) == 1 else 'no steps'}",
)
def test_without_steps_every_method_is_the_plain_model(tiny: Callable, batch: Callable, nothing: Any) -> None:
    model, plain = tiny(*nothing), tiny(Method.VANILLA, VanillaOptions())
    weights = {canonical_name(name): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    tokens, targets = batch(2, 10)
    a, b = model(tokens, targets, return_logits=True), plain(tokens, targets, return_logits=True)
    torch.testing.assert_close(a.logits_BTV, b.logits_BTV, atol=1e-12, rtol=0)
    assert float(a.cross_entropy) == pytest.approx(float(b.cross_entropy), abs=1e-12)
    assert a.trace.mean_steps == 0


def test_a_router_forced_to_one_is_the_fixed_control(tiny: Callable, batch: Callable) -> None:
    options = AdaptiveOptions(lam=0.0, tau=0.0, router_bias=100.0)
    adaptive, fixed = tiny(Method.ADAPTIVE, options, spread=0.0), tiny(Method.FIXED, FixedOptions(steps=3))
    fixed.load_state_dict({n: w for n, w in adaptive.state_dict().items() if "router" not in n})
    tokens, targets = batch(2, 10)
    a, b = adaptive(tokens, targets, return_logits=True), fixed(tokens, targets, return_logits=True)
    torch.testing.assert_close(a.logits_BTV, b.logits_BTV, atol=1e-12, rtol=0)
    assert a.trace.counts == b.trace.counts
    a.loss.backward()
    b.loss.backward()
    for name, parameter in fixed.named_parameters():
        torch.testing.assert_close(adaptive.get_parameter(name).grad, parameter.grad, atol=1e-11, rtol=0)


def test_ponder2_costs_eight_passes_on_average(tiny: Callable, batch: Callable) -> None:
    model = tiny(Method.PONDER2, Ponder2Options()).train()
    passes = []
    for seed in range(40):
        model.begin_step(seed)
        pieces = [round(model(*batch(1, 4)).trace.counts.mean_passes) for _ in range(3)]
        assert len(set(pieces)) == 1, "drawn once per step, whatever its pieces"
        passes.append(pieces[0])
    assert set(passes) == {7, 9}
    assert 8 - 0.5 < sum(passes) / len(passes) < 8 + 0.5
    model.begin_step(seed := next(seed for seed, n in enumerate(passes) if n == 7))
    assert round(model(*batch(1, 4)).trace.counts.mean_passes) == passes[seed], "the seed alone decides"
    assert model.eval()(*batch(1, 4)).trace.counts.mean_passes == 9


def test_fixed_steps_are_dealt_evenly(tiny: Callable, batch: Callable) -> None:
    model = tiny(Method.FIXED, FixedOptions(steps=2.4))
    trace = model(*batch(1, 60)).trace
    assert trace.histogram()[:2] == [0, 0]
    assert trace.mean_steps == pytest.approx(2.4, abs=0.02)
    assert all(abs(trace.steps_BT[0, :n].float().mean() - 2.4) < 1 / n + 0.01 for n in range(1, 60))


def test_shuffling_keeps_the_steps_and_moves_them(tiny: Callable, batch: Callable) -> None:
    options = AdaptiveOptions(**RAGGED)
    tokens, targets = batch(2, 30)
    own = tiny(Method.ADAPTIVE, options, spread=2.0)(tokens, targets).trace.steps_BT
    dealt = tiny(Method.SHUFFLED, ShuffledOptions(shift=5, **RAGGED), spread=2.0)(tokens, targets).trace.steps_BT
    assert torch.equal(dealt[:, 5:], own[:, :-5])
    assert not torch.equal(dealt, own)


@pytest.mark.parametrize("routing", list(Routing))
def test_mor_in_training_equals_the_definition(
    tiny: Callable, batch: Callable, oracle: ModuleType, routing: Routing
) -> None:
    model = tiny(Method.MOR, MorOptions(routing=routing), spread=2.0, shape=replace(TINY, layers=4)).train()
    tokens, targets = batch(2, 7, seed=4)
    rows, wanted = [tokens[0].tolist(), tokens[1, :5].tolist()], [targets[0].tolist(), targets[1, :5].tolist()]
    loss, _, executed = oracle.batch_loss(model, oracle.mor_sequence, rows, wanted, 1.0, None)
    out = model(tokens, targets, lengths_B=torch.tensor([7, 5]))
    assert [out.trace.steps_BT[b, :n].tolist() for b, n in ((0, 7), (1, 5))] == [[n - 1 for n in r] for r in executed]
    if routing is Routing.EXPERT_CHOICE:
        assert out.trace.counts.rows == [12, 5 + 4, 3 + 2]
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(out.loss, parameters),
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_mor_needs_three_layers(tiny: Callable) -> None:
    with pytest.raises(ValueError, match=r"shape.layers = 2: must be at least 3 for mor"):
        tiny(Method.MOR, MorOptions())


@pytest.mark.parametrize("case", ["adaptive, router per step", "ponder3", "adaponder", "mor", "mor, token choice"])
def test_routers_of_passes_that_nobody_reaches_have_gradients_too(tiny: Callable, batch: Callable, case: str) -> None:
    """ZeRO waits on every rank for every parameter, however early this rank's tokens stopped."""
    model = build(tiny, case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.fill_(-1e4 if name.endswith("bias") else 0.0)  # equal scores choose depth 0
    out = model(*batch(2, 6))
    assert out.trace.mean_steps == 0
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
