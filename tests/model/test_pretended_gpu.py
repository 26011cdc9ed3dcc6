"""What can be known of the way on GPUs without one: every tensor is on the device, and nothing waits for it more than
once in a pass (pretend_gpu.py). The kernels are the CPU's, so all results are too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from haltscale.model import METHODS, AdaptiveOptions, Method, VanillaOptions, key_ranges
from haltscale.model.backbone import AttentionKernel

from cases import CASES, TINY, build
from pretend_gpu import DEVICE, Pretended, pretended_gpu, put

LENGTHS = [24, 15]


def inside(x: Tensor) -> Tensor:
    assert isinstance(x, Pretended), "it is not on the device"
    return x.inside


@pytest.mark.parametrize("kernel", [AttentionKernel.DENSE, AttentionKernel.INDICES])
@pytest.mark.parametrize("case", list(CASES))
def test_a_step_waits_for_the_device_once_in_a_pass(
    tiny: Callable, batch: Callable, case: str, kernel: AttentionKernel
) -> None:
    model = build(tiny, case)
    model.attention_kernel = kernel
    given = (*batch(2, 24), torch.tensor(LENGTHS))
    right = model(*given[:2], lengths_B=given[2])
    gradients = torch.autograd.grad(right.loss, list(model.parameters()))
    with pretended_gpu() as waits:
        put(model)
        tokens, targets, lengths = (x.to(DEVICE) for x in given)
        waits.clear()
        out = model(tokens, targets, lengths_B=lengths)
        counts = out.trace.counts
        ran = len(counts.rows) + (len(counts.gradless.rows) if counts.gradless else 0)
        loops = 2 if case == "shuffled" else 1
        assert len(waits) <= ran + loops, "one a pass, and one to learn that nobody goes on any more"
        waits.clear()
        found = torch.autograd.grad(out.loss, list(model.parameters()))
        assert not waits, "the way back knows all that it needs"
    assert counts == right.trace.counts
    assert inside(out.loss).item() == pytest.approx(right.loss.item(), abs=1e-12)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(inside(mine), theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", list(CASES))
def test_decoding_stays_on_the_device(tiny: Callable, batch: Callable, case: str) -> None:
    model = build(tiny, case)
    tokens, _ = batch(3, 12)
    prompts = [tokens[0, :4].tolist(), tokens[1, :7].tolist(), tokens[2, :5].tolist()]

    def decoded(model: Any, tokens: Tensor) -> list[Tensor]:
        state = model.start_decoding(3)
        found = [model.read_prompts(prompts, state)[0]]
        return found + [model.decode_step(tokens[:, t], state)[0] for t in range(8, 12)]

    right = decoded(model, tokens)
    with pretended_gpu():
        found = decoded(put(model), tokens.to(DEVICE))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(inside(mine), theirs, atol=1e-12, rtol=0)


def plain_flex(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool) -> Tensor:
    """FlexAttention's definition."""
    b, m, s = (torch.arange(n, device=q.device) for n in (len(q), q.shape[2], k.shape[2]))
    seen = block_mask.mask_mod(b[:, None, None], None, m[:, None], s)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=enable_gqa)


@pytest.mark.parametrize("options", [AdaptiveOptions(tau=0.25, router_bias=0.5), VanillaOptions()])
@pytest.mark.parametrize("documents", [None, 0])
def test_on_a_gpu_masks_are_indices_and_their_blocks_cost_no_wait(
    tiny: Callable, batch: Callable, monkeypatch: Any, options: Any, documents: int | None
) -> None:
    method = Method.ADAPTIVE if isinstance(options, AdaptiveOptions) else Method.VANILLA
    model = tiny(method, options, spread=2.0, dtype=torch.float32, shape=replace(TINY, d=64), document_start=documents)
    tokens, targets = batch(2, 24)
    right, calls = model(tokens, targets), []

    def flex(*args: Any, **named: Any) -> Tensor:
        calls.append(named["block_mask"])
        return plain_flex(*args, **named)

    monkeypatch.setattr(key_ranges, "compiled_flex", lambda: flex)
    with pretended_gpu() as waits:
        put(model)
        assert model.attends_by_indices
        given = tokens.to(DEVICE), targets.to(DEVICE)
        waits.clear()
        out = model(*given)
        passes = len(out.trace.counts.rows)
        assert len(waits) <= passes + 1
    assert inside(out.loss).item() == pytest.approx(right.loss.item(), abs=1e-5)
    masked = passes if documents == 0 else passes - 1  # a plain causal mask needs none
    assert len(calls) == masked * model.config.shape.layers
    assert len({id(mask) for mask in calls}) == masked, "one for all layers of a pass"


def test_every_method_has_a_case() -> None:
    assert {method for method, _ in CASES.values()} == set(METHODS)


def test_a_tensor_that_is_left_on_the_cpu_is_found() -> None:
    """The pretended device itself."""
    with pretended_gpu() as waits:
        there = torch.arange(4, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.arange(4)
        assert not waits
        for ask in (int, bool, float, lambda x: x.tolist(), lambda x: x.cpu()):
            ask(there[1])
        assert len(waits) == 5
        there[there > 1]
        there.nonzero()
        assert len(waits) == 7
