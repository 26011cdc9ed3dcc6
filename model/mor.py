"""Mixture-of-Recursions (arXiv 2507.10524): a shared middle applied again to the tokens that a router picks.

The first and the last block are unique; the blocks between them form one recursion, applied up to `recursions` times
("middle-cycle"). Every token goes through the first recursion; recursion i sees only the tokens that are still in, and
attends only to the states of that recursion (recursion-wise caching). `shape.layers` counts the unique blocks [R: so
that all arms of a comparison have the same parameters].

Expert choice: recursion i keeps the (recursions - i) / recursions of a sequence that score highest among those still
in, and adds its result times alpha * sigmoid(score). Picking the best of a whole sequence looks into the future, which
decoding cannot. So a second, auxiliary router learns from a detached state to predict the selection, and in evaluation
(`model.eval()`) and decoding it alone decides: there the model is causal, in training it is not, as in the original.

Token choice: after the first block a router commits each token to a depth, by argmax; its last recursion is weighted by
the router's probability and added to what went in. A balancing loss keeps the depths from collapsing into one.

The authors' published recipe for expert choice has the auxiliary loss on the router itself and a z-loss:
`auxiliary="main"`, `z_weight=0.001`.

Both auxiliary losses are averaged over scored tokens, like the cross-entropy [R].

Where the numbers of recursions are replayed (step_source.py), both routers still weigh, and select nothing; there is no
selection to predict, so the auxiliary router is not trained. In evaluation expert choice spends what its auxiliary
router says, not its capacity: a replay of it follows the subject there by the schedule's row at share 1.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltscale.model.backbone import CausalPlan, LatentPlan, Stack, compute_dtype, rope_of, rope_table
from haltscale.model.config import ModelConfig, Shape, in_range, is_int, require
from haltscale.model.decoding import DecodingPlan, DecodingState, PromptStates
from haltscale.model.halting import HaltingTrace
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.step_source import Replay, SourceOptions


class Routing(StrEnum):
    """Whether recursions or tokens choose."""

    EXPERT_CHOICE = "expert_choice"
    """Each recursion chooses its tokens."""
    TOKEN_CHOICE = "token_choice"
    """Each token chooses its number of recursions."""


class Auxiliary(StrEnum):
    """Which router predicts the selection of expert choice, and decides in evaluation and decoding."""

    OWN = "own"
    """An auxiliary router, which reads detached states."""
    MAIN = "main"
    """The router that picks: the auxiliary loss makes its score positive where it picks, and in evaluation the sign
    decides (the recipe that the authors publish; its gradient reaches the states [R])."""


@dataclass(frozen=True, kw_only=True)
class MorOptions(SourceOptions):
    """Options of Mixture-of-Recursions."""

    recursions: int = 3
    """Most times that the middle is applied."""
    routing: Routing = Routing.EXPERT_CHOICE
    """Whether recursions or tokens choose."""
    alpha: float = 0.1
    """Factor on the gate of expert choice."""
    auxiliary_weight: float = 0.001
    """Weight of the auxiliary router's loss (expert choice), nats per token and recursion."""
    auxiliary: Auxiliary = Auxiliary.OWN
    """Which router the auxiliary loss trains (expert choice)."""
    z_weight: float = 0.0
    """Weight of the routers' z-loss, (log sum exp of a row's scores)^2, over all rows that are scored [R]."""
    balance_weight: float = 0.1
    """Weight of the balancing loss (token choice), which is 1 when all depths are equally used."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *in_range("recursions", self.recursions, 1, 32, integer=True),
            *require(self.routing in list(Routing), "routing", self.routing, f"one of {', '.join(Routing)}"),
            *in_range("alpha", self.alpha, 0.0),
            *in_range("auxiliary_weight", self.auxiliary_weight, 0.0),
            *require(self.auxiliary in list(Auxiliary), "auxiliary", self.auxiliary, f"one of {', '.join(Auxiliary)}"),
            *in_range("z_weight", self.z_weight, 0.0),
            *in_range("balance_weight", self.balance_weight, 0.0),
            *self.source_problems(self.recursions - 1 if is_int(self.recursions) else None),
        ]

    def canonical(self) -> "MorOptions":
        """These options with those that have no effect at their defaults."""
        return replace(self, **self.idle_source())


class LinearRouter(nn.Module):
    """Linear scores in at least float32; starts at zero: no preference."""

    def __init__(self, d: int, outputs: int):
        super().__init__()
        self.score = nn.Linear(d, outputs, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, h_Nd: Tensor) -> Tensor:
        with torch.autocast(h_Nd.device.type, enabled=False):
            return F.linear(at_least_float32(h_Nd), at_least_float32(self.score.weight))


class RecursionLoop(nn.Module):
    """First block, recursions, last block; one module, since ranks differ in what they route."""

    def __init__(self, config: ModelConfig, options: MorOptions):
        super().__init__()
        self.config = config
        self.options = options
        self.stack = Stack(config.shape, config.norm_eps)
        d, further = config.shape.d, options.recursions - 1
        self.expert = options.routing is Routing.EXPERT_CHOICE
        if self.expert:
            self.routers = nn.ModuleList(LinearRouter(d, 1) for _ in range(options.recursions))
            own = further if options.auxiliary is Auxiliary.OWN else 0
            self.auxiliary_routers = nn.ModuleList(LinearRouter(d, 1) for _ in range(own))
        else:
            self.routers = nn.ModuleList([LinearRouter(d, options.recursions)])
            self.auxiliary_routers = nn.ModuleList()

    def gate(self, h_Nd: Tensor, i: int) -> Tensor:
        """Weight of recursion i under expert choice."""
        return self.options.alpha * torch.sigmoid(self.routers[i](h_Nd))

    def pick_logit(self, h_Nd: Tensor, i: int) -> Tensor:
        """Logit that recursion i >= 1 will pick these rows."""
        if self.options.auxiliary is Auxiliary.MAIN:
            own_N: Tensor = self.routers[i](h_Nd).squeeze(1)
            return own_N
        logit_N: Tensor = self.auxiliary_routers[i - 1](h_Nd.detach()).squeeze(1)
        return logit_N

    def z_loss(self, h_Nd: Tensor, i: int) -> Tensor:
        """What keeps the scores of rows small, [N], weighted."""
        scores_NR: Tensor = self.routers[i](h_Nd)
        return self.options.z_weight * scores_NR.logsumexp(1).square()

    def combine(self, h_Nd: Tensor, out_Nd: Tensor, first_Nd: Tensor, i: int, depth_N: Tensor, p_NR: Tensor) -> Tensor:
        """The rows after recursion i, which made out_Nd of h_Nd."""
        if self.expert:
            return h_Nd + (self.gate(h_Nd, i) * out_Nd).to(h_Nd.dtype)
        chosen_N1 = p_NR.gather(1, depth_N[:, None])
        last_N1 = depth_N[:, None] == i
        return torch.where(last_N1, (chosen_N1 * out_Nd).to(h_Nd.dtype) + first_Nd, out_Nd)

    def choose_depth(self, first_Nd: Tensor, forced_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token choice: (index of the last recursion, probabilities [N, recursions]). forced_N: the index by order."""
        if self.expert:
            nothing = first_Nd.new_zeros(len(first_Nd), 1)
            return torch.zeros(len(first_Nd), dtype=torch.long, device=first_Nd.device), nothing
        p_NR = torch.softmax(self.routers[0](first_Nd), dim=1)
        return p_NR.argmax(1) if forced_N is None else forced_N, p_NR

    def forward(
        self,
        x_Nd: Tensor,
        valid_BT: Tensor,
        forced_BT: Tensor | None = None,
        *,
        prompts: PromptStates | None = None,
    ) -> LoopOutput:
        """x_Nd: the embedded tokens, [B*T, d]. forced_BT: further recursions by order. prompts: filled in with what
        the passes leave."""
        config, R = self.config, self.options.recursions
        B, T = valid_BT.shape
        device = x_Nd.device
        cos_T, sin_T = rope_table(T, config.shape, config.rope_theta, x_Nd)
        row_N = torch.arange(B * T, device=device)
        everywhere = (cos_T[row_N % T], sin_T[row_N % T])
        causal = CausalPlan(B, T, keep=prompts is not None)
        counts = PassCounts()
        causal.record(counts, valid_BT)  # first block, first recursion and last block: together one whole pass
        counts.tokens = counts.rows[0]

        first_Nd, first_left = self.stack(x_Nd, everywhere, causal, blocks=slice(0, 1), final_norm=False)
        depth_N, p_NR = self.choose_depth(first_Nd, None if forced_BT is None else forced_BT.flatten())
        out_Nd, middle_left = self.stack(first_Nd, everywhere, causal, blocks=slice(1, -1), final_norm=False)
        h_Nd = self.combine(first_Nd, out_Nd, first_Nd, 0, depth_N, p_NR)
        inside_BT = valid_BT
        passes_BT = valid_BT.long()
        auxiliary_BT = at_least_float32(h_Nd).new_zeros(B, T)
        if self.options.z_weight:
            auxiliary_BT = self.z_loss(first_Nd, 0).view(B, T)
        for i in range(1, R):
            if self.expert and self.options.z_weight:
                auxiliary_BT = auxiliary_BT + self.z_loss(h_Nd, i).view(B, T) * inside_BT
            if self.expert and forced_BT is not None:
                picked_BT = inside_BT & (forced_BT >= i)
            elif self.expert:
                pick_logit_BT = self.pick_logit(h_Nd, i).view(B, T)
                score_BT = self.routers[i](h_Nd).detach().view(B, T)
                picked_BT = self._best(score_BT, inside_BT, valid_BT, i) if self.training else pick_logit_BT > 0
                picked_BT = picked_BT & inside_BT
                surprise_BT = F.binary_cross_entropy_with_logits(
                    pick_logit_BT, picked_BT.to(pick_logit_BT.dtype), reduction="none"
                )
                auxiliary_BT = auxiliary_BT + self.options.auxiliary_weight * surprise_BT * inside_BT
            else:
                picked_BT = inside_BT & (depth_N.view(B, T) >= i)
            inside_BT = picked_BT
            plan = LatentPlan(picked_BT.long(), picked_BT, [], compute_dtype(h_Nd))
            row_N = plan.row_N
            if len(row_N) == 0:
                break
            plan.record(counts)
            passes_BT = passes_BT + picked_BT
            rope = (cos_T[row_N % T], sin_T[row_N % T])
            in_Nd = h_Nd[row_N]
            out_Nd, left = self.stack(in_Nd, rope, plan, blocks=slice(1, -1), final_norm=False)
            if prompts is not None:
                prompts.add(left, range(i, i + 1), row_N=row_N, blocks=slice(1, -1))
            now_Nd = self.combine(in_Nd, out_Nd, first_Nd[row_N], i, depth_N[row_N], p_NR[row_N])
            h_Nd = h_Nd.index_copy(0, row_N, now_Nd)
        if not self.expert:
            auxiliary_BT = auxiliary_BT + self.options.balance_weight * self._imbalance(
                depth_N.view(B, T), p_NR.view(B, T, R), valid_BT
            )
        z_Nd, last_left = self.stack(h_Nd, everywhere, causal, blocks=slice(-1, None))
        if prompts is not None:
            prompts.add([*first_left, *middle_left, *last_left], range(1))
        weights = [*self.routers.parameters(), *self.auxiliary_routers.parameters()]
        touch = sum((weight.sum() * 0.0 for weight in weights), start=z_Nd.new_zeros(()))
        trace = self._trace(passes_BT, valid_BT, counts)
        return LoopOutput((z_Nd + touch).view(B, T, -1), trace, auxiliary_BT=auxiliary_BT)

    def _best(self, score_BT: Tensor, inside_BT: Tensor, valid_BT: Tensor, i: int) -> Tensor:
        """The (R - i) / R of each sequence's tokens, rounded up, that score highest among those still in."""
        R = self.options.recursions
        capacity_B = -(-(valid_BT.sum(1) * (R - i)) // R)
        order_BT = score_BT.masked_fill(~inside_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank_BT = order_BT.argsort(dim=1)
        return rank_BT < capacity_B[:, None]

    def _imbalance(self, depth_BT: Tensor, p_BTR: Tensor, valid_BT: Tensor) -> Tensor:
        """R sum_r f_r p[t,r], f_r being the share of a sequence's tokens that chose depth r (Switch's loss)."""
        R = self.options.recursions
        chosen_BTR = F.one_hot(depth_BT, R) * valid_BT[..., None]
        share_BR = chosen_BTR.sum(1).to(p_BTR.dtype) / valid_BT.sum(1, keepdim=True).clamp(min=1)
        return R * (share_BR[:, None] * p_BTR).sum(2)

    def _trace(self, passes_BT: Tensor, valid_BT: Tensor, counts: PassCounts) -> HaltingTrace:
        k_K = torch.arange(self.options.recursions, device=valid_BT.device)
        return HaltingTrace(
            steps_BT=(passes_BT - valid_BT.long()).to(torch.uint8),
            reach_BTK=(k_K < passes_BT[..., None]).float(),
            exit_BTK=(k_K == passes_BT[..., None] - 1).float(),
            valid_BT=valid_BT,
            counts=counts,
        )

    def decode(
        self, x_Bd: Tensor, state: DecodingState, rope: tuple[Tensor, Tensor], forced: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token of each sequence; recursion i keeps its states in cache region i."""
        cache = state.cache

        def blocks(h_Nd: Tensor, plan: DecodingPlan, part: slice, *, final_norm: bool = False) -> Tensor:
            memories, angles = cache.memories[part], rope if plan.rows is None else rope_of(rope, plan.rows)
            out_Nd: Tensor = self.stack(h_Nd, angles, plan, memories, blocks=part, final_norm=final_norm)[0]
            return out_Nd

        whole = cache.plan(state.everyone, read=0, write=[0])
        state.count(0, state.batch, whole)
        first_Bd = blocks(x_Bd, whole, slice(0, 1))
        forced_B = None if forced is None else torch.tensor(forced, device=x_Bd.device)
        depth_B, p_BR = self.choose_depth(first_Bd, forced_B)
        h_Bd = self.combine(first_Bd, blocks(first_Bd, whole, slice(1, -1)), first_Bd, 0, depth_B, p_BR)
        steps_B = torch.zeros(state.batch, dtype=torch.long, device=x_Bd.device)
        inside_B = torch.ones(state.batch, dtype=torch.bool, device=x_Bd.device)
        for i in range(1, self.options.recursions):
            if forced_B is not None:
                inside_B = inside_B & (forced_B >= i)
            else:
                inside_B = inside_B & (self.pick_logit(h_Bd, i) > 0 if self.expert else depth_B >= i)
            rows = [b for b, on in enumerate(inside_B.tolist()) if on]
            if not rows:
                break
            plan = cache.plan(rows, read=i, write=[i])
            state.count(i, len(rows), plan)
            in_Nd = h_Bd[inside_B]
            out_Nd = blocks(in_Nd, plan, slice(1, -1))
            h_Bd[inside_B] = self.combine(in_Nd, out_Nd, first_Bd[inside_B], i, depth_B[inside_B], p_BR[inside_B])
            steps_B[inside_B] += 1
        return blocks(h_Bd, whole, slice(-1, None), final_norm=True), steps_B


class MorModel(LanguageModel):
    """A Llama whose middle blocks are applied again to the tokens that a router selects."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, MorOptions)
        self.options = config.options
        self.latent_loop = RecursionLoop(config, config.options)
        self.replay = Replay.of(config.options)

    @classmethod
    def shape_problems(cls, shape: Shape) -> list[str]:
        return require(shape.layers >= 3, "shape.layers", shape.layers, "at least 3 for mor (first, shared, last)")

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        forced_BT = self.replay.steps(tokens_BT, self.budget_share) if self.replay else None
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        loop_output: LoopOutput = self.latent_loop(x_Nd, valid_BT, forced_BT, prompts=prompts)
        return loop_output

    def cache_widths(self) -> list[int]:
        return [1] * self.options.recursions

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        forced = self.replay.decode(tokens_B, state, self.budget_share) if self.replay else None
        return self.latent_loop.decode(self.embed(tokens_B), state, self.rope_at(state.positions), forced)

    def layers_per_pass(self, passes: int) -> list[int]:
        layers = self.config.shape.layers
        return [layers] + [layers - 2] * (passes - 1)

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """Routers. Under expert choice the later ones score every row, picked or not."""
        per_score = 2.0 * self.config.shape.d
        R = self.options.recursions
        expert, z = self.latent_loop.expert, bool(self.options.z_weight)
        scores = (1 + (1 if self.replay else 3) * (R - 1)) + z * R if expert else R * (1 + z)
        return per_score * scores * sum(counts.rows[:1]), per_score * scores * sum(counts.executed_rows[:1])
