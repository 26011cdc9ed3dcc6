"""The latent chain: the passes of adaptive latent chain-of-thought and of its controls.

A latent step feeds the last hidden state back as the next input, z[t,k] = f(z[t,k-1]): no vocabulary, no adapter. After
each pass a router says with what probability to go on, and a position stops for good once too little mass would reach
the next state (halting.py). States see all executed states at their own position or before (backbone.ThoughtPlan). A
position that has stopped is computed no further: every pass runs on the packed rows that are still active.

The number of steps comes from the router, or is given from outside (step_source.py): then the gates decide nothing, and
weigh the readout as they always do, the last executed state taking the mass that is left. What is read (the mixture of
the states, or the last one) and what the gates learn from are options beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltscale.model.backbone import (
    AttentionPlan,
    CausalPlan,
    FadingPlan,
    LatentPlan,
    Rope,
    Stack,
    compute_dtype,
    rope_of,
    rope_table,
)
from haltscale.model.config import ModelConfig
from haltscale.model.decoding import IDLE, DecodingState, Flight, PromptStates
from haltscale.model.halting import HaltingTrace, halting_step
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LatentState, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.loop_options import LoopBorder, LoopOptions


class RouterKind(StrEnum):
    """What decides whether to go on. The paper's 70M ablation: linear 2.670, none 2.671, mlp 2.675 nats."""

    LINEAR = "linear"
    """g = sigmoid(w . z + b)."""
    MLP = "mlp"
    """g = sigmoid(w . silu(W z) + b), W of size d x d [R]."""
    AHEAD = "ahead"
    """All gates of a position from its step-0 state, one logit per step (PonderLM-3)."""
    NONE = "none"
    """g = sigmoid(b) with b fixed: nothing is learned and all positions think alike [R]."""


class HaltingRule(StrEnum):
    """What has to be above tau for a position to go on."""

    REACH = "reach"
    """The mass that would reach the next state, a product of gates: the paper's rule."""
    GATE = "gate"
    """The gate of this step alone: right where each gate answers a question of its own, as it does when it is taught by
    labels."""


class RouterInput(StrEnum):
    """What the router reads."""

    STATE = "state"
    """z_k."""
    CHANGE = "change"
    """z_k and z_k - z_(k-1), side by side: is the state still moving? Before z_0 stands the embedded token."""


class Router(nn.Module):
    """The probability of going on, in at least float32 whatever the model's precision.

    The last weight starts at zero: every position starts alike, at sigmoid(bias), and the weight learns at once, since
    its gradient does not depend on it.
    """

    def __init__(self, d: int, bias: float, *, hidden: bool = False, outputs: int = 1, rate: float = 1.0):
        """
        d: numbers that it reads. rate: multiple of the learning rate at which the last layer is trained. The layer's
        output is multiplied by it (and its bias divided): an optimizer whose steps do not depend on the gradient's
        scale, as Adam's and Muon's do not, then changes the score so much faster.
        """
        super().__init__()
        self.hidden = nn.Linear(d, d, bias=False) if hidden else None
        self.random_start = {"hidden.weight": math.sqrt(2.0 / (5.0 * d))} if hidden else {}
        self.score = nn.Linear(d, outputs)
        self.rate = rate
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, bias / rate)

    def forward(self, z_Nd: Tensor) -> Tensor:
        with torch.autocast(z_Nd.device.type, enabled=False):
            z_Nd = at_least_float32(z_Nd)
            if self.hidden is not None:
                z_Nd = F.silu(F.linear(z_Nd, at_least_float32(self.hidden.weight)))
            score_NO = F.linear(z_Nd, at_least_float32(self.score.weight), at_least_float32(self.score.bias))
            return torch.sigmoid(score_NO if self.rate == 1 else score_NO * self.rate)

    def flops(self) -> float:
        """Per row."""
        return 2.0 * (self.score.weight.numel() + (self.hidden.weight.numel() if self.hidden is not None else 0))


@dataclass(frozen=True, kw_only=True)
class LoopRules:
    """What the loop needs to know of a method's options."""

    l_max: int
    """Latent steps on top of the ordinary pass."""
    tau: float
    """A position goes on only while more than this much mass would reach the next state."""
    halting_rule: HaltingRule = HaltingRule.REACH
    """What has to be above tau."""
    router: RouterKind
    """Kind of router."""
    router_bias: float
    """Initial (for RouterKind.NONE: fixed) bias of the router."""
    router_per_step: bool = False
    """One router per step instead of one for all."""
    truncate_gradient: bool = False
    """Cut the gradient where a state is fed back; it still flows through keys, values and the mixture."""
    router_input: RouterInput = RouterInput.STATE
    """What the router reads."""
    router_detached: bool = False
    """The router reads, and does not shape, the states: no gradient flows through its input."""
    router_rate: float = 1.0
    """Multiple of the learning rate for the router's last layer."""
    gates_apart: bool = False
    """The masses take the gates as given: what is read teaches them nothing."""
    read_last: bool = False
    """The head reads the last executed state alone, whatever its mass."""
    fading_keys: bool = False
    """Add the logarithm of a state's reach to the scores that its key gets (PonderLM-3)."""
    keep_states: bool = False
    """Hand the states of every pass to the loss."""
    switches: LoopOptions = field(default_factory=LoopOptions)
    """What is alike for all methods that loop."""


class LatentLoop(nn.Module):
    """The whole chain of passes, as one module.

    How often the stack runs depends on the data and so differs between ranks. As one module it can be declared a
    ZeRO-3 leaf (its parameters are gathered once, not per call), and it uses every parameter it has in every forward,
    if only times zero, so that every rank has a gradient for all of them (ZeRO-1/2 wait for each other otherwise).
    """

    def __init__(self, config: ModelConfig, rules: LoopRules):
        super().__init__()
        self.config = config
        self.rules = rules
        self.stack = Stack(config.shape, config.norm_eps, residual_scale=rules.switches.residual_scale(rules.l_max))
        self.border = LoopBorder(config.shape.d, config.norm_eps, rules.switches)
        learned = 0 if rules.router is RouterKind.NONE else (rules.l_max if rules.router_per_step else 1)
        self.routers = nn.ModuleList(
            Router(
                config.shape.d * (2 if rules.router_input is RouterInput.CHANGE else 1),
                rules.router_bias,
                hidden=rules.router is RouterKind.MLP,
                outputs=rules.l_max if rules.router is RouterKind.AHEAD else 1,
                rate=rules.router_rate,
            )
            for _ in range(min(learned, rules.l_max))
        )

    def gate(self, z_Nd: Tensor, before_Nd: Tensor, k: int, ahead_NL: Tensor | None) -> Tensor:
        """Probability of going on after state k, which came after before_Nd, the state before it or the embedded token;
        ahead_NL: the gates of these rows, if they were all set at step 0."""
        if ahead_NL is not None:
            return ahead_NL[:, k]
        if not self.routers:
            constant = torch.sigmoid(torch.tensor(self.rules.router_bias, dtype=torch.float64))
            return at_least_float32(z_Nd).new_full((len(z_Nd),), float(constant))
        if self.rules.router_detached:
            z_Nd, before_Nd = z_Nd.detach(), before_Nd.detach()
        if self.rules.router_input is RouterInput.CHANGE:
            z_Nd = torch.cat((z_Nd, z_Nd - before_Nd), dim=1)
        gate_N1: Tensor = self.routers[k if self.rules.router_per_step else 0](z_Nd)
        return gate_N1.squeeze(1)

    def upfront_gates(self, z_Nd: Tensor) -> Tensor | None:
        """All gates [N, l_max] from the step-0 states, for a router that sets them all at once."""
        return self.routers[0](z_Nd) if self.rules.router is RouterKind.AHEAD and self.routers else None

    def _faded(self, plan: AttentionPlan, reach_N: Tensor) -> AttentionPlan:
        """The plan of a pass whose states were reached by this much mass."""
        return (
            FadingPlan(plan, reach_N.clamp(min=torch.finfo(reach_N.dtype).tiny).log())
            if self.rules.fading_keys
            else plan
        )

    def _decide(
        self,
        gate_N: Tensor | None,
        reach_N: Tensor,
        k: int,
        may_go_on_N: Tensor | bool,
        forced_N: Tensor | None,
        at_least_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(goes on, exit mass, next reach) after state k.

        gate_N: None after the last state. forced_N: the steps that each row takes, by order. at_least_N: the steps that
        it takes even where the rule would stop it.
        """
        if gate_N is None:
            return torch.zeros_like(reach_N, dtype=torch.bool), reach_N, reach_N
        gate_N = gate_N.detach() if self.rules.gates_apart else gate_N
        by_gate = self.rules.halting_rule is HaltingRule.GATE
        if forced_N is None and at_least_N is None and not by_gate:
            return halting_step(reach_N, gate_N, tau=self.rules.tau, may_go_on=may_go_on_N)
        onward_N = reach_N * gate_N
        if forced_N is not None:
            goes_on_N = (forced_N > k) & may_go_on_N
        else:
            goes_on_N = ((gate_N if by_gate else onward_N) > self.rules.tau) & may_go_on_N
            if at_least_N is not None:
                goes_on_N = goes_on_N | ((at_least_N > k) & may_go_on_N)
        return goes_on_N, torch.where(goes_on_N, reach_N - onward_N, reach_N), onward_N

    def _read(self, exit_N: Tensor, goes_on_N: Tensor, exists_N: Tensor | bool) -> Tensor:
        """What each state weighs in what the head reads."""
        if not self.rules.read_last:
            return exit_N
        return (~goes_on_N & exists_N).to(exit_N.dtype)

    def forward(
        self,
        x_Nd: Tensor,
        valid_BT: Tensor,
        forced_BT: Tensor | None = None,
        *,
        at_least_BT: Tensor | None = None,
        open_gates: bool = False,
        most_steps: int | None = None,
        goes_on: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        prompts: PromptStates | None = None,
    ) -> LoopOutput:
        """x_Nd: the embedded tokens, [B*T, d]. Padding (valid_BT False) takes no step. forced_BT: steps by order.
        at_least_BT: steps that are taken even where the halting rule would stop. open_gates: all gates count as 1, so
        that every position takes all steps and the last state has all the mass. most_steps: fewer than l_max, where
        the depth still grows. goes_on: instead of the router's rule, asked after state k with the states of the active
        rows and those before them, embedded tokens first (posthoc.py). prompts: filled in with what the passes
        leave."""
        rules, config = self.rules, self.config
        B, T = valid_BT.shape
        K = rules.l_max + 1
        deepest = rules.l_max if most_steps is None else min(most_steps, rules.l_max)
        gradless = rules.switches.passes_without_gradient(deepest)
        learns = torch.is_grad_enabled()
        device = x_Nd.device
        cos_T, sin_T = rope_table(T, config.shape, config.rope_theta, x_Nd)

        # Pass 0: all positions, plain causal attention.
        row_N = torch.arange(B * T, device=device)  # active rows as indices into [B*T]; shrinks from pass to pass
        position_N = row_N % T
        first_plan = CausalPlan(B, T, keep=True)
        certain_N = at_least_float32(x_Nd).new_ones(B * T)
        first_pass = self._faded(first_plan, certain_N)
        embedded_Nd = token_Nd = before_Nd = x_Nd
        with torch.set_grad_enabled(learns and not gradless):
            z_Nd, memories = self.stack(x_Nd, (cos_T[position_N], sin_T[position_N]), first_pass)
        ahead_NL = self.upfront_gates(z_Nd)
        counts = PassCounts()
        first_plan.record(counts, valid_BT)
        counts.tokens = counts.rows[0]

        states_BT = valid_BT.long()  # executed states per position
        rows = [row_N]  # of every pass so far
        mass_dtype = at_least_float32(z_Nd).dtype
        reach_N = valid_BT.flatten().to(mass_dtype)
        may_go_on_N: Tensor | bool = valid_BT.flatten()
        forced_N = None if forced_BT is None else forced_BT.flatten()
        at_least_N = None if at_least_BT is None else at_least_BT.flatten()
        exists_N: Tensor | bool = valid_BT.flatten()
        mixture_Nd = torch.zeros(B * T, config.shape.d, dtype=mass_dtype, device=device)
        reach_NK = torch.zeros(B * T, K, dtype=mass_dtype, device=device)
        exit_NK = torch.zeros(B * T, K, dtype=mass_dtype, device=device)
        states: list[LatentState] = []
        if prompts is not None:
            prompts.add(memories, range(K))

        for k in range(K):
            gate_N = self.gate(z_Nd, before_Nd, k, ahead_NL) if k < deepest else None
            counted_N = torch.ones_like(gate_N) if open_gates and gate_N is not None else gate_N
            if goes_on is not None and counted_N is not None:
                forced_N = goes_on(k, z_Nd, before_Nd) * (k + 1)
            goes_on_N, exit_N, onward_N = self._decide(counted_N, reach_N, k, may_go_on_N, forced_N, at_least_N)
            read_N = self._read(exit_N, goes_on_N, exists_N)
            reach_NK = reach_NK.index_put((row_N, row_N.new_full((), k)), reach_N)
            exit_NK[row_N, k] = read_N.detach()
            if rules.keep_states:
                states.append(LatentState(row_N, z_Nd, reach_N, exit_N, gate_N))
            share_Nd = read_N[:, None] * z_Nd
            mixture_Nd = share_Nd + mixture_Nd if len(row_N) == B * T else mixture_Nd.index_add(0, row_N, share_Nd)
            if gate_N is None:
                break

            # Pass k + 1: pack the rows that go on. Their input is their own last output, past the border.
            active_BT = torch.zeros_like(valid_BT).flatten().index_copy(0, row_N, goes_on_N).view(B, T)
            states_BT = states_BT + active_BT
            plan = LatentPlan(states_BT, active_BT, rows, compute_dtype(z_Nd))
            if len(plan.row_N) == 0:
                break
            if len(plan.row_N) < len(row_N):
                on_N = torch.nonzero_static(goes_on_N, size=len(plan.row_N)).squeeze(1)
                row_N, position_N = plan.row_N, position_N[on_N]
                z_Nd, onward_N = z_Nd.index_select(0, on_N), onward_N.index_select(0, on_N)
                token_Nd = token_Nd.index_select(0, on_N)
                forced_N = None if forced_N is None else forced_N[on_N]
                at_least_N = None if at_least_N is None else at_least_N[on_N]
                ahead_NL = None if ahead_NL is None else ahead_NL[on_N]
            reach_N = onward_N
            may_go_on_N = exists_N = True
            rows.append(row_N)
            before_Nd = z_Nd.detach() if rules.truncate_gradient else z_Nd
            this_pass = self._faded(plan, reach_N)
            with torch.set_grad_enabled(learns and k + 1 >= gradless):
                x_Nd = self.border(before_Nd, token_Nd)
                z_Nd, memories = self.stack(x_Nd, (cos_T[position_N], sin_T[position_N]), this_pass, memories)
            plan.record(counts)
            if prompts is not None:
                prompts.add(memories, range(k + 1, K), row_N=row_N)
        counts.forward_only = counts.first(gradless)

        trace = HaltingTrace(
            steps_BT=(states_BT - valid_BT.long()).to(torch.uint8),
            reach_BTK=reach_NK.detach().view(B, T, K).float(),
            exit_BTK=exit_NK.view(B, T, K).float(),
            valid_BT=valid_BT,
            counts=counts,
        )
        used_by_few = self.parameters() if gradless else self.routers.parameters()
        touch = sum((parameter.sum() * 0.0 for parameter in used_by_few), start=self.border.touch(mixture_Nd))
        if gradless:  # all positions may have halted before the first pass that has a gradient
            touch = touch + embedded_Nd.sum() * 0.0
        hidden_Nd = (mixture_Nd + touch).to(z_Nd.dtype)
        return LoopOutput(hidden_Nd.view(B, T, -1), trace, reach_BTK=reach_NK.view(B, T, K), states=states)

    # Decoding --------------------------------------------------------------------------------------------------------

    def cache_widths(self) -> list[int]:
        """Region k holds the states of steps 0..k, which is what a query of step k may see."""
        return [k + 1 for k in range(self.rules.l_max + 1)]

    def decode(
        self, x_Bd: Tensor, rope: Rope, state: DecodingState, forced: list[int] | None = None
    ) -> tuple[Tensor, Tensor, list[LatentState]]:
        """One token of each sequence, its steps one after another: (mixtures, steps taken, states if kept)."""
        rules, cache = self.rules, state.cache
        l_max, batch = rules.l_max, state.batch
        row_N = torch.arange(batch, device=x_Bd.device)
        rows = state.everyone
        forced_N = None if forced is None else torch.tensor(forced, device=x_Bd.device)
        reach_N = at_least_float32(x_Bd).new_ones(batch)
        mixture_Bd: Any = None
        steps_B = torch.zeros_like(row_N)
        states: list[LatentState] = []
        ahead_NL: Tensor | None = None
        x_Nd = before_Nd = token_Nd = x_Bd
        for k in range(l_max + 1):
            plan = cache.plan(rows, read=k, write=range(k, l_max + 1))
            z_Nd, _ = self.stack(x_Nd, rope, self._faded(plan, reach_N), cache.memories)
            state.count(k, len(rows), plan)
            ahead_NL = self.upfront_gates(z_Nd) if k == 0 else ahead_NL
            gate_N = self.gate(z_Nd, before_Nd, k, ahead_NL) if k < l_max else None
            goes_on_N, exit_N, onward_N = self._decide(gate_N, reach_N, k, True, forced_N)
            if rules.keep_states:
                states.append(LatentState(row_N, z_Nd, reach_N, exit_N, gate_N))
            share_Nd = self._read(exit_N, goes_on_N, True)[:, None] * z_Nd
            if mixture_Bd is None:
                mixture_Bd = share_Nd
            else:
                mixture_Bd = mixture_Bd.index_add(0, row_N, share_Nd) if len(rows) < batch else mixture_Bd + share_Nd
            going = [i for i, on in enumerate(goes_on_N.tolist()) if on]
            if not going:
                break
            before_Nd, reach_N = z_Nd, onward_N
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                on_N = torch.tensor(going, device=x_Bd.device)
                row_N, before_Nd, reach_N = row_N[on_N], before_Nd[on_N], reach_N[on_N]
                token_Nd, rope = token_Nd[on_N], rope_of(rope, on_N)
                ahead_NL = None if ahead_NL is None else ahead_NL[on_N]
                forced_N = None if forced_N is None else forced_N[on_N]
            steps_B[row_N] += 1
            x_Nd = self.border(before_Nd, token_Nd)
        return mixture_Bd.to(x_Bd.dtype), steps_B, states

    def advance(
        self, x_Nd: Tensor, begun: list[int], state: DecodingState, rope: Callable[[list[int]], Rope], forced: list[int]
    ) -> tuple[list[int], Tensor, list[int]]:
        """One pass of every sequence that has a token in flight, each at the depth where its token is; so that the
        pass is as wide as the batch, whatever the depths.

        x_Nd: the embedded tokens that the sequences `begun` read next. rope: the angles of some sequences' tokens.
        forced: the steps of the begun tokens by order; empty where the router decides. Gives the sequences whose tokens
        are finished, their mixtures [F, d], and the steps that they took.
        """
        l_max, flight = self.rules.l_max, state.flight
        if flight is None:
            none_Bd = x_Nd.new_zeros(state.batch, x_Nd.shape[1])
            mixture_Bd = at_least_float32(none_Bd).clone()
            flight = Flight(
                depths=[IDLE] * state.batch,
                forced=[0] * state.batch if forced else [],
                token_Bd=none_Bd,
                before_Bd=none_Bd.clone(),
                reach_B=mixture_Bd[:, 0].clone(),
                mixture_Bd=mixture_Bd,
            )
            state.flight = flight
        for n, b in enumerate(begun):
            flight.depths[b] = 0
            if forced:
                flight.forced[b] = forced[n]
        flight.token_Bd[begun] = flight.before_Bd[begun] = x_Nd
        flight.reach_B[begun], flight.mixture_Bd[begun] = 1.0, 0.0

        rows = sorted((b for b, k in enumerate(flight.depths) if k != IDLE), key=lambda b: flight.depths[b])
        depths = [flight.depths[b] for b in rows]
        row_N = torch.tensor(rows, device=x_Nd.device)
        before_Nd, reach_N = flight.before_Bd[row_N], flight.reach_B[row_N]
        first = depths.count(0)  # these come first; a token goes past no border on its way in
        x_Nd = before_Nd
        if first < len(rows):
            again_Nd = self.border(before_Nd[first:], flight.token_Bd[row_N[first:]])
            x_Nd = torch.cat((before_Nd[:first], again_Nd))
        plan: AttentionPlan
        if len(rows) == state.batch and depths[0] == depths[-1]:
            k = depths[0]
            plan = together = state.cache.plan(rows, read=k, write=range(k, l_max + 1))
            state.count(k, len(rows), together)
        else:
            plan = apart = state.cache.plan_rows(rows, depths)
            for k, keys in zip(depths, apart.keys, strict=True):
                state.count_keys(k, 1, keys, keys)
        z_Nd, _ = self.stack(x_Nd, rope(rows), self._faded(plan, reach_N), state.cache.memories)

        goes_on, onward, share = [], [], []
        for k, group in groupby(range(len(rows)), key=lambda n: depths[n]):
            places = list(group)
            at = slice(places[0], places[-1] + 1)
            if k == 0 and (ahead_NL := self.upfront_gates(z_Nd[at])) is not None:
                if flight.ahead_BL is None:
                    flight.ahead_BL = ahead_NL.new_zeros(state.batch, l_max)
                flight.ahead_BL[row_N[at]] = ahead_NL
            own_NL = None if flight.ahead_BL is None else flight.ahead_BL[row_N[at]]
            gate_N = self.gate(z_Nd[at], before_Nd[at], k, own_NL) if k < l_max else None
            orders = [flight.forced[b] for b in rows[at]] if flight.forced else None
            forced_N = None if orders is None else torch.tensor(orders, device=row_N.device)
            goes_on_N, exit_N, onward_N = self._decide(gate_N, reach_N[at], k, True, forced_N)
            share.append(self._read(exit_N, goes_on_N, True)[:, None] * z_Nd[at])
            goes_on.append(goes_on_N)
            onward.append(onward_N)
        flight.mixture_Bd.index_add_(0, row_N, torch.cat(share))
        flight.before_Bd[row_N], flight.reach_B[row_N] = z_Nd, torch.cat(onward)
        done = []
        for b, k, on in zip(rows, depths, torch.cat(goes_on).tolist(), strict=True):
            flight.depths[b] = k + 1 if on else IDLE
            done += [] if on else [(b, k)]
        done.sort()
        ended = [b for b, _ in done]
        return ended, flight.mixture_Bd[ended].to(x_Nd.dtype), [k for _, k in done]
