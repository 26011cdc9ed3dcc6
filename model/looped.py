"""Looped: the whole stack applied K + 1 times (LoopedLM, as the PonderLM authors compare it).

h0 = E[x]; h <- f(h), K + 1 times without the final norm in between; the norm once at the end; the embedding is not
injected again. Every pass is an ordinary causal one over its own keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.repeated import RepeatedPasses


@dataclass(frozen=True, kw_only=True)
class LoopedOptions:
    """Options of the looped model."""

    steps: int = 3
    """K: passes beyond the first."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return in_range("steps", self.steps, 0, 32, integer=True)


class LoopedModel(LanguageModel):
    """logits = head(norm(f(f(.. f(E[x])))))."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, LoopedOptions)
        self.steps = config.options.steps
        self.latent_loop = RepeatedPasses(config)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        loop = self.latent_loop
        counts = PassCounts(tokens=int(valid_BT.sum()))

        def passes(h_Nd: Tensor) -> Tensor:
            rope = loop.rope(B, T, h_Nd)
            for k in range(self.steps + 1):
                h_Nd = loop.run(h_Nd, rope, valid_BT, counts, final_norm=k == self.steps, prompts=prompts, region=k)
            return h_Nd

        h_Nd: Tensor = loop(self.embed(tokens_BT).flatten(0, 1), passes)
        return LoopOutput(h_Nd.view(B, T, -1), single_state_trace(valid_BT, counts, steps=self.steps))

    def cache_widths(self) -> list[int]:
        return [1] * (self.steps + 1)

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        h_Bd, rope = self.embed(tokens_B), self.rope_at(state.positions)
        for k in range(self.steps + 1):
            h_Bd = self.latent_loop.decode(h_Bd, rope, state, k=k, region=k, final_norm=k == self.steps)
        return h_Bd, torch.full_like(tokens_B, self.steps)
