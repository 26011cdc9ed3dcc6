"""Adaptive latent chain-of-thought (arXiv 2602.08220): each token thinks 0 to l_max steps before it speaks.

A latent step feeds the last hidden state back as the next input, z[t,k] = f(z[t,k-1]). After each pass a router says
with what probability to go on; a position stops for good once too little probability mass would reach the next state
(halting.py). The head reads the mixture of a position's states by their exit masses. States see all executed states at
their own position or before (backbone.ThoughtPlan). A position that has stopped is computed no further: every pass
runs on the packed rows that are still active.

The loss adds lam * mean_t( sg(p_t)^beta * sum_{k>=1} reach[t,k] ), which presses hardest on tokens that the model
already predicts well (p_t near 1).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from haltscale.model.backbone import CausalPlan, Stack, ThoughtPlan, at_least_float32, compute_dtype, rope_table
from haltscale.model.config import ModelConfig, in_range
from haltscale.model.halting import HaltingTrace, halting_step
from haltscale.model.language_model import LanguageModel, Thought
from haltscale.model.ledger import PassCounts
from haltscale.model.vanilla import count_causal_pass
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions:
    """Options of adaptive latent chain-of-thought. [R] marks what the paper's public traces leave open."""

    lam: float = 0.1
    """Weight of the halting penalty, nats per expected latent step of a token predicted with certainty. Up: more
    pruning, worse cross-entropy."""
    beta: float = 1.0
    """Exponent of p_t in the penalty [R]. Up: only very well predicted tokens are pressed to stop; less pruning."""
    l_max: int = 3
    """Latent steps on top of the ordinary pass; a position has at most l_max + 1 states [R]. 0 is the plain model."""
    tau: float = 1e-2
    """A position goes on only while more than this much mass would reach the next state [R]. It bounds how much of a
    token's mixture is cut off. The siblings' 1e-4 needs a router below 0.0001 at the first step before any compute is
    saved, which short runs never learn; at 0.01, at most 1 % of a token's mass moves to its last state."""
    router_bias: float = 2.0
    """Initial bias of the router [R]. +2 starts every position at 88 % per step: nearly full depth, so that the model
    first learns to use its steps and then to drop them, with the sigmoid far enough from saturation to learn."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *in_range("lam", self.lam, 0.0),
            *in_range("beta", self.beta, 0.0),
            *in_range("l_max", self.l_max, 0, 32, integer=True),
            *in_range("tau", self.tau, 0.0, 1.0),
            *in_range("router_bias", self.router_bias, -100.0, 100.0),
        ]


class Router(nn.Module):
    """g = sigmoid(w . z + b), in at least float32 whatever the model's precision.

    w starts at zero: every position starts alike, and w learns at once, since its gradient does not depend on it.
    """

    def __init__(self, d: int, bias: float):
        super().__init__()
        self.score = nn.Linear(d, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, bias)

    def forward(self, z_Nd: Tensor) -> Tensor:
        with torch.autocast(z_Nd.device.type, enabled=False):
            z_Nd, weight, bias = (at_least_float32(x) for x in (z_Nd, self.score.weight, self.score.bias))
            return torch.sigmoid(F.linear(z_Nd, weight, bias)).squeeze(1)


class LatentLoop(nn.Module):
    """The whole chain of passes, as one module.

    How often the stack runs depends on the data and so differs between ranks. As one module it can be declared a
    ZeRO-3 leaf (its parameters are gathered once, not per call), and it uses every parameter it has in every forward,
    if only times zero, so that every rank has a gradient for all of them (ZeRO-1/2 wait for each other otherwise).
    """

    def __init__(self, config: ModelConfig, options: AdaptiveOptions):
        super().__init__()
        self.config = config
        self.options = options
        self.stack = Stack(config.shape, config.norm_eps)
        self.router = Router(config.shape.d, options.router_bias) if options.l_max else None

    def forward(self, x_Nd: Tensor, valid_BT: Tensor) -> Thought:
        """x_Nd: the embedded tokens, [B*T, d]. Padding (valid_BT False) never thinks."""
        options, config = self.options, self.config
        B, T = valid_BT.shape
        K = options.l_max + 1
        device = x_Nd.device
        cos_T, sin_T = rope_table(T, config.shape, config.rope_theta, x_Nd)

        # Pass 0: all positions, plain causal attention.
        row_N = torch.arange(B * T, device=device)  # active rows as indices into [B*T]; shrinks from pass to pass
        position_N = row_N % T
        first_plan = CausalPlan(B, T)
        z_Nd, memories = self.stack(x_Nd, (cos_T[position_N], sin_T[position_N]), first_plan)
        counts = count_causal_pass(valid_BT, first_plan)

        states_BT = valid_BT.long()  # executed states per position
        slots = T
        mass_dtype = at_least_float32(z_Nd).dtype
        reach_N = valid_BT.flatten().to(mass_dtype)
        may_go_on_N: Tensor | bool = valid_BT.flatten()
        reach_sum = torch.zeros(B * T, dtype=mass_dtype, device=device)
        untouched = torch.zeros((), dtype=mass_dtype, device=device)
        mixture_Nd = torch.zeros(B * T, config.shape.d, dtype=mass_dtype, device=device)
        reach_NK = torch.zeros(B * T, K, dtype=mass_dtype, device=device)
        exit_NK = torch.zeros(B * T, K, dtype=mass_dtype, device=device)

        for k in range(K):
            reach_NK[row_N, k] = reach_N.detach()
            if k == options.l_max:
                goes_on_N, exit_N, onward_N = torch.zeros_like(reach_N, dtype=torch.bool), reach_N, reach_N
            else:
                assert self.router is not None
                gate_N = self.router(z_Nd)
                untouched = untouched + 0.0 * gate_N.sum()
                goes_on_N, exit_N, onward_N = halting_step(reach_N, gate_N, tau=options.tau, may_go_on=may_go_on_N)
            exit_NK[row_N, k] = exit_N.detach()
            share_Nd = exit_N[:, None] * z_Nd
            mixture_Nd = share_Nd + mixture_Nd if len(row_N) == B * T else mixture_Nd.index_add(0, row_N, share_Nd)
            if k == options.l_max:
                break
            on_N = goes_on_N.nonzero().squeeze(1)
            if len(on_N) == 0:
                break

            # Pass k + 1: pack the rows that go on. Their input is their own last output: no vocabulary, no adapter.
            if len(on_N) < len(row_N):
                row_N, position_N = row_N[on_N], position_N[on_N]
                z_Nd, onward_N = z_Nd.index_select(0, on_N), onward_N.index_select(0, on_N)
            reach_N = onward_N
            may_go_on_N = True
            reach_sum = reach_sum + reach_N if len(row_N) == B * T else reach_sum.index_add(0, row_N, reach_N)
            active_BT = torch.zeros(B * T, dtype=torch.bool, device=device).index_fill_(0, row_N, True).view(B, T)
            plan = ThoughtPlan(states_BT, active_BT, row_N, slots, compute_dtype(z_Nd))
            z_Nd, memories = self.stack(z_Nd, (cos_T[position_N], sin_T[position_N]), plan, memories)
            states_BT = states_BT + active_BT
            slots = plan.slots
            counts.record(
                rows=len(row_N),
                keys=plan.keys_needed,
                executed_rows=len(row_N),
                executed_keys=plan.executed_keys,
            )

        trace = HaltingTrace(
            steps_BT=(states_BT - valid_BT.long()).to(torch.uint8),
            reach_BTK=reach_NK.view(B, T, K).float(),
            exit_BTK=exit_NK.view(B, T, K).float(),
            valid_BT=valid_BT,
            counts=counts,
        )
        hidden_Nd = (mixture_Nd + untouched).to(z_Nd.dtype)
        return Thought(hidden_Nd.view(B, T, -1), trace, reach_sum.view(B, T))


class AdaptiveModel(LanguageModel):
    """A Llama that thinks on each token for as long as its router asks for."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, AdaptiveOptions)
        self.options = config.options
        self.latent_loop = LatentLoop(config, config.options)

    def think(self, tokens_BT: Tensor, valid_BT: Tensor) -> Thought:
        thought: Thought = self.latent_loop(self.embed(tokens_BT).flatten(0, 1), valid_BT)
        return thought

    def penalty(self, thought: Thought, probability_BT: Tensor, scored_BT: Tensor) -> Tensor:
        """The correctness-aware penalty [R: the exponent, and the expected number of latent steps as its object]."""
        assert thought.reach_sum_BT is not None
        pressed_BT = probability_BT.pow(self.options.beta) * thought.reach_sum_BT * scored_BT
        return self.options.lam * pressed_BT.sum() / scored_BT.sum().clamp(min=1)

    def router_flops(self, counts: PassCounts) -> tuple[float, float]:
        per_row = 2.0 * self.config.shape.d
        routed = slice(0, self.options.l_max)
        return per_row * sum(counts.rows[routed]), per_row * sum(counts.executed_rows[routed])
