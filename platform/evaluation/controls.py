"""Controls and compute dial: other halting on the same weights, at equal mean steps or at other depths.

Controls (docs/controls.md): the split is read again with another source of steps, at the router's mean number of them.

- ``fixed``: spread evenly, and ``shuffled``: given to other tokens at random, equally many in every window.
- ``posthoc-*``: a training-free rule (:mod:`haltscale.model.posthoc`). Its threshold is tuned on other text to the
  steps that the router takes there, and then moved, by counts of steps alone, to the router's mean on this text.
- ``oracle``: the truth decides. The best places to stop at full depth, at a price for each step that brings their mean
  to the router's.
- ``none`` and ``full``: no step and all steps everywhere, so not at equal steps: what the latent steps are worth to
  these weights.

Gates and readout stay the router's. If the learned halting does no better than these at equal steps, it has learned a
budget and not a choice.

Dial: the split is read at other tau and at lower maximum depth, which gives loss against inference FLOPs for one
checkpoint.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from haltscale.model import Flops, LanguageModel, ledger, probing
from haltscale.model.posthoc import Score, Threshold
from haltscale.platform.analysis.estimates import Estimate
from haltscale.platform.analysis.paired import paired_difference
from haltscale.platform.corpora.corpus import HeldOutDocument
from haltscale.platform.evaluation.halting_summary import interval_of, oracle
from haltscale.platform.evaluation.held_out import Batch, Tally, TokenEvents, batches, read_batch

TAUS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The dial's values of tau, beside the model's own. At 1 no latent step is taken."""


def first_tokens(documents: Sequence[HeldOutDocument], tokens: int | None) -> list[HeldOutDocument]:
    """Whole documents from the beginning until they hold so many tokens (all of them for None)."""
    if tokens is None:
        return list(documents)
    held = itertools.accumulate(len(document.tokens) - 1 for document in documents)
    needed = 1 + sum(total < tokens for total in held)
    return list(documents[:needed])


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents, and how they are read."""

    documents: Sequence[HeldOutDocument]
    context: int
    batch_rows: int = 16

    def batches(self) -> Iterator[Batch]:
        return batches(self.documents, self.context, self.batch_rows)


@dataclass
class Arm:
    """What one way of halting made of a text."""

    tally: Tally = field(default_factory=Tally)
    sums: list[npt.NDArray[np.float64]] = field(default_factory=list)
    """Of every batch: document, nats of each of its tokens."""
    head_flops: float = 0.0
    """Of a rule that asks the head."""
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, events: TokenEvents) -> None:
        """Take a batch in."""
        self.tally.add(events)
        self.sums.append(np.stack([events.document.astype(np.float64), events.nll.astype(np.float64)]))

    def by_document(self) -> pd.DataFrame:
        """``tokens`` and ``nats`` of each document."""
        document, nats = np.concatenate(self.sums, axis=1)
        tokens = np.bincount(document.astype(np.int64))
        held = np.flatnonzero(tokens)
        totals = np.bincount(document.astype(np.int64), weights=nats)
        return pd.DataFrame({"tokens": tokens[held], "nats": totals[held]}, index=held)

    @property
    def mean_steps(self) -> float:
        return float(self.tally.row(text_bytes=1)["mean_steps"])


def control(
    model: LanguageModel,
    documents: Sequence[HeldOutDocument],
    *,
    context: int,
    tuning: Sequence[HeldOutDocument] = (),
    seed: int = 0,
    batch_rows: int = 16,
) -> dict[str, Any] | None:
    """The learned halting against its controls.

    Args:
        documents: read by every arm.
        tuning: other text, by which the thresholds are tuned; without it, they are by ``documents``.
        seed: of the shuffling, and of the bootstrap.

    Returns:
        ``arms``: rows of ``name`` (learned, shuffled, fixed, posthoc-change, posthoc-divergence, posthoc-confidence,
        oracle, none, full), ``loss`` (nats), ``mean_steps``, ``flops_realised`` per token, ``nats_by_document``, and
        ``minus_learned``, the paired difference in nats with a 95 % interval over documents (no ends for a single
        one): above 0 the router is better; of posthoc arms also ``threshold``, and ``tuned_mean_steps``, what the
        threshold of the tuning text took here. ``tokens_by_document``. ``oracle``: at full depth, the best place to
        stop against the last state; with ``rank_correlation`` between the router's steps and the best depth, and the
        learned halting's ``router_loss`` and ``router_gap`` there. None for methods without a router that halts step by
        step.
    """
    loop = probing.latent_loop_of(model)
    if loop is None or not probing.has_router(model):
        return None
    model.eval()
    text = Text(documents=documents, context=context, batch_rows=batch_rows)
    stream = torch.Generator().manual_seed(seed)
    arms = {name: Arm() for name in ("learned", "shuffled", "fixed")}
    none, full = Arm(), Arm()
    learned_steps, learned_nll, by_step = [], [], []
    for batch in text.batches():
        reading, learned = read_batch(model, batch)
        own, valid = reading.trace.steps_BT, reading.trace.valid_BT
        shuffled, level = probing.shuffled_steps(own, valid, stream), probing.spread_steps(own, valid)
        arms["learned"].add(learned)
        arms["shuffled"].add(read_batch(model, batch, steps_BT=shuffled)[1])
        arms["fixed"].add(read_batch(model, batch, steps_BT=level)[1])
        none.add(read_batch(model, batch, steps_BT=torch.zeros_like(own).long())[1])
        all_steps = torch.full_like(own, loop.rules.l_max).long() * valid
        events = read_batch(model, batch, steps_BT=all_steps, by_step=1.0)[1]
        full.add(events)
        learned_steps.append(learned.steps)
        learned_nll.append(learned.nll)
        by_step.append(events.nll_by_step)
    nll, router, steps = (np.concatenate(parts) for parts in (by_step, learned_nll, learned_steps))
    wanted = float(steps.mean())
    if loop.rules.l_max:
        other = Text(documents=tuning, context=context, batch_rows=batch_rows) if tuning else text
        for score in Score:
            arms[f"posthoc-{score}"] = _post_hoc(model, score, text, other, wanted)
        arms["oracle"] = _dictated(
            model, text, best_steps(nll.astype(np.float64), int(steps.sum(dtype=np.int64)), seed)
        )
    arms |= {"none": none, "full": full}

    found = oracle(np.full(len(nll), loop.rules.l_max), nll.astype(np.float64))
    if found is not None:
        found["router_loss"] = float(router.mean())
        found["router_gap"] = interval_of(router.astype(np.float64) - nll.min(1))
        found["rank_correlation"] = _rank_correlation(steps, nll.argmin(1))
    reference = arms["learned"].by_document()
    rows = [_row(name, arm, reference, seed) for name, arm in arms.items()]
    return {"arms": rows, "tokens_by_document": reference["tokens"].tolist(), "oracle": found}


def _row(name: str, arm: Arm, reference: pd.DataFrame, seed: int) -> dict[str, Any]:
    row, sums = arm.tally.row(text_bytes=1), arm.by_document()
    gap = paired_difference([sums], [reference], seed=seed)
    mean = float((sums["nats"].sum() - reference["nats"].sum()) / reference["tokens"].sum())
    ends = {"low": gap.low, "high": gap.high} if isinstance(gap, Estimate) else {"low": None, "high": None}
    return {
        "name": name,
        **{key: row[key] for key in ("loss", "loss_standard_error", "mean_steps", "tokens_evaluated")},
        "flops_realised": (arm.tally.flops.realised + arm.head_flops) / arm.tally.tokens,
        **arm.about,
        "minus_learned": None if name == "learned" else {"mean": mean, **ends, "documents": len(sums)},
        "nats_by_document": [round(nats, 4) for nats in sums["nats"].tolist()],
    }


# ---- thresholds -----------------------------------------------------------------------------------------------------

TRIES = 12
NEAR = 0.003
"""Mean steps that differ by less than this, relatively, count as equal."""


def _read(model: LanguageModel, text: Text, rule: Threshold) -> Arm:
    arm, shape = Arm(), model.config.shape
    loop = probing.latent_loop_of(model)
    assert loop is not None
    head_rows = 0
    for batch in text.batches():
        reading, events = read_batch(model, batch, goes_on=rule)
        head_rows += sum(reading.trace.counts.rows[: loop.rules.l_max])
        arm.add(events)
    if rule.score.reads_head:
        arm.head_flops = ledger.head_flops(shape, model.config.vocab_size, head_rows)
    return arm


def _scores(model: LanguageModel, text: Text, score: Score) -> npt.NDArray[np.float32]:
    """``(n, l_max)`` scores of all tokens at full depth."""
    parts = []
    for batch in text.batches():
        rule = Threshold(model, score, -np.inf, seen=[])
        valid_N = read_batch(model, batch, goes_on=rule)[0].trace.valid_BT.flatten().cpu()
        assert rule.seen is not None
        parts.append(torch.stack([found[valid_N] if k == 0 else found for k, found in rule.seen], dim=1).numpy())
    return np.concatenate(parts)


def threshold_for(scores: npt.NDArray[np.float32], mean_steps: float) -> float:
    """The threshold at which tokens with these ``(n, l_max)`` scores take so many steps on average, or as near as their
    ties allow."""
    if not 0 < mean_steps < scores.shape[1]:
        return np.inf if mean_steps <= 0 else -np.inf
    values = np.concatenate([[-np.inf], np.unique(scores[np.isfinite(scores)])])

    def mean(index: int) -> float:
        return float(np.logical_and.accumulate(scores > values[index], axis=1).sum(1).mean())

    low, high = 0, len(values) - 1  # the mean falls as the threshold rises
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) > mean_steps else (low, middle)
    return float(values[min((low, high), key=lambda index: abs(mean(index) - mean_steps))])


def _at_mean(
    read: Callable[[float], Arm], scores: npt.NDArray[np.float32], mean_steps: float, first: float | None = None
) -> tuple[float, Arm, Arm]:
    """(threshold, its reading, the first reading) whose mean steps are nearest to those wanted.

    Scores at full depth say where the threshold should lie; since other tokens' states are missing once they halt, it
    is then corrected by what was really taken.

    Args:
        first: a threshold to begin with.
    """
    aim = mean_steps
    tried: list[tuple[float, float, Arm]] = []  # by the mean that the scores led to expect: a scale for interpolation
    for attempt in range(TRIES):
        value = first if attempt == 0 and first is not None else threshold_for(scores, aim)
        expected = float(np.logical_and.accumulate(scores > value, axis=1).sum(1).mean())
        if value in [known for _, known, _ in tried]:
            break
        arm = read(value)
        tried.append((expected, value, arm))
        if abs(arm.mean_steps - mean_steps) <= NEAR * mean_steps:
            break
        above = min(((x, one.mean_steps) for x, _, one in tried if one.mean_steps > mean_steps), default=None)
        below = max(((x, one.mean_steps) for x, _, one in tried if one.mean_steps < mean_steps), default=None)
        if above is None or below is None or above[0] <= below[0]:
            aim = min(max(expected + mean_steps - arm.mean_steps, 0.0), float(scores.shape[1]))
            continue
        share = (mean_steps - below[1]) / (above[1] - below[1])
        aim = below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0])
    _, value, nearest = min(tried, key=lambda one: abs(one[2].mean_steps - mean_steps))
    return value, nearest, tried[0][2]


def _post_hoc(model: LanguageModel, score: Score, text: Text, other: Text, mean_steps: float) -> Arm:
    """The text read under a threshold, tuned to the router's steps on other text and moved to its mean on this one."""
    scores = _scores(model, other, score)
    first: float | None = None
    if other is not text:
        router = Arm()
        for batch in other.batches():
            router.add(read_batch(model, batch)[1])
        first, _, _ = _at_mean(
            lambda value: _read(model, other, Threshold(model, score, value)), scores, router.mean_steps
        )
    value, arm, as_tuned = _at_mean(
        lambda value: _read(model, text, Threshold(model, score, value)), scores, mean_steps, first
    )
    arm.about = {"threshold": value if np.isfinite(value) else None, "tuned_mean_steps": as_tuned.mean_steps}
    return arm


# ---- the oracle -----------------------------------------------------------------------------------------------------


def best_steps(nll: npt.NDArray[np.float64], total: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """``(n,)`` latent steps with the lowest sum of nats among those with this sum of steps.

    A price for each step is looked for at which the best places to stop have that sum; tokens that are indifferent at
    this price are chosen among at random.

    Args:
        nll: ``(n, l_max + 1)`` nats of each token had it stopped after each step.
        total: the sum of steps.
    """
    k = np.arange(nll.shape[1])

    def at(price: float) -> npt.NDArray[np.int64]:
        return np.asarray((nll + price * k).argmin(1))

    bound = 1.0 + float(np.ptp(nll))
    low, high = -bound, bound  # the sum falls as the price rises: all steps at the low end, none at the high end
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > total else (low, middle)
    more, fewer = at(low), at(high)
    missing = total - int(fewer.sum())
    steps = fewer.copy()
    for index in np.random.default_rng(seed).permutation(np.flatnonzero(more != fewer)):
        added = min(int(more[index] - fewer[index]), missing)
        steps[index] += added
        missing -= added
    return steps


def _dictated(model: LanguageModel, text: Text, steps: npt.NDArray[np.int64]) -> Arm:
    """The text read with the steps of each token given, in reading order."""
    arm, done = Arm(), 0
    device = next(model.parameters()).device
    for batch in text.batches():
        valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        given = np.zeros(valid.shape, dtype=np.int64)
        count = int(valid.sum())
        given[valid] = steps[done : done + count]
        done += count
        arm.add(read_batch(model, batch, steps_BT=torch.as_tensor(given, device=device))[1])
    return arm


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
