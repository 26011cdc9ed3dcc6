"""What one method is worth in another's compute or parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from haltscale.platform.analysis.estimates import Estimate, Floats, Refusal, interval, quiet
from haltscale.platform.analysis.laws import LawFit
from haltscale.platform.analysis.recipes import recipe_warning
from haltscale.platform.analysis.runs import column

POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """How much of its input a reference needs for a method's loss, as a multiple of what the method needs.

    Above 1 the method is the cheaper one: 1.5 says that the reference must spend half as much again.
    """

    x: str
    """The input: a kind of FLOPs, or ``parameters``."""
    table: pd.DataFrame
    """``x`` (the method's input), ``loss`` (nats/token), ``multiplier``, ``low``, ``high``, over the losses that runs
    of both methods reach: no extrapolation."""
    mean: Estimate
    """Geometric mean over the table."""
    warning: str = ""
    """Why the comparison may be unfair: an arm that is not at a recipe of its own; see :func:`recipe_warning`."""


@quiet
def equivalent(method: LawFit | Refusal, reference: LawFit | Refusal) -> Multiplier | Refusal:
    """The multiplier between two laws of the same single input, where both were measured.

    Args:
        method: such as ``fit_power_law(adaptive, "flops_realised")``.
        reference: such as ``fit_power_law(vanilla, "flops_realised")``.

    Returns:
        Where one of them is a refusal, that.
    """
    for law in (method, reference):
        if isinstance(law, Refusal):
            return law
    assert isinstance(method, LawFit)
    assert isinstance(reference, LawFit)
    if method.form.inputs != reference.form.inputs or method.form.terms != 1:
        raise ValueError(f"laws of {method.form.inputs} and {reference.form.inputs} cannot be compared: fit both alike")
    low_loss, high_loss = _shared(method, reference)
    if not low_loss < high_loss:
        first, second = column(method.runs, "loss"), column(reference.runs, "loss")
        return Refusal(
            reason=f"no loss is reached by both: {first.min():.3g} to {first.max():.3g} nats/token against"
            f" {second.min():.3g} to {second.max():.3g}"
        )
    losses = np.linspace(high_loss, low_loss, POINTS)
    value = _inputs_at(reference.theta[None], reference, losses) - _inputs_at(method.theta[None], method, losses)
    # The two bootstraps are independent; shuffling one keeps equal seeds from pairing equal draws.
    order = np.random.default_rng(1).permutation(len(reference.replicates))
    count = min(len(method.replicates), len(reference.replicates))
    replicates = _inputs_at(reference.replicates[order[:count]], reference, losses) - _inputs_at(
        method.replicates[:count], method, losses
    )
    low, high = _either_way(replicates)
    table = pd.DataFrame(
        {
            "x": np.exp(_inputs_at(method.theta[None], method, losses)[0]),
            "loss": losses,
            "multiplier": np.exp(value[0]),
            "low": low,
            "high": high,
        }
    )
    table = table[np.isfinite(table["x"]) & np.isfinite(table["multiplier"])].reset_index(drop=True)
    if table.empty:
        return Refusal(reason="the fitted laws meet at no loss that both methods' runs reach")
    kept = np.isfinite(value[0])
    compared = replicates[:, kept]
    known = ~np.isnan(compared)
    means = np.where(known, compared, 0.0).sum(axis=1) / known.sum(axis=1)  # over what the resample can compare
    least, most = _either_way(means)
    mean = Estimate(value=float(np.exp(value[0][kept].mean())), low=float(least), high=float(most))
    both = pd.concat(
        [
            law.runs.assign(arm=law.runs.get("method", name))
            for name, law in (("the method", method), ("the reference", reference))
        ]
    )
    return Multiplier(x=method.form.inputs[0], table=table, mean=mean, warning=recipe_warning(both))


@quiet
def _either_way(logs: Floats) -> tuple[Floats, Floats]:
    """Interval of multipliers from replicates of their logarithm.

    Where neither resampled law reaches a loss (infinity over infinity), the multiplier could be anything: that
    replicate counts for both ends.
    """
    unknown = np.isnan(logs)
    low, _ = interval(np.exp(np.where(unknown, -np.inf, logs)))
    _, high = interval(np.exp(np.where(unknown, np.inf, logs)))
    return low, high


def _shared(method: LawFit, reference: LawFit) -> tuple[float, float]:
    """The losses that both laws have inside what was measured."""
    ends = [law.predict(law.form.at({law.form.inputs[0]: np.array(law.domain)})) for law in (method, reference)]
    return max(float(end.min()) for end in ends), min(float(end.max()) for end in ends)


@quiet
def _inputs_at(theta: Floats, law: LawFit, losses: Floats) -> Floats:
    """``(R, n)`` logarithm of the input at which a law of one input has a loss; infinite at or below E."""
    above = losses[None] - np.exp(theta[:, :1])
    logs = law.form.centres[0] + (theta[:, 1:2] - np.log(above)) / theta[:, 2:3]
    return np.where(above > 0, logs, np.inf)
