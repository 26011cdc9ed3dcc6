"""How many latent steps a run's tokens took, as a function of the share of its budget: what a replay control repeats.

Counts are kept by optimizer step, and neighbours are merged as they become many, so that a run of any length keeps a
hundred to two hundred of them: never coarser than a hundredth of what has been trained so far. They are kept against
steps and FLOPs, not against the share, since a branch of a WSD run begins in a run of another budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from haltscale.platform.config import RunConfig
from haltscale.platform.schedule import Spent, share

MOST = 200
PERCENT = 100
DIGITS = 5
"""Of the probabilities: they may be part of a control's identity."""


class StepsSchedule:
    """Tokens by executed latent steps, in order of training."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []  # step and FLOPs before the first of some optimizer steps, then counts

    @property
    def _width(self) -> int:
        """Optimizer steps that a row stands for."""
        return int(self._rows[1][0] - self._rows[0][0]) if len(self._rows) > 1 else 1

    def add(self, before: Spent, histogram: npt.ArrayLike) -> None:
        """Take one optimizer step in.

        Args:
            before: what was spent before it.
            histogram: its tokens by executed latent steps.
        """
        counts = np.asarray(histogram, dtype=np.float64).tolist()
        if self._rows and before.step < self._rows[-1][0] + self._width:
            self._rows[-1] = _merged(self._rows[-1], [0.0, 0.0, *counts])
            return
        if len(self._rows) >= MOST:
            self._rows = [_merged(*pair) for pair in zip(self._rows[::2], self._rows[1::2], strict=True)]
            if before.step < self._rows[-1][0] + self._width:
                self._rows[-1] = _merged(self._rows[-1], [0.0, 0.0, *counts])
                return
        self._rows.append([before.step, before.flops, *counts])

    def to_list(self) -> list[list[float]]:
        """JSON-able; the inverse of :meth:`from_list`."""
        return [list(row) for row in self._rows]

    @classmethod
    def from_list(cls, rows: Sequence[Sequence[float]]) -> StepsSchedule:
        """A schedule as it was saved; further steps are taken in as if it had never been."""
        made = cls()
        made._rows = [list(row) for row in rows]
        return made

    def by_share(self, run: RunConfig) -> list[list[float]]:
        """Rows of the share of the run's budget from which on a distribution holds, and its probabilities of 0, 1, ...
        latent steps: one for each hundredth of the budget, without those that repeat the one before."""
        parts: dict[int, npt.NDArray[np.float64]] = {}
        for step, flops, *counts in self._rows:
            spent = share(run, Spent(step=int(step), tokens=int(step) * run.batch_tokens, flops=flops))
            part = min(int(spent * PERCENT + 1e-9), PERCENT - 1)
            parts[part] = parts.get(part, np.zeros(len(counts))) + np.asarray(counts)
        found: list[list[float]] = []
        for part, total in parts.items():
            row = [round(float(p), DIGITS) for p in total / total.sum()]
            if not found or row != found[-1][1:]:
                found.append([part / PERCENT, *row])
        return found


def _merged(one: list[float], other: list[float]) -> list[float]:
    return [*one[:2], *(a + b for a, b in zip(one[2:], other[2:], strict=True))]
