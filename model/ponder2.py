"""PonderLM-2 with K latent thoughts per token, trained by Jacobi iteration (the authors' public code, whose K is 1).

The sequence [x1 z1 x2 z2 ..] holds, after each token, a latent thought: the last hidden state at the token. z_t needs
z_1 .. z_{t-1}, so an exact pass would be sequential. Training iterates instead: one pass over the tokens alone guesses
all z at once; J Jacobi passes over the interleaved sequence (2T long, token and thought sharing a position, ordinary
causal mask) refresh z from the token slots; a last pass gives the logits at the thought slots. J is drawn from {2, 3}
for each optimizer step and is 3 in evaluation; gradients flow through everything. Cost: 2J + 3 passes of length T, 8
on average.

With K > 1 [R], [x1 z1 .. zK x2 ..] is K + 1 times as long: each thought is the last hidden state at the slot before it,
the first guess of all K is that of the pass over the tokens, and the logits are read at the last thought.

Decoding is exact and sequential: two passes per token over one cache. It is the fixed point that J passes approach, and
equals `forward` once J reaches the number of tokens; with J = 3 the two differ a little. That gap is the method's own.
A prompt is read by as many Jacobi passes as the fixed point takes to be reached, to rounding; what the method needs of
them is two passes per token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltscale.model.config import ModelConfig, in_range
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, LoopOutput
from haltscale.model.ledger import PassCounts
from haltscale.model.repeated import RepeatedPasses


@dataclass(frozen=True, kw_only=True)
class Ponder2Options:
    """Options of PonderLM-2."""

    thoughts: int = 1
    """K: latent thoughts after every token."""
    jacobi_low: int = 2
    """Fewest Jacobi passes in training; drawn uniformly up to jacobi_high, once per optimizer step (`begin_step`), so
    that a step's result does not depend on how its batch is cut into pieces and shared by ranks."""
    jacobi_high: int = 3
    """Most Jacobi passes in training, and their number in evaluation."""

    def problems(self) -> list[str]:
        """All errors of the options."""
        found = in_range("jacobi_high", self.jacobi_high, 0, 4096, integer=True)
        found = found or in_range("jacobi_low", self.jacobi_low, 0, self.jacobi_high, integer=True)
        return [*in_range("thoughts", self.thoughts, 1, 32, integer=True), *found]


class Ponder2Model(LanguageModel):
    """A Llama with a latent thought after every token."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        assert isinstance(config.options, Ponder2Options)
        self.options = config.options
        self.latent_loop = RepeatedPasses(config)
        self._drawn = config.options.jacobi_high

    def begin_step(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        self._drawn = int(torch.randint(self.options.jacobi_low, self.options.jacobi_high + 1, (), generator=stream))

    def hidden_states(self, tokens_BT: Tensor, valid_BT: Tensor, *, prompts: PromptStates | None = None) -> LoopOutput:
        B, T = tokens_BT.shape
        loop, K = self.latent_loop, self.options.thoughts
        counts = PassCounts()

        def passes(x_Nd: Tensor) -> Tensor:
            z_NKd = loop.run(x_Nd, loop.rope(B, T, x_Nd), valid_BT, counts)[:, None].expand(-1, K, -1)
            rope, valid_BU = loop.rope(B, T, x_Nd, repeat=K + 1), valid_BT.repeat_interleave(K + 1, dim=1)

            def interleaved(**last: Any) -> Tensor:
                slots_Nd = torch.cat((x_Nd[:, None], z_NKd), dim=1).flatten(0, 1)
                states_NKd: Tensor = loop.run(slots_Nd, rope, valid_BU, counts, **last).unflatten(0, (-1, K + 1))
                return states_NKd

            drawn = self._drawn if self.training else self.options.jacobi_high
            for _ in range(drawn if prompts is None else T * K):  # after T K passes every state is exact
                before_NKd, z_NKd = z_NKd, interleaved()[:, :-1]
                if prompts is not None and _settled(before_NKd, z_NKd):
                    break
            return interleaved(prompts=prompts, rows_per_position=K + 1)[:, -1]

        out_Nd: Tensor = loop(self.embed(tokens_BT).flatten(0, 1), passes)
        counts.tokens = counts.rows[0]
        if prompts is not None:
            counts = _sequential_passes(valid_BT, K + 1) + counts.executed_only()
        return LoopOutput(out_Nd.view(B, T, -1), single_state_trace(valid_BT, counts, steps=K))

    def cache_widths(self) -> list[int]:
        return [self.options.thoughts + 1]

    def decode_hidden_states(self, tokens_B: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        rope = self.rope_at(state.positions)
        z_Bd = self.embed(tokens_B)
        for k in range(self.options.thoughts + 1):
            z_Bd = self.latent_loop.decode(z_Bd, rope, state, k=k, region=0)
        return z_Bd, torch.full_like(tokens_B, self.options.thoughts)


def _settled(before_NKd: Tensor, after_NKd: Tensor) -> bool:
    """Whether a Jacobi pass has changed no state by more than rounding."""
    change = (after_NKd - before_NKd).abs().max()
    return bool(change <= 4 * torch.finfo(after_NKd.dtype).eps * after_NKd.abs().max())


def _sequential_passes(valid_BT: Tensor, passes: int) -> PassCounts:
    """What the method needs of whole texts: at its first pass, token t sees ``passes`` states of each token before it
    and its own; at each further one, one more."""
    tokens, seen = int(valid_BT.sum()), int((valid_BT.cumsum(1) * valid_BT).sum())
    return PassCounts(
        rows=[tokens] * passes,
        keys=[passes * (seen - tokens) + (slot + 1) * tokens for slot in range(passes)],
        executed_rows=[0] * passes,
        executed_keys=[0] * passes,
        tokens=tokens,
    )
