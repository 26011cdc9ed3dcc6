"""Looped: the whole stack applied K + 1 times (LoopedLM, as the PonderLM authors compare it).

h0 = E[x]; h <- f(h), K + 1 times without the final norm in between; the norm once at the end; the embedding is not
injected again, unless `injection` says so (loop_options.py). Every pass is an ordinary causal one over its own keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.loop_options import LoopOptions
from haltscale.model.repeated import RepeatedPasses


@dataclass(frozen=True, kw_only=True)
class LoopedOptions(LoopOptions):
    """Options of the looped model."""

    steps: int = 3
    """K: passes beyond the first."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [*in_range("steps", self.steps, 0, 32, integer=True), *self.loop_problems(self.steps)]

    def canonical(self) -> "LoopedOptions":
        """These options with those that have no effect at their defaults."""
        return replace(self, **self.idle_loop(self.steps))


class LoopedModel(LanguageModel):
    """logits = head(norm(f(f(.. f(E[x])))))."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, LoopedOptions)
        self.options = config.options
        self.steps = config.options.steps
        self.latent_loop = RepeatedPasses(config, options=config.options, steps=self.steps)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        loop = self.latent_loop
        counts = PassCounts()

        steps = self.options.most_steps(self.budget_share, self.steps)
        gradless = self.options.passes_without_gradient(steps)

        def passes(token_Nd: Tensor) -> Tensor:
            rope, h_Nd = loop.rope(B, T, token_Nd), token_Nd
            for k in range(steps + 1):
                with torch.set_grad_enabled(torch.is_grad_enabled() and k >= gradless):
                    h_Nd = loop.border(h_Nd, token_Nd) if k else h_Nd
                    last = k == steps
                    h_Nd = loop.run(h_Nd, rope, valid_BT, counts, final_norm=last, prompts=prompts, region=k)
            return h_Nd + loop.border.touch(h_Nd) if steps < self.steps else h_Nd

        h_Nd: Tensor = loop(self.embed(tokens_BT).flatten(0, 1), passes)
        counts.tokens = counts.rows[0]
        counts.forward_only = counts.first(gradless)
        trace = single_state_trace(valid_BT, counts, steps=steps, most_steps=self.steps)
        return LoopOutput(h_Nd.view(B, T, -1), trace)

    def cache_widths(self) -> list[int]:
        return [1] * (self.steps + 1)

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        steps = self.options.most_steps(self.budget_share, self.steps)
        token_Bd, rope = self.embed(tokens_B), self.rope_at(state.positions)
        h_Bd = token_Bd
        for k in range(steps + 1):
            h_Bd = self.latent_loop.border(h_Bd, token_Bd) if k else h_Bd
            h_Bd = self.latent_loop.decode(h_Bd, rope, state, k=k, region=k, final_norm=k == steps)
        return h_Bd, torch.full_like(tokens_B, steps)
