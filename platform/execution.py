"""How a run is executed: nothing here changes its result beyond rounding, so nothing here is in its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

from haltscale.model.backbone import AttentionKernel
from haltscale.model.config import build_options, in_range, is_int, is_number, require, set_normalised
from haltscale.model.language_model import HeadLoss
from haltscale.platform.config import Precision, RunConfig
from haltscale.platform.schedule import can_branch


class Offload(StrEnum):
    """Where ZeRO keeps what a step does not need at the moment."""

    NONE = "none"
    CPU = "cpu"


class FailurePolicy(StrEnum):
    """What happens to a run whose loss explodes or whose router collapses; either is recorded."""

    STOP = "stop"
    """The run ends as diverged; the sweep continues."""
    CONTINUE = "continue"
    """The run continues, and its record says what happened."""


class Sink(StrEnum):
    """Where metrics go beside the run store."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a run is executed; see the module."""

    workers: int = 1
    """Training processes per run."""
    cpus_per_worker: int = 1
    """CPU threads of each worker; a quarter of one CPU stays with the data tasks."""
    gpus_per_worker: float = 0
    """GPUs of each worker (0 or 1)."""
    micro_batch_sequences: int = 16
    """Sequences of one forward pass per worker; the rest of its share of a batch is accumulated."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3."""
    offload_optimizer: Offload = Offload.NONE
    """Where the optimizer's state lives between steps; from ZeRO stage 1 on."""
    offload_parameters: Offload = Offload.NONE
    """Where parameters live between their uses; ZeRO stage 3 only."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its inside: less memory, more time."""
    compile: bool = False
    """Compile each block's work outside attention with torch.compile: minutes at the start of a run for a faster GPU.
    ZeRO stages 0 to 2."""
    attention: AttentionKernel = AttentionKernel.AUTO
    """How attention masks are represented: dense, or as indices (FlexAttention), the default on CUDA devices."""
    head_loss: HeadLoss = HeadLoss.AUTO
    """Whether losses come from the logits of all positions, or by parts of them: less memory, the logits twice."""
    deterministic: bool = False
    """Refuse kernels whose result differs from call to call, at some cost of speed. CPUs need it not."""
    evaluations: int = 5
    """Evaluations per run, spread evenly over its budget; the last is at the end."""
    checkpoints: int = 2
    """Checkpoints per run, spread evenly over its budget; the last is at the end."""
    keep_last: int = 2
    """Checkpoints that are kept: the newest ones."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest held-out loss too."""
    milestones: tuple[float, ...] = ()
    """Shares of the budget (above 0, up to 1) at which another checkpoint is taken, and kept for good."""
    branch: bool = False
    """Begin a WSD run in the stable phase of a run of the study that differs in its budget alone, where there is one,
    and train such runs one after the other, the shortest first; needs ``warmup_tokens``."""
    log_every_seconds: float = 2.0
    """How often a run writes metrics and its status."""
    sinks: tuple[Sink, ...] = ()
    """Where metrics go beside the store; W&B needs its extra (``pip install haltscale[wandb]``)."""
    max_failures: int = 1
    """How often a failed run is started again (from its last checkpoint) before it is recorded as failed."""
    max_hours: float | None = None
    """Training time after which a run ends as ``capped``, with what it has; None: as long as its budget takes."""
    on_divergence: FailurePolicy = FailurePolicy.STOP
    """What to do about a loss that explodes. One that is not finite always stops the run: nothing is left to train."""
    on_collapse: FailurePolicy = FailurePolicy.CONTINUE
    """What to do about a router that sends every token to 0 steps, or every token to l_max, for ``collapse_steps``."""
    collapse_steps: int = 500
    """Optimizer steps in a row after which a router counts as collapsed."""

    def __post_init__(self) -> None:
        set_normalised(self)

    def problems(self, runs: list[RunConfig], cluster: Mapping[str, float] | None = None) -> list[str]:
        """Everything wrong, given the runs and what the cluster has: ``CPU``, ``GPU`` and, where known,
        the ``node_cpus`` of its largest node."""
        found = []
        counts = ("workers", "cpus_per_worker", "micro_batch_sequences", "evaluations", "checkpoints", "keep_last")
        for name in (*counts, "collapse_steps"):
            found += in_range(name, getattr(self, name), 1, integer=True)
        for name, low in (("gpus_per_worker", 0), ("log_every_seconds", 0), ("max_failures", 0)):
            found += in_range(name, getattr(self, name), low)
        if self.max_hours is not None:
            found += in_range("max_hours", self.max_hours, 0, above=True)
        found += require(is_int(self.zero_stage) and 0 <= self.zero_stage <= 3, "zero_stage", self.zero_stage, "0 to 3")
        found += self._choice_problems()
        if found:
            return found
        if not self.gpus_per_worker and any(run.precision is Precision.FP16 for run in runs):
            found.append(
                "precision fp16 requires gpus_per_worker: DeepSpeed supports it on GPUs only; use bf16 or fp32 on CPUs"
            )
        if self.branch and runs and not any(map(can_branch, runs)):
            found.append(
                "branch requires runs with schedule wsd and warmup_tokens, of methods that do not depend on the share"
                " of the budget (no gate_warmup, lam_ramp, depth_growth or replayed steps): no run here qualifies"
            )
        for batch in sorted({run.batch_sequences for run in runs}):
            if batch % self.workers:
                found.append(f"a batch of {batch} sequences cannot be divided evenly among {self.workers} workers")
        if cluster is not None and self.cpus_per_worker > cluster.get("node_cpus", math.inf):
            found.append(f"cpus_per_worker {self.cpus_per_worker}: the largest node has {cluster['node_cpus']:g}")
        if cluster is not None:
            for resource, each in (("CPU", self.cpus_per_worker), ("GPU", self.gpus_per_worker)):
                needed, there = self.workers * each, cluster.get(resource, 0)
                if needed > there:
                    found.append(
                        f"{self.workers} workers x {each:g} {resource} need {needed:g} {resource}s,"
                        f" the cluster has {there:g}: lower workers or {resource.lower()}s_per_worker"
                    )
        return found

    def _choice_problems(self) -> list[str]:
        found = []
        for name, members in EXECUTION_CHOICES.items():
            value = getattr(self, name)
            found += require(value in list(members), name, value, f"one of {', '.join(members)}")
        for name in ("sinks", "milestones"):
            value = getattr(self, name)
            found += require(isinstance(value, tuple), name, value, "a list")
        if found:
            return found
        for name in ("activation_checkpointing", "compile", "deterministic", "keep_best", "branch"):
            value = getattr(self, name)
            found += require(isinstance(value, bool), name, value, "true or false")
        for sink in self.sinks:
            if sink not in list(Sink):
                found.append(f"sinks = {sink!r}: must be one of {', '.join(Sink)}")
            elif find_spec(SINK_PACKAGES[sink]) is None:
                found.append(f"sink {sink} requires a package that is not installed: pip install {SINK_PACKAGES[sink]}")
        for share in self.milestones:
            if not is_number(share) or not 0 < share <= 1:
                found.append(f"milestones = {share!r}: must be shares of the budget above 0 and up to 1")
        if found or self.zero_stage not in (0, 1, 2, 3):
            return found
        if self.compile and self.zero_stage == 3:
            found.append("compile requires zero_stage 0, 1 or 2: stage 3 partitions parameters between their uses")
        if self.offload_optimizer is not Offload.NONE and self.zero_stage == 0:
            found.append(f"offload_optimizer {self.offload_optimizer} requires zero_stage 1, 2 or 3 (got 0)")
        if self.offload_parameters is not Offload.NONE and self.zero_stage != 3:
            found.append(f"offload_parameters {self.offload_parameters} requires zero_stage 3 (got {self.zero_stage})")
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExecutionConfig:
        """The inverse of ``dataclasses.asdict``, also after a way through JSON, and of a spec with removed fields."""
        known = {name: value for name, value in values.items() if name not in REMOVED_FIELDS}
        execution: ExecutionConfig = build_options(cls, known)
        return execution

    def accumulation(self, batch_sequences: int) -> tuple[int, int]:
        """(sequences per forward pass, forward passes per step) of each worker."""
        share = batch_sequences // self.workers
        micro = min(self.micro_batch_sequences, share)
        while share % micro:
            micro -= 1
        return micro, share // micro


REMOVED_FIELDS = ("optimizer", "optimizer_kernel", "offload_folder")
"""Of specs by earlier versions. None of them changed a result."""
SINK_PACKAGES = {Sink.TENSORBOARD: "tensorboardX", Sink.WANDB: "wandb"}
EXECUTION_CHOICES: dict[str, type[StrEnum]] = {
    "offload_optimizer": Offload,
    "offload_parameters": Offload,
    "attention": AttentionKernel,
    "head_loss": HeadLoss,
    "on_divergence": FailurePolicy,
    "on_collapse": FailurePolicy,
}
