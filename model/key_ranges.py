"""Attention with a mask from indices: each query sees one run of the keys, from a first one up to a last one.

That is all that the plans of backbone.py ever ask for, so two integers per query say what dense masks say with one
number per query and key. On CUDA devices FlexAttention makes a fused kernel of it, which skips the blocks of keys that
nobody sees; which blocks these are follows from the integers too, without asking the device anything. Elsewhere the
same integers make one boolean mask for PyTorch's own attention: the reference that the tests hold to the definition.
"""

# ruff: noqa: N815 (fields of a dataclass carry shape suffixes too)

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries, and keys, of one block of FlexAttention. Query slots and keys are padded to multiples of it, so that few
shapes come up, however many rows are active."""
SMALLEST_HEAD = 16
"""Numbers in a head that FlexAttention's kernels need at least."""


def in_blocks(number: Any) -> Any:
    """So many, padded to whole blocks; of an integer, or of a tensor of them."""
    return (number + BLOCK - 1) // BLOCK * BLOCK


def fits_flex(like: Tensor, head_dim: int) -> bool:
    """Whether FlexAttention has a kernel for heads of this size on the device, and in the precision, of a tensor."""
    return like.device.type == "cuda" and like.dtype is not torch.float64 and head_dim >= SMALLEST_HEAD


@dataclass(frozen=True)
class KeyRanges:
    """Which keys each query sees. Every query needs one, or its softmax has nothing to sum over."""

    end_BM: Tensor
    """One past the last key that a query sees."""
    first_BM: Tensor
    """The first key that it sees."""

    def seen(self, keys: int) -> Tensor:
        """[B, 1, M, keys]: True where the query sees the key."""
        slot_S = torch.arange(keys, device=self.end_BM.device)
        return ((slot_S < self.end_BM[..., None]) & (slot_S >= self.first_BM[..., None]))[:, None]

    def _edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each block of queries, in blocks of keys: from and to which there is anything to see, and from and to
        which all is seen by all of its queries. [B, M / BLOCK] each."""
        queries = self.end_BM.shape[1]
        slot_M = torch.arange(in_blocks(queries), device=self.end_BM.device)
        near_M = slot_M.clamp(max=queries - 1)  # where the last block of queries is cut off, its last one stands in
        end_BQM, first_BQM = (x[:, near_M].unflatten(1, (-1, BLOCK)) for x in (self.end_BM, self.first_BM))
        there_QM = (slot_M < queries).unflatten(0, (-1, BLOCK))
        return (
            first_BQM.amin(2) // BLOCK,
            in_blocks(end_BQM.amax(2)) // BLOCK,
            in_blocks(first_BQM.amax(2)) // BLOCK,
            (end_BQM * there_QM).amin(2) // BLOCK,  # and nothing is seen by all of it
        )

    def pairs(self) -> Tensor:
        """Query-key pairs of each block of queries, [B, M / BLOCK], in the blocks that are computed."""
        low_BQ, high_BQ, *_ = self._edges()
        return (high_BQ - low_BQ) * BLOCK * BLOCK

    def block_mask(self, keys: int) -> BlockMask:
        """The same for FlexAttention, over so many keys."""
        low_BQ, high_BQ, full_low_BQ, full_high_BQ = (edge[..., None] for edge in self._edges())
        block_K = torch.arange(in_blocks(keys) // BLOCK, device=self.end_BM.device)
        some_BQK = (block_K >= low_BQ) & (block_K < high_BQ)
        full_BQK = (block_K >= full_low_BQ) & (block_K < full_high_BQ)
        end_BM, first_BM = self.end_BM, self.first_BM

        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv < end_BM[b, q]) & (kv >= first_BM[b, q])

        def blocks(chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
            """How many blocks of keys, and which: the chosen ones first."""
            order_BQK = chosen_BQK.to(torch.int8).argsort(dim=2, descending=True, stable=True)
            return chosen_BQK.sum(2)[:, None].int(), order_BQK[:, None].int().contiguous()

        partial, partial_order = blocks(some_BQK & ~full_BQK)
        full, full_order = blocks(full_BQK)
        return BlockMask.from_kv_blocks(
            partial,
            partial_order,
            full,
            full_order,
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(self.end_BM.shape[1], keys),
        )

    @cached_property
    def _block_masks(self) -> dict[int, BlockMask]:
        return {}

    def attend(self, q_BMHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor) -> Tensor:
        """Scaled dot-product attention on position-major tensors; gives [B, M, H, E]. One call serves all layers of a
        pass with one mask."""
        q_BHME, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BMHE, k_BSGE, v_BSGE))
        grouped, keys = q_BHME.shape[1] != k_BGSE.shape[1], k_BGSE.shape[2]
        if fits_flex(q_BMHE, q_BMHE.shape[-1]):
            if keys not in self._block_masks:
                self._block_masks[keys] = self.block_mask(keys)
            mask = self._block_masks[keys]
            out_BHME: Tensor = compiled_flex()(q_BHME, k_BGSE, v_BGSE, block_mask=mask, enable_gqa=grouped)
        else:
            seen = self.seen(keys)
            out_BHME = F.scaled_dot_product_attention(q_BHME, k_BGSE, v_BGSE, attn_mask=seen, enable_gqa=grouped)
        return out_BHME.transpose(1, 2)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all lengths. Uncompiled it would make the matrix of all scores."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
