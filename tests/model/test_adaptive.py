"""Adaptive latent chain-of-thought against its definition, and the promises that its speed rests on."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from haltscale.model import IGNORE_INDEX, AdaptiveOptions, Method, VanillaOptions

Build = Callable[..., Any]
OPTIONS = AdaptiveOptions(tau=0.25, router_bias=0.5, lam=0.3, beta=0.7)


def stop_everyone(model: Any) -> None:
    """Force the router's gate to 0."""
    with torch.no_grad():
        model.latent_loop.routers[0].score.weight.zero_()
        model.latent_loop.routers[0].score.bias.fill_(-100.0)


def keep_everyone(model: Any) -> None:
    """Force the router's gate to 1."""
    with torch.no_grad():
        model.latent_loop.routers[0].score.weight.zero_()
        model.latent_loop.routers[0].score.bias.fill_(100.0)


def set_up(tiny: Build, batch: Build, *, seed: int, **changes: Any) -> tuple[Any, list[int], Any, Any]:
    model = tiny(options=OPTIONS, seed=seed, spread=2.0, **changes)
    tokens, targets = batch(3, 9, seed)
    return model, [9, 4, 7], tokens, targets


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_forward_and_gradients_equal_the_definition(
    tiny: Build, batch: Build, oracle: ModuleType, seed: int, tie_embeddings: bool
) -> None:
    model, lengths, tokens, targets = set_up(tiny, batch, seed=seed, tie_embeddings=tie_embeddings)
    rows = [tokens[b, :n].tolist() for b, n in enumerate(lengths)]
    wanted = [targets[b, :n].tolist() for b, n in enumerate(lengths)]
    loss, logits, executed = oracle.batch_loss(
        model, oracle.adaptive_sequence, rows, wanted, lam=OPTIONS.lam, beta=OPTIONS.beta
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))

    out = model(tokens, targets, lengths_B=torch.tensor(lengths), return_logits=True)
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    steps = [out.trace.steps_BT[b, :n].tolist() for b, n in enumerate(lengths)]
    assert steps == [[n - 1 for n in row] for row in executed]
    assert len({n for row in steps for n in row}) >= 3, "the example is meant to halt raggedly"
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-9)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(out.logits_BTV[b, :n], logits[b], atol=1e-9, rtol=0)
    for (name, _), mine, theirs in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

    single = model.float()(tokens, targets, lengths_B=torch.tensor(lengths), return_logits=True)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(single.logits_BTV[b, :n].double(), logits[b], atol=1e-5, rtol=0)


def test_long_sequences_are_cut_into_chunks_without_a_difference(tiny: Build, batch: Build, monkeypatch: Any) -> None:
    from haltscale.model.backbone import LatentPlan

    model = tiny(options=OPTIONS, spread=2.0)
    tokens, targets = batch(2, 40)
    whole = model(tokens, targets)
    monkeypatch.setattr(LatentPlan, "QUERIES_PER_CHUNK", 4)
    cut = model(tokens, targets)
    assert cut.trace.counts.executed_keys[1] < whole.trace.counts.executed_keys[1]
    assert cut.trace.counts.keys == whole.trace.counts.keys
    for a, b in zip(
        torch.autograd.grad(whole.loss, list(model.parameters())),
        torch.autograd.grad(cut.loss, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_linear_layers_see_only_the_rows_that_go_on(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS, spread=2.0)
    tokens, targets = batch(4, 12)
    seen: dict[str, list[int]] = {}
    for name, module in model.latent_loop.stack.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("norm"):
            module.register_forward_hook(
                lambda _module, args, _out, name=name: seen.setdefault(name, []).append(args[0].shape[0])
            )
    trace = model(tokens, targets).trace
    active = [int((trace.steps_BT >= k).sum()) for k in range(4)]
    assert active == sorted(active, reverse=True)
    assert active[0] > active[1] > active[3], "the example is meant to halt raggedly"
    assert trace.counts.executed_rows == trace.counts.rows == active
    assert all(rows == active for rows in seen.values())
    assert len(seen) == 2 * 6 + 1


def test_counts_are_the_definitions(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS, spread=2.0)
    tokens, targets = batch(3, 11)
    lengths = torch.tensor([11, 5, 8])
    trace = model(tokens, targets, lengths_B=lengths).trace
    states = (trace.steps_BT.long() + 1) * trace.valid_BT
    for k in range(4):
        visible = torch.minimum(states, torch.tensor(k + 1)).cumsum(1)
        active = states > k
        assert trace.counts.rows[k] == int(active.sum())
        assert trace.counts.keys[k] == int(visible[active].sum())
    assert trace.counts.tokens == 24
    assert trace.mean_steps == pytest.approx(float((states - 1)[trace.valid_BT].double().mean()))
    assert sum(trace.histogram()) == 24
    torch.testing.assert_close(trace.exit_BTK.sum(2), trace.valid_BT.float())
    torch.testing.assert_close(trace.exit_BTK[..., 1:].sum(2), trace.reach_BTK[..., 1])


def test_the_future_changes_nothing(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS, spread=2.0)
    tokens, _ = batch(2, 12)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 5) % 31
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before.logits_BTV[:, :7], after.logits_BTV[:, :7], atol=1e-12, rtol=0)
    assert not torch.allclose(before.logits_BTV[:, 7:], after.logits_BTV[:, 7:])
    assert torch.equal(before.trace.steps_BT[:, :7], after.trace.steps_BT[:, :7])


@pytest.mark.parametrize("options", [AdaptiveOptions(l_max=0), AdaptiveOptions(tau=1.0)])
def test_without_steps_it_is_the_plain_model(tiny: Build, batch: Build, options: AdaptiveOptions) -> None:
    tokens, targets = batch(2, 10)
    adaptive, plain = tiny(options=options), tiny(Method.VANILLA, VanillaOptions())
    for theirs, mine in zip(plain.stack.parameters(), adaptive.latent_loop.stack.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    a, b = adaptive(tokens, targets, return_logits=True), plain(tokens, targets, return_logits=True)
    torch.testing.assert_close(a.logits_BTV, b.logits_BTV, atol=1e-12, rtol=0)
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-12)
    assert a.trace.counts.rows == b.trace.counts.rows
    assert a.trace.mean_steps == 0


def test_a_router_that_always_goes_on_executes_every_step(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS)
    keep_everyone(model)
    tokens, targets = batch(2, 10)
    trace = model(tokens, targets).trace
    assert trace.counts.rows == [20] * 4
    assert trace.counts.keys == [2 * (k + 1) * 55 for k in range(4)]
    torch.testing.assert_close(trace.exit_BTK[..., -1], torch.ones(2, 10))


def test_a_batch_of_one_equals_a_batch_of_many(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS, spread=2.0)
    tokens, targets = batch(5, 9)
    together = model(tokens, targets)
    for b in range(5):
        alone = model(tokens[b : b + 1], targets[b : b + 1])
        torch.testing.assert_close(alone.nll_BT[0], together.nll_BT[b], atol=1e-6, rtol=0)
        assert torch.equal(alone.trace.steps_BT[0], together.trace.steps_BT[b])


def test_padding_changes_nothing(tiny: Build, batch: Build) -> None:
    model = tiny(options=OPTIONS, spread=2.0)
    tokens, targets = batch(3, 8)
    lengths = torch.tensor([8, 3, 6])
    inside = torch.arange(8) < lengths[:, None]
    plain = model(tokens, targets.masked_fill(~inside, IGNORE_INDEX), lengths_B=lengths)
    noise = torch.randint(31, (3, 14))
    longer = torch.where(torch.arange(14) < lengths[:, None], nn.functional.pad(tokens, (0, 6)), noise)
    padded = model(longer, nn.functional.pad(targets, (0, 6), value=3), lengths_B=lengths)
    assert padded.loss.item() == pytest.approx(plain.loss.item(), abs=1e-12)
    torch.testing.assert_close(padded.nll_BT[:, :8], plain.nll_BT, atol=1e-7, rtol=0)
    assert (padded.nll_BT[:, 8:] == 0).all()
    assert (padded.trace.steps_BT[~padded.trace.valid_BT] == 0).all()
    assert (padded.trace.exit_BTK[~padded.trace.valid_BT] == 0).all()
    assert padded.trace.counts.rows == plain.trace.counts.rows
    assert padded.trace.counts.keys == plain.trace.counts.keys
    assert padded.trace.counts.tokens == 17
    for a, b in zip(
        torch.autograd.grad(plain.loss, list(model.parameters())),
        torch.autograd.grad(padded.loss, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("who", ["nobody", "one position", "everybody"])
def test_every_parameter_has_a_gradient_however_many_go_on(tiny: Build, batch: Build, who: str) -> None:
    model = tiny(options=replace(OPTIONS, tau=0.01))
    tokens, targets = batch(2, 6)
    if who == "everybody":
        keep_everyone(model)
    else:
        stop_everyone(model)
    if who == "one position":
        token = int(tokens[1, 2])
        tokens = tokens.masked_fill(tokens == token, (token + 1) % 31)
        tokens[1, 2] = token
        plain = model.latent_loop.stack
        z_Nd = model.latent_loop(model.embed(tokens).flatten(0, 1), torch.ones_like(tokens, dtype=torch.bool))
        with torch.no_grad():
            model.latent_loop.routers[0].score.weight.copy_(z_Nd.hidden_BTd[1, 2][None])
            scores = z_Nd.hidden_BTd.flatten(0, 1) @ z_Nd.hidden_BTd[1, 2]
            best, second = scores.sort(descending=True).values[:2]
            model.latent_loop.routers[0].score.weight.mul_(100 / (best - second))
            model.latent_loop.routers[0].score.bias.fill_(float(-100 * (best + second) / 2 / (best - second)))
        assert plain is model.latent_loop.stack
    out = model(tokens, targets)
    if who == "one position":
        assert out.trace.counts.rows[1] == 1
    else:
        assert len(out.trace.counts.rows) == (4 if who == "everybody" else 1)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_penalty_alone_teaches_the_router_to_stop(tiny: Build, batch: Build) -> None:
    tokens, targets = batch(2, 8)
    gentle, strict = (tiny(options=replace(OPTIONS, lam=lam)) for lam in (0.0, 1.0))
    mild, hard = gentle(tokens, targets), strict(tokens, targets)
    assert float(mild.penalty) == 0
    assert float(hard.penalty) > 0
    assert float(mild.cross_entropy) == float(hard.cross_entropy)
    bias = strict.latent_loop.routers[0].score.bias
    (pressed,) = torch.autograd.grad(hard.loss - mild.loss.detach(), bias)
    (free,) = torch.autograd.grad(mild.loss, gentle.latent_loop.routers[0].score.bias)
    assert pressed.item() > free.item()


def test_no_targets_no_penalty(tiny: Build, batch: Build) -> None:
    tokens, targets = batch(2, 8)
    model = tiny(options=OPTIONS)
    out = model(tokens)
    assert torch.isnan(out.loss)
    assert float(out.penalty) == 0
    torch.testing.assert_close(out.logits_BTV, model(tokens, targets, return_logits=True).logits_BTV)


def test_bfloat16_keeps_masses_and_angles_in_float32(tiny: Build, batch: Build) -> None:
    tokens, targets = batch(4, 48)
    exact = tiny(options=OPTIONS, dtype=torch.float32)
    rough = tiny(options=OPTIONS, dtype=torch.float32).bfloat16()
    out = rough(tokens, targets, return_logits=True)
    out.loss.backward()
    assert out.logits_BTV.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.trace.exit_BTK.sum(2), torch.ones(4, 48), atol=1e-6, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in rough.parameters())
    assert float(out.cross_entropy) == pytest.approx(float(exact(tokens, targets).cross_entropy), abs=0.05)
    # The tables are derived: had they been rounded to bfloat16, angle 47 would be off by up to 0.1.
    from haltscale.model.backbone import rope_table

    cos, _ = rope_table(48, rough.config.shape, 10_000.0, rough.embedding.weight)
    assert cos.dtype == torch.float32
    assert float(cos[47, 0, 0]) == pytest.approx(float(torch.tensor(47.0).cos()), abs=1e-6)


def test_activation_checkpointing_changes_no_result(tiny: Build, batch: Build) -> None:
    tokens, targets = batch(2, 10)
    model = tiny(options=OPTIONS, spread=2.0)
    plain = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    model.activation_checkpointing_()
    again = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_compiling_changes_rounding_only(tiny: Build, batch: Build) -> None:
    """One compilation serves every pass, however many rows it has."""
    tokens, targets = batch(2, 10)
    model = tiny(options=OPTIONS, spread=2.0)
    plain = model(tokens, targets)
    expected = torch.autograd.grad(plain.loss, list(model.parameters()))
    compiled: Counter[str] = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    out = model.compile_blocks_()(tokens, targets)
    passes = len({*plain.trace.counts.rows})
    assert passes > 2, "too few: the test has lost its subject"
    assert 0 < compiled["unique_graphs"] - before < 2 * model.config.shape.layers * passes
    torch.testing.assert_close(out.nll_BT, plain.nll_BT, atol=1e-6, rtol=0)
    for a, b in zip(expected, torch.autograd.grad(out.loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_autocast_runs(tiny: Build, batch: Build) -> None:
    tokens, targets = batch(2, 10)
    model = tiny(options=OPTIONS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens, targets)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(model(tokens, targets).loss.item(), abs=0.1)
