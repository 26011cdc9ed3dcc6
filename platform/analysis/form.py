"""The form that all laws here share: an irreducible loss and a sum of falling powers, in logarithms.

    L = E + sum_j A_j x_j^-a_j

With one input it is L(C) or L(N), with two L(N, D), and where a loop is to be worth something, the first input is
N_once + r^phi N_rec (arXiv 2604.21106): parameters used once per token, and those of the stack that is passed r times.

Parameters are (log E, log A_1.., a_1.., phi_1..) with every log A_j taken at the centre of the data, so that a
coefficient and its exponent hardly move together and an optimiser has an easy time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import Floats
from haltscale.platform.analysis.runs import column

EXPONENTS = (0.01, 3.0)
PHI = (-1.0, 2.0)
LETTERS = {"parameters": ("A", "a"), "tokens": ("B", "b")}
"""Names of coefficient and exponent; compute's are A and alpha."""
LOOPED = ("parameters_once", "parameters_recurrent", "passes_per_token")
"""Columns behind the effective parameters of a looped model."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Inputs of a law at n points."""

    logs: Floats
    """``(J, n)`` logarithms of the inputs. Of a looped law, the first row is not used."""
    once: Floats = field(default_factory=lambda: np.zeros(0))
    """``(n,)`` parameters used once per token."""
    recurrent: Floats = field(default_factory=lambda: np.zeros(0))
    """``(n,)`` parameters of the stack that is passed several times."""
    log_passes: Floats = field(default_factory=lambda: np.zeros(0))
    """``(n,)`` logarithm of the mean passes per token."""
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    """``(n,)`` which phi applies; any where one pass is made."""

    @property
    def count(self) -> int:
        return int(self.logs.shape[1])

    def take(self, rows: np.ndarray) -> Points:
        """Some of the points."""
        looped = (self.once, self.recurrent, self.log_passes, self.group)
        once, recurrent, log_passes, group = (part[rows] if len(part) else part for part in looped)
        return Points(logs=self.logs[:, rows], once=once, recurrent=recurrent, log_passes=log_passes, group=group)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A law without its numbers."""

    inputs: tuple[str, ...]
    """Columns that it falls with."""
    centres: tuple[float, ...]
    """``(J,)`` logarithm of each input's geometric mean in the data."""
    phis: tuple[str, ...] = ()
    """Methods with an exponent of their own for what a pass is worth; none in a plain law."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameters as they are reported, in the order of the vector."""
        letters = [LETTERS.get(name, ("A", "alpha")) for name in self.inputs]
        return ("E", *(big for big, _ in letters), *(small for _, small in letters), *self.phis)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents among them, without phi."""
        return self.names[1 + self.terms : 1 + 2 * self.terms]

    @property
    def terms(self) -> int:
        return len(self.inputs)

    def points(self, runs: pd.DataFrame) -> Points:
        """The law's inputs of some runs."""
        looped = {}
        if self.phis:
            index = {name: position for position, name in enumerate(self.phis)}
            looped = {
                "once": column(runs, "parameters_once"),
                "recurrent": column(runs, "parameters_recurrent"),
                "log_passes": np.log(column(runs, "passes_per_token")),
                "group": np.array([index.get(str(method), 0) for method in runs["method"]], dtype=int),
            }
        return Points(logs=np.log(np.stack([column(runs, name) for name in self.inputs])), **looped)

    def at(self, values: Mapping[str, Floats]) -> Points:
        """The inputs of a plain law at chosen values."""
        return Points(logs=np.log(np.stack(np.broadcast_arrays(*(np.asarray(values[name]) for name in self.inputs)))))

    def evaluate(self, theta: Floats, points: Points) -> tuple[Floats, Floats]:
        """Logarithm of the loss and its Jacobian.

        Args:
            theta: ``(R, P)`` parameters.

        Returns:
            ``(R, n)`` and ``(R, n, P)``.
        """
        terms, replicates = self.terms, len(theta)
        centred = points.logs - np.array(self.centres)[:, None]
        logs = np.broadcast_to(centred, (replicates, *centred.shape)).copy()
        share = np.zeros(0)
        if self.phis:
            phi = theta[:, 1 + 2 * terms :][:, points.group]
            looped = points.recurrent * np.exp(phi * points.log_passes)
            logs[:, 0] = np.log(points.once + looped) - self.centres[0]
            share = looped / (points.once + looped)
        coefficients, exponents = theta[:, 1 : 1 + terms], theta[:, 1 + terms : 1 + 2 * terms]
        powers = coefficients[:, :, None] - exponents[:, :, None] * logs
        every = np.concatenate([np.broadcast_to(theta[:, :1, None], (replicates, 1, points.count)), powers], axis=1)
        top = every.max(axis=1, keepdims=True)
        weights = np.exp(every - top)
        total = weights.sum(axis=1, keepdims=True)
        weights /= total
        jacobian = np.empty((replicates, points.count, theta.shape[1]))
        jacobian[:, :, : 1 + terms] = weights.transpose(0, 2, 1)
        jacobian[:, :, 1 + terms : 1 + 2 * terms] = -(weights[:, 1:] * logs).transpose(0, 2, 1)
        for index in range(len(self.phis)):
            slope = -weights[:, 1] * exponents[:, :1] * share * points.log_passes
            jacobian[:, :, 1 + 2 * terms + index] = np.where(points.group == index, slope, 0.0)
        return (top + np.log(total))[:, 0], jacobian

    def bounds(self, log_loss: Floats) -> Floats:
        """``(P, 2)``: wide, so that a fit that needs them is one that the data do not determine."""
        low, high = float(log_loss.min()), float(log_loss.max())
        return np.array(
            [
                (low - np.log(1e3), high),
                *[(low - np.log(1e6), high + np.log(1e3))] * self.terms,
                *[EXPONENTS] * self.terms,
                *[PHI] * len(self.phis),
            ]
        )

    def reported(self, theta: Floats) -> Floats:
        """``(R, P)`` as people write it: E and A_j themselves, at x_j = 1, not at the centre."""
        shown = theta.copy()
        exponents = theta[:, 1 + self.terms : 1 + 2 * self.terms]
        shown[:, 0] = np.exp(theta[:, 0])
        shown[:, 1 : 1 + self.terms] = np.exp(theta[:, 1 : 1 + self.terms] + exponents * np.array(self.centres))
        return shown
