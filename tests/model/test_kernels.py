"""The hand-written gradients against the plain formulas that they stand for."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from haltscale.model import AdaptiveOptions, kernels
from haltscale.model.backbone import CausalPlan, LatentPlan, attention_by_indices
from haltscale.model.kernels import (
    ChunkedAttentionFunction,
    CrossEntropyFunction,
    HeadLossFunction,
    MergeFunction,
    RMSNormFunction,
    RotateFunction,
    SwiGLUFunction,
    TakeFunction,
)


def agree(mine: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Same values and same gradients, and the gradients pass the numerical check."""
    inputs = tuple(x.double().requires_grad_() for x in inputs)
    a, b = mine(*inputs), plain(*inputs)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    seed = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, inputs, seed), torch.autograd.grad(b, inputs, seed), strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(mine, inputs)


def test_rms_norm() -> None:
    agree(
        lambda x, w: RMSNormFunction.apply(x, w, 1e-5),
        lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        torch.randn(5, 8),
        torch.rand(8) + 0.5,
    )


def test_rms_norm_in_bfloat16_computes_in_float32() -> None:
    x, w = torch.randn(64, 256), torch.rand(256)
    exact = RMSNormFunction.apply(x.bfloat16().float(), w.bfloat16().float(), 1e-5)
    rough = RMSNormFunction.apply(x.bfloat16(), w.bfloat16(), 1e-5)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=2**-7, atol=1e-6)


def plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)


def test_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.tensor([3, -100, 0, 7, 7])
    for rows in (1, 2, 5):
        monkeypatch.setattr(kernels, "cache_sized_rows", lambda _, rows=rows: rows)
        agree(
            lambda logits: CrossEntropyFunction.apply(logits, target, -100),
            lambda logits: plain_cross_entropy(logits, target),
            torch.randn(5, 8) * 3,
        )


def test_cross_entropy_survives_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, 3e38]], requires_grad=True)
    loss = CrossEntropyFunction.apply(logits, torch.tensor([1, 2]), -100)
    assert loss.tolist() == [2e4, 0.0]
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_cross_entropy_in_bfloat16_computes_in_float32() -> None:
    logits, target = (torch.randn(300, 512) * 4).bfloat16(), torch.randint(512, (300,))
    a, b = logits.clone().requires_grad_(), logits.float().requires_grad_()
    loss, exact = CrossEntropyFunction.apply(a, target, -100), plain_cross_entropy(b, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    loss.mean().backward()
    exact.mean().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.dtype == torch.bfloat16
    torch.testing.assert_close(a.grad.float(), b.grad, rtol=2**-7, atol=1e-9)


def plain_head_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return plain_cross_entropy(hidden @ weight.T, target)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_head_loss_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.tensor([3, -100, 0, 7, 7])
    monkeypatch.setattr(kernels, "rows_in_a_part", lambda _: rows)
    agree(
        lambda hidden, weight: HeadLossFunction.apply(hidden, weight, target, -100),
        lambda hidden, weight: plain_head_loss(hidden, weight, target),
        torch.randn(5, 4) * 3,
        torch.randn(8, 4),
    )


def test_head_loss_in_bfloat16_adds_up_in_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the weight is a sum over all rows: by parts of bfloat16, small ones would be lost on large."""
    monkeypatch.setattr(kernels, "rows_in_a_part", lambda _: 8)
    stream = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=stream).to(device, torch.bfloat16) / 2 for n in (2048, 512))
    target = torch.randint(512, (2048,), generator=stream).to(device)
    a, b = weight.clone().requires_grad_(), weight.double().requires_grad_()
    a.grad_dtype = torch.float32
    loss, exact = HeadLossFunction.apply(hidden, a, target, -100), plain_head_loss(hidden.double(), b, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=3e-2)  # logits are rounded to bfloat16
    loss.mean().backward()
    exact.mean().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.dtype == torch.float32
    assert (a.grad - b.grad).norm() < 5e-3 * b.grad.norm()


def test_swiglu() -> None:
    def plain(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate / (1 + torch.exp(-gate)) * up

    agree(SwiGLUFunction.apply, plain, torch.randn(5, 8))


def test_rotation() -> None:
    angle = torch.rand(5, 1, 4, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()

    def plain(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)).movedim(-1, -2).flatten(-2)

    agree(lambda x: RotateFunction.apply(x, cos, sin), plain, torch.randn(5, 3, 8))


def test_merge() -> None:
    old_slot, new_slot = torch.tensor([0, 3, 6, 6]), torch.tensor([1, 5])

    def plain(old: Tensor, new: Tensor) -> Tensor:
        zeros = torch.zeros(7, 2, dtype=torch.float64)
        return zeros.index_put((old_slot,), old).index_put((new_slot,), new)[:-1]

    def mine(old: Tensor, new: Tensor) -> Tensor:
        return MergeFunction.apply(7, False, [old_slot, new_slot], old, new)[:-1]

    agree(mine, plain, torch.randn(4, 2), torch.randn(2, 2))


def test_take() -> None:
    index = torch.tensor([4, 0, 2])
    agree(lambda x: TakeFunction.apply(x, index), lambda x: x[index], torch.randn(5, 3))


@pytest.mark.parametrize("edges", [[0, 6], [0, 2, 6]])
@pytest.mark.parametrize("widest", [9, 7])
def test_chunked_attention(edges: list[int], widest: int) -> None:
    visible = torch.tensor([[1, 2, 4, 5, 6, widest], [1, 3, 3, 4, 4, 5]])
    chunks = []
    for a, b in pairwise(edges):
        width = int(visible[:, a:b].max())
        unseen = torch.arange(width) >= visible[:, a:b, None]
        mask = torch.zeros(unseen.shape, dtype=torch.float64).masked_fill(unseen, -torch.inf)
        chunks.append((a, b, width, mask[:, None]))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(2, 3) / 2).masked_fill((torch.arange(9) >= visible[..., None])[:, None], -torch.inf)
        return scores.softmax(-1) @ v

    agree(
        lambda q, k, v: ChunkedAttentionFunction.apply(q, k, v, chunks),
        plain,
        torch.randn(2, 3, 6, 4),
        torch.randn(2, 3, 9, 4),
        torch.randn(2, 3, 9, 4),
    )


def test_attention_in_bfloat16_has_gradients_nearer_to_the_truth_than_pytorchs() -> None:
    stream = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 40, 8, generator=stream).bfloat16().requires_grad_() for _ in range(3)]
    seed = torch.randn(2, 3, 40, 8, generator=stream).bfloat16()

    def gradients(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [x.detach().to(dtype).requires_grad_() for x in inputs]
        return [x.double() for x in torch.autograd.grad(attend(*own), own, seed.to(dtype))]

    def pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    mask = torch.full((1, 1, 40, 40), -torch.inf).triu(1).bfloat16()
    exact, theirs = (gradients(pytorchs, dtype) for dtype in (torch.float64, torch.bfloat16))
    for chunk in ((0, 40, 40, None), (0, 40, 40, mask)):
        mine = gradients(lambda q, k, v, chunk=chunk: ChunkedAttentionFunction.apply(q, k, v, [chunk]), torch.bfloat16)
        for a, b, right in zip(mine, theirs, exact, strict=True):
            assert (a - right).norm() < 0.9 * (b - right).norm()
            assert (a - right).norm() < 4e-3 * right.norm()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_fused_and_plain_attention_agree(tiny: Callable, batch: Callable, kv_heads: int) -> None:
    from dataclasses import replace

    shape = replace(tiny().config.shape, kv_heads=kv_heads)
    model = tiny(options=AdaptiveOptions(tau=0.25, router_bias=0.5), spread=2.0, shape=shape)
    tokens, targets = batch(2, 20)
    fused = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.autograd.grad(model(tokens, targets).loss, list(model.parameters()))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@st.composite
def halting(draw: Any) -> list[list[int]]:
    """Executed states per position of a ragged batch; 0 is padding, which stands at the end."""
    T = draw(st.integers(1, 7))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        real = draw(st.integers(1, T))
        rows.append([draw(st.integers(1, 4)) for _ in range(real)] + [0] * (T - real))
    return rows


@given(halting(), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=200)
def test_a_plan_shows_each_query_the_executed_states_up_to_its_position(
    rows: list[list[int]], per_chunk: int, by_indices: bool
) -> None:
    """Each state's value is its own number, so attention with equal scores averages the numbers that were visible."""
    states_BT = torch.tensor(rows)
    B, T = states_BT.shape
    number = {(b, t, i): 1.0 + b * 1000 + t * 10 + i for b in range(B) for t in range(T) for i in range(4)}
    everywhere = torch.arange(B * T)
    zero_N11 = torch.zeros(B * T, 1, 1, dtype=torch.float64)
    first_N11 = torch.tensor([[[number[b, t, 0]]] for b in range(B) for t in range(T)], dtype=torch.float64)
    _, memory = CausalPlan(B, T, keep=True).attend(zero_N11, zero_N11, first_N11, None)
    rows_so_far = [everywhere]
    for k in range(1, int(states_BT.max())):
        row_N = (states_BT > k).flatten().nonzero().squeeze(1)
        now_BT = states_BT.clamp(max=k + 1)
        with attention_by_indices(by_indices):
            plan = LatentPlan(now_BT, states_BT > k, rows_so_far, torch.float64, queries_per_chunk=per_chunk)
        assert torch.equal(plan.row_N, row_N)
        rows_so_far.append(row_N)
        value_N = torch.tensor([[[number[int(n) // T, int(n) % T, k]]] for n in row_N], dtype=torch.float64)
        out, memory = plan.attend(torch.zeros_like(value_N), torch.zeros_like(value_N), value_N, memory)
        for n, row in enumerate(row_N.tolist()):
            b, t = divmod(row, T)
            seen = [number[b, j, i] for j in range(t + 1) for i in range(min(k + 1, rows[b][j]))]
            assert out[n].item() == pytest.approx(sum(seen) / len(seen), rel=1e-12)
