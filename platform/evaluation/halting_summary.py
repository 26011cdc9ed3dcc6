"""What a split's telemetry says: one JSON-able summary, made from its events and their cube.

Every mean comes with a 95 % interval, mean +- 1.96 standard errors, that takes tokens as independent. Tokens of one
document are not quite, so the true intervals are somewhat wider.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from haltscale.platform.evaluation.telemetry import EventsFile

CONFIDENCE_BINS = 10
DEAD_SHARE = 0.999
"""A split where at least so many tokens take the same number of steps has a collapsed router."""


def mean_interval(count: float, total: float, squares: float) -> dict[str, float | None]:
    """Mean and 95 % interval from a count, a sum and a sum of squares; no interval for one value."""
    mean = total / count
    variance = max(squares - total * mean, 0.0) / max(count - 1, 1)
    half = 1.96 * math.sqrt(variance / count)
    return {"mean": mean, "low": mean - half if count > 1 else None, "high": mean + half if count > 1 else None}


def summarise_halting(
    events: EventsFile, cube: pd.DataFrame, *, quarters: npt.NDArray[np.float32], l_max: int
) -> dict[str, Any]:
    """The summary of one split at one step.

    Args:
        quarters: the lowest and the highest quartile of the events' nll.
        l_max: most latent steps of the model.

    Returns:
        ``tokens``; ``steps_histogram``; ``by_surprisal``, ``by_position``, ``by_frequency``, ``by_token_class``: rows
        of ``value``, ``tokens``, ``mean_steps`` with ``low`` and ``high``, ``loss``; ``router_entropy`` (nats);
        ``gain_by_step``; ``gain_by_depth``; ``oracle``; ``calibration``; ``difficulty``; ``alarms``: see the functions
        of these names.
    """
    tokens = int(cube["tokens"].sum())
    histogram = cube.groupby("steps")["tokens"].sum().reindex(range(l_max + 1), fill_value=0) / tokens
    entropy = mean_interval(tokens, cube["router_entropy_sum"].sum(), cube["router_entropy_sum2"].sum())
    every_step = sampled_steps(events, l_max)
    return {
        "tokens": tokens,
        "steps_histogram": histogram.tolist(),
        "by_surprisal": steps_by(cube, "surprisal"),
        "by_position": steps_by(cube, "position_from"),
        "by_frequency": steps_by(cube, "frequency"),
        "by_token_class": steps_by(cube, "token_class"),
        "router_entropy": entropy,
        "gain_by_step": gain_by_step(*every_step),
        "gain_by_depth": gain_by_depth(*every_step),
        "oracle": oracle(*every_step),
        "calibration": calibration(events),
        "difficulty": by_difficulty(events, *quarters.tolist()),
        "alarms": alarms(histogram.to_numpy(), l_max=l_max),
    }


def steps_by(cube: pd.DataFrame, dimension: str) -> list[dict[str, Any]]:
    """Latent steps by one dimension of the cube: rows of value, tokens, mean steps with interval, loss."""
    weighted = cube.assign(
        steps_sum=cube["steps"].astype(np.int64) * cube["tokens"],
        steps_sum2=cube["steps"].astype(np.int64) ** 2 * cube["tokens"],
    )
    rows = []
    for value, cells in weighted.groupby(dimension, sort=True):
        count = int(cells["tokens"].sum())
        steps = mean_interval(count, cells["steps_sum"].sum(), cells["steps_sum2"].sum())
        rows.append(
            {
                "value": value if isinstance(value, str) else int(str(value)),
                "tokens": count,
                "mean_steps": steps["mean"],
                "low": steps["low"],
                "high": steps["high"],
                "loss": float(cells["nll_sum"].sum()) / count,
            }
        )
    return rows


def sampled_steps(events: EventsFile, l_max: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """(steps ``(s,)``, nll by step ``(s, l_max + 1)``) of the tokens that were read after every step."""
    steps, losses = [np.zeros(0, dtype=np.int64)], [np.zeros((0, l_max + 1))]
    for piece in events.pieces(("steps", "nll_by_step")):
        held = piece.filter(piece["nll_by_step"].is_valid())
        taken = held["steps"].to_numpy().astype(np.int64)
        nll = np.full((len(taken), l_max + 1), np.nan)
        nll[np.arange(l_max + 1) <= taken[:, None]] = held["nll_by_step"].flatten().to_numpy()
        steps.append(taken)
        losses.append(nll)
    return np.concatenate(steps), np.concatenate(losses)


def interval_of(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and 95 % interval of some values."""
    return mean_interval(len(values), float(values.sum()), float((values**2).sum()))


def gain_by_step(steps: npt.NDArray[np.int64], nll: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """For each step k: nats after it minus nats after step 0, over the tokens that executed it. Below 0 is a gain."""
    rows = []
    for k in range(1, nll.shape[1]):
        gain = (nll[:, k] - nll[:, 0])[steps >= k]
        if len(gain):
            rows.append({"step": k, "tokens": len(gain), **interval_of(gain)})
    return rows


def gain_by_depth(steps: npt.NDArray[np.int64], nll: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """The same for each depth: over the tokens that halted after ``depth`` steps, what each step k was worth."""
    rows = []
    for depth in range(1, nll.shape[1]):
        halted = nll[steps == depth]
        for k in range(1, depth + 1):
            if len(halted):
                gain = halted[:, k] - halted[:, 0]
                rows.append({"depth": depth, "step": k, "tokens": len(halted), **interval_of(gain)})
    return rows


def oracle(steps: npt.NDArray[np.int64], nll: npt.NDArray[np.float64]) -> dict[str, Any] | None:
    """The best place to stop among the states that each token executed, and how close the router came to it.

    Returns:
        ``tokens``; ``loss`` as it is and ``oracle_loss``, had every token stopped where the truth was most likely;
        ``gap``, their difference with interval; ``mean_depth`` of that place; ``stopped_there``, the share of tokens
        that did. None where no token was read after every step.
    """
    if not len(steps):
        return None
    best = np.nanargmin(nll, axis=1)
    own, least = nll[np.arange(len(steps)), steps], np.nanmin(nll, axis=1)
    return {
        "tokens": len(steps),
        "loss": float(own.mean()),
        "oracle_loss": float(least.mean()),
        "gap": interval_of(own - least),
        "mean_depth": float(best.mean()),
        "stopped_there": float((best == steps).mean()),
    }


def calibration(events: EventsFile) -> dict[str, Any]:
    """How often the most likely token is the true one, by how likely it was held.

    Returns:
        ``bins``: rows of ``from``, ``tokens``, ``confidence`` and ``accuracy`` (means); ``expected_error``: the mean
        distance between the two, weighted by tokens (ECE, ten equal bins).
    """
    sums = np.zeros((3, CONFIDENCE_BINS))
    for piece in events.pieces(("confidence", "correct")):
        confidence = piece["confidence"].to_numpy(zero_copy_only=False).astype(np.float64)
        correct = piece["correct"].to_numpy(zero_copy_only=False).astype(np.float64)
        at = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        sums += [np.bincount(at, weights, CONFIDENCE_BINS) for weights in (np.ones_like(correct), confidence, correct)]
    rows = [
        {"from": index / CONFIDENCE_BINS, "tokens": int(n), "confidence": confidence / n, "accuracy": correct / n}
        for index, (n, confidence, correct) in enumerate(sums.T.tolist())
        if n
    ]
    error = float(np.abs(sums[1] - sums[2]).sum() / sums[0].sum())
    return {"bins": rows, "expected_error": error}


def by_difficulty(events: EventsFile, low: float, high: float) -> dict[str, Any]:
    """Whether the router spends its steps where they are needed: mean steps of the easiest and the hardest quarter.

    Args:
        low: tokens with at most this nll (nats) are predicted well.
        high: tokens with at least this nll are predicted badly.
    """
    sums = {"well": np.zeros(3), "badly": np.zeros(3)}
    for piece in events.pieces(("nll", "steps", "expected_steps")):
        nll = piece["nll"].to_numpy()
        steps = piece["steps"].to_numpy()
        expected = piece["expected_steps"].to_numpy(zero_copy_only=False).astype(np.float64)
        for name, chosen in (("well", nll <= low), ("badly", nll >= high)):
            sums[name] += [chosen.sum(), steps[chosen].sum(), expected[chosen].sum()]
    found: dict[str, Any] = {}
    for name, (count, steps_sum, expected_sum) in sums.items():
        found[f"{name}_predicted_mean_steps"] = steps_sum / max(count, 1)
        found[f"{name}_predicted_expected_steps"] = expected_sum / max(count, 1)
    return found | {"well_predicted_nll_below": low, "badly_predicted_nll_above": high}


def alarms(histogram: npt.NDArray[np.float64], *, l_max: int) -> list[str]:
    """Sentences about a router that no longer chooses; none for methods without latent steps."""
    found = []
    same = int(histogram.argmax())
    if l_max and histogram[same] >= DEAD_SHARE:
        where = {0: "no token takes a step", l_max: "every token takes all steps"}.get(same, f"all take {same}")
        found.append(f"collapsed: {histogram[same]:.1%} of the tokens take {same} of {l_max} latent steps ({where})")
    return found
