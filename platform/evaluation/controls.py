"""Does the router know anything, and what would more or less thinking cost? Other halting on the same weights.

Controls: the split is read again with the number of steps dictated, equally many in every window as the router took
there: dealt evenly (fixed), dealt at random to other tokens (shuffled), and all steps everywhere (full). Gates and
masses stay the router's; what is destroyed is where it spends. If the learned halting does no better than these, it has
learned a budget and not a choice.

Dial: the split is read at other tau and at lower maximum depth, which gives loss against inference FLOPs for one
checkpoint.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from haltscale.model import Flops, LanguageModel, probing
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.evaluation.halting_summary import interval_of, mean_interval, oracle
from haltscale.platform.evaluation.held_out import STATES_READ, Tally, batches, read_batch

TAUS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The dial's values of tau, beside the model's own. At 1 nothing is thought."""


def first_tokens(documents: Sequence[HeldOutDocument], tokens: int | None) -> list[HeldOutDocument]:
    """Whole documents from the beginning until they hold so many tokens (all of them for None)."""
    if tokens is None:
        return list(documents)
    held = itertools.accumulate(len(document.tokens) - 1 for document in documents)
    needed = 1 + sum(total < tokens for total in held)
    return list(documents[:needed])


class Difference:
    """Nats of a control minus nats of the learned halting, token by token."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, nll: npt.NDArray[np.float32], learned: npt.NDArray[np.float32]) -> None:
        """Take some tokens in."""
        gap = nll.astype(np.float64) - learned
        self.count += len(gap)
        self.total += float(gap.sum())
        self.squares += float((gap * gap).sum())


def control(
    model: LanguageModel, documents: Sequence[HeldOutDocument], *, context: int, seed: int = 0, batch_rows: int = 16
) -> dict[str, Any] | None:
    """The learned halting against its controls.

    Args:
        seed: of the shuffling.

    Returns:
        ``arms``: rows of ``name`` (learned, shuffled, fixed, full), ``loss`` (nats), ``mean_steps``,
        ``flops_realised`` per token, and ``minus_learned``, the paired difference in nats with a 95 % interval: above 0
        the router is better. ``oracle``: at full depth, of some tokens, the best place to stop against the last state;
        with ``rank_correlation`` between the router's steps and the best depth, and the learned halting's
        ``router_loss`` and ``router_gap`` there. None for methods without a router.
    """
    loop = probing.latent_loop_of(model)
    if loop is None or not probing.has_router(model):
        return None
    model.eval()
    stream = torch.Generator().manual_seed(seed)
    share = min(1.0, STATES_READ / max(sum(len(document.tokens) - 1 for document in documents), 1))
    tallies = {name: Tally() for name in ("learned", "shuffled", "fixed", "full")}
    gaps = {name: Difference() for name in tallies}
    best: list[tuple[npt.NDArray[Any], ...]] = []
    seen = 0
    for batch in batches(documents, context, batch_rows):
        reading, learned = read_batch(model, batch)
        own, valid = reading.trace.steps_BT, reading.trace.valid_BT
        all_steps = torch.full_like(own, loop.rules.l_max).long() * valid
        arms = {
            "learned": learned,
            "shuffled": read_batch(model, batch, steps_BT=probing.shuffled_steps(own, valid, stream))[1],
            "fixed": read_batch(model, batch, steps_BT=probing.spread_steps(own, valid))[1],
            "full": read_batch(model, batch, steps_BT=all_steps, first=seen, by_step=share)[1],
        }
        for name, events in arms.items():
            tallies[name].add(events)
            gaps[name].add(events.nll, learned.nll)
        full = arms["full"]
        best.append((full.nll_by_step, learned.steps[full.sampled], learned.nll[full.sampled]))
        seen += len(learned.nll)

    rows = [_arm(name, tally, gaps[name]) for name, tally in tallies.items()]
    nll, steps, router = (np.concatenate(part) for part in zip(*best, strict=True))
    found = oracle(np.full(len(nll), loop.rules.l_max), nll.astype(np.float64))
    if found is not None:
        found["router_loss"] = float(router.mean())
        found["router_gap"] = interval_of(router.astype(np.float64) - nll.min(1))
        found["rank_correlation"] = _rank_correlation(steps, nll.argmin(1))
    return {"arms": rows, "oracle": found}


def _arm(name: str, tally: Tally, gap: Difference) -> dict[str, Any]:
    row = tally.row(text_bytes=1)
    return {
        "name": name,
        **{key: row[key] for key in ("loss", "loss_standard_error", "mean_steps", "tokens_evaluated")},
        "flops_realised": tally.flops.realised / tally.tokens,
        "minus_learned": None if name == "learned" else mean_interval(gap.count, gap.total, gap.squares),
    }


def _rank_correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float | None:
    """Spearman's; None where one of the two never varies."""
    if len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2:
        return None
    return float(pd.Series(a.astype(np.float64)).corr(pd.Series(b.astype(np.float64)), method="spearman"))


def dial(
    model: LanguageModel,
    documents: Sequence[HeldOutDocument],
    *,
    context: int,
    taus: Sequence[float] = TAUS,
    batch_rows: int = 16,
) -> list[dict[str, Any]]:
    """Loss against inference FLOPs of one checkpoint.

    Returns:
        Rows of ``dial`` ("tau" or "l_max"), ``value``, ``own`` (whether the model was trained with it), ``loss`` with
        ``loss_standard_error`` (nats), ``mean_steps``, ``flops_realised`` and ``flops_executed`` per token, measured
        ``seconds`` per token, ``tokens_evaluated``. Nothing for methods without a router.
    """
    loop = probing.latent_loop_of(model)
    if loop is None or not probing.has_router(model):
        return []
    rules = loop.rules
    settings = [("tau", tau, tau == rules.tau) for tau in sorted({*taus, rules.tau})]
    settings += [("l_max", depth, depth == rules.l_max) for depth in range(rules.l_max + 1)]
    rows = []
    for name, value, own in settings:
        with probing.rules_changed(model, **{name: value}):
            rows.append({"dial": name, "value": value, "own": own, **_timed(model, documents, context, batch_rows)})
    return rows


def _timed(model: LanguageModel, documents: Sequence[HeldOutDocument], context: int, batch_rows: int) -> dict[str, Any]:
    model.eval()
    tally, seconds = Tally(), 0.0
    for batch in batches(documents, context, batch_rows):
        began = time.perf_counter()
        _, events = read_batch(model, batch)  # the events come to the CPU: the device has done its work
        seconds += time.perf_counter() - began
        tally.add(events)
    row = tally.row(text_bytes=1)
    per_token: Flops = tally.flops * (1 / tally.tokens)
    return {
        **{key: row[key] for key in ("loss", "loss_standard_error", "mean_steps", "tokens_evaluated")},
        "flops_realised": per_token.realised,
        "flops_executed": per_token.executed,
        "seconds": seconds / tally.tokens,
    }
