"""A run as a row: what the terminal, the analysis and the dashboard read of its documents, once for all of them.

A document is whatever lies in the store. Nothing here raises for one that is odd: a value of another type than it
should have is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from haltscale.platform.arms import OLD_CONTROLS, arm, is_control
from haltscale.platform.identity import digest
from haltscale.platform.store import RunView

BLOCKS = ("attention", "mlp")
"""Groups of parameters that all lie inside of the blocks."""
RECURRENT = (*BLOCKS, "norms")
"""Groups that a latent step uses again; the rest (embedding, head, router) is used once per token."""
MIDDLE_RECURS = ("mor",)
"""Methods whose first and last block run once per token, and only those between them again: for records from before
they had ``parameters_recurrent``."""
UNROUTED = ("vanilla", "looped", "pause", "ponder", "ponder2", "fixed")
"""Methods without a router: every token takes as many steps. For documents from before they had ``routed``."""
RESULTS = (
    *("tokens", "loss", "loss_standard_error", "perplexity", "bits_per_byte", "mean_steps", "expected_steps"),
    *("passes_per_token", "flops_realised", "flops_executed", "flops_paper", "wall_seconds", "tokens_per_second"),
)
"""Figures of a record that are columns under their own name."""


def number(value: object) -> float:
    """A finite number, or NaN for anything else (null, text, a list, infinity, an integer beyond a float)."""
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Reals too
        return math.nan
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def words(value: object) -> str:
    """Text, or an empty string for a missing value."""
    return "" if value is None else str(value)


def figure(value: object) -> float | None:
    """A finite number as it is, or None."""
    return None if math.isnan(number(value)) else value  # type: ignore[return-value]


def row(view: RunView) -> dict[str, Any]:
    """One run: its names and state, every field of its identity and every option, and its figures where it is finished.

    Returns:
        Beside the fields of the identity under their own names (``tokens`` is what the run trained on, what it was
        planned for is ``planned_tokens``): ``budget`` (realised FLOPs that the study planned for it, if it did),
        ``configuration`` (a digest of the identity without the seed), ``setting`` (:func:`setting`),
        ``parameters``, ``parameters_recurrent`` and
        ``parameters_once`` (parameters that are used per pass, and per token), :data:`RESULTS`, ``easy_steps`` and
        ``hard_steps``; ``recipe`` (where its settings are from: a
        ``RecipeSource``, or empty where nothing was tuned) and ``recipe_at_end`` (what was best at an end of what was
        tried); ``branched_from`` (key of the run in which it began) and ``shared_flops`` (its realised FLOPs that were
        trained there); of text whose need is known ``needy_accuracy``, ``needy_steps`` and ``need_rank_correlation``;
        and ``error``. Missing figures are None.
    """
    record = mapping(view.record)
    identity = mapping(record.get("identity")) or mapping(view.spec.get("identity"))
    halting, groups = mapping(record.get("halting")), mapping(record.get("parameters"))
    recurrent = number(record.get("parameters_recurrent"))
    recurrent = recurrent_parameters(groups, identity) if math.isnan(recurrent) else recurrent
    whole = sum(number(count) for count in groups.values()) if groups else math.nan
    return {
        "run": view.label,
        "key": view.key,
        "state": str(view.state),
        "method": arm(identity) or None,
        "size": scalar(identity.get("size")),
        "seed": scalar(identity.get("seed")),
        **{str(n): scalar(value) for n, value in mapping(identity.get("options")).items() if n != "steps_schedule"},
        "role": words(view.spec.get("role")) or "comparison",
        **recipe_figures(record or view.spec),
        "parameters": figure(record.get("parameters_total")),
        "parameters_recurrent": figure(recurrent),
        "parameters_once": figure(whole - recurrent),
        **{name: figure(record.get(name)) for name in RESULTS},
        "easy_steps": figure(halting.get("well_predicted_mean_steps")),
        "hard_steps": figure(halting.get("badly_predicted_mean_steps")),
        **need_figures(mapping(record.get("need"))),
        **branch_figures(record),
        "error": words(mapping(view.status).get("error")) or view.problem,
        "budget": figure(identity.get("flops")),
        "planned_tokens": figure(identity.get("tokens")) or None,
        "configuration": configuration(identity),
        "setting": setting(identity),
        **rest_of(identity),
    }


def routed(document: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a router of the run's own chooses the steps of its tokens: not in a control. As its record or spec says,
    since the method may be another package's."""
    name = arm(identity)
    known = document.get("routed")
    return not (is_control(name) or name in OLD_CONTROLS) and (
        known if isinstance(known, bool) else name.partition("/")[0] not in UNROUTED
    )


def need_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation's ``need`` (``NeedTally.result``); None where the text's need is not known."""
    needy = mapping(found.get("needy"))
    return {
        "needy_accuracy": figure(needy.get("accuracy")),
        "needy_steps": figure(needy.get("mean_steps")),
        "need_rank_correlation": figure(found.get("rank_correlation")),
    }


def branch_figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """``branched_from`` and ``shared_flops`` of a record; empty and None where the run began at its own start."""
    attempts = record.get("attempts")
    first = mapping(attempts[0]) if isinstance(attempts, list) and attempts else {}
    parent = first.get("parent")
    if isinstance(parent, str):  # as it was written before the FLOPs were
        return {"branched_from": parent, "shared_flops": None}
    return {"branched_from": words(mapping(parent).get("key")), "shared_flops": figure(mapping(parent).get("flops"))}


def recipe_figures(document: Mapping[str, Any]) -> dict[str, str]:
    """``recipe`` and ``recipe_at_end`` of a record or spec; empty where nothing was tuned."""
    recipe = mapping(document.get("recipe"))
    at_end = recipe.get("at_end")
    return {
        "recipe": words(recipe.get("source")),
        "recipe_at_end": ", ".join(map(str, at_end)) if isinstance(at_end, list) else "",
    }


SHOWN_ELSEWHERE = ("method", "size", "seed", "options", "tokens", "flops", "schema", "shape", "semantics")


def rest_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an identity that have no column of another name."""
    return {str(name): scalar(value) for name, value in identity.items() if name not in SHOWN_ELSEWHERE}


def scalar(value: object) -> Any:
    """A value that can stand in a column: a finite number, text, truth, or the text of anything else; None for null."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return figure(value)
    return str(value)


def configuration(identity: Mapping[str, Any]) -> str | None:
    """A digest of an identity without its seed: equal where runs differ in their seed only. None without an identity
    that has one."""
    if not identity:
        return None
    try:
        return digest({name: value for name, value in identity.items() if name != "seed"})
    except (TypeError, ValueError, RecursionError):
        return None


POINT = ("size", "seed", "tokens", "flops", "learning_rate", "warmup_tokens")
"""Fields of an identity that place a run in a design: the rate follows from the size where it was tuned."""
REPLAYED = ("steps_schedule", "steps_seed")
"""Options that a replay control gets from its subject, run by run."""


def setting(identity: Mapping[str, Any]) -> str | None:
    """A digest of what an arm was set to: equal where runs differ in their place in the design (size, budget, seed,
    learning rate) only. None without an identity that has one."""
    if not identity:
        return None
    dropped = (*REPLAYED, "steps") if arm(identity) in OLD_CONTROLS else REPLAYED
    options = {name: value for name, value in mapping(identity.get("options")).items() if name not in dropped}
    try:
        return digest(
            {name: v for name, v in identity.items() if name not in (*POINT, "options")} | {"options": options}
        )
    except (TypeError, ValueError, RecursionError):
        return None


def recurrent_parameters(groups: Mapping[str, Any], identity: Mapping[str, Any]) -> float:
    """Parameters that each pass of a token uses, of a record's ``parameters`` by group; NaN where they do not say.

    For most methods that is the whole stack. Where only the blocks between the first and the last recur, these count,
    and neither does the norm behind the stack.
    """
    if not groups:
        return math.nan
    blocks = sum(number(groups.get(name)) for name in BLOCKS)
    norms = number(groups.get("norms"))
    if identity.get("method") not in MIDDLE_RECURS:
        return blocks + norms
    layers = layer_count(groups, identity)
    if math.isnan(layers) or layers < 3:
        return math.nan
    return blocks * (layers - 2) / layers + norms * 2 * (layers - 2) / (2 * layers + 1)


def layer_count(groups: Mapping[str, Any], identity: Mapping[str, Any]) -> float:
    """Blocks of a stack, from a record's ``parameters`` by group; NaN where they do not tell.

    A block has two norms of d and, where each query head has keys of its own (every size of the ladder), attention
    matrices of 4 d^2; one norm stands behind them all. An imported model's shape stands in its identity.
    """
    shape = mapping(identity.get("shape")) or mapping(mapping(identity.get("init_from")).get("shape"))
    if shape:
        return number(shape.get("layers"))
    norms, attention = number(groups.get("norms")), number(groups.get("attention"))
    for layers in range(1, 1_000):
        d, rest = divmod(norms, 2 * layers + 1)
        if rest == 0 and 4 * layers * d * d == attention:
            return float(layers)
    return math.nan


def rows(views: Iterable[RunView]) -> list[dict[str, Any]]:
    """A row for each run."""
    return [row(view) for view in views]
