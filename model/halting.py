"""Halting: from a router's gates to the masses that weigh the states, and the record of what happened.

g[t,k], the gate, is the probability of another step after state k of position t. reach[t,0] = 1 and reach[t,k+1] =
reach[t,k] g[t,k]; a position takes another step iff k < l_max and reach[t,k+1] > tau; exit[t,k] = reach[t,k] -
reach[t,k+1], and the last executed state takes all the mass that is left, so that a position's exit masses sum to 1
(arXiv 2602.08220). In the terms of ACT and PonderNet, reach is the survival probability and exit the halting
probability.
"""

# ruff: noqa: N815 (fields of a dataclass carry shape suffixes too)

from dataclasses import dataclass

import torch
from torch import Tensor

from haltscale.model.ledger import PassCounts


def halting_step(
    reach_N: Tensor, gate_N: Tensor, *, tau: float, may_go_on: Tensor | bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """One application of the rule, the same in training and in decoding.

    Gives (goes_on_N bool, exit_N, next_reach_N): the mass that leaves at this state and, for those that take another
    step, the mass that reaches the next. `may_go_on` False forbids more steps (the last step, a padded position).
    """
    onward_N = reach_N * gate_N
    goes_on_N = (onward_N > tau) & may_go_on
    exit_N = torch.where(goes_on_N, reach_N - onward_N, reach_N)
    return goes_on_N, exit_N, onward_N


def masses(gates: list[float], *, l_max: int, tau: float) -> tuple[list[float], list[float]]:
    """(reach, exit) of one position with these gates, up to its last executed state: the rule in plain Python."""
    reach, left = [1.0], []
    for k in range(l_max):
        onward = reach[k] * gates[k]
        if not onward > tau:
            break
        left.append(reach[k] - onward)
        reach.append(onward)
    return reach, [*left, reach[-1]]


@dataclass
class HaltingTrace:
    """How one forward pass allocated its latent steps. Detached; K = l_max + 1 states at most per position."""

    steps_BT: Tensor
    """uint8: latent steps executed after the ordinary pass; 0 at padding."""
    reach_BTK: Tensor
    """float32: probability mass that reached each executed state; 0 for states that were not executed."""
    exit_BTK: Tensor
    """float32: weight of each state in the position's mixture; sums to 1 at real positions, to 0 at padding."""
    valid_BT: Tensor
    """bool: real positions."""
    counts: PassCounts
    """What the pass cost; `LanguageModel.flops` turns it into FLOPs."""

    @property
    def mean_steps(self) -> float:
        """Executed latent steps per real token."""
        return float(self.steps_BT[self.valid_BT].float().mean())

    @property
    def expected_steps(self) -> float:
        """sum_k k exit[k] per real token: the steps that the mixture leans on, which pruning only bounds from above."""
        weight_K = torch.arange(self.exit_BTK.shape[2], device=self.exit_BTK.device, dtype=torch.float32)
        return float((self.exit_BTK @ weight_K)[self.valid_BT].mean())

    def histogram(self) -> list[int]:
        """Real tokens by number of executed latent steps: entry k counts those that took k."""
        steps = self.steps_BT[self.valid_BT].long()
        return [int(n) for n in torch.bincount(steps, minlength=self.exit_BTK.shape[2])]


def single_state_trace(
    valid_BT: Tensor, counts: PassCounts, *, steps: int = 0, most_steps: int | None = None
) -> HaltingTrace:
    """The trace of a method without halting: every real position executes `steps` extra steps and uses the last.
    most_steps: what it will execute once its depth has grown, which is how wide the trace is."""
    exit_BTK = torch.zeros(*valid_BT.shape, (steps if most_steps is None else most_steps) + 1, device=valid_BT.device)
    reach_BTK = exit_BTK.clone()
    exit_BTK[..., steps] = valid_BT.float()
    reach_BTK[..., : steps + 1] = valid_BT.float()[..., None]
    steps_BT = (valid_BT * steps).to(torch.uint8)
    return HaltingTrace(steps_BT=steps_BT, reach_BTK=reach_BTK, exit_BTK=exit_BTK, valid_BT=valid_BT, counts=counts)
