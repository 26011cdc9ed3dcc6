"""Incremental decoding: keys and values kept from token to token, and attention of one new row per sequence.

Prompts are read whole: the passes that training makes leave their keys and values in `PromptStates`, and the cache
takes them over as if the tokens had been read one by one.

A cache has *regions*. A query reads exactly one region, which lies in one piece, so that decoding needs no gathering
and, while all sequences hold equally much, no mask. A method with one state per token has one region. Where a query of
step k may see the states of steps 0..k and no others (adaptive latent chain-of-thought), region k holds just those: a
state of step i is written to all regions from i on. That spends memory, (l_max+1)(l_max+2)/2 rows per token where
l_max+1 would hold the states, to read each of them in one stride.
"""

# ruff: noqa: N815 (fields of a tuple carry shape suffixes too)

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from haltscale.model.backbone import Memory, attention
from haltscale.model.ledger import PassCounts

FIRST_CAPACITY = 64
"""Tokens that a new cache has room for; it doubles whenever it is full."""


class PromptPass(NamedTuple):
    """What one pass over whole prompts left."""

    regions: range
    """The regions of the cache that its states go to."""
    blocks: slice
    """The layers that were run."""
    states: list[tuple[Tensor, Tensor]]
    """Keys and values [N, row] of each of them."""
    row_N: Tensor | None
    """The rows of the pass as indices into [B*T], ascending; None: all of them."""


class PromptStates:
    """Keys and values of the passes over whole prompts, in the order of the passes, on their way into a cache.

    Several states of one position stand in the order of their passes; a pass that has several rows for each position
    (pause, PonderLM-2) is the only one of its region.
    """

    def __init__(self) -> None:
        self.passes: list[PromptPass] = []
        self.rows_per_position = 1

    def add(
        self,
        memories: Sequence[Memory],
        regions: range,
        *,
        row_N: Tensor | None = None,
        blocks: slice = slice(None),
        rows_per_position: int = 1,
    ) -> None:
        """Keep the newest part of what a pass left in the memory of each layer."""
        self.rows_per_position = rows_per_position
        self.passes.append(PromptPass(regions, blocks, [memory[-1] for memory in memories], row_N))


class KeyValueCache:
    """Keys and values of all layers for a batch of sequences that advance together, one token at a time."""

    def __init__(
        self,
        batch: int,
        row: int,
        widths: Sequence[int],
        *,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = FIRST_CAPACITY,
    ):
        """
        row: numbers in a key of all heads. widths: for each region, the most states that one token can leave in it.
        layers: how many keep states. capacity: tokens to make room for at once.
        """
        self.batch = batch
        self.widths = list(widths)
        self.capacity = capacity  # tokens
        self.held = [[0] * batch for _ in widths]  # states of each region and sequence
        self._row = row
        self.memories: list[Memory] = [
            ((self._blank(self.capacity, dtype, device), self._blank(self.capacity, dtype, device)),)
            for _ in range(layers)
        ]

    def _blank(self, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(self.batch, capacity * sum(self.widths), self._row, dtype=dtype, device=device)

    def _start(self, region: int, capacity: int) -> int:
        return capacity * sum(self.widths[:region])

    def make_room(self, tokens: int) -> None:
        """Grow until `tokens` tokens fit."""
        while self.capacity < tokens:
            old, new = self.capacity, 2 * self.capacity

            def moved(rows_BSd: Tensor, old: int = old, new: int = new) -> Tensor:
                bigger = self._blank(new, rows_BSd.dtype, rows_BSd.device)
                for region, width in enumerate(self.widths):
                    a, b = self._start(region, old), self._start(region, new)
                    bigger[:, b : b + width * old] = rows_BSd[:, a : a + width * old]
                return bigger

            self.memories = [((moved(keys), moved(values)),) for ((keys, values),) in self.memories]
            self.capacity = new

    def fill(self, rows: list[int], valid_BT: Tensor, prompts: PromptStates) -> None:
        """Give the sequences `rows`, which hold nothing yet, the states of their prompts. valid_BT: real positions."""
        valid_BS = valid_BT.repeat_interleave(prompts.rows_per_position, dim=1)
        (B, S), device = valid_BS.shape, valid_BS.device
        valid_N, every_N = valid_BS.flatten(), torch.arange(B * S, device=device)
        base_B = torch.tensor(rows, device=device) * self.capacity * sum(self.widths)
        for region in range(len(self.widths)):
            own = [one for one in prompts.passes if region in one.regions]
            states_N = torch.zeros(B * S, dtype=torch.long, device=device)
            places = []  # of each pass: its rows that are real, their slots, and their place among a slot's states
            for one in own:
                row_N = every_N if one.row_N is None else one.row_N
                real_N = valid_N[row_N].nonzero().squeeze(1)
                row_N = row_N[real_N]
                places.append((real_N, row_N, states_N[row_N]))
                states_N.index_add_(0, row_N, torch.ones_like(row_N))
            states_BS = states_N.view(B, S)
            first_N = (states_BS.cumsum(1) - states_BS + base_B[:, None] + self._start(region, self.capacity)).flatten()
            for one, (real_N, row_N, place_N) in zip(own, places, strict=True):
                slot_N = first_N[row_N] + place_N
                for ((keys, values),), fresh in zip(self.memories[one.blocks], one.states, strict=True):
                    for store, new_Nr in zip((keys, values), fresh, strict=True):
                        new_Nr = new_Nr if len(real_N) == len(new_Nr) else new_Nr.index_select(0, real_N)
                        store.flatten(0, 1).index_copy_(0, slot_N, new_Nr)
            for b, held in zip(rows, states_BS.sum(1).tolist(), strict=True):
                self.held[region][b] = held

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences alone, in this order."""
        device = self.memories[0][0][0].device
        row_N = torch.tensor(rows, device=device)
        for layer, ((keys, values),) in enumerate(self.memories):  # one by one: never two caches at a time
            self.memories[layer] = ((keys.index_select(0, row_N), values.index_select(0, row_N)),)
        self.held = [[held[b] for b in rows] for held in self.held]
        self.batch = len(rows)

    def plan(
        self, rows: list[int], *, read: int, write: Sequence[int], new: int = 1, replace: bool = False
    ) -> "DecodingPlan":
        """The plan of a pass in which the sequences `rows` add `new` states each to the regions `write` (one to each)
        and their queries see region `read`, itself one of them; the j-th of several new states sees those up to it.
        replace: the new states take the places of the newest ones instead."""
        device = self.memories[0][0][0].device
        slots, stride = [], self.capacity * sum(self.widths)
        if replace:
            for r in write:
                for b in rows:
                    self.held[r][b] -= new
        for b in rows:
            for j in range(new):
                slots += [b * stride + self._start(r, self.capacity) + self.held[r][b] + j for r in write]
        for r in write:
            for b in rows:
                self.held[r][b] += new
        held = self.held[read]
        longest = max(held[b] for b in rows)
        mask = None
        if new > 1 or any(held[b] != longest for b in rows):
            # Sequences that are not in this pass get a full view; nobody reads what it gives them.
            present = set(rows)
            last = [held[b] if b in present else longest for b in range(self.batch)]
            visible = [[n - (new - 1 - j) for j in range(new)] for n in last]
            mask = torch.arange(longest, device=device) < torch.tensor(visible, device=device)[:, None, :, None]
        return DecodingPlan(
            batch=self.batch,
            new=new,
            start=self._start(read, self.capacity),
            length=longest,
            copies=len(write),
            slots=torch.tensor(slots, device=device),
            rows=None if len(rows) == self.batch else torch.tensor(rows, device=device),
            mask=mask,
            keys_needed=sum(held[b] - (new - 1 - j) for b in rows for j in range(new)),
        )

    def plan_rows(self, rows: list[int], depths: list[int]) -> "RowsPlan":
        """The plan of a pass in which each of the sequences `rows` adds one state to all regions from its own depth
        on, and its query sees the region of that depth."""
        device, stride = self.memories[0][0][0].device, self.capacity * sum(self.widths)
        views, source, slots = [], [], []
        for n, (b, depth) in enumerate(zip(rows, depths, strict=True)):
            for region in range(depth, len(self.widths)):
                source.append(n)
                slots.append(b * stride + self._start(region, self.capacity) + self.held[region][b])
                self.held[region][b] += 1
            views.append((b, self._start(depth, self.capacity), self.held[depth][b]))
        return RowsPlan(views, torch.tensor(source, device=device), torch.tensor(slots, device=device))


@dataclass(frozen=True)
class DecodingPlan:
    """One decoding pass over one layer's memory, which it changes in place."""

    batch: int
    new: int
    start: int
    length: int
    copies: int
    slots: Tensor
    rows: Tensor | None
    mask: Tensor | None
    keys_needed: int
    padding: ClassVar[int] = 0

    @property
    def executed_keys(self) -> int:
        """Query-key pairs handed to attention: all sequences, the sitting-out ones included."""
        return self.batch * self.new * self.length

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        assert memory is not None
        N, G, E = k_NGE.shape
        for store, fresh_NGE in zip(memory[0], (k_NGE, v_NGE), strict=True):
            fresh = fresh_NGE.reshape(N, 1, G * E).expand(N, self.copies, G * E).reshape(N * self.copies, G * E)
            store.flatten(0, 1).index_copy_(0, self.slots, fresh)
        keys, values = (store[:, self.start : self.start + self.length].unflatten(2, (G, E)) for store in memory[0])
        q_BMHE = q_NHE.unflatten(0, (-1, self.new))
        if self.rows is not None:
            q_BMHE = q_NHE.new_zeros(self.batch, *q_BMHE.shape[1:]).index_copy(0, self.rows, q_BMHE)
        out_BMHE = attention(q_BMHE, keys, values, self.mask)
        if self.rows is not None:
            out_BMHE = out_BMHE.index_select(0, self.rows)
        return out_BMHE.reshape(N, -1), memory


@dataclass(frozen=True)
class RowsPlan:
    """One decoding pass of rows that each look at a region and a length of their own: attention row by row, over
    exactly the keys that are needed. The memory changes in place."""

    views: list[tuple[int, int, int]]
    """Of each row: sequence, start of its region, states in it."""
    source_M: Tensor
    """The row of each state that is written."""
    slot_M: Tensor
    """Where it is written."""
    padding: ClassVar[int] = 0

    @property
    def keys(self) -> list[int]:
        """Query-key pairs of each row, needed and executed."""
        return [length for _, _, length in self.views]

    def attend(self, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        assert memory is not None
        G, E = k_NGE.shape[1:]
        for store, fresh_NGE in zip(memory[0], (k_NGE, v_NGE), strict=True):
            fresh_Mr = fresh_NGE.flatten(1).index_select(0, self.source_M)
            store.flatten(0, 1).index_copy_(0, self.slot_M, fresh_Mr)
        keys_BGSE, values_BGSE = (store.unflatten(2, (G, E)).transpose(1, 2) for store in memory[0])
        grouped = q_NHE.shape[1] != G
        out = []  # these calls are many: a batch of one row each, by as few operations as can be
        for q_1H1E, (b, start, n) in zip(q_NHE.unsqueeze(2).split(1), self.views, strict=True):
            keys, values = (x_BGSE.narrow(0, b, 1).narrow(2, start, n) for x_BGSE in (keys_BGSE, values_BGSE))
            out.append(F.scaled_dot_product_attention(q_1H1E, keys, values, enable_gqa=grouped))
        return torch.cat(out).flatten(1), memory


IDLE = -1
"""Depth of a sequence that waits for a token."""


@dataclass
class Flight:
    """Sequences whose newest tokens are at different depths of a latent chain."""

    depths: list[int]
    """Of each sequence, the latent step that its next pass is, or IDLE."""
    forced: list[int]
    """Of each sequence, the steps that its token takes by order; empty where a router decides."""
    token_Bd: Tensor
    """The embedded tokens."""
    before_Bd: Tensor
    """The newest states, embedded tokens before the first."""
    reach_B: Tensor
    """Mass that reaches their states."""
    mixture_Bd: Tensor
    """What the head is to read, so far."""
    ahead_BL: Tensor | None = None
    """Gates that were all set at step 0."""

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences alone, in this order."""
        self.depths = [self.depths[b] for b in rows]
        self.forced = [self.forced[b] for b in rows] if self.forced else []
        self.token_Bd, self.before_Bd = self.token_Bd[rows], self.before_Bd[rows]
        self.reach_B, self.mixture_Bd = self.reach_B[rows], self.mixture_Bd[rows]
        self.ahead_BL = None if self.ahead_BL is None else self.ahead_BL[rows]


@dataclass
class DecodingState:
    """What `LanguageModel.decode_step` carries from one token to the next."""

    batch: int
    """Sequences that are decoded together."""
    cache: KeyValueCache
    """Their keys and values."""
    positions: list[int] = field(default_factory=list)
    """Tokens read so far, of each sequence."""
    counts: PassCounts = field(default_factory=PassCounts)
    """What decoding has cost so far."""
    text: Tensor | None = None
    """[batch, 1] hash of the text read so far, for methods whose number of steps is replayed (step_source.py)."""
    flight: Flight | None = None
    """Tokens that are being read, for `LanguageModel.decode_pass`."""
    extra: Any = None
    """Whatever else the method carries."""

    def __post_init__(self) -> None:
        self.positions = self.positions or [0] * self.batch

    @property
    def everyone(self) -> list[int]:
        """The indices of all sequences."""
        return list(range(self.batch))

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences alone, in this order; see :meth:`LanguageModel.keep_sequences`."""
        self.cache.keep(rows)
        self.positions = [self.positions[b] for b in rows]
        self.text = self.text if self.text is None else self.text[rows]
        if self.flight is not None:
            self.flight.keep(rows)
        self.batch = len(rows)

    def count(self, k: int, rows: int, plan: DecodingPlan) -> None:
        """Add one pass as pass k of this token."""
        self.count_keys(k, rows, plan.keys_needed, plan.executed_keys)

    def count_keys(self, k: int, rows: int, keys: int, executed_keys: int) -> None:
        """Add one pass k of some rows."""
        counts = self.counts
        while len(counts.rows) <= k:
            counts.record(rows=0, keys=0, executed_rows=0, executed_keys=0)
        counts.rows[k] += rows
        counts.keys[k] += keys
        counts.executed_rows[k] += rows
        counts.executed_keys[k] += executed_keys
