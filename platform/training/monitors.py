"""What can go wrong with a run's numbers: a loss that is lost or explodes, a router that collapses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from haltscale.model import LanguageModel
from haltscale.platform.execution import ExecutionConfig, FailurePolicy
from haltscale.platform.training.progress import Progress

EXPLODED = 3.0
"""Times the loss of a uniform guess, ln(vocabulary): beyond it a loss has exploded."""


class TrainingDivergedError(RuntimeError):
    """The run cannot continue, or its policy forbids it; the message says why and at which step."""


class RunCappedError(RuntimeError):
    """The run has reached its time limit (``ExecutionConfig.max_hours``)."""


class Watch:
    """Looks at every step of a run. What it finds goes into ``Progress.events``, and so into checkpoint and record."""

    def __init__(self, model: LanguageModel, execution: ExecutionConfig) -> None:
        self._execution = execution
        self._exploded = EXPLODED * math.log(model.config.vocab_size)
        options: Any = model.config.options
        self._l_max = int(getattr(options, "l_max", 0))  # methods without it have no router that could collapse
        if str(getattr(options, "router", "")) == "none":
            self._l_max = 0

    def look(
        self,
        progress: Progress,
        *,
        loss: float,
        cross_entropy: float,
        gradient_norm: float | None,
        histogram: npt.NDArray[np.float64],
    ) -> None:
        """Judge the step that was just taken, by what all ranks did together.

        Args:
            progress: of the run, that step included; events are added to it.
            loss: nats per token, the method's penalty included.
            cross_entropy: nats per token.
            gradient_norm: before clipping; None where DeepSpeed does not report it.
            histogram: tokens by executed latent steps.

        Raises:
            TrainingDivergedError: loss or gradient is not finite, or the policy stops the run.
        """
        step = progress.step
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if value is not None and not math.isfinite(value):
                raise TrainingDivergedError(f"the {name} is {float(value)} at step {step}: lower the learning rate")
        exploded = cross_entropy > self._exploded
        if exploded and not progress.exploded:
            self._found(progress, f"the loss exploded to {cross_entropy:.1f}", self._execution.on_divergence)
        progress.exploded = exploded
        self._look_at_router(progress, histogram)

    def _look_at_router(self, progress: Progress, histogram: npt.NDArray[np.float64]) -> None:
        if self._l_max == 0:
            return
        depth = next((k for k in (0, self._l_max) if histogram[k] == histogram.sum()), None)
        progress.uniform_steps = progress.uniform_steps + 1 if depth is not None and depth == progress.depth else 1
        progress.depth = depth
        if depth is not None and progress.uniform_steps == self._execution.collapse_steps:
            where = "0 latent steps" if depth == 0 else f"l_max, {depth} latent steps,"
            what = f"the router collapsed: every token took {where} for {progress.uniform_steps} steps"
            self._found(progress, what, self._execution.on_collapse)

    @staticmethod
    def _found(progress: Progress, what: str, policy: FailurePolicy) -> None:
        progress.events.append({"step": progress.step, "what": what})
        if policy is FailurePolicy.STOP:
            raise TrainingDivergedError(f"{what} at step {progress.step}")


class RunMemoryError(RuntimeError):
    """There was not enough memory for a step; the message says which settings need less."""


@contextlib.contextmanager
def memory_explained(execution: ExecutionConfig) -> Iterator[None]:
    """Say, where a block runs out of memory, which settings need less.

    Raises:
        RunMemoryError: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch has an exception of its own for GPUs only
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not exhausted:
            raise
        advice = [f"micro_batch_sequences below {execution.micro_batch_sequences}"]
        advice += [] if execution.activation_checkpointing else ["activation_checkpointing"]
        advice += (
            [] if execution.zero_stage == 3 else [f"a zero_stage above {execution.zero_stage} with several workers"]
        )
        raise RunMemoryError(
            f"out of memory: try {', '.join(advice)} (none changes the result, checkpoints are kept);"
            f" it was: {str(error).splitlines()[0] if str(error) else 'MemoryError'}"
        ) from error
