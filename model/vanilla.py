"""Vanilla: the plain Llama. One pass per token; the baseline that every other method must beat at equal compute."""

from dataclasses import dataclass

from haltscale.model.backbone import CausalPlan, Stack, rope_table
from haltscale.model.config import ModelConfig
from haltscale.model.halting import single_state_trace
from haltscale.model.language_model import LanguageModel, Thought
from haltscale.model.ledger import PassCounts
from torch import Tensor


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

    def think(self, tokens_BT: Tensor, valid_BT: Tensor) -> Thought:
        B, T = tokens_BT.shape
        config = self.config
        x_Nd = self.embed(tokens_BT).flatten(0, 1)
        cos, sin = rope_table(T, config.shape, config.rope_theta, x_Nd)
        plan = CausalPlan(B, T)
        z_Nd, _ = self.stack(x_Nd, (cos.repeat(B, 1, 1), sin.repeat(B, 1, 1)), plan)
        trace = single_state_trace(valid_BT, count_causal_pass(valid_BT, plan))
        return Thought(z_Nd.view(B, T, -1), trace)


def count_causal_pass(valid_BT: Tensor, plan: CausalPlan) -> PassCounts:
    """The counts of one ordinary pass: position t of a sequence needs t + 1 keys."""
    rows, keys = (int(n) for n in (valid_BT.sum(), (valid_BT.cumsum(1) * valid_BT).sum()))
    counts = PassCounts(tokens=rows)
    counts.record(rows=rows, keys=keys, executed_rows=plan.batch * plan.length, executed_keys=plan.executed_keys)
    return counts
