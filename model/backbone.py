"""The Llama stack of every method, and the rule of which states attend to which.

RMSNorm before each part, rotary positions, multi-head or grouped-query attention, SwiGLU, no biases, a final norm that
belongs to the stack. Rows are packed: every linear layer sees [N, d] with just the N rows that exist in this pass.
Which row attends to which is not the block's business; an *attention plan* decides:

- CausalPlan: one state per position, the ordinary causal pass over [B, T].
- ThoughtPlan: pass k of a latent chain, where the active rows of pass k attend to every state that has been executed
  at their position or before (the paper's 2-D causal attention).
- ReusePlan: a later pass that sees one state per position, the newest.

Shape suffixes, here and in the files beside this one:
B sequences, T positions, N packed rows, M query slots, S key slots, H query heads, G key/value heads, E head dimension,
d hidden size, V vocabulary, K states per position (l_max + 1), L layers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from haltscale.model.config import Shape
from haltscale.model.kernels import (
    Chunk,
    ChunkedAttentionFunction,
    MergeFunction,
    RMSNormFunction,
    RotateFunction,
    SwiGLUFunction,
    TakeFunction,
    at_least_float32,
    fused_cpu_attention,
)
from haltscale.model.key_ranges import BLOCK, KeyRanges, in_blocks
from haltscale.model.ledger import PassCounts

Rope = tuple[Tensor, Tensor]  # cos_N1E, sin_N1E with E halved
Memory = tuple[tuple[Tensor, Tensor], ...]  # of one layer: for each visible pass, keys and values of its rows


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that linear layers give for input x: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@functools.lru_cache(maxsize=16)
def _rope_table(length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Rope:
    """Angles of positions 0..length-1. Derived, never a buffer: `model.bfloat16()` would round a buffer's angles."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        inverse_E = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle_TE = torch.arange(length, dtype=torch.float64)[:, None] * inverse_E
        return angle_TE.cos().to(device, dtype), angle_TE.sin().to(device, dtype)


def rope_table(length: int, shape: Shape, theta: float, like: Tensor) -> Rope:
    """cos and sin, [length, 1, head_dim / 2], in float32 (float64 for a float64 model), on the device of `like`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rounded = 1 << max(length - 1, 0).bit_length()  # few distinct tables, whatever lengths come
    cos_TE, sin_TE = _rope_table(rounded, shape.head_dim, theta, like.device, dtype)
    return cos_TE[:length, None], sin_TE[:length, None]


def rope_of(rope: Rope, row_N: Tensor) -> Rope:
    """The angles of some rows; as they are where one row of angles serves all."""
    cos_N1E, sin_N1E = rope
    return (cos_N1E, sin_N1E) if len(cos_N1E) == 1 else (cos_N1E[row_N], sin_N1E[row_N])


def rotate(x_NHE: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding (Su et al., 2021), in the half-split layout that Llama's Hugging Face weights use."""
    cos_N1E, sin_N1E = rope
    if torch.compiler.is_compiling():
        a_NHE, b_NHE = x_NHE.to(cos_N1E.dtype).chunk(2, dim=-1)
        parts = (a_NHE * cos_N1E - b_NHE * sin_N1E, b_NHE * cos_N1E + a_NHE * sin_N1E)
        return torch.cat(parts, dim=-1).to(x_NHE.dtype)
    turned: Tensor = RotateFunction.apply(x_NHE, cos_N1E, sin_N1E)
    return turned


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, gate and up the halves of the last dimension (Shazeer, 2020)."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    mixed: Tensor = SwiGLUFunction.apply(gate_up)
    return mixed


class AttentionKernel(StrEnum):
    """How attention masks are represented where a plain causal mask does not suffice. Changes rounding only."""

    AUTO = "auto"
    """By indices on CUDA devices, where head and precision allow it; by dense masks elsewhere."""
    DENSE = "dense"
    """Additive masks, queries by chunks over prefixes of the keys."""
    INDICES = "indices"
    """FlexAttention with a mask from two integers per query (key_ranges.py); rows, query slots and keys are padded to
    whole blocks, so that a compiled pass meets few shapes."""


class AttentionPlan(Protocol):
    """Who sees whom in one pass, shared by all layers of it."""

    @property
    def padding(self) -> int:
        """Rows of nothing that are added behind the real ones on their way through the layers; they see nobody, and
        nobody sees them."""
        ...

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Attention output [N, H*E] of this pass's rows, and the layer's memory with this pass's states added."""
        ...


def attention(q_BMHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention on position-major tensors; gives [B, M, H, E]."""
    grouped = q_BMHE.shape[2] != k_BSGE.shape[2]
    out_BHME = F.scaled_dot_product_attention(
        q_BMHE.transpose(1, 2),
        k_BSGE.transpose(1, 2),
        v_BSGE.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=grouped,
    )
    return out_BHME.transpose(1, 2)


def attention_in_chunks(q_BMHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, chunks: list[Chunk]) -> Tensor:
    """The same, queries by chunks over prefixes of the keys."""
    if fused_cpu_attention(q_BMHE) and q_BMHE.shape[2] == k_BSGE.shape[2]:
        q_BHME, k_BHSE, v_BHSE = (x.transpose(1, 2) for x in (q_BMHE, k_BSGE, v_BSGE))
        out_BHME: Tensor = ChunkedAttentionFunction.apply(q_BHME, k_BHSE, v_BHSE, chunks)
        return out_BHME.transpose(1, 2)
    parts = [
        attention(q_BMHE[:, a:b], k_BSGE[:, :width], v_BSGE[:, :width], mask, causal=mask is None)
        for a, b, width, mask in chunks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


_first_seen: ContextVar[Tensor | None] = ContextVar("first_seen", default=None)
_by_indices: ContextVar[bool] = ContextVar("by_indices", default=False)


@contextmanager
def attention_by_indices(on: bool) -> Iterator[None]:
    """Have every plan that is made meanwhile say by indices who sees whom (AttentionKernel.INDICES), or by masks."""
    token = _by_indices.set(on)
    try:
        yield
    finally:
        _by_indices.reset(token)


@contextmanager
def documents_apart(first_BT: Tensor | None) -> Iterator[None]:
    """Have every plan that is made meanwhile stop at the borders of documents.

    Who sees whom is the plans' business alone, so no method has to know of documents.

    first_BT: for each position, the one at which its document begins; None where documents see each other.
    """
    token = _first_seen.set(first_BT)
    try:
        yield
    finally:
        _first_seen.reset(token)


QUERIES_PER_CHUNK = 64
MAX_CHUNKS = 8


@dataclass(frozen=True)
class CausalPlan:
    """The ordinary causal pass: rows are [B, T] flattened, each sees its own sequence up to itself.

    Padding stands only at the end of a sequence, so no real position can see it and no mask is needed. Within
    `documents_apart`, a row sees its own document alone; queries are then cut into chunks as in a LatentPlan.
    """

    batch: int
    length: int
    keep: bool = False
    """Whether a later pass will look at these states."""
    first: Tensor | None = field(default_factory=_first_seen.get, compare=False)
    """[B, positions], as in `documents_apart`; each position may have several rows here, one after the other."""
    by_indices: bool = field(default_factory=_by_indices.get, compare=False)
    """As in `attention_by_indices`."""
    padding: ClassVar[int] = 0

    @functools.cached_property
    def _ranges(self) -> KeyRanges | None:
        """The keys that rows see, if that is said by indices."""
        if self._first_row is None or not self.by_indices:
            return None
        end_T = torch.arange(1, self.length + 1, device=self._first_row.device)
        return KeyRanges(end_T.expand_as(self._first_row), self._first_row)

    @functools.cached_property
    def _first_row(self) -> Tensor | None:
        """[B, T]: the first row of this pass that each row may see."""
        if self.first is None:
            return None
        rows = self.length // self.first.shape[1]
        return (self.first * rows).repeat_interleave(rows, dim=1)

    @functools.cached_property
    def _borders(self) -> list[tuple[int, int, Tensor]]:
        """Chunks of queries a..b over the keys up to b, with which of them are after the query or before its
        document."""
        first_BT, T = self._first_row, self.length
        assert first_BT is not None
        t_T = torch.arange(T, device=first_BT.device)
        chunks = min(max(T // QUERIES_PER_CHUNK, 1), MAX_CHUNKS)
        edges = [T * c // chunks for c in range(chunks + 1)]
        return [(a, b, (t_T[:b] > t_T[a:b, None]) | (t_T[:b] < first_BT[:, a:b, None])) for a, b in pairwise(edges)]

    @functools.cached_property
    def _chunks(self) -> dict[torch.dtype, list[Chunk]]:
        return {}

    def _chunks_for(self, q_NHE: Tensor) -> list[Chunk]:
        """The same as attention takes them; made once for all layers."""
        if self.first is None:
            return [(0, self.length, self.length, None)]
        if q_NHE.dtype not in self._chunks:
            self._chunks[q_NHE.dtype] = [
                (a, b, b, q_NHE.new_zeros(unseen_BMS.shape).masked_fill_(unseen_BMS, -torch.inf)[:, None])
                for a, b, unseen_BMS in self._borders
            ]
        return self._chunks[q_NHE.dtype]

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        B, T = self.batch, self.length
        q_BTHE, k_BTGE, v_BTGE = (x.unflatten(0, (B, T)) for x in (q_NHE, k_NGE, v_NGE))
        if self._ranges is not None:
            out_BTHE = self._ranges.attend(q_BTHE, k_BTGE, v_BTGE)
        else:
            out_BTHE = attention_in_chunks(q_BTHE, k_BTGE, v_BTGE, self._chunks_for(q_NHE))
        kept = ((k_NGE.flatten(1), v_NGE.flatten(1)),) if self.keep else ()
        return out_BTHE.reshape(B * T, -1), kept

    def record(self, counts: PassCounts, valid_BT: Tensor) -> None:
        """Add this pass to the counts: real position t of a sequence, or of a document, needs t + 1 keys."""
        keys_BT = valid_BT.cumsum(1)
        pairs = self.batch * self.length * self.length
        if self._first_row is not None:
            keys_BT = keys_BT - self._first_row
            if self._ranges is None:
                pairs = sum(self.batch * (b - a) * b for a, b, _ in self._borders)
        numbers = [valid_BT.sum(), (keys_BT * valid_BT).sum()]
        if self._ranges is not None:
            numbers.append(self._ranges.pairs().sum())
        rows, keys, *computed = torch.stack(numbers).tolist()  # one trip
        pairs = computed[0] if computed else pairs
        counts.record(rows=rows, keys=keys, executed_rows=self.batch * self.length, executed_keys=pairs)


class LatentPlan:
    """Pass k >= 1 of a latent chain: the active rows see all states executed so far at their position or before.

    That is the paper's rule, (t, k) attends to (j, i) iff j <= t and i <= k, because when pass k runs every state that
    exists has i <= k. The states of a sequence are kept position-major: (0,0) (0,1) .. (1,0) (1,1) .. So what a query
    at position t may see is a *prefix* of the keys, and the whole mask follows from one count per query. By dense
    masks, queries are cut into a few chunks, each handed only the prefix that its last query needs, which removes most
    masked work; by indices the count itself is the mask.

    Within `documents_apart`, what a query sees begins with its document.

    Building a plan reads a few integers back from the device (how many rows are active, and the sizes that follow), in
    one trip per pass, not per layer. Without active rows there is nothing to attend with; `row_N` is empty then.
    """

    QUERIES_PER_CHUNK = QUERIES_PER_CHUNK
    MAX_CHUNKS = MAX_CHUNKS

    def __init__(
        self,
        states_BT: Tensor,
        active_BT: Tensor,
        earlier: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        queries_per_chunk: int | None = None,
    ):
        """
        states_BT: visible states at each position, those of this pass included (0 at padding).
        active_BT: positions that have a row in this pass.
        earlier: for each earlier pass whose states are visible, its rows as indices into [B*T], ascending.
        dtype: of the queries, for the additive mask.
        queries_per_chunk: instead of the class's own.
        """
        B, T = states_BT.shape
        device = states_BT.device
        self.batch = B
        self.by_indices = _by_indices.get()
        end_BT = states_BT.cumsum(1)  # keys visible at t = slot one past its newest state
        before_BT: Tensor | None = None  # of these, the keys of earlier documents
        if (first_BT := _first_seen.get()) is not None:
            before_BT = (end_BT - states_BT).gather(1, first_BT)
        needed_BT = end_BT if before_BT is None else end_BT - before_BT
        place_BT = active_BT.cumsum(1) - 1  # of an active row among its sequence's
        active_B = active_BT.sum(1)
        queries = active_B.max()
        sizes = [end_BT[:, -1].max(), end_BT[:, -1].sum(), (needed_BT * active_BT).sum(), queries, active_B.sum()]

        ranges: KeyRanges | None = None
        if self.by_indices:
            ranges = self._ranges(active_BT, place_BT, end_BT, before_BT)
            asked_Q = torch.arange(in_blocks(T) // BLOCK, device=device) * BLOCK < queries
            numbers = [(ranges.pairs() * asked_Q).sum()[None]]
        else:
            per_chunk, most = queries_per_chunk or self.QUERIES_PER_CHUNK, self.MAX_CHUNKS
            chunks_0 = (queries // per_chunk).clamp(min=1, max=most)
            edge_C = queries * torch.arange(1, most + 1, device=device) // chunks_0
            chunk_N = torch.searchsorted(edge_C, place_BT.flatten(), right=True)
            # A query slot that holds no row sees one key, which keeps its softmax finite; nobody reads what it gives.
            visible_N = torch.where(active_BT, end_BT, 1).flatten()
            widest_C = torch.ones(most, dtype=torch.long, device=device).scatter_reduce(0, chunk_N, visible_N, "amax")
            numbers = [chunks_0[None], widest_C]
        read = torch.cat((torch.stack(sizes), *numbers)).tolist()  # the one trip
        slots, states, self.keys_needed, M, rows, *read = read
        if self.by_indices:
            slots, M = in_blocks(slots), in_blocks(M)
        self.slots = slots
        self.full = states == B * slots
        self.queries = M
        self.padding = -rows % BLOCK if self.by_indices else 0
        self.row_N = row_N = torch.nonzero_static(active_BT.flatten(), size=rows).squeeze(1)
        self.chunks: list[Chunk] = []
        self.ranges: KeyRanges | None = None
        if rows == 0:
            return

        # Where the states go: state i of a position stands i places after the position's first. Padding, which has
        # rows in the first pass but no states, goes to one spare slot that nobody reads.
        first_N = (end_BT - states_BT + slots * torch.arange(B, device=device)[:, None]).flatten()
        exists_N = states_BT.flatten() > 0
        self.slots_of = [
            torch.where(exists_N[own_N], first_N[own_N] + i, B * slots) for i, own_N in enumerate((*earlier, row_N))
        ]
        self.dense = rows == B * M
        self.query_slot_N = row_N // T * M + place_BT.flatten()[row_N]
        if ranges is not None:
            self.executed_keys = read[0]
            self.ranges = KeyRanges(ranges.end_BM[:, :M], ranges.first_BM[:, :M])
            return
        chunks, *widest = read
        visible_BM = torch.ones(B * M, dtype=torch.long, device=device)
        visible_BM = visible_BM.index_copy(0, self.query_slot_N, end_BT.flatten()[row_N]).view(B, M)
        before_BM: Tensor | None = None
        if before_BT is not None:
            before_BM = torch.zeros_like(visible_BM).flatten()
            before_BM = before_BM.index_copy(0, self.query_slot_N, before_BT.flatten()[row_N]).view(B, M)
        edges = [M * c // chunks for c in range(chunks + 1)]
        slot_S = torch.arange(slots, device=device)
        for (a, b), width in zip(pairwise(edges), widest, strict=False):
            unseen_BMS = slot_S[:width] >= visible_BM[:, a:b, None]
            if before_BM is not None:
                unseen_BMS |= slot_S[:width] < before_BM[:, a:b, None]
            mask_BMS = torch.zeros(unseen_BMS.shape, dtype=dtype, device=device).masked_fill_(unseen_BMS, -torch.inf)
            self.chunks.append((a, b, width, mask_BMS[:, None]))
        self.executed_keys = sum(B * (b - a) * width for a, b, width, _ in self.chunks)

    @staticmethod
    def _ranges(active_BT: Tensor, place_BT: Tensor, end_BT: Tensor, before_BT: Tensor | None) -> KeyRanges:
        """The keys of each query slot, for as many slots as there might be, in whole blocks; a slot that holds no row
        sees one key."""
        B, T = active_BT.shape
        M = in_blocks(T)
        slot_BT = torch.where(active_BT, place_BT, M)  # the last one is spare
        blank_BM = torch.zeros(B, M + 1, dtype=torch.long, device=active_BT.device)
        end_BM = (blank_BM + 1).scatter(1, slot_BT, end_BT)[:, :M]
        first_BM = blank_BM if before_BT is None else blank_BM.scatter(1, slot_BT, before_BT)
        return KeyRanges(end_BM, first_BM[:, :M])

    def record(self, counts: PassCounts) -> None:
        """Add this pass to the counts; attention is handed whole chunks or blocks, masked pairs included."""
        rows = len(self.row_N)
        counts.record(
            rows=rows, keys=self.keys_needed, executed_rows=rows + self.padding, executed_keys=self.executed_keys
        )

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        B, S = self.batch, self.slots
        G, E = k_NGE.shape[1:]
        q_NHE, k_NGE, v_NGE = (self._real(x) for x in (q_NHE, k_NGE, v_NGE))
        memory = (*(memory or ()), (k_NGE.flatten(1), v_NGE.flatten(1)))
        keys, values = (self._merge(parts) for parts in zip(*memory, strict=True))
        return self._look(q_NHE, keys[:-1].view(B, S, G, E), values[:-1].view(B, S, G, E)), memory

    def _real(self, x_N: Tensor) -> Tensor:
        """The rows without the padding behind them."""
        return x_N[: len(self.row_N)] if self.padding else x_N

    def _look(self, q_NHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor) -> Tensor:
        """Attention of this pass's rows over all states."""
        B, M = self.batch, self.queries
        E = k_BSGE.shape[3]
        q_flat = q_NHE.flatten(1)
        if not self.dense:
            q_flat = MergeFunction.apply(B * M + 1, False, [self.query_slot_N], q_flat)[:-1]
        q_BMHE = q_flat.view(B, M, -1, E)
        if self.ranges is not None:
            out_BMHE = self.ranges.attend(q_BMHE, k_BSGE, v_BSGE)
        else:
            out_BMHE = attention_in_chunks(q_BMHE, k_BSGE, v_BSGE, self.chunks)
        out_flat = out_BMHE.reshape(B * M, -1)
        looked: Tensor = out_flat if self.dense else TakeFunction.apply(out_flat, self.query_slot_N)
        return F.pad(looked, (0, 0, 0, self.padding)) if self.padding else looked

    def _merge(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The states of all passes in position-major order, [B*S + 1, G*E].

        The row after the last slot is the spare one; it stays on, so that nothing has to be cut off and copied.
        """
        merged: Tensor = MergeFunction.apply(self.batch * self.slots + 1, self.full, self.slots_of, *parts)
        return merged


class ReusePlan(LatentPlan):
    """A later pass in which a position shows one state, its newest: the active rows see every position up to their own,
    and a position that has stopped keeps the keys and values of its last pass visible (AdaPonderLM)."""

    def __init__(self, valid_BT: Tensor, active_BT: Tensor, dtype: torch.dtype):
        """active_BT: positions that have a row in this pass."""
        super().__init__(valid_BT.long(), active_BT, [], dtype)

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """memory: keys and values of all B*T rows, as a CausalPlan with `keep` or a ReusePlan left them."""
        assert memory is not None
        G, E = k_NGE.shape[1:]
        q_NHE, k_NGE, v_NGE = (self._real(x) for x in (q_NHE, k_NGE, v_NGE))
        keys, values = (
            old.index_copy(0, self.row_N, new.flatten(1)) for old, new in zip(memory[0], (k_NGE, v_NGE), strict=True)
        )
        k_BTGE, v_BTGE = (x.view(self.batch, -1, G, E) for x in (keys, values))
        # By indices, slots are whole blocks, which may be more than there are positions: nobody sees the rest.
        k_BSGE, v_BSGE = (
            F.pad(x, (0, 0, 0, 0, 0, self.slots - x.shape[1])) if x.shape[1] < self.slots else x[:, : self.slots]
            for x in (k_BTGE, v_BTGE)
        )
        return self._look(q_NHE, k_BSGE, v_BSGE), ((keys, values),)


@dataclass(frozen=True)
class FadingPlan:
    """Another plan, with the logarithm of a weight added to every score that a key gets (PonderLM-3).

    The addition is done by one more dimension, in which the key carries the logarithm and every query the constant that
    survives the scaling; so fused attention and its gradient serve as they are.
    """

    inner: AttentionPlan
    log_weight: Tensor
    """[N], of the rows of this pass."""

    @property
    def padding(self) -> int:
        return self.inner.padding

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        H, E = q_NHE.shape[1:]
        log_weight_N = F.pad(self.log_weight, (0, self.padding)) if self.padding else self.log_weight
        fade_NG1 = log_weight_N.to(k_NGE.dtype)[:, None, None].expand(-1, k_NGE.shape[1], 1)
        constant_NH1 = q_NHE.new_full((len(q_NHE), H, 1), math.sqrt(E + 1))
        out_N, memory = self.inner.attend(
            torch.cat((q_NHE * math.sqrt((E + 1) / E), constant_NH1), dim=2),
            torch.cat((k_NGE, fade_NG1), dim=2),
            F.pad(v_NGE, (0, 1)),
            memory,
        )
        return out_N.view(-1, H, E + 1)[..., :E].flatten(1), memory


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain; the mean square is taken in at least float32."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x_Nd: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            wide_Nd = at_least_float32(x_Nd)
            scale_N1 = torch.rsqrt(wide_Nd.square().mean(-1, keepdim=True) + self.eps)
            return (wide_Nd * scale_N1).to(x_Nd.dtype) * self.weight
        normed_Nd: Tensor = RMSNormFunction.apply(x_Nd, self.weight, self.eps)
        return normed_Nd


class Block(nn.Module):
    """One transformer block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, shape: Shape, norm_eps: float, *, residual_scale: float = 1.0):
        """residual_scale: of what attention and MLP add to the residual stream."""
        super().__init__()
        self.shape = shape
        self.residual_scale = residual_scale
        kv = shape.kv_heads * shape.head_dim
        self.attention_norm = RMSNorm(shape.d, norm_eps)
        self.qkv = nn.Linear(shape.d, shape.d + 2 * kv, bias=False)  # one product for queries, keys and values
        self.out = nn.Linear(shape.d, shape.d, bias=False)
        self.mlp_norm = RMSNorm(shape.d, norm_eps)
        self.gate_up = nn.Linear(shape.d, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.d, bias=False)

    def forward(self, x_Nd: Tensor, rope: Rope, plan: AttentionPlan, memory: Memory | None) -> tuple[Tensor, Memory]:
        q_NHE, k_NGE, v_NGE = self.before_attention(x_Nd, rope)
        mixed_Nd, memory = plan.attend(q_NHE, k_NGE, v_NGE, memory)
        return self.after_attention(x_Nd, mixed_Nd), memory

    def before_attention(self, x_Nd: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, E], keys and values [N, G, E] of the rows."""
        shape = self.shape
        qkv = self.qkv(self.attention_norm(x_Nd)).unflatten(1, (shape.heads + 2 * shape.kv_heads, shape.head_dim))
        turned, v_NGE = qkv.split((shape.heads + shape.kv_heads, shape.kv_heads), dim=1)
        q_NHE, k_NGE = rotate(turned, rope).split((shape.heads, shape.kv_heads), dim=1)
        return q_NHE, k_NGE, v_NGE

    def after_attention(self, x_Nd: Tensor, mixed_Nd: Tensor) -> Tensor:
        """The block's output, once the rows have looked at others."""
        x_Nd = x_Nd + self._scaled(self.out(mixed_Nd))
        return x_Nd + self._scaled(self.down(swiglu(self.gate_up(self.mlp_norm(x_Nd)))))

    def _scaled(self, added_Nd: Tensor) -> Tensor:
        return added_Nd if self.residual_scale == 1 else added_Nd * self.residual_scale

    def compile_(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile what is before and after attention, for any number of rows: raggedness leaves it no fixed shape, and
        attention has fused kernels of its own. The same two graphs serve all blocks and passes."""
        for name in ("before_attention", "after_attention"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True, backend=backend))


class Stack(nn.Module):
    """f: all blocks and the final norm. What goes out has unit scale and can go in again."""

    def __init__(self, shape: Shape, norm_eps: float, *, residual_scale: float = 1.0):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(shape, norm_eps, residual_scale=residual_scale) for _ in range(shape.layers))
        self.final_norm = RMSNorm(shape.d, norm_eps)
        self.activation_checkpointing = False

    def forward(
        self,
        x_Nd: Tensor,
        rope: Rope,
        plan: AttentionPlan,
        memories: Sequence[Memory | None] | None = None,
        *,
        final_norm: bool = True,
        blocks: slice = slice(None),
    ) -> tuple[Tensor, list[Memory]]:
        """One pass over the packed rows x_Nd, through all blocks or some.

        `memories` holds, for each of these blocks, what the passes before this one left.
        """
        part = self.blocks[blocks]
        left: list[Memory] = []
        rows = len(x_Nd)
        if plan.padding:
            x_Nd = F.pad(x_Nd, (0, 0, 0, plan.padding))
            rope = tuple(F.pad(angle_N1E, (0, 0, 0, 0, 0, plan.padding)) for angle_N1E in rope)  # type: ignore[assignment]
        for block, memory in zip(part, memories or [None] * len(part), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_Nd, memory = checkpoint(
                    block, x_Nd, rope, plan, memory, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_Nd, memory = block(x_Nd, rope, plan, memory)
            left.append(memory)
        if plan.padding:
            x_Nd = x_Nd[:rows]
        return self.final_norm(x_Nd) if final_norm else x_Nd, left
