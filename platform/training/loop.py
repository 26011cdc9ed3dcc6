"""The training loop: an engine, an iterator of batches, and hooks. It knows nothing of Ray.

It runs the same in a Ray Train worker, in a plain process and in a notebook. The engine is DeepSpeed's
(:mod:`haltscale.platform.training.engine`); what happens at logs, checkpoints and evaluations is the caller's.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from haltscale.model import Flops, LanguageModel, PassCounts
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.training.peak import peak_flops
from haltscale.platform.training.schedule import Spent, evenly, is_over, learning_rate, reached, stable_steps
from haltscale.platform.training.trouble import Watch


class Engine(Protocol):
    """What the loop needs of ``deepspeed.DeepSpeedEngine``."""

    module: LanguageModel
    optimizer: Any

    def __call__(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *, lengths_B: torch.Tensor | None = None
    ) -> Any: ...
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

    events: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong without ending the run: ``step`` and ``what``."""
    pinned: list[int] = field(default_factory=list)
    """Steps whose checkpoints are kept for good."""
    exploded: bool = False
    """Whether the last step's loss was beyond all bounds."""
    depth: int | None = None
    """How many latent steps every token of the last step took, where all took 0 or all took l_max."""
    uniform_steps: int = 0
    """For how many steps in a row."""

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
    """Called, on all ranks at the same steps, with a row of metrics, averaged since the last one."""
    checkpoint: Callable[[Progress], None]
    evaluate: Callable[[Progress], None]
    notice: Callable[[], bool] = lambda: False
    """Whether this rank was told that it may end soon: then all save a checkpoint after the step, and go on."""


def train(
    engine: Engine,
    batches: Iterator[Any],
    run: RunConfig,
    progress: Progress,
    hooks: Hooks,
    *,
    execution: ExecutionConfig,
    rank: int = 0,
    world: int = 1,
) -> Progress:
    """Train to the end of the run's budget.

    Args:
        engine: wraps the model; accumulates over as many calls as ``execution`` says.
        batches: this rank's batches from step ``progress.step`` on (``step``, ``seq_ids``, ``tokens``); a row may end
            in ``IGNORE_INDEX``, which is neither thought about nor scored.
        progress: where to begin; updated in place.
        execution: micro-batches, and how often what is logged, saved and evaluated. A checkpoint comes before the
            evaluation of the same step; the evaluation at the end is left to the caller, who has more to do then.
        rank: this process.
        world: ranks that share the run.

    Raises:
        TrainingDivergedError: see :class:`haltscale.platform.training.trouble.Watch`.
        ValueError: a batch is not the one that is due.
    """
    parameter = next(engine.module.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    peak = peak_flops(name, parameter.dtype)
    _, micro_batches = execution.accumulation(run.batch_sequences)
    window, watch = MetricsWindow(progress, peak and peak * world), Watch(engine.module, execution)
    noticed = False
    branches_at = stable_steps(run) if execution.branch else None

    def is_due(shares: Iterable[float]) -> bool:
        return reached(run, progress.before_last, progress.spent, shares)

    if progress.step and is_due(evenly(execution.evaluations)) and not is_over(run, progress.spent):
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
        scored_everywhere = _over_ranks(int((tokens[:, 1:] != IGNORE_INDEX).sum()), world)
        counts, outputs = PassCounts(), []
        for piece in tokens.chunk(micro_batches):
            output, scored = _forward(engine, piece)
            # DeepSpeed averages over pieces and ranks; with this weight that is the mean over all scored tokens.
            engine.backward(output.loss * (scored * micro_batches * world / max(scored_everywhere, 1)))
            engine.step()  # takes the optimizer's step at the last piece, and only then
            counts += output.trace.counts
            outputs.append((output, scored))
        asks = (window.age >= execution.log_every_seconds, hooks.notice())
        flops = engine.module.flops(counts).training
        step = StepTotals.of(outputs, flops, counts, asks, rank=rank, world=world).over_ranks()
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        progress.spend(step, run.batch_tokens)
        progress.saw(batch.seq_ids)
        norm = _gradient_norm(engine, run)
        loss, cross_entropy, *_ = step.means.tolist()
        watch.look(progress, loss=loss, cross_entropy=cross_entropy, gradient_norm=norm, histogram=step.histogram)
        window.add(step)
        over = is_over(run, progress.spent)
        evaluate = is_due(evenly(execution.evaluations)) and not over
        is_milestone = is_due(execution.milestones) or progress.step == branches_at
        if is_milestone:
            progress.pinned.append(progress.step)
        save = over or is_milestone or is_due(evenly(execution.checkpoints))
        save = save or (evaluate and execution.keep_best) or (step.is_noticed and not noticed)
        noticed = step.is_noticed
        if save or evaluate or step.is_log_due:
            hooks.log(window.close(progress, rate, norm), progress)
        if save:
            hooks.checkpoint(progress)
        if evaluate:
            hooks.evaluate(progress)
            engine.module.train()
    return progress


def _forward(engine: Engine, tokens_BT: torch.Tensor) -> tuple[Any, int]:
    """The model's output on rows of context + 1 tokens, and how many tokens it scored."""
    targets_BT = tokens_BT[:, 1:]
    scored_B = (targets_BT != IGNORE_INDEX).sum(1)
    scored = int(scored_B.sum())
    if scored == targets_BT.numel():
        return engine(tokens_BT[:, :-1], targets_BT), scored
    return engine(tokens_BT[:, :-1].clamp(min=0), targets_BT, lengths_B=scored_B), scored


def _gradient_norm(engine: Engine, run: RunConfig) -> float | None:
    norm = engine.get_global_grad_norm()
    if norm is None or (run.precision is Precision.FP16 and not 0 <= float(norm) < math.inf):
        return None  # under fp16 a step that overflows is skipped, and the loss scale lowered: nothing is lost
    return float(norm)


def _over_ranks(count: int, world: int) -> int:
    if world == 1:
        return count
    total = torch.tensor([count], device=_collective_device())
    torch.distributed.all_reduce(total)
    return int(total)


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def step_seed(seed: int, step: int) -> int:
    """Of what a model draws in one step (PonderLM-2: its passes): the same on all ranks, and after a resumption."""
    return int.from_bytes(hashlib.sha256(f"{seed}/step/{step}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What one step did, on this rank or on all together; sums, so that ranks add up."""

    sums: npt.NDArray[np.float64]
    """Times scored tokens: loss, cross-entropy, penalty, expected steps; scored tokens; FLOPs realised, executed,
    paper; pass rows; ranks that find a log due; ranks that were given notice."""
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
        asks: tuple[bool, bool],
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
        return self.sums[:4] / max(self.sums[4], 1.0)

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
        """Whether any rank was told that it may end soon."""
        return bool(self.sums[10])

    @property
    def straggling(self) -> float:
        """Most over mean latent steps of the ranks' tokens: all wait for the rank that thinks longest. 1 is even."""
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
        seconds = max(progress.seconds - self._from_seconds, 1e-9)
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
            "time": time.time(),
        }
        self._clear(progress)
        return row
