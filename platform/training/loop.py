"""The training loop: an engine, an iterator of batches, and hooks. It does not depend on Ray.

It runs the same in a Ray Train worker, in a plain process and in a notebook. The engine is DeepSpeed's
(:mod:`haltscale.platform.training.engine`); what happens at logs, checkpoints and evaluations is the caller's.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from haltscale.model import LanguageModel, PassCounts
from haltscale.model.language_model import IGNORE_INDEX
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.schedule import evenly, is_over, is_stable, learning_rate, reached, share
from haltscale.platform.training.metrics import MetricsWindow, StepTotals, sum_over_ranks
from haltscale.platform.training.mfu import peak_flops
from haltscale.platform.training.monitors import RunCappedError, Watch
from haltscale.platform.training.parameter_groups import set_rate
from haltscale.platform.training.progress import Progress


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


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the caller does at the loop's milestones."""

    log: Callable[[dict[str, Any], Progress], None]
    """Called, on all ranks at the same steps, with a row of metrics, averaged since the last one."""
    checkpoint: Callable[[Progress], None]
    evaluate: Callable[[Progress], None]
    notice: Callable[[], bool] = lambda: False
    """Whether this rank has notice of preemption: then all save a checkpoint after the step, and continue."""


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
            in ``IGNORE_INDEX``, which takes no latent steps and is not scored.
        progress: where to begin; updated in place.
        execution: micro-batches, and how often what is logged, saved and evaluated. A checkpoint comes before the
            evaluation of the same step; the evaluation at the end is left to the caller, who has more to do then.
        rank: this process.
        world: ranks that share the run.

    Raises:
        TrainingDivergedError: see :class:`haltscale.platform.training.monitors.Watch`.
        RunCappedError: the run has trained for ``execution.max_hours``; a checkpoint was taken.
        ValueError: a batch is not the one that is due.
    """
    parameter = next(engine.module.parameters())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    peak = peak_flops(name, parameter.dtype)
    _, micro_batches = execution.accumulation(run.batch_sequences)
    window, watch = MetricsWindow(progress, peak and peak * world), Watch(engine.module, execution)
    noticed = False

    def is_due(shares: Iterable[float]) -> bool:
        return reached(run, progress.before_last, progress.spent, shares)

    engine.module.set_budget_share(share(run, progress.spent))
    if progress.step and is_due(evenly(execution.evaluations)) and not is_over(run, progress.spent):
        hooks.evaluate(progress)  # resumed from the checkpoint before this evaluation
    engine.module.train()
    while not is_over(run, progress.spent):
        began = time.perf_counter()
        batch = next(batches, None)
        if batch is None or batch.step != progress.step:
            raise ValueError(f"the data stream delivered step {batch and batch.step}, step {progress.step} is due")
        rate = learning_rate(run, progress.spent, progress.expected(run, engine.module))
        set_rate(engine.optimizer.param_groups, rate)
        engine.module.begin_step(step_seed(run.seed, progress.step))
        rows = torch.as_tensor(np.ascontiguousarray(batch.tokens))
        lengths_B = (rows[:, 1:] != IGNORE_INDEX).sum(1)  # counted here: on a GPU, each piece would wait for its count
        tokens = rows.to(device)
        scored_everywhere = sum_over_ranks(int(lengths_B.sum()), world)
        counts, outputs = PassCounts(), []
        for piece, lengths_b in zip(tokens.chunk(micro_batches), lengths_B.chunk(micro_batches), strict=True):
            output, scored = _forward(engine, piece, lengths_b)
            # DeepSpeed averages over pieces and ranks; with this weight that is the mean over all scored tokens.
            engine.backward(output.loss * (scored * micro_batches * world / max(scored_everywhere, 1)))
            engine.step()  # takes the optimizer's step at the last piece, and only then
            counts += output.trace.counts
            outputs.append((output, scored))
        limit = math.inf if execution.max_hours is None else 3600 * execution.max_hours
        asks = (window.age >= execution.log_every_seconds, hooks.notice(), progress.seconds > limit)
        flops = engine.module.flops(counts).training
        step = StepTotals.of(outputs, flops, counts, asks, rank=rank, world=world).over_ranks()
        progress.add_steps(step.histogram)
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        progress.spend(step.flops, step.pass_rows, run.batch_tokens)
        engine.module.set_budget_share(share(run, progress.spent))
        progress.saw(batch.seq_ids)
        norm = _gradient_norm(engine, run)
        loss, cross_entropy, *_ = step.means.tolist()
        watch.look(progress, loss=loss, cross_entropy=cross_entropy, gradient_norm=norm, histogram=step.histogram)
        window.add(step)
        over = is_over(run, progress.spent)
        evaluate = is_due(evenly(execution.evaluations)) and not over
        is_milestone = is_due(execution.milestones)
        if execution.branch and is_stable(run, progress.before_last) and not is_stable(run, progress.spent):
            is_milestone = True  # the last step of larger budgets too
        if is_milestone:
            progress.pinned.append(progress.step)
        save = over or is_milestone or is_due(evenly(execution.checkpoints))
        save = save or (evaluate and execution.keep_best) or (step.is_noticed and not noticed) or step.is_capped
        noticed = step.is_noticed
        if save or evaluate or step.is_log_due:
            hooks.log(window.close(progress, rate, norm), progress)
        if save:
            hooks.checkpoint(progress)
        if evaluate:
            hooks.evaluate(progress)
            engine.module.train()
        if step.is_capped and not over:
            raise RunCappedError(
                f"max_hours ({execution.max_hours:g}) is reached at step {progress.step}: raise it to resume"
            )
    return progress


def _forward(engine: Engine, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[Any, int]:
    """The model's output on rows of context + 1 tokens, and how many tokens it scored.

    Args:
        lengths_B: scored tokens of each row, on the CPU.
    """
    targets_BT = tokens_BT[:, 1:]
    scored = int(lengths_B.sum())
    if scored == targets_BT.numel():
        return engine(tokens_BT[:, :-1], targets_BT), scored
    return engine(tokens_BT[:, :-1].clamp(min=0), targets_BT, lengths_B=lengths_B.to(tokens_BT.device)), scored


def _gradient_norm(engine: Engine, run: RunConfig) -> float | None:
    norm = engine.get_global_grad_norm()
    if norm is None or (run.precision is Precision.FP16 and not 0 <= float(norm) < math.inf):
        return None  # under fp16 a step that overflows is skipped, and the loss scale lowered: nothing is lost
    return float(norm)


def step_seed(seed: int, step: int) -> int:
    """Of what a model draws in one step (:meth:`haltscale.model.LanguageModel.begin_step`)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/step/{step}".encode()).digest()[:8], "big") >> 1
