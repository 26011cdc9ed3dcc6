"""Arms: what a comparison sets side by side. A method, and, where its steps are replayed, what they are replayed as.

A replay control (docs/controls.md) is a run of its subject's method, so that the method alone would pool it with its
subject; ``adaptive/shuffled`` is an arm of its own. The methods ``fixed`` and ``shuffled`` served as controls before
there was replay. They read another state, or train a router of their own, so that they differ from a router in more
than where the steps are: records made with them are shown as what they are, and no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

REPLAYS = ("shuffled", "fixed")
"""What a run's steps may be replayed as (``haltscale.model.StepsFrom``, which code that only reads records need not
import)."""
OLD_CONTROLS = ("fixed", "shuffled")
INJECTED = "injected"
"""The twin of looped that has its embedding injected again: a looped baseline without it is called weak
(docs/methods.md). Other methods stay one arm, with or without it."""


def arm(identity: Mapping[str, Any]) -> str:
    """The arm of a run, from its identity; empty where there is none."""
    method, options = identity.get("method"), identity.get("options")
    if not isinstance(method, str):
        return ""
    chosen = options if isinstance(options, Mapping) else {}
    if method == "looped" and chosen.get("injection") not in (None, "none"):
        return f"{method}/{INJECTED}"
    source = chosen.get("steps_from")
    return f"{method}/{source}" if source in REPLAYS else str(method)


def is_control(name: str) -> bool:
    """Whether an arm is a replay control of another one."""
    return name.partition("/")[2] in REPLAYS


def controls_of(name: str, arms: Collection[str]) -> list[str]:
    """Of the arms, those that are replay controls of one."""
    return [f"{name}/{source}" for source in REPLAYS if f"{name}/{source}" in arms]


def shown(name: str) -> str:
    """How tables of controls name an arm."""
    return f"{name} (old control)" if name in OLD_CONTROLS else name
