"""Halting without training: thresholds on the hidden states and predictions of a finished model.

Three scores of a state that are known as soon as it is computed: how far the step moved it, how far it moved the
prediction, and how uncertain the prediction is. A position takes another step while its score is above a threshold. The
embedded token counts as the state before the first. The rules are causal and could be deployed; a learned router has to
beat them at equal mean steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from haltscale.model.kernels import at_least_float32
from haltscale.model.language_model import LanguageModel


class Score(StrEnum):
    """What is compared with the threshold."""

    CHANGE = "change"
    """|z_k - z_(k-1)| / |z_k|."""
    DIVERGENCE = "divergence"
    """KL(p_k || p_(k-1)) in nats, of the next-token distributions that the head reads from single states."""
    CONFIDENCE = "confidence"
    """1 - the greatest probability in p_k: a position takes another step while it is not confident."""

    @property
    def reads_head(self) -> bool:
        """Whether every state has to go through the head."""
        return self is not Score.CHANGE


@dataclass
class Threshold:
    """A halting rule for `LatentLoop.forward`."""

    model: LanguageModel
    score: Score
    value: float
    """A position takes another step while its score is above this."""
    seen: list[tuple[int, Tensor]] | None = field(default=None)
    """If a list: (step, scores) of every call."""

    def __call__(self, k: int, z_Nd: Tensor, before_Nd: Tensor) -> Tensor:
        """Which rows take another step after state k, which was computed from before_Nd."""
        score_N = score(self.model, self.score, z_Nd, before_Nd)
        if self.seen is not None:
            self.seen.append((k, score_N.float().cpu()))
        return score_N > self.value


GoesOn = Callable[[int, Tensor, Tensor], Tensor]


@torch.no_grad()
def score(model: LanguageModel, kind: Score, z_Nd: Tensor, before_Nd: Tensor) -> Tensor:
    """The scores of states [N], which were computed from before_Nd."""
    z_Nd, before_Nd = at_least_float32(z_Nd), at_least_float32(before_Nd)
    if kind is Score.CHANGE:
        tiny = torch.finfo(z_Nd.dtype).tiny
        change_N: Tensor = (z_Nd - before_Nd).norm(dim=1) / z_Nd.norm(dim=1).clamp(min=tiny)
        return change_N
    dtype = model.embedding.weight.dtype
    log_p_NV = at_least_float32(model.lm_head(z_Nd.to(dtype))).log_softmax(1)
    if kind is Score.CONFIDENCE:
        return 1 - log_p_NV.amax(1).exp()
    before_NV = at_least_float32(model.lm_head(before_Nd.to(dtype))).log_softmax(1)
    return (log_p_NV.exp() * (log_p_NV - before_NV)).sum(1)
