"""Fixed-k: the control without a router. Every token takes equally many latent steps, whatever it is.

A learned router must beat this at the same mean number of steps; otherwise the gain came from the passes and not from
choosing where to spend them. The steps are those of adaptive latent chain-of-thought (latent_loop.py), and the head
reads the last state.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.latent_loop import LatentLoop, LoopRules, RouterKind
from haltscale.model.loop_options import LoopOptions, loop_options

CERTAIN = 100.0
"""A router bias whose sigmoid is 1 in float32 and float64: all mass reaches the last executed state."""


@dataclass(frozen=True, kw_only=True)
class FixedOptions(LoopOptions):
    """Options of the fixed-k control."""

    steps: float = 3.0
    """Latent steps per token. A fraction is spread evenly over positions: with 2.4, four in ten positions
    take 3 steps and the others 2. So the control can be set to the mean that a router arrived at."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        found = in_range("steps", self.steps, 0.0, 32.0)
        return found + self.loop_problems(None if found else math.ceil(self.steps))

    def canonical(self) -> "FixedOptions":
        """These options with those that have no effect at their defaults."""
        return replace(self, **self.idle_loop(math.ceil(self.steps)))


def spread_steps(steps: float, position: int) -> int:
    """Whole steps of one position: rounded up at positions spread by the golden ratio (Weyl), else rounded down."""
    whole = math.floor(steps)
    return whole + ((position + 1) * 0.6180339887498949 % 1.0 < steps - whole)


class FixedModel(LanguageModel):
    """The latent chain, equally long at every position."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, FixedOptions)
        self.options = config.options
        self.steps = config.options.steps
        rules = LoopRules(
            l_max=math.ceil(self.steps),
            tau=0.0,
            router=RouterKind.NONE,
            router_bias=CERTAIN,
            switches=loop_options(config.options),
        )
        self.latent_loop = LatentLoop(config, rules)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        steps_T = torch.tensor([spread_steps(self.steps, t) for t in range(T)], device=tokens_BT.device)
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        loop_output: LoopOutput = self.latent_loop(
            x_Nd, valid_BT, steps_T.expand(B, T), most_steps=self._most_steps, prompts=prompts
        )
        return loop_output

    @property
    def _most_steps(self) -> int:
        """The depth that has been grown at this share of the budget."""
        return self.options.most_steps(self.budget_share, math.ceil(self.steps))

    def cache_widths(self) -> list[int]:
        return self.latent_loop.cache_widths()

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        forced = [min(spread_steps(self.steps, position), self._most_steps) for position in state.positions]
        rope = self.rope_at(state.positions)
        hidden_Bd, steps_B, _ = self.latent_loop.decode(self.embed(tokens_B), rope, state, forced)
        return hidden_Bd, steps_B
