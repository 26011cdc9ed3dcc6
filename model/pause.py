"""Pause: K copies of one learned pause token after every token (Goyal et al., 2310.02226, used at every position).

The sequence is (K+1) times as long; the pauses carry the position of the token that they follow; attention is plain
causal over the longer sequence; the logits are read at the last pause.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haltscale.model.config import EmbeddingScale, ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.repeated import RepeatedPasses


@dataclass(frozen=True, kw_only=True)
class PauseOptions:
    """Options of the pause-token model."""

    steps: int = 3
    """K: pauses after every token."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        return in_range("steps", self.steps, 0, 32, integer=True)


class PauseModel(LanguageModel):
    """A Llama over [x1 p p p x2 p p p ..]."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, PauseOptions)
        self.steps = config.options.steps
        self.latent_loop = RepeatedPasses(config)
        # One learned vector, which goes in as it is: at unit scale if the tokens do.
        self.pause = nn.Parameter(torch.zeros(config.shape.d)) if self.steps else None
        if self.steps:
            self.random_start = {"pause": 0.02 if config.embedding_scale is EmbeddingScale.NONE else 1.0}

    def _with_pauses(self, x_Nd: Tensor) -> Tensor:
        """[N, d] -> [N * (K + 1), d]."""
        if self.pause is None:
            return x_Nd
        pauses_NKd = self.pause.to(x_Nd.dtype).expand(len(x_Nd), self.steps, -1)
        return torch.cat((x_Nd[:, None], pauses_NKd), dim=1).flatten(0, 1)

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        width = self.steps + 1
        loop = self.latent_loop
        counts = PassCounts()

        def one_pass(x_Nd: Tensor) -> Tensor:
            rope = loop.rope(B, T, x_Nd, repeat=width)
            valid_BU = valid_BT.repeat_interleave(width, dim=1)
            return loop.run(x_Nd, rope, valid_BU, counts, prompts=prompts, rows_per_position=width)

        z_Nd: Tensor = loop(self._with_pauses(self.embed(tokens_BT).flatten(0, 1)), one_pass)
        counts.tokens = counts.rows[0] // width
        return LoopOutput(z_Nd.view(B, T, width, -1)[:, :, -1], single_state_trace(valid_BT, counts, steps=self.steps))

    def embedded_rows(self, counts: PassCounts) -> int:
        return sum(counts.executed_rows[:1]) // (self.steps + 1)

    def cache_widths(self) -> list[int]:
        return [self.steps + 1]

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        width = self.steps + 1
        x_Nd = self._with_pauses(self.embed(tokens_B))
        rope = self.rope_at([position for position in state.positions for _ in range(width)])
        z_Nd = self.latent_loop.decode(x_Nd, rope, state, k=0, region=0, new=width)
        return z_Nd.unflatten(0, (-1, width))[:, -1], torch.full_like(tokens_B, self.steps)
