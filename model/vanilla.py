"""Vanilla: the plain Llama. One pass per token; the baseline that every other method must beat at equal compute."""

from dataclasses import dataclass

import torch
from torch import Tensor

from haltscale.model.backbone import CausalPlan, Stack, rope_table
from haltscale.model.config import ModelConfig
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts


@dataclass(frozen=True, kw_only=True)
class VanillaOptions:
    """The plain model has nothing to choose."""

    def problems(self) -> list[str]:
        """No options, no errors."""
        return []


class VanillaModel(LanguageModel):
    """logits = head(f(E[x]))."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.stack = Stack(config.shape, config.norm_eps)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        config = self.config
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        cos, sin = rope_table(T, config.shape, config.rope_theta, x_Nd)
        plan = CausalPlan(B, T, keep=prompts is not None)
        z_Nd, memories = self.stack(x_Nd, (cos.repeat(B, 1, 1), sin.repeat(B, 1, 1)), plan)
        if prompts is not None:
            prompts.add(memories, range(1))
        counts = PassCounts()
        plan.record(counts, valid_BT)
        counts.tokens = counts.rows[0]
        trace = single_state_trace(valid_BT, counts)
        return LoopOutput(z_Nd.view(B, T, -1), trace)

    def cache_widths(self) -> list[int]:
        return [1]

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        plan = state.cache.plan(state.everyone, read=0, write=[0])
        z_Bd, _ = self.stack(self.embed(tokens_B), self.rope_at(state.positions), plan, state.cache.memories)
        state.count(0, state.batch, plan)
        return z_Bd, torch.zeros_like(tokens_B)
