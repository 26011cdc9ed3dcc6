"""Masks from indices: against dense masks, against PyTorch's own block masks, and whole methods against the definition
of attention by dense masks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from haltscale.model import Method, VanillaOptions
from haltscale.model.backbone import AttentionKernel, CausalPlan, LatentPlan, attention_by_indices, documents_apart
from haltscale.model.key_ranges import BLOCK, KeyRanges, in_blocks
from haltscale.model.ledger import PassCounts

from cases import CASES, TINY, build


@st.composite
def ranges(draw: Any) -> tuple[KeyRanges, int]:
    """Queries that see one run of keys each, as those of a ragged pass do: both ends rise."""
    B, M = draw(st.integers(1, 2)), draw(st.sampled_from([1, 100, BLOCK, 3 * BLOCK, 300]))
    keys = draw(st.sampled_from([BLOCK, 250, 4 * BLOCK]))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    end_BM = torch.randint(1, keys + 1, (B, M), generator=stream).sort(1).values
    if draw(st.booleans()):
        return KeyRanges(end_BM, torch.zeros_like(end_BM)), keys
    reach_BM = torch.randint(1, keys + 1, (B, M), generator=stream)
    return KeyRanges(end_BM, (end_BM - reach_BM).clamp(min=0).cummax(1).values), keys


@given(ranges())
@settings(deadline=None, max_examples=60)
def test_blocks_are_those_that_pytorch_finds_by_looking_at_every_pair(case: tuple[KeyRanges, int]) -> None:
    mask, keys = case
    B, M = mask.end_BM.shape
    mine = mask.block_mask(keys)
    theirs = create_block_mask(mine.mask_mod, B, None, M, keys, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for name, number in (("kv_indices", "kv_num_blocks"), ("full_kv_indices", "full_kv_num_blocks")):
        held = torch.arange(mine.kv_indices.shape[-1]) < getattr(mine, number)[..., None]
        assert torch.equal(getattr(mine, name)[held], getattr(theirs, name)[held]), name
    computed = theirs.kv_num_blocks.sum() + theirs.full_kv_num_blocks.sum()
    assert mask.pairs().sum() == computed * BLOCK * BLOCK


def test_flex_attention_with_it_is_attention_with_a_dense_mask() -> None:
    """Forward, uncompiled: FlexAttention has no gradient on CPUs."""
    stream = torch.Generator().manual_seed(0)
    end_BM = torch.randint(1, 200, (2, 150), generator=stream).sort(1).values
    mask = KeyRanges(end_BM, (end_BM - 40).clamp(min=0))
    q_BMHE = torch.randn(2, 150, 4, 16, generator=stream)
    k_BSGE, v_BSGE = torch.randn(2, 2, 200, 2, 16, generator=stream)
    q, k, v = (x.transpose(1, 2) for x in (q_BMHE, k_BSGE, v_BSGE))
    flex = flex_attention(q, k, v, block_mask=mask.block_mask(200), enable_gqa=True)
    torch.testing.assert_close(mask.attend(q_BMHE, k_BSGE, v_BSGE), flex.transpose(1, 2), atol=1e-6, rtol=0)


def test_one_graph_serves_all_lengths_and_masks() -> None:
    """What compiles FlexAttention sees another mask, another number of queries and keys at every pass."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def seen(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    compiled = torch.compile(flex_attention, dynamic=True, backend=seen, fullgraph=True)
    for queries, keys in ((300, 512), (130, 640), (257, 1024), (600, 700)):
        M, S = in_blocks(queries), in_blocks(keys)
        end_BM = torch.arange(1, M + 1).expand(2, M)
        mask = KeyRanges(end_BM, (end_BM - 5).clamp(min=0))
        q, k, v = (torch.randn(2, 2, length, 16) for length in (M, S, S))
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask.block_mask(S), enable_gqa=False)
    assert len(graphs) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_a_plan_by_indices_counts_the_blocks_that_it_hands_over(apart: bool) -> None:
    """Padding and masked pairs are executed, not needed."""
    B, T = 2, 300
    active_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.6
    states_BT = 1 + active_BT.long()
    first_BT = (torch.arange(T) // 140 * 140).expand(B, T) if apart else None
    counts = {}
    for by_indices in (False, True):
        with attention_by_indices(by_indices), documents_apart(first_BT):
            plan = LatentPlan(states_BT, active_BT, [torch.arange(B * T)], torch.float32)
        counts[by_indices] = PassCounts()
        plan.record(counts[by_indices])
    dense, indexed = counts.values()
    assert (indexed.rows, indexed.keys) == (dense.rows, dense.keys)
    assert indexed.executed_rows == [in_blocks(dense.rows[0])]
    assert plan.ranges is not None
    mask = plan.ranges.block_mask(plan.slots)
    assert indexed.executed_keys == [int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) * BLOCK**2]
    seen = plan.ranges.seen(plan.slots)[:, 0]
    query_N = plan.query_slot_N
    assert int(seen.flatten(0, 1)[query_N].sum()) == indexed.keys[0]
    assert (seen.sum(2) > 0).all()


def test_documents_of_a_causal_pass_cost_their_blocks() -> None:
    first_BT = torch.tensor([[0] * 256 + [256] * 128])
    counts = PassCounts()
    with attention_by_indices(True), documents_apart(first_BT):
        CausalPlan(1, 384).record(counts, torch.ones(1, 384, dtype=torch.bool))
    assert counts.executed_keys == [(1 + 2 + 1) * BLOCK**2]
    assert counts.keys == [256 * 257 // 2 + 128 * 129 // 2]


@pytest.mark.parametrize("documents", [None, 0])
@pytest.mark.parametrize("case", list(CASES))
def test_every_method_is_the_same_by_indices(
    tiny: Callable, batch: Callable, device: torch.device, case: str, documents: int | None
) -> None:
    """Logits, gradients, halting and what was needed; rows, queries and keys are padded to whole blocks. On a CUDA
    device it is FlexAttention's compiled kernels that are held to dense masks, in float32, which they have."""
    shape = replace(TINY, d=64) if device.type == "cuda" else TINY
    model = build(tiny, case, document_start=documents, shape=shape)
    model = model.to(device, torch.float32) if device.type == "cuda" else model
    bound = 1e-4 if device.type == "cuda" else 1e-10
    tokens, targets = (x.to(device) for x in batch(2, 17, seed=4))
    lengths = torch.tensor([17, 12], device=device)
    found = []
    for kernel in (AttentionKernel.DENSE, AttentionKernel.INDICES):
        model.attention_kernel = kernel
        out = model(tokens, targets, lengths_B=lengths, return_logits=True)
        found.append((out, torch.autograd.grad(out.loss, list(model.parameters()))))
    (dense, mine), (indexed, theirs) = found
    torch.testing.assert_close(indexed.logits_BTV[0], dense.logits_BTV[0], atol=bound, rtol=0)
    assert torch.equal(indexed.trace.steps_BT, dense.trace.steps_BT)
    assert (indexed.trace.counts.rows, indexed.trace.counts.keys) == (dense.trace.counts.rows, dense.trace.counts.keys)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=bound, rtol=0)


def test_on_a_cpu_masks_are_dense_unless_asked_for(tiny: Callable) -> None:
    model = tiny(Method.VANILLA, VanillaOptions())
    assert not model.cpu().attends_by_indices
    model.attention_kernel = AttentionKernel.INDICES
    assert model.attends_by_indices


def test_padding_of_a_pass_reaches_nobody(tiny: Callable, batch: Callable) -> None:
    """Rows of nothing run through the layers; what they leave there is neither kept nor seen."""
    model = build(tiny, "adaptive")
    model.attention_kernel = AttentionKernel.INDICES
    widths: list[int] = []
    model.latent_loop.stack.blocks[0].qkv.register_forward_hook(lambda _, args, __: widths.append(len(args[0])))
    tokens, targets = batch(4, 60)
    counts = model(tokens, targets).trace.counts
    assert widths == counts.executed_rows == [240, *(in_blocks(rows) for rows in counts.rows[1:])]
    assert counts.executed_rows != counts.rows
    assert all(isinstance(rows, int) for rows in counts.executed_keys)


def test_every_query_needs_a_key() -> None:
    """What a query slot without a row would give: a number, and a gradient that is one."""
    plan_rows = torch.tensor([[True, False, False, False], [False, False, False, False]])
    with attention_by_indices(True):
        plan = LatentPlan(torch.ones(2, 4, dtype=torch.long), plan_rows, [], torch.float32)
    x: Tensor = torch.randn(plan.padding + 1, 2, 8, requires_grad=True)
    out, _ = plan.attend(x, x, x, None)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all()
    assert gradient.isfinite().all()
