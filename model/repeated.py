"""Causal passes one after another over all positions: what looped, PonderLM, PonderLM-2 and pause have in common.

In these methods a pass sees only its own keys and values, so decoding keeps one cache region per pass.
"""

from collections.abc import Callable

from torch import Tensor, nn

from haltscale.model.backbone import CausalPlan, Rope, Stack, rope_table
from haltscale.model.config import ModelConfig
from haltscale.model.decoding import DecodingState, PromptStates
from haltscale.model.ledger import PassCounts
from haltscale.model.loop_options import LoopBorder, LoopOptions


class RepeatedPasses(nn.Module):
    """The stack, ready to be applied to [B, T] rows as often as a method likes.

    In training, all passes run within one `forward`: under ZeRO-3 the parameters are gathered once for all of them.
    """

    def __init__(self, config: ModelConfig, *, options: LoopOptions | None = None, steps: int = 0):
        """options, steps: the switches of a method that has them, and its passes beyond the first."""
        super().__init__()
        options = options or LoopOptions()
        self.config = config
        self.stack = Stack(config.shape, config.norm_eps, residual_scale=options.residual_scale(steps))
        self.border = LoopBorder(config.shape.d, config.norm_eps, options)

    def forward(self, x_Nd: Tensor, passes: Callable[[Tensor], Tensor]) -> Tensor:
        """passes(x_Nd): what the method makes of its input by calling `run`."""
        return passes(x_Nd)

    def rope(self, B: int, T: int, like: Tensor, *, repeat: int = 1) -> Rope:
        """Angles of [B, T * repeat] rows, each position standing `repeat` times."""
        cos_T1E, sin_T1E = rope_table(T, self.config.shape, self.config.rope_theta, like)
        cos, sin = (x.repeat_interleave(repeat, 0).repeat(B, 1, 1) for x in (cos_T1E, sin_T1E))
        return cos, sin

    def run(
        self,
        x_Nd: Tensor,
        rope: Rope,
        valid_BT: Tensor,
        counts: PassCounts,
        *,
        final_norm: bool = True,
        prompts: PromptStates | None = None,
        region: int = 0,
        rows_per_position: int = 1,
    ) -> Tensor:
        """One causal pass over x_Nd = [B, T] rows, counted. prompts: gets what the pass leaves, for a cache region."""
        B, T = valid_BT.shape
        plan = CausalPlan(B, T, keep=prompts is not None)
        plan.record(counts, valid_BT)
        z_Nd: Tensor
        z_Nd, memories = self.stack(x_Nd, rope, plan, final_norm=final_norm)
        if prompts is not None:
            prompts.add(memories, range(region, region + 1), rows_per_position=rows_per_position)
        return z_Nd

    def decode(
        self,
        x_Nd: Tensor,
        rope: Rope,
        state: DecodingState,
        *,
        k: int,
        region: int,
        new: int = 1,
        final_norm: bool = True,
    ) -> Tensor:
        """One decoding pass of all sequences, `new` rows each, on a cache region of its own; counted as pass k."""
        plan = state.cache.plan(state.everyone, read=region, write=[region], new=new)
        z_Nd: Tensor
        z_Nd, _ = self.stack(x_Nd, rope, plan, state.cache.memories, final_norm=final_norm)
        state.count(k, state.batch * new, plan)
        return z_Nd
