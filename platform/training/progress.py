"""How far a run is: what a checkpoint carries, so that a resumed run counts on from there."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from haltscale.model import Flops, LanguageModel
from haltscale.platform.config import RunConfig
from haltscale.platform.schedule import Spent
from haltscale.platform.training.steps_schedule import StepsSchedule


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint, so that a resumed run continues counting."""

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
    steps_schedule: list[list[float]] = field(default_factory=list)
    """Tokens by latent steps over training (:class:`StepsSchedule`)."""

    def add_steps(self, histogram: npt.NDArray[np.float64]) -> None:
        """Take in how many tokens took how many latent steps, before the step's work is added."""
        schedule = StepsSchedule.from_list(self.steps_schedule)
        schedule.add(self.spent, histogram)
        self.steps_schedule = schedule.to_list()

    def saw(self, seq_ids: npt.NDArray[np.int64]) -> None:
        """Chain one step's sequence ids into the digest."""
        chained = self.sequence_digest.encode() + np.ascontiguousarray(seq_ids, dtype="<i8").tobytes()
        self.sequence_digest = hashlib.sha256(chained).hexdigest()[:16]

    def spend(self, flops: Flops, pass_rows: int, tokens: int) -> None:
        """Add one step's work, of all ranks together."""
        self.tokens += tokens
        self.flops_before_step = self.flops_realised
        self.flops_realised += flops.realised
        self.flops_executed += flops.executed
        self.flops_paper += flops.paper
        self.pass_rows += pass_rows

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
