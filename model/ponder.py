"""PonderLM: feed back the expected embedding of the model's own guess (PonderLM's public code).

e0 = E[x]; K times: p = softmax(head(f(e))), then e <- e + p W_E; one last pass gives the logits. The paper adds the
guess to what went in; the later code replaces it, e = e0 + p W_E. Every pass is an ordinary causal one over its own
keys. The vocabulary is multiplied twice per step, and the ledger counts it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range, require
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.repeated import RepeatedPasses


@dataclass(frozen=True, kw_only=True)
class PonderOptions:
    """Options of PonderLM."""

    steps: int = 3
    """K: guesses fed back before the last pass."""
    accumulate: bool = True
    """Add each guess to the last input (the paper), or to the token's embedding alone (the later code)."""
    top_k: int = 0
    """Above 0: a guess is the distribution over the so many likeliest tokens alone, made to sum to 1 [R]. It is
    computed densely, and counted so."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return [
            *in_range("steps", self.steps, 0, 32, integer=True),
            *require(isinstance(self.accumulate, bool), "accumulate", self.accumulate, "true or false"),
            *in_range("top_k", self.top_k, 0, integer=True),
        ]


class PonderModel(LanguageModel):
    """A Llama that reads its own guesses."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, PonderOptions)
        self.options = config.options
        self.steps = config.options.steps
        self.latent_loop = RepeatedPasses(config)

    def _next_input(self, token_Nd: Tensor, e_Nd: Tensor, z_Nd: Tensor) -> Tensor:
        """The input after a pass that gave z_Nd from e_Nd."""
        logits_NV = at_least_float32(self.lm_head(z_Nd))
        if 0 < self.options.top_k < logits_NV.shape[1]:
            kept, place = logits_NV.topk(self.options.top_k, dim=1)
            logits_NV = torch.full_like(logits_NV, -torch.inf).scatter(1, place, kept)
        guess_NV = torch.softmax(logits_NV, dim=1).to(z_Nd.dtype)
        return (e_Nd if self.options.accumulate else token_Nd) + self.expected_embedding(guess_NV)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        loop = self.latent_loop
        counts = PassCounts()

        def passes(token_Nd: Tensor) -> Tensor:
            e_Nd, rope = token_Nd, loop.rope(B, T, token_Nd)
            for k in range(self.steps):
                z_Nd = loop.run(e_Nd, rope, valid_BT, counts, prompts=prompts, region=k)
                e_Nd = self._next_input(token_Nd, e_Nd, z_Nd)
            return loop.run(e_Nd, rope, valid_BT, counts, prompts=prompts, region=self.steps)

        z_Nd: Tensor = loop(self.embed(tokens_BT).flatten(0, 1), passes)
        counts.tokens = counts.rows[0]
        return LoopOutput(z_Nd.view(B, T, -1), single_state_trace(valid_BT, counts, steps=self.steps))

    def cache_widths(self) -> list[int]:
        return [1] * (self.steps + 1)

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        token_Bd = e_Bd = self.embed(tokens_B)
        rope = self.rope_at(state.positions)
        for k in range(self.steps):
            z_Bd = self.latent_loop.decode(e_Bd, rope, state, k=k, region=k)
            e_Bd = self._next_input(token_Bd, e_Bd, z_Bd)
        z_Bd = self.latent_loop.decode(e_Bd, rope, state, k=self.steps, region=self.steps)
        return z_Bd, torch.full_like(tokens_B, self.steps)

    def extra_flops(self, counts: PassCounts) -> tuple[float, float]:
        """Each guess: once through the head, once through the embedding."""
        per_row = 2 * self.head_row_flops()
        return per_row * sum(counts.rows[: self.steps]), per_row * sum(counts.executed_rows[: self.steps])
