"""The optimizer's parameter groups: what decays, and what trains at a multiple of the run's rate."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from haltscale.model import LanguageModel, parameter_scales
from haltscale.platform.config import RunConfig

EPSILON = 1e-8
"""AdamW's."""
RATE_SCALE = "rate_scale"
"""Name, in a group, of its multiple of the run's learning rate."""


def parameter_groups(model: LanguageModel, run: RunConfig) -> list[dict[str, Any]]:
    """Groups for AdamW, which decays matrices only. Under the standard parametrisation: matrices, and all else."""
    scales = parameter_scales(model)
    groups: dict[tuple[Any, ...], list[Any]] = {(True, 1.0, 1.0): [], (False, 1.0, 1.0): []}
    for name, parameter in model.named_parameters():
        scale = scales[name]
        groups.setdefault((parameter.ndim >= 2, scale.rate, scale.epsilon), []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": run.weight_decay / rate if decays else 0.0,  # AdamW multiplies it by the rate
            "eps": EPSILON * epsilon,
            RATE_SCALE: rate,
        }
        for (decays, rate, epsilon), members in groups.items()
        if members
    ]


def set_rate(groups: Iterable[MutableMapping[str, Any]], rate: float) -> None:
    """Give each group its multiple of a step's learning rate."""
    for group in groups:
        group["lr"] = rate * group.get(RATE_SCALE, 1.0)
