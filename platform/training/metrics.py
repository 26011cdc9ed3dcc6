"""What one optimizer step did, summed over micro-batches and ranks, and the rows of metrics made of several steps."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from haltscale.model import Flops, PassCounts
from haltscale.platform.training.progress import Progress


def sum_over_ranks(count: int, world: int) -> int:
    """The sum of a count over all ranks."""
    if world == 1:
        return count
    total = torch.tensor([count], device=_collective_device())
    torch.distributed.all_reduce(total)
    return int(total)


def compile_seconds() -> float:
    """What torch.compile has taken so far in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")
    spent = compiler.cumulative_time_spent_ns if compiler else {}
    return sum(spent.get(name, 0.0) for name in ("entire_frame_compile", "entire_backward_compile")) / 1e9


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What one step did, on this rank or on all together; sums, so that ranks add up."""

    sums: npt.NDArray[np.float64]
    """Times scored tokens: loss, cross-entropy, penalty, expected steps; scored tokens; FLOPs realised, executed,
    paper; pass rows; ranks that find a log due; ranks that were given notice; ranks
    whose time is over."""
    rank_steps: npt.NDArray[np.float64]
    """Mean latent steps of each rank's tokens; 0 at the places of other ranks until they are added."""
    histogram: npt.NDArray[np.float64]
    """Tokens by executed latent steps."""

    @classmethod
    def of(
        cls,
        outputs: list[tuple[Any, int]],
        flops: Flops,
        counts: PassCounts,
        asks: tuple[bool, bool, bool],
        *,
        rank: int,
        world: int,
    ) -> StepTotals:
        """This rank's totals, from its forward passes of the step and the tokens that each scored."""
        weights = torch.tensor([float(scored) for _, scored in outputs], dtype=torch.float64)
        means = torch.stack([_means(output) for output, _ in outputs]).double().cpu()
        sums = torch.where(weights[:, None] > 0, means * weights[:, None], 0.0).sum(0).numpy()
        spent = [float(weights.sum()), flops.realised, flops.executed, flops.paper, float(sum(counts.rows))]
        steps = torch.cat([output.trace.steps_BT[output.trace.valid_BT] for output, _ in outputs]).long()
        histogram = torch.bincount(steps, minlength=outputs[0][0].trace.exit_BTK.shape[2]).double().cpu().numpy()
        rank_steps = np.zeros(world)
        rank_steps[rank] = float(steps.double().mean()) if len(steps) else 0.0
        return cls(sums=np.concatenate([sums, spent, asks]), rank_steps=rank_steps, histogram=histogram)

    def over_ranks(self) -> StepTotals:
        """The sum over all ranks: they halt differently, so their losses, steps and FLOPs differ."""
        world = len(self.rank_steps)
        if world == 1:
            return self
        together = np.concatenate([self.sums, self.rank_steps, self.histogram])
        values = torch.as_tensor(together, device=_collective_device())
        torch.distributed.all_reduce(values)
        ends = np.cumsum([len(self.sums), world])
        sums, rank_steps, histogram = np.split(values.cpu().numpy(), ends)
        return StepTotals(sums=sums, rank_steps=rank_steps, histogram=histogram)

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """Mean over scored tokens of loss, cross-entropy, penalty and expected steps."""
        return np.asarray(self.sums[:4] / max(self.sums[4], 1.0))

    @property
    def flops(self) -> Flops:
        realised, executed, paper = self.sums[5:8].tolist()
        return Flops(realised=realised, executed=executed, paper=paper)

    @property
    def pass_rows(self) -> int:
        return int(self.sums[8])

    @property
    def is_log_due(self) -> bool:
        """Whether any rank finds that a row of metrics is due."""
        return bool(self.sums[9])

    @property
    def is_noticed(self) -> bool:
        """Whether any rank has notice of preemption."""
        return bool(self.sums[10])

    @property
    def is_capped(self) -> bool:
        """Whether any rank has trained for as long as it may."""
        return bool(self.sums[11])

    @property
    def straggling(self) -> float:
        """The straggler ratio: maximum over mean of the ranks' latent steps. 1 is balanced."""
        mean = float(self.rank_steps.mean())
        return float(self.rank_steps.max()) / mean if mean > 0 else 1.0


def _means(output: Any) -> torch.Tensor:
    exit_BTK = output.trace.exit_BTK[output.trace.valid_BT].float()
    expected = (exit_BTK @ torch.arange(exit_BTK.shape[1], dtype=torch.float32, device=exit_BTK.device)).mean()
    return torch.stack([x.detach().float() for x in (output.loss, output.cross_entropy, output.penalty, expected)])


class MetricsWindow:
    """Means of the steps since the last logged row."""

    def __init__(self, progress: Progress, peak: float | None = None) -> None:
        """
        Args:
            peak: FLOP/s of all ranks' devices together, where they are known.
        """
        self._peak = peak
        self._clear(progress)

    def _clear(self, progress: Progress) -> None:
        self._from_tokens, self._from_seconds = progress.tokens, progress.seconds
        self._from_executed, self._from_realised = progress.flops_executed, progress.flops_realised
        self._from_compiling = compile_seconds()
        self._steps: list[StepTotals] = []
        self._began = time.perf_counter()

    @property
    def age(self) -> float:
        return time.perf_counter() - self._began

    def add(self, step: StepTotals) -> None:
        """Take one step in."""
        self._steps.append(step)

    def close(self, progress: Progress, rate: float, gradient_norm: float | None) -> dict[str, Any]:
        """The row of metrics (see the run store), and a fresh window."""
        loss, cross_entropy, penalty, expected = np.mean([step.means for step in self._steps], axis=0).tolist()
        histogram = np.sum([step.histogram for step in self._steps], axis=0)
        histogram = histogram / histogram.sum()
        compiling = compile_seconds() - self._from_compiling  # once, at the start: no part of the rates
        seconds = max(progress.seconds - self._from_seconds - compiling, 1e-9)
        realised = (progress.flops_realised - self._from_realised) / seconds
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "penalty": penalty,
            "mean_steps": float(histogram @ np.arange(len(histogram))),
            "expected_steps": expected,
            "steps_histogram": histogram.tolist(),
            "straggling": float(np.mean([step.straggling for step in self._steps])),
            "learning_rate": rate,
            "grad_norm": gradient_norm,
            "flops_realised": progress.flops_realised,
            "flops_executed": progress.flops_executed,
            "flops_paper": progress.flops_paper,
            "flops_per_second": (progress.flops_executed - self._from_executed) / seconds,
            **({"mfu": realised / self._peak} if self._peak else {}),
            "tokens_per_second": (progress.tokens - self._from_tokens) / seconds,
            "seconds": progress.seconds,
            **({"compile_seconds": compiling} if compiling else {}),
            "time": time.time(),
        }
        self._clear(progress)
        return row
