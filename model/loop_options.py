"""Switches that make loops train, alike for every method that applies its stack again: looped, fixed, adaptive.

All are off by default; docs/methods.md has the source of each. They say what a state goes through before it enters the
stack again (`injection`, `loop_norm`), how blocks begin and how much they add (`zero_outputs`, `scaled_residuals`), how
many passes are allowed at which share of the training budget (`depth_growth`, `depth_curve`), and through how many of
them the gradient flows (`gradient_passes`).
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from haltscale.model.backbone import RMSNorm
from haltscale.model.config import in_range, is_int, require


class Injection(StrEnum):
    """How the token's embedding e comes in again before every pass but the first."""

    NONE = "none"
    """Not at all: the next input is z, the state that the last pass left."""
    ADD = "add"
    """z + e."""
    NORM = "norm"
    """RMSNorm(z) + alpha e; the norm has a gain of its own, alpha is one learned number that starts at 1."""


class DepthCurve(StrEnum):
    """How the passes allowed grow over the first share W = `depth_growth` of the budget; R passes in the end."""

    LINEAR = "linear"
    """From 1 to R in R equal parts."""
    SQRT = "sqrt"
    """ceil(R (1 - sqrt(1 - t / W))) at share t, at least 1: slowly first, fast at the end."""
    LATE = "late"
    """1 until W, R from there on. W = 0.7 loops in the last 30 % only."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of every method that loops."""

    injection: Injection = Injection.NONE
    """How the embedding comes in again before every pass but the first."""
    loop_norm: bool = False
    """Whether an RMSNorm with a gain of its own normalises the input of every pass but the first, after injection."""
    zero_outputs: bool = False
    """Whether the projections into the residual stream, of attention and of the MLP, start at zero: every block begins
    as the identity."""
    scaled_residuals: bool = False
    """Whether what a block adds to the residual stream is multiplied by 1 / N, N being the most passes."""
    depth_growth: float = 0.0
    """Share W of the training budget over which the most latent steps grow from 0 to all; 0: all from the start."""
    depth_curve: DepthCurve = DepthCurve.LINEAR
    """How they grow."""
    gradient_passes: int = 0
    """Above 0: the gradient flows through the last so many of the passes that are allowed; those before run without
    one, and cost a third in training. Needs an injection, which is how the embedding learns then. Passes are counted
    from the deepest one: a position that halts before the last so many trains router and head, not the stack."""

    def loop_problems(self, l_max: object) -> list[str]:
        """All errors of these options, for a method with so many latent steps at most."""
        found = [
            *in_range("depth_growth", self.depth_growth, 0.0, 1.0),
            *in_range("gradient_passes", self.gradient_passes, 0, 33, integer=True),
        ]
        for name, kind in (("injection", Injection), ("depth_curve", DepthCurve)):
            value = getattr(self, name)
            found += require(value in list(kind), name, value, f"one of {', '.join(kind)}")
        for name in ("loop_norm", "zero_outputs", "scaled_residuals"):
            found += require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if found:
            return found
        if self.injection == Injection.NORM:
            allowed = "false with injection norm, which has a norm at the border already (or take injection add)"
            found += require(not self.loop_norm, "loop_norm", self.loop_norm, allowed)
        if self.gradient_passes and self.injection == Injection.NONE:
            allowed = "0 without an injection, or the embedding would never be trained: set injection to add or norm"
            found += require(False, "gradient_passes", self.gradient_passes, allowed)
        if l_max == 0:
            for name in ("injection", "loop_norm", "scaled_residuals", "gradient_passes"):
                value, default = getattr(self, name), getattr(LoopOptions, name)
                allowed = f"{default} where there are no steps to loop"
                found += require(value == default, name, getattr(value, "value", value), allowed)
        return found

    def idle_loop(self, l_max: object) -> dict[str, Any]:
        """The fields that have no effect, at their defaults (see `canonical` of the options)."""
        idle: dict[str, Any] = {} if self.depth_growth else {"depth_curve": DepthCurve.LINEAR}
        if is_int(l_max) and self.gradient_passes > l_max:  # type: ignore[operator]
            idle["gradient_passes"] = 0
        return idle

    @property
    def follows_budget(self) -> bool:
        """Whether what a training step computes depends on the share of the budget that is spent."""
        return self.depth_growth > 0

    def most_steps(self, share: float, l_max: int) -> int:
        """The latent steps allowed at a share of the training budget, of l_max in the end."""
        if share >= self.depth_growth:
            return l_max
        passes, grown = l_max + 1, share / self.depth_growth
        if self.depth_curve == DepthCurve.LATE:
            return 0
        if self.depth_curve == DepthCurve.SQRT:
            return max(1, math.ceil(passes * (1 - math.sqrt(1 - grown)))) - 1
        return int(grown * passes)

    def passes_without_gradient(self, most_steps: int) -> int:
        """Of the most_steps + 1 passes that are allowed, those that run without a gradient."""
        return max(0, most_steps + 1 - self.gradient_passes) if self.gradient_passes else 0

    def residual_scale(self, l_max: int) -> float:
        """What the outputs of blocks are multiplied by."""
        return 1 / (l_max + 1) if self.scaled_residuals else 1.0


LOOP_FIELDS = tuple(field.name for field in fields(LoopOptions))


def loop_options(options: Any) -> LoopOptions:
    """The switches of a method's options alone; all off where it has none."""
    return LoopOptions(**{name: getattr(options, name) for name in LOOP_FIELDS if hasattr(options, name)})


class LoopBorder(nn.Module):
    """What a state goes through before it enters the stack again. Without a switch it has no parameters."""

    def __init__(self, d: int, norm_eps: float, options: LoopOptions):
        super().__init__()
        self.injection = options.injection
        if self.injection == Injection.NORM:
            self.state_norm = RMSNorm(d, norm_eps)
            self.alpha = nn.Parameter(torch.ones(1))
        self.input_norm = RMSNorm(d, norm_eps) if options.loop_norm else None

    def forward(self, z_Nd: Tensor, token_Nd: Tensor) -> Tensor:
        """The next input of rows with states z_Nd, token_Nd being their embedded tokens."""
        if self.injection == Injection.ADD:
            z_Nd = z_Nd + token_Nd
        elif self.injection == Injection.NORM:
            z_Nd = self.state_norm(z_Nd) + self.alpha * token_Nd
        return z_Nd if self.input_norm is None else self.input_norm(z_Nd)

    def touch(self, like: Tensor) -> Tensor:
        """Zero, with a gradient for every parameter: no pass may have used them yet, and all ranks need one."""
        return sum((parameter.sum() * 0.0 for parameter in self.parameters()), start=like.new_zeros(()))
