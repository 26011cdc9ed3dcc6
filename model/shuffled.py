"""Shuffled router: the control that keeps the number of latent steps and destroys their placement.

A router decides as in adaptive.py, but its decision for a token is carried out `shift` tokens later. The numbers of
steps are moved to other tokens: their distribution and the compute stay, their fit to the token is lost. A shift
into the past keeps the model causal and lets it decode, which a random permutation would not. If this control does as
well as the router, the router has learned a budget and not a choice.

The router's own run comes first, without gradient (the routing run). Its FLOPs count as `executed` but not as
`realised`, since the compute to match is that of the second run, which gives the logits. The router is trained as in
adaptive.py, by the mixture of the second run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from haltscale.model.adaptive import AdaptiveModel, AdaptiveOptions, Mixture, PenaltyProbability
from haltscale.model.config import ModelConfig, in_range, require
from haltscale.model.decoding import FIRST_CAPACITY, DecodingState, PromptStates
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.step_source import StepsFrom


@dataclass(frozen=True, kw_only=True)
class ShuffledOptions(AdaptiveOptions):
    """Options of the shuffled router: those of adaptive, and how far away its decisions are carried out."""

    shift: int = 17
    """Tokens between the one that a number of steps is computed for and the one that gets it. The first `shift` tokens
    of a sequence keep their own."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *super().problems(),
            *in_range("shift", self.shift, 1, integer=True),
            *require(self.mixture is Mixture.HIDDEN, "mixture", str(self.mixture), "hidden for the shuffled control"),
            *require(
                self.penalty_probability is PenaltyProbability.MIXTURE,
                "penalty_probability",
                str(self.penalty_probability),
                "mixture for the shuffled control",
            ),
            *require(
                self.steps_from is StepsFrom.ROUTER and not self.gate_warmup and not self.explore,
                "steps_from",
                str(self.steps_from),
                "router for the shuffled control, without gate_warmup and explore",
            ),
        ]


class ShuffledModel(AdaptiveModel):
    """Adaptive, with its numbers of steps moved to other tokens."""

    def __init__(self, config: ModelConfig):
        assert isinstance(config.options, ShuffledOptions)
        self.shift = config.options.shift
        super().__init__(config)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        valid_BT: Tensor,
        *,
        prompts: PromptStates | None = None,
        routing_states: PromptStates | None = None,
        own_steps: list[list[int]] | None = None,
    ) -> LoopOutput:
        """routing_states, own_steps: filled with the keys and values of the routing run, and with its steps."""
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        with torch.no_grad():
            routing: LoopOutput = self.latent_loop(x_Nd.detach(), valid_BT, prompts=routing_states)
        own_BT = routing.trace.steps_BT.long()
        shifted_BT = torch.cat((own_BT[:, : self.shift], own_BT[:, : -self.shift]), dim=1)[:, : own_BT.shape[1]]
        if own_steps is not None:
            own_steps += own_BT.tolist()
        loop_output: LoopOutput = self.latent_loop(x_Nd, valid_BT, shifted_BT, prompts=prompts)
        loop_output.trace.counts.gradless = routing.trace.counts.executed_only()
        return loop_output

    def cache_bytes_per_token(self) -> int:
        return 2 * super().cache_bytes_per_token()  # of the routing run and of the run that gives the logits

    # Decoding: one cache for the routing run, one for the run that gives the logits -----------------------------------

    def start_decoding(self, batch_size: int, *, capacity: int = FIRST_CAPACITY) -> DecodingState:
        state, routing = (super(ShuffledModel, self).start_decoding(batch_size, capacity=capacity) for _ in range(2))
        state.extra = (
            routing,
            [[] for _ in range(batch_size)],
        )  # the routing run's cache, and its steps of each sequence
        return state

    def read_hidden_states(
        self, tokens_BT: Tensor, valid_BT: Tensor, state: DecodingState, rows: list[int]
    ) -> LoopOutput:
        routing, own_steps = state.extra
        prompts, routing_states, found = PromptStates(), PromptStates(), list[list[int]]()
        loop_output = self.hidden_states(
            tokens_BT, valid_BT, prompts=prompts, routing_states=routing_states, own_steps=found
        )
        routing.cache.make_room(tokens_BT.shape[1])
        for one, states in ((state, prompts), (routing, routing_states)):
            one.cache.fill(rows, valid_BT, states)
        for b, steps, length in zip(rows, found, valid_BT.sum(1).tolist(), strict=True):
            own_steps[b] += steps[:length]
        return loop_output

    def decode_pass(self, tokens: Mapping[int, int], state: DecodingState) -> tuple[list[int], Tensor, Tensor]:
        return LanguageModel.decode_pass(self, tokens, state)  # the scout goes first

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        routing, own_steps = state.extra
        x_Bd, rope = self.embed(tokens_B), self.rope_at(state.positions)
        routing.cache.make_room(max(state.positions) + 1)
        _, steps_B, _ = self.latent_loop.decode(x_Bd, rope, routing)
        forced = []
        for own, steps in zip(own_steps, steps_B.tolist(), strict=True):
            own.append(steps)
            forced.append(own[-1 - self.shift] if len(own) > self.shift else steps)
        before = routing.counts
        routing.counts = PassCounts()
        hidden_Bd, shifted_B, _ = self.latent_loop.decode(x_Bd, rope, state, forced)
        state.counts += before.executed_only()
        return hidden_Bd, shifted_B

    def keep_sequences(self, state: DecodingState, rows: list[int]) -> None:
        super().keep_sequences(state, rows)
        routing, own_steps = state.extra
        routing.keep(rows)
        state.extra = (routing, [own_steps[b] for b in rows])
