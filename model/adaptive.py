"""Adaptive latent chain-of-thought (arXiv 2602.08220): each token thinks 0 to l_max steps before it speaks.

The chain itself is latent_loop.py. The head reads the mixture of a position's states by their exit masses. The loss
adds lam * mean_t( sg(p_t)^beta * sum_{k>=1} reach[t,k] ), which presses hardest on tokens that the model already
predicts well (p_t near 1).

What the paper's public traces leave open is marked [R], a reconstruction, and each such decision has an option here or
a named place in latent_loop.py, halting.py or backbone.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range, require
from haltscale.model.decoding import DecodingState
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import IGNORE_INDEX, LanguageModel, LatentState, LoopOutput
from haltscale.model.latent_loop import LatentLoop, LoopRules, RouterKind
from haltscale.model.ledger import PassCounts


class Mixture(StrEnum):
    """What the exit masses mix."""

    HIDDEN = "hidden"
    """Hidden states, before one head: the paper's choice."""
    PROBABILITY = "probability"
    """Next-token distributions, after a head on every executed state: the exact expectation over the router's stops,
    at the price of as many head rows as executed states."""


class PenaltyProbability(StrEnum):
    """Whose probability of the true next token weighs the halting penalty."""

    MIXTURE = "mixture"
    """The model's own, after mixing [R]."""
    STEP = "step"
    """For step k, the one that state k - 1 would give if the head read it alone: was this step still needed? Costs a
    head row, forward only, for every state that is followed by another."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions:
    """Options of adaptive latent chain-of-thought."""

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
    router: RouterKind = RouterKind.LINEAR
    """Kind of router."""
    router_bias: float = 2.0
    """Initial bias of the router [R]. +2 starts every position at 88 % per step: nearly full depth, so that the model
    first learns to use its steps and then to drop them, with the sigmoid far enough from saturation to learn."""
    router_per_step: bool = False
    """One router per step instead of one for all steps [R]."""
    mixture: Mixture = Mixture.HIDDEN
    """What the exit masses mix."""
    penalty_probability: PenaltyProbability = PenaltyProbability.MIXTURE
    """Whose probability weighs the penalty."""
    truncate_gradient: bool = False
    """Cut the gradient where a state is fed back, as if every thought began from a given input [R: not cut]."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        found = [
            *in_range("lam", self.lam, 0.0),
            *in_range("beta", self.beta, 0.0),
            *in_range("l_max", self.l_max, 0, 32, integer=True),
            *in_range("tau", self.tau, 0.0, 1.0),
            *in_range("router_bias", self.router_bias, -100.0, 100.0),
        ]
        kinds = [RouterKind.LINEAR, RouterKind.MLP, RouterKind.NONE]
        for name, choices in (
            ("router", kinds),
            ("mixture", Mixture),
            ("penalty_probability", PenaltyProbability),
        ):
            value = getattr(self, name)
            found += require(value in list(choices), name, value, f"one of {', '.join(choices)}")
        for name in ("router_per_step", "truncate_gradient"):
            found += require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        return found


class AdaptiveModel(LanguageModel):
    """A Llama that thinks on each token for as long as its router asks for."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        options = config.options
        assert isinstance(options, AdaptiveOptions)
        self.options = options
        rules = LoopRules(
            l_max=options.l_max,
            tau=options.tau,
            router=options.router,
            router_bias=options.router_bias,
            router_per_step=options.router_per_step,
            truncate_gradient=options.truncate_gradient,
            keep_states=(
                options.mixture is Mixture.PROBABILITY or options.penalty_probability is PenaltyProbability.STEP
            ),
        )
        self.latent_loop = LatentLoop(config, rules)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor) -> LoopOutput:
        loop_output: LoopOutput = self.latent_loop(self.embed(tokens_BT).flatten(0, 1), valid_BT)
        return loop_output

    # Speaking --------------------------------------------------------------------------------------------------------

    def mix_probabilities(self, states: Sequence[LatentState], rows: int) -> Tensor:
        """log sum_k exit[k] softmax(head(z[k])), [rows, V]: log-probabilities serve as logits."""
        mixed_NV: Tensor | None = None
        for state in states:
            probability_NV = torch.softmax(at_least_float32(self.lm_head(state.z_Nd)), dim=1)
            share_NV = state.exit_N[:, None].to(probability_NV.dtype) * probability_NV
            mixed_NV = share_NV if mixed_NV is None else mixed_NV.index_add(0, state.row_N, share_NV)
        assert mixed_NV is not None
        # Padding carries no mass; the floor keeps its logarithm finite.
        return mixed_NV.clamp(min=torch.finfo(mixed_NV.dtype).tiny).log()

    def logits(self, loop_output: LoopOutput) -> Tensor:
        if self.options.mixture is Mixture.HIDDEN:
            return super().logits(loop_output)
        B, T = loop_output.trace.valid_BT.shape
        loop_output.trace.counts.head_rows += sum(len(state.row_N) for state in loop_output.states)
        return self.mix_probabilities(loop_output.states, B * T).view(B, T, -1)

    def penalty(self, loop_output: LoopOutput, targets_BT: Tensor, nll_BT: Tensor) -> Tensor:
        """The correctness-aware penalty [R: the exponent, and the expected number of latent steps as its object]."""
        assert loop_output.reach_BTK is not None
        scored_BT = targets_BT != IGNORE_INDEX
        if self.options.penalty_probability is PenaltyProbability.MIXTURE:
            probability_BTK = torch.exp(-nll_BT)[..., None]
        else:
            probability_BTK = self._probability_before_each_step(loop_output, targets_BT)
        pressed_BT = (probability_BTK.pow(self.options.beta) * loop_output.reach_BTK[..., 1:]).sum(2) * scored_BT
        return self.options.lam * pressed_BT.sum() / scored_BT.sum().clamp(min=1)

    @torch.no_grad()
    def _probability_before_each_step(self, loop_output: LoopOutput, targets_BT: Tensor) -> Tensor:
        """[B, T, l_max]: entry k - 1 is what the head, reading state k - 1 alone, gives to the true next token."""
        target_N = targets_BT.flatten().clamp(min=0)
        B, T = targets_BT.shape
        probability_NK = loop_output.states[0].reach_N.new_zeros(B * T, self.options.l_max)
        gradless = loop_output.trace.counts.gradless = PassCounts()
        for k, (state, following) in enumerate(zip(loop_output.states, loop_output.states[1:], strict=False)):
            gradless.head_rows += len(following.row_N)
            place_N = torch.searchsorted(state.row_N, following.row_N)  # rows are ascending in every pass
            logits_NV = at_least_float32(self.lm_head(state.z_Nd[place_N]))
            nll_N = F.cross_entropy(logits_NV, target_N[following.row_N], reduction="none")
            probability_NK[following.row_N, k] = torch.exp(-nll_N).to(probability_NK.dtype)
        return probability_NK.view(B, T, -1)

    # Decoding --------------------------------------------------------------------------------------------------------

    def cache_widths(self) -> list[int]:
        return self.latent_loop.cache_widths()

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        rope = self.rope_at(state.position)
        hidden_Bd, steps_B, state.extra = self.latent_loop.decode(self.embed(tokens_B), rope, state)
        return hidden_Bd, steps_B

    def decode_logits(self, hidden_Bd: Tensor, state: DecodingState) -> Tensor:
        if self.options.mixture is Mixture.HIDDEN:
            return super().decode_logits(hidden_Bd, state)
        state.counts.head_rows += sum(len(one.row_N) for one in state.extra)
        return self.mix_probabilities(state.extra, state.batch)

    # Accounting ------------------------------------------------------------------------------------------------------

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """Routers; and, where every state is read by the head, the head rows beyond one per token."""
        realised = executed = 0.0
        if self.latent_loop.routers:
            per_row = self.latent_loop.routers[0].flops()  # type: ignore[operator]
            routed = slice(0, self.latent_loop.rules.l_max)
            realised, executed = per_row * sum(counts.rows[routed]), per_row * sum(counts.executed_rows[routed])
        per_head_row = 2.0 * self.config.shape.d * self.config.vocab_size
        if self.options.mixture is Mixture.PROBABILITY:
            realised += per_head_row * sum(counts.rows[1:])
        return realised, executed
