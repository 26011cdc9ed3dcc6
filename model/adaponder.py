"""AdaPonderLM (arXiv 2603.01914): PonderLM whose tokens leave the loop when a gate of that iteration closes.

PonderLM feeds back the expected embedding of its own guess (ponder.py). Here a small MLP, one for each iteration, reads
a token's state after every pass and says whether another iteration is worth it. Halting is monotone: a token that has
stopped never comes back. It keeps its last state, and later passes of other tokens see the keys and values that it left
in its last pass, in training as in decoding. A sparsity loss presses on the lowest k fraction of the gates alone, so
that easy tokens learn to stop and hard ones are not penalised.

The public description stops there. What it leaves open is decided here, and nowhere else, as follows [R]:

- The gate scales what it lets through, e <- e + g p W_E, and is cut at tau: g <= tau halts. So the cross-entropy
  teaches a gate for as long as it is open, and a closing gate feeds back less and less before it shuts. A shut gate has
  no gradient, so tau is low: with 0.5, gates of a toy drifted shut with no pressure at all; with 0.1 they did not.
- The MLP is w . silu(W z) + b with W of size d x d, then a sigmoid. It starts open, at sigmoid(router_bias) everywhere.
- The head reads a token's last executed state alone; nothing is mixed.
- "The lowest k fraction" is taken in each iteration, in each sequence, among the tokens that were still in: rounded up,
  earlier positions first where gates are equal. A sequence's loss then does not depend on what else is in the batch.
- The sparsity loss is lam times the sum of those gates over the iterations, averaged over scored tokens.
- Its defaults: with fraction 0.1 and three iterations, a router that shuts exactly the gates that are pressed upon
  leaves 3.44 of 4 passes, about the saving that is reported.
- A guess is added to the last input, as in PonderLM's paper, not to the token's embedding.

What cannot be done here is choosing by rank while decoding, and nothing needs it: ranks are in the loss only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltscale.model.backbone import CausalPlan, ReusePlan, Rope, Stack, compute_dtype, rope_of, rope_table
from haltscale.model.config import ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import HaltingTrace
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.latent_loop import Router
from haltscale.model.ledger import PassCounts
from haltscale.model.step_source import Replay, SourceOptions


@dataclass(frozen=True, kw_only=True)
class AdaponderOptions(SourceOptions):
    """Options of AdaPonderLM."""

    lam: float = 0.1
    """Weight of the sparsity loss, nats per open gate."""
    fraction: float = 0.1
    """k: the share of each iteration's gates, the lowest ones, that the sparsity loss presses on."""
    l_max: int = 3
    """Iterations on top of the first pass. 0 is the plain model."""
    tau: float = 0.1
    """A token takes another iteration only while its gate is above this."""
    router_bias: float = 2.0
    """Initial bias of the gates: +2 starts them all at 0.88, open."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *in_range("lam", self.lam, 0.0),
            *in_range("fraction", self.fraction, 0.0, 1.0),
            *in_range("l_max", self.l_max, 0, 32, integer=True),
            *in_range("tau", self.tau, 0.0, 1.0),
            *in_range("router_bias", self.router_bias, -100.0, 100.0),
            *self.source_problems(self.l_max),
        ]

    def canonical(self) -> "AdaponderOptions":
        """These options with those that have no effect at their defaults."""
        return replace(self, **self.idle_source())


Guess = Callable[[Tensor], Tensor]  # [N, d] states -> [N, d] expected embeddings of their guesses


class GatedLoop(nn.Module):
    """All iterations, as one module, since ranks differ in what they run (see latent_loop.LatentLoop).

    The guess needs head and embedding, which are not its own: it is computed equally often whatever the gates are, for
    no rows at all if need be, so that all ranks gather those weights alike.
    """

    def __init__(self, config: ModelConfig, options: AdaponderOptions):
        super().__init__()
        self.config = config
        self.options = options
        self.stack = Stack(config.shape, config.norm_eps)
        self.routers = nn.ModuleList(
            Router(config.shape.d, options.router_bias, hidden=True) for _ in range(options.l_max)
        )

    def gate(self, z_Nd: Tensor, k: int) -> Tensor:
        """How far each row's gate is open after pass k."""
        gate_N1: Tensor = self.routers[k](z_Nd)
        return gate_N1.squeeze(1)

    @staticmethod
    def fed_back(x_Nd: Tensor, gate_N: Tensor, guess_Nd: Tensor) -> Tensor:
        """The next input of rows that continue."""
        return x_Nd + (gate_N[:, None] * guess_Nd).to(x_Nd.dtype)

    def forward(
        self,
        x_Nd: Tensor,
        valid_BT: Tensor,
        guess: Guess,
        forced_BT: Tensor | None = None,
        *,
        prompts: PromptStates | None = None,
    ) -> LoopOutput:
        """x_Nd: the embedded tokens, [B*T, d]. forced_BT: iterations by order; gates then only scale what they let
        through. prompts: filled in with what the passes leave."""
        config, options = self.config, self.options
        B, T = valid_BT.shape
        cos_T, sin_T = rope_table(T, config.shape, config.rope_theta, x_Nd)
        row_N = torch.arange(B * T, device=x_Nd.device)  # rows of the last pass, as indices into [B*T]
        first = CausalPlan(B, T, keep=True)
        z_Nd, memories = self.stack(x_Nd, (cos_T[row_N % T], sin_T[row_N % T]), first)
        counts = PassCounts()
        first.record(counts, valid_BT)
        counts.tokens = counts.rows[0]
        newest_Nd = z_Nd  # each position's last executed state
        passes_BT = valid_BT.long()
        inside_BT = valid_BT  # positions that ran the last pass
        pressed_N = at_least_float32(z_Nd).new_zeros(B * T)
        if prompts is not None:
            prompts.add(memories, range(1))
        for k in range(options.l_max):
            gate_N = self.gate(z_Nd, k)
            low_N = self._lowest(gate_N.detach(), row_N, inside_BT)
            pressed_N = pressed_N.index_add(0, row_N, gate_N * low_N)
            is_open_N = gate_N > options.tau if forced_BT is None else forced_BT.flatten()[row_N] > k
            goes_on_N = is_open_N & inside_BT.flatten()[row_N]
            inside_BT = torch.zeros_like(inside_BT).flatten().index_copy(0, row_N, goes_on_N).view(B, T)
            passes_BT = passes_BT + inside_BT
            plan = ReusePlan(valid_BT, inside_BT, compute_dtype(x_Nd))
            on_N = torch.nonzero_static(goes_on_N, size=len(plan.row_N)).squeeze(1)
            row_N, gate_N = plan.row_N, gate_N.index_select(0, on_N)
            z_Nd = x_Nd = self.fed_back(x_Nd.index_select(0, on_N), gate_N, guess(z_Nd.index_select(0, on_N)))
            if len(row_N):
                plan.record(counts)
                z_Nd, memories = self.stack(x_Nd, (cos_T[row_N % T], sin_T[row_N % T]), plan, memories)
            newest_Nd = newest_Nd.index_copy(0, row_N, z_Nd)
            if prompts is not None:  # the newest state of every position
                prompts.add(memories, range(k + 1, k + 2))
        k_K = torch.arange(options.l_max + 1, device=x_Nd.device)
        trace = HaltingTrace(
            steps_BT=(passes_BT - valid_BT.long()).to(torch.uint8),
            reach_BTK=(k_K < passes_BT[..., None]).float(),
            exit_BTK=(k_K == passes_BT[..., None] - 1).float(),
            valid_BT=valid_BT,
            counts=counts,
        )
        auxiliary_BT = options.lam * pressed_N.view(B, T)
        return LoopOutput(newest_Nd.view(B, T, -1), trace, auxiliary_BT=auxiliary_BT)

    def _lowest(self, gate_N: Tensor, row_N: Tensor, inside_BT: Tensor) -> Tensor:
        """Which rows have the lowest gates of their sequence, among those that are inside."""
        gate_BT = gate_N.new_full((inside_BT.numel(),), torch.inf).index_copy(0, row_N, gate_N).view(inside_BT.shape)
        order_BT = gate_BT.masked_fill(~inside_BT, torch.inf).argsort(dim=1, stable=True)
        pressed_B = (inside_BT.sum(1).double() * self.options.fraction).ceil()
        low_BT = (order_BT.argsort(dim=1) < pressed_B[:, None]) & inside_BT
        return low_BT.flatten()[row_N]

    def decode(
        self, x_Bd: Tensor, state: DecodingState, rope: Rope, guess: Guess, forced: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token of each sequence. Cache region k holds every token's newest state up to pass k."""
        l_max, rows = self.options.l_max, state.everyone
        row_N = torch.arange(state.batch, device=x_Bd.device)
        steps_B = torch.zeros_like(row_N)
        newest_Bd: Any = None
        x_Nd = x_Bd
        for k in range(l_max + 1):
            plan = state.cache.plan(rows, read=k, write=range(k, l_max + 1), replace=k > 0)
            z_Nd, _ = self.stack(x_Nd, rope, plan, state.cache.memories)
            state.count(k, len(rows), plan)
            newest_Bd = z_Nd if newest_Bd is None else newest_Bd.index_copy(0, row_N, z_Nd)
            if k == l_max:
                break
            gate_N = self.gate(z_Nd, k)
            if forced is None:
                going = [i for i, on in enumerate((gate_N > self.options.tau).tolist()) if on]
            else:
                going = [i for i, b in enumerate(rows) if forced[b] > k]
            if not going:
                break
            on_N = torch.tensor(going, device=x_Bd.device)
            rows, row_N, rope = [rows[i] for i in going], row_N[on_N], rope_of(rope, on_N)
            x_Nd = self.fed_back(x_Nd[on_N], gate_N[on_N], guess(z_Nd[on_N]))
            steps_B[row_N] += 1
        return newest_Bd, steps_B


class AdaponderModel(LanguageModel):
    """A Llama that reads its own guesses for as long as its gates are open."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, AdaponderOptions)
        self.options = config.options
        self.latent_loop = GatedLoop(config, config.options)
        self.replay = Replay.of(config.options)

    def guess(self, z_Nd: Tensor) -> Tensor:
        """The expected embedding of the next token, as these states predict it."""
        guess_NV = torch.softmax(at_least_float32(self.lm_head(z_Nd)), dim=1).to(z_Nd.dtype)
        return self.expected_embedding(guess_NV)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        forced_BT = self.replay.steps(tokens_BT, self.budget_share) if self.replay else None
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        loop_output: LoopOutput = self.latent_loop(x_Nd, valid_BT, self.guess, forced_BT, prompts=prompts)
        return loop_output

    def cache_widths(self) -> list[int]:
        return [1] * (self.options.l_max + 1)

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        forced = self.replay.decode(tokens_B, state, self.budget_share) if self.replay else None
        return self.latent_loop.decode(self.embed(tokens_B), state, self.rope_at(state.positions), self.guess, forced)

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """Gates after every pass but the last; a guess, through head and embedding, before every pass but the first."""
        d = self.config.shape.d
        per_gate = 2.0 * (d * d + d)
        per_guess = 2 * self.head_row_flops()
        l_max = self.options.l_max
        realised, executed = (
            per_gate * sum(rows[:l_max]) + per_guess * sum(rows[1:]) for rows in (counts.rows, counts.executed_rows)
        )
        return realised, executed
