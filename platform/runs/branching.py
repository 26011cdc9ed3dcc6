"""Several budgets from one WSD run: a run may begin in the stable phase of another one.

Where the warm-up is in tokens, WSD runs that differ in their budget alone (tokens, or realised FLOPs) take the same
steps, to the last bit, until the first of them decays. So nothing of a branch is in a run's key: it is only a shorter
way to the same result (by as many workers at the same ZeRO stage; otherwise the same but for rounding, as after any
resumption). A method whose steps depend on the share of the budget that is spent has no branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from haltscale.platform.checkpoints import CheckpointError, Checkpoints, Saved
from haltscale.platform.config import RunConfig
from haltscale.platform.identity import canonical_json
from haltscale.platform.schedule import can_branch, is_stable
from haltscale.platform.store import RunStore
from haltscale.platform.training.progress import Progress

Key = TypeVar("Key")
BUDGETS = ("tokens", "flops")


def family(identity: Mapping[str, Any]) -> str:
    """What runs have in common that differ in their budget alone; budgets in tokens and in FLOPs are two families."""
    own = {name: value for name, value in identity.items() if name not in BUDGETS}
    return canonical_json({**own, "budget": "tokens" if identity.get("flops") is None else "flops"})


def shortest_of_families(runs: Iterable[tuple[Key, RunConfig, Mapping[str, Any]]]) -> set[Key]:
    """The runs that need not wait: of each family, the one with the smallest budget; the others begin in it.

    Args:
        runs: keys, runs and their identities.
    """
    first: dict[str, tuple[float, Key]] = {}
    free = set()
    for key, run, identity in runs:
        if not can_branch(run):
            free.add(key)
            continue
        kin, budget = family(identity), run.tokens if run.flops is None else run.flops
        if kin not in first or budget < first[kin][0]:
            first[kin] = (budget, key)
    return free | {key for _, key in first.values()}


def branch_point(
    checkpoints: Checkpoints, store: RunStore, study: str, key: str, *, rank: int = 0, world: int = 1
) -> tuple[str, Saved] | None:
    """The key of the run to begin in, and its checkpoint: the last intact one in the stable phase of both.

    None where the run has checkpoints of its own, or the study no such run. All ranks call it.
    """
    found: list[tuple[str, int] | None] = [None]
    if rank == 0 and not checkpoints.complete():
        found = [_latest(store, study, key)]
    if world > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return None
    parent, step = found[0]
    return parent, Checkpoints(store, study, parent, rank=rank, world=world).open(step, verify=False)


def _latest(store: RunStore, study: str, key: str) -> tuple[str, int] | None:
    views = store.views(study, store.present(study))
    mine = views[key].spec["identity"]
    own = RunConfig.from_identity(mine)
    candidates = []
    for other, view in views.items():
        identity = view.spec.get("identity")
        if not can_branch(own) or other == key or not identity or family(identity) != family(mine):
            continue
        saved = Checkpoints(store, study, other)
        candidates += [(step, other, saved, RunConfig.from_identity(identity)) for step in saved.complete()]
    for step, other, saved, run in sorted(candidates, key=lambda each: each[:2], reverse=True):
        try:
            before = Progress(**saved.open(step, verify=False).progress).before_last
            if is_stable(own, before) and is_stable(run, before):
                saved.open(step)
                return other, step
        except CheckpointError:
            continue
    return None
