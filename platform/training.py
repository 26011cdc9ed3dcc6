"""The training loop: an engine, an iterator of batches, and hooks. It knows nothing of Ray.

It runs the same in a Ray Train worker, in a plain process and in a notebook. The engine is DeepSpeed's
(:mod:`haltscale.platform.engine`); what happens at logs, checkpoints and evaluations is the caller's.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from haltscale.model import Flops, LanguageModel, PassCounts
from haltscale.platform.config import RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.schedule import Spent, evenly, is_over, learning_rate, reached

EXPLODED_LOSS = 50.0
"""Nats per token; a uniform guess over 50k tokens is 10.8, so a loss above this is lost."""


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite, or the loss exploded; the message says at which step."""


class Engine(Protocol):
    """What the loop needs of ``deepspeed.DeepSpeedEngine``."""

    module: LanguageModel
    optimizer: Any

    def __call__(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> Any: ...
    def backward(self, loss: torch.Tensor) -> Any: ...
    def step(self) -> Any: ...
    def get_global_grad_norm(self) -> float | None: ...


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint, so that a resumed run goes on counting."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time alone, without evaluations and start-up."""
    flops_realised: float = 0.0
    flops_executed: float = 0.0
    flops_paper: float = 0.0
    pass_rows: int = 0
    """Positions times passes, for the mean passes per token."""
    flops_before_step: float = 0.0
    """``flops_realised`` as it was before the last step."""
    sequence_digest: str = ""
    """Running digest of the sequence ids that were trained on: equal digests mean the same data in the same order."""

    def saw(self, seq_ids: npt.NDArray[np.int64]) -> None:
        """Chain one step's sequence ids into the digest."""
        chained = self.sequence_digest.encode() + np.ascontiguousarray(seq_ids, dtype="<i8").tobytes()
        self.sequence_digest = hashlib.sha256(chained).hexdigest()[:16]

    def spend(self, step: StepTotals, tokens: int) -> None:
        """Add one step's work, of all ranks together."""
        self.tokens += tokens
        self.flops_before_step = self.flops_realised
        self.flops_realised += step.flops.realised
        self.flops_executed += step.flops.executed
        self.flops_paper += step.flops.paper
        self.pass_rows += step.pass_rows

    @property
    def spent(self) -> Spent:
        """What the run has spent so far."""
        return Spent(step=self.step, tokens=self.tokens, flops=self.flops_realised)

    @property
    def before_last(self) -> Spent:
        """What it had spent before its last step."""
        tokens = self.tokens - self.tokens // self.step if self.step else 0  # all steps are of one size
        return Spent(step=self.step - 1, tokens=tokens, flops=self.flops_before_step)

    def expected(self, run: RunConfig, model: LanguageModel) -> Spent:
        """What it will have spent after the next step: as much more as the last one took, or, before the first, what
        one pass over its tokens takes by the paper's convention."""
        last = self.flops_realised - self.flops_before_step
        flops = last or 6.0 * sum(model.parameter_groups_count().values()) * run.batch_tokens
        return Spent(step=self.step + 1, tokens=self.tokens + run.batch_tokens, flops=self.flops_realised + flops)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the caller does at the loop's milestones."""

    log: Callable[[dict[str, Any], Progress], None]
    """Called with a row of metrics, averaged since the last one."""
    checkpoint: Callable[[Progress], None]
    evaluate: Callable[[Progress], None]


def train(
    engine: Engine,
    batches: Iterator[Any],
    run: RunConfig,
    progress: Progress,
    hooks: Hooks,
    *,
    execution: ExecutionConfig,
    world: int,
) -> Progress:
    """Train to the end of the run's budget.

    Args:
        engine: wraps the model; accumulates over as many calls as ``execution`` says.
        batches: this rank's batches from step ``progress.step`` on (``step``, ``seq_ids``, ``tokens``).
        progress: where to begin; updated in place.
        execution: micro-batches, and how often what is logged, saved and evaluated. A checkpoint comes before the
            evaluation of the same step; the evaluation at the end is left to the caller, who has more to do then.
        world: ranks that share the run.

    Raises:
        TrainingDivergedError: the loss is not finite or above ``EXPLODED_LOSS``.
        ValueError: a batch is not the one that is due.
    """
    device = next(engine.module.parameters()).device
    _, micro_batches = execution.accumulation(run.batch_sequences)
    window = MetricsWindow(progress)

    def is_due(count: int) -> bool:
        return reached(run, progress.before_last, progress.spent, evenly(count))

    if progress.step and is_due(execution.evaluations) and not is_over(run, progress.spent):
        hooks.evaluate(progress)  # resumed from the checkpoint before this evaluation
    engine.module.train()
    while not is_over(run, progress.spent):
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None or batch.step != progress.step:
            raise ValueError(f"the data stream delivered step {batch and batch.step}, step {progress.step} is due")
        rate = learning_rate(run, progress.spent, progress.expected(run, engine.module))
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step_seed(run.seed, progress.step))
        tokens = torch.as_tensor(np.ascontiguousarray(batch.tokens), device=device)
        counts, outputs = PassCounts(), []
        for piece in tokens.chunk(micro_batches):
            output = engine(piece[:, :-1], piece[:, 1:])
            engine.backward(output.loss)
            engine.step()  # takes the optimizer's step at the last piece, and only then
            counts += output.trace.counts
            outputs.append(output)
        step = StepTotals.of(outputs, engine.module.flops(counts).training, counts).over_ranks(world)
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        progress.spend(step, run.batch_tokens)
        progress.saw(batch.seq_ids)
        norm = engine.get_global_grad_norm()
        step.check_finite(progress.step, norm)  # the same on every rank, so that all of them stop at once
        window.add(step)
        over = is_over(run, progress.spent)
        save, evaluate = is_due(execution.checkpoints) or over, is_due(execution.evaluations) and not over
        if over or save or evaluate or window.age >= execution.log_every_seconds:
            hooks.log(window.close(progress, rate, norm), progress)
        if save:
            hooks.checkpoint(progress)
        if evaluate:
            hooks.evaluate(progress)
            engine.module.train()
    return progress


def step_seed(seed: int, step: int) -> int:
    """Of what a model draws in one step (PonderLM-2: its passes): the same on all ranks, and after a resumption."""
    return int.from_bytes(hashlib.sha256(f"{seed}/step/{step}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class StepTotals:
    """What one step did, on this rank or on all together; sums, so that ranks add up."""

    values: npt.NDArray[np.float64]
    """Sums over ranks: loss, cross-entropy, penalty, expected steps, 1 per rank; FLOPs realised, executed, paper; pass
    rows; then tokens by executed latent steps."""

    @classmethod
    def of(cls, outputs: list[Any], flops: Flops, counts: PassCounts) -> StepTotals:
        """This rank's totals, from its forward passes of the step."""
        means = torch.stack([_means(output) for output in outputs]).mean(0).double().cpu().numpy()
        steps = torch.cat([output.trace.steps_BT[output.trace.valid_BT] for output in outputs]).long()
        histogram = torch.bincount(steps, minlength=outputs[0].trace.exit_BTK.shape[2]).double().cpu().numpy()
        spent = [1.0, flops.realised, flops.executed, flops.paper, float(sum(counts.rows))]
        return cls(np.concatenate([means, spent, histogram]))

    def over_ranks(self, world: int) -> StepTotals:
        """The sum over all ranks: they halt differently, so their losses, steps and FLOPs differ."""
        if world == 1:
            return self
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        values = torch.as_tensor(self.values, device=device)
        torch.distributed.all_reduce(values)
        return StepTotals(values.cpu().numpy())

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """Mean over ranks of loss, cross-entropy, penalty and expected steps."""
        return self.values[:4] / self.values[4]

    @property
    def flops(self) -> Flops:
        realised, executed, paper = self.values[5:8].tolist()
        return Flops(realised=realised, executed=executed, paper=paper)

    @property
    def pass_rows(self) -> int:
        return int(self.values[8])

    @property
    def histogram(self) -> npt.NDArray[np.float64]:
        """Tokens by executed latent steps."""
        return self.values[9:]

    def check_finite(self, step: int, gradient_norm: float | None) -> None:
        """Stop a run whose loss is lost.

        Raises:
            TrainingDivergedError: the loss or the gradient is not finite, or the loss exploded.
        """
        loss, cross_entropy, *_ = self.means
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss is {loss} at step {step}: lower the learning rate")
        if cross_entropy > EXPLODED_LOSS:
            raise TrainingDivergedError(f"the loss exploded to {cross_entropy:.1f} at step {step}")
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            raise TrainingDivergedError(f"the gradient norm is {float(gradient_norm)} at step {step}")


def _means(output: Any) -> torch.Tensor:
    exit_BTK = output.trace.exit_BTK[output.trace.valid_BT].float()
    expected = (exit_BTK @ torch.arange(exit_BTK.shape[1], dtype=torch.float32, device=exit_BTK.device)).mean()
    return torch.stack([x.detach().float() for x in (output.loss, output.cross_entropy, output.penalty, expected)])


class MetricsWindow:
    """Means of the steps since the last logged row."""

    def __init__(self, progress: Progress) -> None:
        self._clear(progress)

    def _clear(self, progress: Progress) -> None:
        self._from_tokens, self._from_seconds = progress.tokens, progress.seconds
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
        seconds = progress.seconds - self._from_seconds
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "penalty": penalty,
            "mean_steps": float(histogram @ np.arange(len(histogram))),
            "expected_steps": expected,
            "steps_histogram": histogram.tolist(),
            "learning_rate": rate,
            "grad_norm": None if gradient_norm is None else float(gradient_norm),
            "flops_realised": progress.flops_realised,
            "flops_executed": progress.flops_executed,
            "flops_paper": progress.flops_paper,
            "tokens_per_second": (progress.tokens - self._from_tokens) / max(seconds, 1e-9),
            "seconds": progress.seconds,
            "time": time.time(),
        }
        self._clear(progress)
        return row
